"""[`NextFlowVQTrainer`]: transformers' Trainer for the vision tokenizer, in NextFlow's three stages (sec. 3.1)."""

import copy
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..modeling_nextflow_vq import AttnBlock, NextFlowVQModel, NextFlowVQOutput, ResidualBlock
from ..quantizer import CODEBOOK_LOSSES, QuantizerOutput
from ..sampling import integer
from ..utils.files import save_png
from .checkpoints import output_field
from .metrics import lpips, psnr, ssim
from .order import OWN_STEPS, PicturesTrainer, check_heeded, judge_by, refuse_shared_weights
from .teacher import FOLDER as TEACHER
from .teacher import keep_teacher
from .vq_losses import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    codebook_losses,
    discriminator_loss,
    distillation_loss,
)

STAGES = ("pixel", "joint", "decoder")
DISCRIMINATOR = "discriminator.safetensors"
CHOSEN = "chosen_entries.safetensors"
SHEET_PICTURES = 8


@dataclass
class NextFlowVQTrainingArguments(TrainingArguments):
    """`TrainingArguments` and the losses' weights. Defaults are what TokenFlow's training script sets for its SigLIP
    tokenizer (commit 9812da0 of its repository): the optimizer's, and those of all losses. The best model, where it is
    asked for, is that of the highest `eval_psnr`, by which learning rates go that go by a metric, unless
    `metric_for_best_model` says otherwise.

    Args:
        stage (`str`): `"pixel"`, `"joint"` or `"decoder"`, see [`prepare_vq_stage`].
        weight_decay (`float`):
            0, since TokenFlow's optimizer never gets the 0.05 that its script has an option for.
        codebook_loss (`str`):
            What entries are fitted to and how the gradient passes them: `"tokenflow"` (each scale's normalised
            entries to its normalised queries) or `"var"` (the running sum after each scale to the features), see
            [`DualCodebookQuantizer.forward`].
        l2_weight, perceptual_weight, codebook_weight, commitment_weight, distillation_weight (`float`):
            Weights of the losses. The perceptual one needs the package `lpips`, or a network given to the trainer.
        discriminator_weight (`float`):
            Of the adversarial loss, the tokenizer's and the discriminator's alike; 0 is without.
        discriminator_start (`int`): Step, counted from 1, from which discriminator and adversarial loss take part.
        adaptive_discriminator_weight (`bool`):
            Whether the tokenizer's adversarial loss has VQGAN's [`adaptive_weight`] beside its own. TokenFlow has
            it as an option, which its script leaves off.
        scale_drop (`float`):
            Share of batches in which every scale but the first is dropped with probability 1/2. Open in the paper,
            which drops half of the scales; TokenFlow drops one scale in a tenth of its steps.
        restart_steps (`int`):
            Every so many steps, entries that no picture has chosen since the last time are set to what the current
            batch looked up; 0 is never.

    Raises:
        ValueError: for an unknown `stage` or `codebook_loss`, negative weights, a share outside [0, 1], or an
            option that is not heeded ([`~order.check_heeded`]).
    """

    output_dir: str | None = output_field()
    stage: str = field(default="pixel", metadata={"help": "pixel, joint or decoder", "choices": STAGES})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak"})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "how the learning rate goes on"})
    weight_decay: float = field(default=0.0, metadata={"help": "of matrices"})
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "items of the dataset, batches themselves"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "items of the dataset, batches themselves"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "batches hold what is needed"})
    codebook_loss: str = field(
        default="tokenflow", metadata={"help": "form of codebook and commitment loss", "choices": CODEBOOK_LOSSES}
    )
    l2_weight: float = field(default=1.0, metadata={"help": "of the squared error of pixels"})
    perceptual_weight: float = field(default=1.0, metadata={"help": "of LPIPS"})
    codebook_weight: float = field(default=1.0, metadata={"help": "of the entries' distance to features"})
    commitment_weight: float = field(default=0.25, metadata={"help": "of the features' distance to entries"})
    distillation_weight: float = field(default=1.0, metadata={"help": "of 1 - cosine to the teacher's features"})
    discriminator_weight: float = field(default=0.5, metadata={"help": "of the adversarial loss; 0 is without"})
    discriminator_start: int = field(default=20_000, metadata={"help": "step at which the adversary begins"})
    adaptive_discriminator_weight: bool = field(default=False, metadata={"help": "VQGAN's, beside the weight"})
    scale_drop: float = field(default=0.1, metadata={"help": "share of batches in which half of the scales drop"})
    restart_steps: int = field(default=0, metadata={"help": "steps between restarts of unused entries; 0: never"})

    def __post_init__(self):
        judge_by("psnr", self)
        super().__post_init__()
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        if self.codebook_loss not in CODEBOOK_LOSSES:
            raise ValueError(f"codebook_loss must be one of {', '.join(CODEBOOK_LOSSES)}, got {self.codebook_loss!r}")
        for name in ("l2", "perceptual", "codebook", "commitment", "distillation", "discriminator"):
            if not 0 <= (weight := getattr(self, f"{name}_weight")) < inf:
                raise ValueError(f"{name}_weight must be finite and not negative, got {weight}")
        integer("restart_steps", self.restart_steps, 0)
        check_heeded(self, **OWN_STEPS)
        if not 0 <= self.scale_drop <= 1:
            raise ValueError(f"scale_drop must lie in [0, 1], got {self.scale_drop}")

    def loss_weights(self, step: int) -> dict[str, float]:
        """Weight of each loss by its name, at optimizer step `step`, counted from 1."""
        adversarial = self.discriminator_weight if step >= self.discriminator_start else 0.0
        return {
            "reconstruction": 1.0,
            "codebook": self.codebook_weight,
            "commitment": self.commitment_weight,
            "distillation": self.distillation_weight,
            "adversarial": adversarial,
            "discriminator": adversarial,
        }


def prepare_vq_stage(model: NextFlowVQModel, stage: str) -> NextFlowVQModel:
    """The model as a stage begins (NextFlow sec. 3.1), with what the stage trains left to train.

    - `"pixel"`: pixel encoder, pixel decoder and the pixel half of the codebook; semantic features and entries count
      as 0.
    - `"joint"`: all of it, from those weights. Bring a semantic encoder with the teacher's weights.
    - `"decoder"`: the pixel decoder alone, with twice its residual blocks, [`enlarge_decoder`], in a copy of the
      model; one that was in this stage before goes on as it is. Codes stay what they were.

    The stage is noted in the config's `training_stages`.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    stages = model.config.training_stages or []
    if stage == "decoder" and stage not in stages:
        model = enlarge_decoder(model)
    model.config.training_stages = [*stages, *({stage} - set(stages))]
    model.requires_grad_(stage == "joint")
    if stage != "joint":
        model.pixel_decoder.requires_grad_(True)
    if stage == "pixel":
        model.pixel_encoder.requires_grad_(True)
        model.quantizer.pixel_codebook.requires_grad_(True)
    return model


def enlarge_decoder(model: NextFlowVQModel) -> NextFlowVQModel:
    """A copy with twice the residual blocks in the pixel decoder; it begins as the same function.

    Open in the paper: how the capacity is doubled. Here in depth, by blocks that add nothing at first.
    """
    config = copy.deepcopy(model.config)
    config.decoder_blocks *= 2
    larger = NextFlowVQModel(config).to(model.device)
    new = set(larger.load_state_dict(model.state_dict(), strict=False).missing_keys)
    for name, module in larger.pixel_decoder.named_modules(prefix="pixel_decoder"):
        last = {ResidualBlock: "conv2", AttnBlock: "proj_out"}.get(type(module))
        if last and f"{name}.{last}.weight" in new:
            for parameter in getattr(module, last).parameters():
                nn.init.zeros_(parameter)
    return larger


class VQTraining(nn.Module):
    """The tokenizer and the discriminator of its pictures, as one module for devices to wrap."""

    def __init__(self, vq_model: NextFlowVQModel, discriminator: PatchDiscriminator | None):
        super().__init__()
        self.vq_model, self.discriminator = vq_model, discriminator

    def activation_checkpointing_enable(self, **kwargs) -> None:
        self.vq_model.activation_checkpointing_enable(**kwargs)

    def forward(
        self, pixel_values: torch.Tensor, adversarial: bool, **kwargs
    ) -> tuple[NextFlowVQOutput, dict[str, torch.Tensor]]:
        """The tokenizer's output and, if `adversarial`, the `adversarial` loss, whose gradient moves the tokenizer
        alone, and the `discriminator`'s, which moves the discriminator alone."""
        output = self.vq_model(pixel_values, **kwargs)
        if not adversarial:
            return output, {}
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        deceived = functional_call(self.discriminator, fixed, output.reconstruction)
        real, fake = self.discriminator(pixel_values), self.discriminator(output.reconstruction.detach())
        return output, {"adversarial": adversarial_loss(deceived), "discriminator": discriminator_loss(real, fake)}


class NextFlowVQTrainer(PicturesTrainer):
    """Trains [`NextFlowVQModel`] on pictures, in one of the stages that [`prepare_vq_stage`] makes it ready for.

    Logged beside `loss`: each loss by its name (`loss_reconstruction`, `loss_codebook`, ..), `psnr` in dB, and for
    every scale `usage_scale_1` .. (share of its entries chosen since the last log), `perplexity_scale_1` .. and
    `residual_scale_1` .. (root mean square of what is left to quantise before it). `evaluate` gives PSNR, SSIM
    and LPIPS without dropped scales, of each dataset where there are several by name, and writes a sheet of pictures
    above their reconstructions to `output_dir/reconstructions`. A checkpoint is a folder for
    `NextFlowVQModel.from_pretrained`.

    Differs from TokenFlow's training: discriminator and tokenizer share one optimizer, which moves each by its own
    loss alone, and one bound on the gradient's norm; the perceptual network runs without dropout, as it was made to
    (there `.train()` switches it on); no entropy loss (its weight is 0 there).

    Args:
        model: as [`prepare_vq_stage`] left it; parameters frozen since then stay frozen.
        train_dataset, eval_dataset: items are batches, dicts of `pixel_values` (B, 3, H, W) in [-1, 1] of one size, as
            [`ImageBatches`] gives them; several in a forward are joined, and run apart where their sizes differ.
        teacher: vision model of the semantic encoder's kind whose features the joint stage distils, see
            [`~teacher.load_teacher`]; it stays frozen, and is left in `output_dir/teacher`.
        perceptual: network of two (B, 3, H, W) pictures whose mean output is their distance; by default `lpips`' VGG.

    Raises:
        ImportError: if the perceptual loss has a weight, and neither `perceptual` nor the package `lpips` is there.
        ValueError: for a joint stage without a teacher, or weights that devices share.
    """

    def __init__(
        self,
        model: NextFlowVQModel,
        args: NextFlowVQTrainingArguments,
        train_dataset=None,
        eval_dataset=None,
        teacher: PreTrainedModel | None = None,
        perceptual: nn.Module | None = None,
        **kwargs,
    ):
        if args.stage == "joint" and teacher is None:
            raise ValueError("the joint stage distils a teacher's features: give `teacher`, a frozen vision model")
        if args.perceptual_weight and perceptual is None:
            perceptual = lpips()
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            discriminator = PatchDiscriminator() if args.discriminator_weight else None
        module = VQTraining(model, discriminator)
        super().__init__(module, args, _by_size, train_dataset, eval_dataset, **kwargs)
        refuse_shared_weights(self)
        frozen = {"teacher": teacher, "perceptual": perceptual}
        for name, network in frozen.items():
            setattr(self, name, network and network.requires_grad_(False).eval().to(args.device))
        self._measured = MeasuredCodes(model)
        self._restarts = Restarts(model, self.accelerator, args) if args.restart_steps else None
        if self._restarts is not None:
            self.add_callback(self._restarts)

    def train(self, *args, **kwargs):
        self._measured.reset()  # of what a training before this has seen since its last log
        if self.args.stage == "joint" and self.is_world_process_zero():
            keep_teacher(self.teacher, Path(self.args.output_dir) / TEACHER)
        return super().train(*args, **kwargs)

    @property
    def vq_model(self) -> NextFlowVQModel:
        """The tokenizer below the wrappers of devices."""
        return self.accelerator.unwrap_model(self.model).vq_model

    def reconstruction_loss(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Weighted squared and perceptual distance of float32 (B, 3, H, W) pictures; override for another."""
        loss = self.args.l2_weight * F.mse_loss(reconstruction, pixel_values)
        if self.perceptual is not None:
            loss = loss + self.args.perceptual_weight * self.perceptual(reconstruction, pixel_values).mean()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the pictures of `pixel_values`, or over those of a list of such; in training a forward's part
        of the mean over a step's."""
        pictures = self.count(inputs) if num_items_in_batch is None else float(num_items_in_batch)
        total, outputs = 0.0, []
        for pixel_values in _sizes(inputs):
            loss, output = self._loss_of_size(model, pixel_values)
            total = total + loss * (len(pixel_values) / pictures)
            outputs.append(output)
        return (total, outputs) if return_outputs else total

    def count(self, inputs: dict) -> int:
        return sum(map(len, _sizes(inputs)))

    def _loss_of_size(self, model, pixel_values: torch.Tensor) -> tuple[torch.Tensor, NextFlowVQOutput]:
        args = self.args
        weights = args.loss_weights(self.state.global_step + 1)
        adversarial, pixel_only = weights["adversarial"] > 0, args.stage == "pixel"
        keep_scales = self._draw_scales(self.vq_model.schedules.by_size(*pixel_values.shape[-2:]))
        output, losses = model(
            pixel_values,
            adversarial,
            keep_scales=keep_scales,
            pixel_only=pixel_only,
            codebook_loss=args.codebook_loss,
        )
        losses["reconstruction"] = self.reconstruction_loss(output.reconstruction.float(), pixel_values)
        if args.stage != "decoder":
            channels = slice(self.vq_model.config.semantic_dim if pixel_only else 0, None)
            losses["codebook"], losses["commitment"] = codebook_losses(output.quantization, channels)
        if args.stage == "joint":
            with torch.no_grad(), self.accelerator.autocast():
                target = self.vq_model.semantic_features(pixel_values, self.teacher)
            losses["distillation"] = distillation_loss(output.semantic_features, target)
        if adversarial and args.adaptive_discriminator_weight:
            last_layer = self.vq_model.pixel_decoder.conv_out.weight
            weights["adversarial"] *= adaptive_weight(losses["reconstruction"], losses["adversarial"], last_layer)
        self._measured.add(losses, output, pixel_values)
        if self._restarts is not None:
            self._restarts.see(output.quantization)
        return sum(weights[name] * loss for name, loss in losses.items()), output

    def _draw_scales(self, schedule) -> list[bool] | None:
        """Which scales take part in this batch: all, or the first and about half of the others."""
        if torch.rand(()) >= self.args.scale_drop:
            return None
        return [True] + (torch.rand(len(schedule) - 1) < 0.5).tolist()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = logs | self._measured.pop(self.accelerator)
        super().log(logs, start_time)

    def blank(self, item: dict) -> dict:
        return item | {"counts": False}

    def measure(self, dataset, prefix: str) -> dict[str, float]:
        """Mean `psnr` (dB), `ssim` and, with a perceptual network, `lpips` of reconstructions over all pictures, but
        for those that come back equal, which have no PSNR."""
        pixel_only, shown = self.args.stage == "pixel", []
        measures = {"psnr": psnr, "ssim": ssim} | ({} if self.perceptual is None else {"lpips": self.perceptual})
        sums = torch.zeros(len(measures), 2, dtype=torch.float64, device=self.args.device)  # and of how many pictures
        with torch.no_grad():
            for batch in self.get_eval_dataloader(dataset):
                for pixels in batch["pixel_values"]:
                    rebuilt = self.vq_model(pixels, pixel_only=pixel_only).reconstruction.float().clamp(-1, 1)
                    measured = (measure(rebuilt, pixels) for measure in measures.values())
                    sums += torch.stack([_finite_sum(values, len(pixels)) for values in measured])
                    shown += list(zip(pixels.cpu(), rebuilt.cpu()))[: SHEET_PICTURES - len(shown)]
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        if self.is_world_process_zero():
            name = f"step-{self.state.global_step}{prefix.removeprefix('eval')}.png"
            save_png(_sheet(shown), Path(self.args.output_dir) / "reconstructions" / name)
        return {name: total / count if count else inf for name, (total, count) in zip(measures, sums)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        is_checkpoint = _internal_call and output_dir is not None  # of which the Trainer writes its state last
        if is_checkpoint and self._restarts is not None:
            self._restarts.save(Path(output_dir))

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        module = self.accelerator.unwrap_model(self.model)
        module.vq_model.save_pretrained(folder)
        if module.discriminator is not None:
            save_file(module.discriminator.state_dict(), folder / DISCRIMINATOR)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_weights(self, checkpoint: str, model=None) -> None:
        module, folder = self.accelerator.unwrap_model(self.model), Path(checkpoint)
        module.vq_model.load_state_dict(NextFlowVQModel.from_pretrained(folder).state_dict())
        if module.discriminator is not None:
            module.discriminator.load_state_dict(load_file(folder / DISCRIMINATOR))
        if self._restarts is not None:
            self._restarts.load(folder)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class MeasuredCodes:
    """What the losses were and which entries were chosen since the last log, on this device."""

    def __init__(self, model: NextFlowVQModel):
        self.schedules, self.quantizer = model.schedules, model.quantizer
        self.entries = len(model.quantizer.pixel_codebook)
        self.reset()

    def reset(self) -> None:
        scales = self.schedules.max_scales
        self.losses: dict[str, tuple[float, float]] = {}  # sums, and of how many pictures: some begin late
        self.chosen = torch.zeros(scales, self.entries, dtype=torch.int64)
        self.residuals = torch.zeros(2, scales, dtype=torch.float64)  # sums, and how many

    def add(self, losses: dict[str, torch.Tensor], output: NextFlowVQOutput, pixel_values: torch.Tensor) -> None:
        rebuilt = output.reconstruction.detach().float().clamp(-1, 1)
        count = len(pixel_values)
        sums = {f"loss_{name}": [float(loss.detach()) * count, count] for name, loss in losses.items()}
        sums["psnr"] = _finite_sum(psnr(rebuilt, pixel_values), count).tolist()
        for name, (value, number) in sums.items():
            total, pictures = self.losses.get(name, (0.0, 0))
            self.losses[name] = total + value, pictures + number
        schedule = self.schedules.by_size(*pixel_values.shape[-2:])
        codes = output.quantization.target_codes.cpu()
        for scale in range(len(schedule)):
            self.chosen[scale] += codes[:, schedule.slice(scale)].flatten().bincount(minlength=self.entries)
        norms = output.quantization.residual_norms.cpu().double()
        self.residuals[0, : len(norms)] += norms * count
        self.residuals[1, : len(norms)] += count

    def pop(self, accelerator) -> dict[str, float]:
        """Means and counts over all devices since the last call."""
        names = sorted(self.losses)
        sums = torch.tensor([self.losses[name] for name in names], dtype=torch.float64)
        sums, chosen, residuals = (
            accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()
            for values in (sums, self.chosen, self.residuals)
        )
        self.reset()
        logs = {name: float(total / pictures) for name, (total, pictures) in zip(names, sums) if pictures}
        for scale, counts in enumerate(chosen):
            if not counts.sum():
                continue
            shares = counts.double() / counts.sum()
            logs[f"usage_scale_{scale + 1}"] = float((shares > 0).double().mean())
            logs[f"perplexity_scale_{scale + 1}"] = float(torch.special.entr(shares).sum().exp())
            logs[f"residual_scale_{scale + 1}"] = float(residuals[0, scale] / residuals[1, scale])
        return logs


class Restarts(TrainerCallback):
    """Sets entries that no picture has chosen for a while to what the last batch looked up, the same everywhere."""

    def __init__(self, model: NextFlowVQModel, accelerator, args: NextFlowVQTrainingArguments):
        self.quantizer, self.schedules, self.accelerator = model.quantizer, model.schedules, accelerator
        self.every, self.pixel_only = args.restart_steps, args.stage == "pixel"
        self.chosen = torch.zeros(len(model.quantizer.pixel_codebook), device=args.device)

    def save(self, folder: Path) -> None:
        """Into a checkpoint; all processes do."""
        chosen = self.accelerator.reduce(self.chosen, reduction="sum")
        if self.accelerator.is_main_process:
            save_file({"chosen": chosen}, folder / CHOSEN)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint; the first process knows what all of them had seen."""
        if self.accelerator.is_main_process:
            self.chosen.copy_(load_file(folder / CHOSEN)["chosen"])

    def see(self, quantization: QuantizerOutput) -> None:
        self.chosen[quantization.target_codes.unique()] = 1
        self.queries = quantization.queries

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        unused = self.accelerator.reduce(self.chosen, reduction="sum") == 0
        dead, queries = unused.nonzero().squeeze(1), torch.cat(self.queries)
        rows = queries[torch.randint(len(queries), (len(dead),)).to(queries.device)]
        semantic, pixel = broadcast(rows).split(self.quantizer.dims, dim=-1)
        self.quantizer.pixel_codebook[dead] = pixel
        if not self.pixel_only:
            self.quantizer.semantic_codebook[dead] = semantic
        self.chosen.zero_()


def _finite_sum(values: torch.Tensor, pictures: int) -> torch.Tensor:
    """(2,) float64: of a measure of so many pictures, one value or several for each or one for all, the sum of those
    that are not infinite, as the PSNR of equal pictures is, and of how many."""
    kept = values.double()[~values.isinf()]
    return torch.stack([kept.sum(), kept.new_tensor(kept.numel())]) * (pictures / values.numel())


def _sizes(inputs: dict) -> list[torch.Tensor]:
    """The pictures of a forward, those of one size together."""
    batches = inputs["pixel_values"]
    return batches if isinstance(batches, list) else [batches]


def _by_size(items: list[dict]) -> dict:
    """The pictures of all items that count, as one batch for each size."""
    batches: dict[torch.Size, list[torch.Tensor]] = {}
    for item in items:
        if item.get("counts", True):
            batches.setdefault(item["pixel_values"].shape[1:], []).append(item["pixel_values"])
    return {"pixel_values": [torch.cat(members) for members in batches.values()]}


def _sheet(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Image.Image:
    """Pictures above their reconstructions, side by side."""
    height, width = (max(pair[0].shape[axis] for pair in pairs) for axis in (1, 2))
    sheet = np.full((2 * height, len(pairs) * width, 3), 255, dtype=np.uint8)
    for column, pair in enumerate(pairs):
        for row, picture in enumerate(pair):
            pixels = ((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
            sheet[row * height :, column * width :][: pixels.shape[0], : pixels.shape[1]] = pixels
    return Image.fromarray(sheet)
