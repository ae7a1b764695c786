"""Training of a decoder: what of it is trained, the loop, and checkpoints from which a training goes on exactly.

NextFlow sec. 3.3: a UNet is trained as a whole, a transformer by LoRA, the conditioner always; a first stage at the
resolution of the codes, a second one at twice that (`upscale` of the conditioner). Batches, noise and timesteps follow
from the seed and the number of the batch, so a resumed run repeats an undisturbed one bit for bit.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.utils.files import write_atomically

from .conditioning import NextFlowConditioner
from .decoding import NextFlowDecoderMixin
from .denoising import LORA_TARGETS, DecoderLoss, encode_pixels
from .pipelines import (
    NextFlowDecoderPipeline,
    NextFlowFluxDecoderPipeline,
    NextFlowQwenImageDecoderPipeline,
    NextFlowXLDecoderPipeline,
)
from .training_data import condition_of

STOCK = {  # beginnings of the names of stock pipelines over the same components
    "StableDiffusionXL": NextFlowXLDecoderPipeline,
    "StableDiffusion": NextFlowDecoderPipeline,
    "Flux": NextFlowFluxDecoderPipeline,
    "QwenImage": NextFlowQwenImageDecoderPipeline,
}
STOCK_ENDINGS = ("Pipeline", "Img2ImgPipeline")
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER = "default"


@dataclass
class DecoderTrainingArguments:
    """Under the names of diffusers' training scripts."""

    output_dir: str = field(
        metadata={"help": "gets checkpoints, log.jsonl, validation pictures and the result", "aliases": ["--output"]}
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "of LoRA adapters; default: the whole UNet is trained", "aliases": ["--lora_r"]},
    )
    max_train_steps: int = field(default=15_000, metadata={"help": "optimizer steps"})
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-4
    lr_scheduler: str = field(default="constant", metadata={"help": "of diffusers: constant, linear, cosine, ..."})
    lr_warmup_steps: int = 500
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16"})
    use_ema: bool = field(default=False, metadata={"help": "keep a moving average of a whole UNet, which is saved"})
    ema_decay: float = field(default=0.9999, metadata={"help": "reached by (1 + step) / (10 + step)"})
    guidance_scale: float = field(default=3.5, metadata={"help": "told to guidance-distilled transformers"})
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint's folder, or latest"})
    validation_steps: int = field(default=500, metadata={"help": "steps from one drawing to the next"})
    num_validation_images: int = field(default=4, metadata={"help": "0: none"})
    num_inference_steps: int = field(default=20, metadata={"help": "of validation pictures"})
    logging_steps: int = 10
    dataloader_num_workers: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be positive, got {self.rank}")
        if self.rank is not None and self.use_ema:
            raise ValueError("use_ema averages a UNet trained as a whole, not adapters: leave out use_ema or rank")
        if self.mixed_precision not in WEIGHT_DTYPES:
            raise ValueError(
                f"mixed_precision must be one of {', '.join(WEIGHT_DTYPES)}, got {self.mixed_precision!r}"
            )


def load_decoder(
    name: str,
    vq_model: NextFlowVQModel | None = None,
    upscale: int = 1,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> NextFlowDecoderMixin:
    """A decoder to train, from a decoder's or a stock pipeline's folder or Hub id.

    Args:
        vq_model: the vision tokenizer, where `name` holds none.
        upscale: 1, or 2 for the second stage, which starts from the first one's result.
        adapter: folder of a LoRA training to start from.
        dtype: of a transformer and its text encoders.

    Raises:
        ValueError: for other pipelines, without a vision tokenizer, or for a decoder of the second stage where the
            first is asked for.
    """
    config = DiffusionPipeline.load_config(name)
    components: dict = {} if vq_model is None else {"vq_model": vq_model}
    if adapter is not None:
        components["conditioner"] = NextFlowConditioner.from_pretrained(adapter, subfolder="conditioner")
    dtypes = {part: dtype for part in ("transformer", "text_encoder", "text_encoder_2")} | {"default": torch.float32}
    pipe = decoder_class(config["_class_name"]).from_pretrained(name, dtype=dtypes, **components)
    if pipe.vq_model is None:
        raise ValueError(f"{name} holds no vision tokenizer: name one")
    if pipe.conditioner.config.upscale > upscale:
        raise ValueError(
            f"the conditioner draws at {pipe.conditioner.config.upscale} times the coded size, after which a stage at "
            f"{upscale} times is none: start from a decoder of the first stage"
        )
    pipe.conditioner.register_to_config(upscale=upscale)
    if adapter is not None:
        pipe.load_lora_weights(adapter, adapter_name=ADAPTER)
    return pipe


def decoder_class(name: str) -> type[NextFlowDecoderMixin]:
    """Of the pipeline class that a `model_index.json` names: ours, or the one over a stock pipeline's components."""
    for decoder in STOCK.values():
        if name == decoder.__name__:
            return decoder
    for stock, decoder in STOCK.items():
        if name in [stock + ending for ending in STOCK_ENDINGS]:
            return decoder
    known = [stock + ending for stock in STOCK for ending in STOCK_ENDINGS]
    raise ValueError(f"a decoder starts from one of {', '.join(known)}, or one saved before; got {name}")


def prepare(pipe: NextFlowDecoderMixin, rank: int | None) -> None:
    """Let gradients reach the conditioner and the whole UNet, or adapters of `rank`, and nothing else.

    A UNet's adapters include one of `conv_in`, which reads the condition.

    Raises:
        ValueError: for a transformer without `rank`, or a `rank` other than that of the adapters it has already.
    """
    backbone = getattr(pipe, pipe.backbone)
    if rank is None and pipe.family != "unet":
        raise ValueError(f"the {pipe.family} transformer is trained by adapters: give their rank")
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    pipe.conditioner.requires_grad_(True).train()
    backbone.train()
    if rank is None:
        backbone.requires_grad_(True)
        return
    from peft import LoraConfig

    adapters = getattr(backbone, "peft_config", {})
    if ADAPTER not in adapters:
        targets = LORA_TARGETS[pipe.family]
        backbone.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    elif adapters[ADAPTER].r != rank:
        raise ValueError(f"the adapters have rank {adapters[ADAPTER].r}, got {rank}")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)
    cast_training_params(backbone)


def save(pipe: NextFlowDecoderMixin, folder: Path, rank: int | None) -> None:
    """The whole pipeline, or the adapters with the conditioner beside them."""
    if rank is None:
        pipe.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(getattr(pipe, pipe.backbone), adapter_name=ADAPTER)
    pipe.save_lora_weights(folder, **{f"{pipe.backbone}_lora_layers": layers})
    pipe.conditioner.save_pretrained(folder / "conditioner")


def train(
    pipe: NextFlowDecoderMixin,
    batches: Dataset,
    arguments: DecoderTrainingArguments,
    validation: Mapping | None = None,
) -> None:
    """Train a decoder and save it.

    Args:
        batches: gives for each number from 0 on a batch as [`PictureBatches`] does.
        validation: a batch whose pictures are drawn.

    Raises:
        ValueError: see [`prepare`]; if the grids do not fit the backbone, or pictures the grids; for a checkpoint that
            is none.
    """
    pipe.conditioner.cells(pipe.stride)  # raises where a cell is no whole number of latents
    output = Path(arguments.output_dir)
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision, gradient_accumulation_steps=arguments.gradient_accumulation_steps
    )
    set_seed(arguments.seed + accelerator.process_index)
    backbone = getattr(pipe, pipe.backbone)
    _place(pipe, accelerator.device, WEIGHT_DTYPES[arguments.mixed_precision], arguments.rank, batches[0])
    prepare(pipe, arguments.rank)
    if arguments.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()

    loss_of = DecoderLoss(pipe, arguments.guidance_scale)
    trained = {name: parameter for name, parameter in loss_of.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        weight_decay=arguments.adam_weight_decay,
        eps=arguments.adam_epsilon,
    )
    rates = get_scheduler(
        arguments.lr_scheduler,
        optimizer,
        num_warmup_steps=arguments.lr_warmup_steps,
        num_training_steps=arguments.max_train_steps,
    )
    ema = EMAModel(trained.values(), decay=arguments.ema_decay) if arguments.use_ema else None
    loss_of, optimizer = accelerator.prepare(loss_of, optimizer)
    accelerator.register_for_checkpointing(*([rates] if ema is None else [rates, ema]))
    _checkpoint_trained_alone(accelerator, trained)

    done = 0
    if (checkpoint := checkpoint_to_resume(arguments.resume_from_checkpoint, output)) is not None:
        accelerator.load_state(str(checkpoint))
        done = int(checkpoint.name.rpartition("-")[2])
    per_step = arguments.gradient_accumulation_steps * accelerator.num_processes
    first, end = done * per_step + accelerator.process_index, arguments.max_train_steps * per_step
    numbers = range(first, end, accelerator.num_processes)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=arguments.dataloader_num_workers,
        generator=torch.Generator(),  # of workers' seeds, apart from what a checkpoint restores
    )
    log, started, losses = Log(output, done), time.perf_counter(), []
    progress = tqdm(initial=done, total=arguments.max_train_steps, disable=not accelerator.is_main_process or None)
    for number, batch in zip(numbers, loader):
        generator = torch.Generator().manual_seed(draw_seed(arguments.seed, number))
        features = condition_of(pipe.vq_model, batch)
        drawn, expected = tuple(batch["pixel_values"].shape[-2:]), pipe.output_size(features.shape[-2:])
        if drawn != expected:
            raise ValueError(
                f"codes of the grid {tuple(features.shape[-2:])} are drawn at {expected[0]}x{expected[1]} (upscale "
                f"{pipe.conditioner.config.upscale}), but batch {number} holds pictures of {drawn[0]}x{drawn[1]}"
            )
        latents = encode_pixels(pipe, batch["pixel_values"], generator)
        with accelerator.accumulate(loss_of):
            loss = loss_of(latents, features.to(latents.device), batch["captions"], generator)
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained.values(), arguments.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        rates.step()
        if ema is not None:
            ema.step(trained.values())
        done += 1
        progress.update()
        last = done == arguments.max_train_steps
        if done % arguments.logging_steps == 0 or last:
            value = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            losses = []
            if not math.isfinite(value):
                raise ValueError(f"the loss is {value} at step {done}: lower the learning rate")
            if accelerator.is_main_process:
                log.write(done, value, rates.get_last_lr()[0], time.perf_counter() - started)
        if done % arguments.checkpointing_steps == 0 or last:
            _save_checkpoint(accelerator, output, done, arguments.checkpoints_total_limit)
        if validation and accelerator.is_main_process and (done % arguments.validation_steps == 0 or last):
            with averaged(ema, trained.values()), accelerator.autocast():
                _draw(pipe, validation, arguments, output / "validation" / f"step-{done}.png")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with averaged(ema, trained.values()):
            save(pipe, output, arguments.rank)


def draw_seed(seed: int, number: int) -> int:
    """Of noise and timesteps of a batch."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def checkpoint_to_resume(name: str | None, output: Path) -> Path | None:
    """The folder of a checkpoint, `latest` being the newest in `output`; None to begin anew, also without any."""
    if name is None:
        return None
    if name == "latest":
        return next(reversed(_checkpoints(output)), None)
    if not re.fullmatch(r"checkpoint-\d+", Path(name).name) or not Path(name).is_dir():
        raise ValueError(f"resume_from_checkpoint must be latest or a folder checkpoint-STEP, got {name}")
    return Path(name)


def _place(pipe, device: torch.device, dtype: torch.dtype, rank: int | None, batch: Mapping) -> None:
    """What training needs goes to the device, beside adapters in `dtype` (it is not saved then) but for the VAE;
    encoders of the vision tokenizer only where batches hold no codes."""
    frozen = torch.float32 if rank is None else dtype
    pipe.vae.to(device, torch.float32)
    for name, component in pipe.components.items():
        if name.startswith("text_encoder") and component is not None:
            component.to(device, frozen)
    getattr(pipe, pipe.backbone).to(frozen)
    if "codes" in batch:
        pipe.vq_model.quantizer.to(device)
        pipe.vq_model.semantic_decoder.to(device)
    else:
        pipe.vq_model.to(device)


def _checkpoint_trained_alone(accelerator: Accelerator, trained: Mapping[str, nn.Parameter]) -> None:
    """Checkpoints hold the weights that are trained, not those of the frozen backbone."""

    def save_trained(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            save_file(
                {name: p.detach().contiguous() for name, p in trained.items()}, Path(folder, "trained.safetensors")
            )

    def load_trained(models, folder):
        models.clear()
        stored = load_file(Path(folder, "trained.safetensors"))
        if stored.keys() != trained.keys():
            raise ValueError(f"the checkpoint {folder} holds other weights than those that are trained")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(stored[name])

    accelerator.register_save_state_pre_hook(save_trained)
    accelerator.register_load_state_pre_hook(load_trained)


def _save_checkpoint(accelerator: Accelerator, output: Path, step: int, limit: int | None) -> None:
    """Under its name only once it is whole."""
    partial, whole = output / f".checkpoint-{step}.partial", output / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    shutil.rmtree(whole, ignore_errors=True)
    partial.rename(whole)
    if limit is not None:
        for old in _checkpoints(output)[:-limit]:
            shutil.rmtree(old)


def _checkpoints(output: Path) -> list[Path]:
    """From the oldest to the newest."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


@contextmanager
def averaged(ema: EMAModel | None, parameters) -> Iterator[None]:
    """While it lasts, the averages are in the place of the weights."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _draw(pipe, batch: Mapping, arguments: DecoderTrainingArguments, path: Path) -> None:
    """Pictures of a batch above what the decoder draws of their codes."""
    count = arguments.num_validation_images
    features, captions = condition_of(pipe.vq_model, batch)[:count], batch["captions"][:count]
    pipe.set_progress_bar_config(disable=True)
    with torch.random.fork_rng():
        generator = torch.Generator().manual_seed(arguments.seed)
        pixels = pipe(
            captions,
            features=features,
            num_inference_steps=arguments.num_inference_steps,
            generator=generator,
            output_type="pt",
        ).images
    rows = [batch["pixel_values"][:count] / 2 + 0.5, pixels.float().cpu()]
    sheet = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)
    picture = Image.fromarray((sheet * 255).round().clamp(0, 255).byte().movedim(0, -1).numpy())
    write_atomically(path, lambda partial: picture.save(partial, format="PNG"))


class Log:
    """`log.jsonl`: a line for each logged step, also over several runs."""

    def __init__(self, output: Path, done: int):
        self.path = output / "log.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if done and self.path.exists() else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= done]
        self.before = self.rows[-1]["seconds"] if self.rows else 0.0

    def write(self, step: int, loss: float, learning_rate: float, seconds: float) -> None:
        row = {"step": step, "loss": loss, "learning_rate": learning_rate, "seconds": round(self.before + seconds, 1)}
        self.rows.append(row)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.path, lambda partial: partial.write_text(text))
