"""Training of a decoder: what of it is trained, and [`NextFlowDecoderTrainer`], transformers' Trainer for it.

NextFlow sec. 3.3: a UNet is trained as a whole, a transformer by LoRA, the conditioner always; a first stage at the
resolution of the codes, a second one at twice that (`upscale` of the conditioner). Batches, noise and timesteps follow
from the seed and the number of the batch, so a resumed run repeats an undisturbed one bit for bit, and a step does not
depend on how it is split.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.training.checkpoints import output_field
from transformers_nextflow.training.ema import EMACallback
from transformers_nextflow.training.order import (
    OWN_STEPS,
    PicturesTrainer,
    check_heeded,
    refuse_shared_weights,
    told_epochs,
)
from transformers_nextflow.training.samples import DrawingCallback
from transformers_nextflow.utils.precision import without_autocast

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
ADAPTER = "default"
TRAINED = "trained.safetensors"


@dataclass
class DecoderTrainingArguments(TrainingArguments):
    """`TrainingArguments` with other defaults, and what decoders have beside them.

    Args:
        rank (`int`, *optional*): Of LoRA adapters; by default a UNet is trained as a whole.
        use_ema (`bool`): Whether a moving average of a whole UNet is kept, and saved as the result.
        ema_decay (`float`): Of that average, reached by (1 + step) / (10 + step).
        guidance_scale (`float`): What guidance-distilled transformers (FLUX.1-dev) are told.
        sample_steps (`int`): Optimizer steps from one drawing to the next.
        num_samples (`int`): Pictures drawn each time; 0 is none.
        num_inference_steps (`int`): Of those pictures.

    Raises:
        ValueError: for a `rank` below 1, an average of adapters, or an option that is not heeded.
    """

    output_dir: str | None = output_field()
    max_steps: int = field(default=15_000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak"})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "how the learning rate goes on"})
    weight_decay: float = field(default=1e-2, metadata={"help": "of matrices"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "items of the dataset, batches themselves"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "items of the dataset, batches themselves"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "batches hold what is needed"})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "a loss that is no number ends the training"}
    )
    logging_steps: float = field(default=10, metadata={"help": "steps from one log to the next"})
    rank: int | None = field(
        default=None,
        metadata={"help": "of LoRA adapters; default: the whole UNet is trained", "aliases": ["--lora_r"]},
    )
    use_ema: bool = field(default=False, metadata={"help": "keep a moving average of a whole UNet, which is saved"})
    ema_decay: float = field(default=0.9999, metadata={"help": "reached by (1 + step) / (10 + step)"})
    guidance_scale: float = field(default=3.5, metadata={"help": "told to guidance-distilled transformers"})
    sample_steps: int = field(default=500, metadata={"help": "steps from one drawing to the next"})
    num_samples: int = field(default=4, metadata={"help": "pictures drawn each time; 0: none"})
    num_inference_steps: int = field(default=20, metadata={"help": "of those pictures"})

    def __post_init__(self):
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be positive, got {self.rank}")
        if self.rank is not None and self.use_ema:
            raise ValueError("use_ema averages a UNet trained as a whole, not adapters: leave out use_ema or rank")
        check_heeded(self, **OWN_STEPS, activation_checkpointing_kwargs=None)  # of which diffusers' models have none

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of what stays frozen beside adapters."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


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
    """Write the whole pipeline, or the adapters with the conditioner beside them."""
    if rank is None:
        pipe.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(getattr(pipe, pipe.backbone), adapter_name=ADAPTER)
    pipe.save_lora_weights(folder, **{f"{pipe.backbone}_lora_layers": layers})
    pipe.conditioner.save_pretrained(folder / "conditioner")


def draw_seed(seed: int, number: int) -> int:
    """Of noise and timesteps of a batch."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class Numbered(Dataset):
    """Batches of a dataset with their `number`, counted on from epoch to epoch."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.epoch = dataset, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        for each in told_epochs(self.dataset):
            each.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index] | {"number": self.epoch * len(self) + index}


class NextFlowDecoderTrainer(PicturesTrainer):
    """Trains a decoder pipeline on batches of pictures, as [`prepare`] says what of it.

    A checkpoint holds the weights that are trained in `trained.safetensors`, not those of the frozen backbone.
    `save_model` writes the whole pipeline, or the adapters with the conditioner beside them; with `use_ema` it is the
    average. `evaluate` gives `eval_loss`, exact over all pictures, with noise that is the same each time.

    Args:
        pipe: the decoder.
        train_dataset, eval_dataset: items are batches as [`~training_data.PictureBatches`] gives them.
        samples: a batch whose pictures are drawn every `sample_steps`, to `output_dir/samples`, the truth above each.

    Raises:
        ValueError: see [`prepare`]; if the grids do not fit the backbone, or pictures the grids; for weights that
            devices share; in training if the loss is not finite, or for a checkpoint that is none.
    """

    def __init__(
        self,
        pipe: NextFlowDecoderMixin,
        args: DecoderTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        samples: Mapping | None = None,
        **kwargs,
    ):
        pipe.conditioner.cells(pipe.stride)  # raises where a cell is no whole number of latents
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        examples = [dataset[0] for dataset in (train_dataset, *held_out.values()) if dataset is not None]
        coded = bool(examples) and all("codes" in example for example in examples)
        _place(pipe, args.device, args.weight_dtype, args.rank, coded)
        prepare(pipe, args.rank)
        self.pipe = pipe
        loss_of = DecoderLoss(pipe, args.guidance_scale)
        super().__init__(loss_of, args, _listed, train_dataset and Numbered(train_dataset), eval_dataset, **kwargs)
        refuse_shared_weights(self)
        self._trained = {name: parameter for name, parameter in loss_of.named_parameters() if parameter.requires_grad}
        self._average = EMACallback(args.ema_decay, warmup=True) if args.use_ema else None
        if self._average is not None:
            self.add_callback(self._average)
        if samples is not None and args.num_samples:
            self.add_callback(DecoderSamples(self, samples))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the pictures of all batches; in training a forward's part of the mean over a step's."""
        pictures = self.count(inputs) if num_items_in_batch is None else float(num_items_in_batch)
        loss = sum(self._loss_of(model, batch) * (len(batch["captions"]) / pictures) for batch in inputs["batches"])
        return (loss, {}) if return_outputs else loss

    def count(self, inputs: dict) -> int:
        return sum(len(batch["captions"]) for batch in inputs["batches"])

    def _loss_of(self, model, batch: Mapping) -> torch.Tensor:
        generator = torch.Generator().manual_seed(draw_seed(self.args.seed, batch["number"]))
        with without_autocast(self.args.device):
            features = condition_of(self.pipe.vq_model, batch)
            drawn, expected = tuple(batch["pixel_values"].shape[-2:]), self.pipe.output_size(features.shape[-2:])
            if drawn != expected:
                raise ValueError(
                    f"codes of the grid {tuple(features.shape[-2:])} are drawn at {expected[0]}x{expected[1]} "
                    f"(upscale {self.pipe.conditioner.config.upscale}), but batch {batch['number']} holds pictures of "
                    f"{drawn[0]}x{drawn[1]}"
                )
            latents = encode_pixels(self.pipe, batch["pixel_values"], generator)
        return model(latents, features.to(latents.device), batch["captions"], generator)

    def blank(self, item: dict) -> dict:
        return item | {"counts": False}

    @torch.no_grad()
    def measure(self, dataset, prefix: str) -> dict[str, float]:
        """Mean `loss` over the pictures of all batches."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in self.get_eval_dataloader(Numbered(dataset)):
            for batch in inputs["batches"]:
                count = len(batch["captions"])
                with self._autocast():
                    loss = self._loss_of(self.model, batch)
                sums += torch.stack([loss.double() * count, loss.new_tensor(count).double()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        return {"loss": total / count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(f"the loss is {logs['loss']} at step {self.state.global_step}: lower the learning rate")
        super().log(logs, start_time)

    def _autocast(self):
        """Of forwards that are not the prepared model's."""
        mixed = self.args.bf16 or self.args.fp16
        return torch.autocast(self.args.device.type, self.args.weight_dtype) if mixed else nullcontext()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See the class; `_internal_call` is the Trainer's, of checkpoints and, without a folder, for the Hub."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if _internal_call and output_dir is not None:
            tensors = {name: parameter.detach().contiguous() for name, parameter in self._trained.items()}
            save_file(tensors, folder / TRAINED)
            return
        is_averaged = self._average is not None and self._average.averages
        with self._average.in_place() if is_averaged else nullcontext():
            save(self.pipe, folder, self.args.rank)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    @torch.no_grad()
    def _load_weights(self, checkpoint: str, model=None) -> None:
        stored = load_file(Path(checkpoint, TRAINED))
        if stored.keys() != self._trained.keys():
            raise ValueError(f"the checkpoint {checkpoint} holds other weights than those that are trained")
        for name, parameter in self._trained.items():
            parameter.copy_(stored[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    @torch.no_grad()
    def draw(self, batch: Mapping) -> list[Image.Image]:
        """Pictures of a batch, each above what the decoder draws of its codes."""
        count = self.args.num_samples
        self.model.eval()
        self.pipe.set_progress_bar_config(disable=True)
        with torch.random.fork_rng(), self._autocast():
            pixels = self.pipe(
                batch["captions"][:count],
                features=condition_of(self.pipe.vq_model, batch)[:count],
                num_inference_steps=self.args.num_inference_steps,
                generator=torch.Generator().manual_seed(self.args.seed),
                output_type="pt",
            ).images
        pairs = torch.cat([batch["pixel_values"][:count] / 2 + 0.5, pixels.float().cpu()], dim=-2)
        pairs = (pairs * 255).round().byte().movedim(1, -1)
        self.model.train()
        return [Image.fromarray(pair.numpy()) for pair in pairs]


class DecoderSamples(DrawingCallback):
    """A decoder's pictures of one batch all along a training."""

    def __init__(self, trainer: NextFlowDecoderTrainer, batch: Mapping):
        super().__init__(batch["captions"], trainer.args.sample_steps)
        self.trainer, self.batch = trainer, batch

    def draw(self, model) -> list[Image.Image]:
        return self.trainer.draw(self.batch)


def _listed(batches: list[dict]) -> dict:
    """Those that count."""
    return {"batches": [batch for batch in batches if batch.get("counts", True)]}


def _place(pipe, device: torch.device, dtype: torch.dtype, rank: int | None, coded: bool) -> None:
    """What training needs goes to the device, beside adapters in `dtype` (it is not saved then) but for the VAE;
    encoders of the vision tokenizer only where batches hold no codes."""
    frozen = torch.float32 if rank is None else dtype
    pipe.vae.to(device, torch.float32)
    for name, component in pipe.components.items():
        if name.startswith("text_encoder") and component is not None:
            component.to(device, frozen)
    getattr(pipe, pipe.backbone).to(frozen)
    if coded:
        pipe.vq_model.quantizer.to(device)
        pipe.vq_model.semantic_decoder.to(device)
    else:
        pipe.vq_model.to(device)
