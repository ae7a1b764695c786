"""[`NextFlowGRPOTrainer`]: prefix-tuning GRPO (NextFlow sec. 3.2.5) on transformers' Trainer, in TRL's shape."""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback
from trl import SyncRefModelCallback

from ...data.inspection import draw_sheet
from ...modeling_nextflow import NextFlowForConditionalGeneration
from ...processing_nextflow import NextFlowProcessor
from ...utils.files import write_atomically
from ..checkpoints import checkpoint_to_resume
from ..samples import PictureReports
from .config import NextFlowGRPOConfig
from .objective import (
    clipped_policy_loss,
    group_advantages,
    kl_to_reference,
    log_ratios,
    nanstd,
    num_prefix_scales,
    prefix_values,
    token_weights,
)
from .rewards import RewardError, RewardFunction, call_rewards, combine, reward_name
from .rollouts import Rollouts, level_difference, roll_out, rollout_logps, seed_of, with_images

ROLLOUTS = "rollouts-{rank}.safetensors"
PROMPT_COLUMNS = ("prompt", "images", "image")
EXTREMES = {"clip_ratio/low_min": min, "clip_ratio/high_max": max, "sampling/sampling_logp_difference/max": max}


@dataclass(frozen=True)
class Part:
    """Texts, or prefixes of pictures, in a batch that is optimised.

    Attributes:
        name: before its metrics.
        weights: (B, a) of its tokens or codes, which sum to 1 in a row.
        sampled: (B, a) bool.
        lengths: codes of each scale; 1 for every token of a text.
        share: of its loss in the batch's.
    """

    name: str
    weights: torch.Tensor
    sampled: torch.Tensor
    lengths: tuple[int, ...]
    share: float


class PromptOrder(Sampler[int]):
    """Prompts in TRL's order: each `num_generations` times in a row, the prompts of a generation again for every step
    that trains on it. A permutation by seed and epoch; prompts that fill no generation wait for another epoch."""

    def __init__(self, num_prompts: int, prompts_at_once: int, num_generations: int, repeats: int, seed: int | None):
        self.num_prompts, self.prompts_at_once = num_prompts, prompts_at_once
        self.num_generations, self.repeats, self.seed, self.epoch = num_generations, repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_prompts // self.prompts_at_once * self.prompts_at_once * self.num_generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.num_prompts)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
            order = torch.randperm(self.num_prompts, generator=generator)
        for batch in order.split(self.prompts_at_once):
            if len(batch) == self.prompts_at_once:
                yield from batch.repeat_interleave(self.num_generations).repeat(self.repeats).tolist()


class Numbered(Dataset):
    """Rows of a dataset with their numbers."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, dict]:
        return index, self.dataset[index]


class NextFlowGRPOTrainer(Trainer):
    """GRPO on the coarse scales of pictures.

    One step: every prompt of the batch draws a group of pictures over one reading of the prompt, reward functions
    judge them, and one forward that ends with the scale prefix gives the log-probabilities that eq. 5 moves.

    Logged with TRL's names: `reward`, `reward_std`, `frac_reward_zero_std`, `rewards/<function>/mean` and `/std`,
    `kl`, `entropy`, `clip_ratio/*`, `step_time`; beside them `rollout_share` of the step's time, and
    `sampling/sampling_logp_difference/mean` and `/max` between the log-probabilities of sampling and of training.
    Texts have `kl`, `entropy`, `clip_ratio/*` and `sampling/*` of their own after `text/`, `completions/mean_length`,
    and `completions/clipped_ratio`, the share that reached the limit without `<boi>`. With `log_completions` the last
    batch's pictures, `num_completions_to_print` of them or all, are drawn to `output_dir/completions` and go to the
    trackers of `report_to`, see [`PictureReports`].

    Rollouts of a lower `rollout_level` than the model's have the same first scales, but not quite the same policy: the
    number of an image's scales is embedded too. `level/kl/scale_1` .. and `level/logp_difference/scale_1` .. say how
    far its distributions, and the log-probabilities of the rollouts' codes, are from those of the model's level.

    Differs from TRL's trainer, which it does not subclass: rollouts depend on seed, prompt and step alone, and a
    checkpoint between two steps of one generation holds its rollouts, so that resuming is exact.

    Args:
        model: a [`NextFlowForConditionalGeneration`], adapters on one, or a name to load.
        reward_funcs: one or more, see `rewards.py`; weighted by `args.reward_weights`.
        train_dataset, eval_dataset: rows with `prompt`, a text or messages, optionally `images` (or `image`), PIL
            pictures for its image items; other columns go to the reward functions.
        processing_class: [`NextFlowProcessor`]; loaded with a model that comes by name.
        peft_config: adapters to train instead of the weights.
        token_mask_func: `f(prompts, images, prefix, **columns)` -> (B, n) bool, which codes of the prefix are
            optimised (arXiv 2601.02256, mask propagation).

    Raises:
        ValueError: if a prefix does not fit the schedule, weights and functions differ in number, or the dataset is
            smaller than a generation.
        RewardError: in training, naming the reward function at fault; what was trained until then is saved first.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: NextFlowGRPOConfig,
        train_dataset=None,
        eval_dataset=None,
        processing_class: NextFlowProcessor | None = None,
        peft_config=None,
        token_mask_func: Callable | None = None,
        **kwargs,
    ):
        if isinstance(model, str):
            processing_class = processing_class or NextFlowProcessor.from_pretrained(model)
            model = NextFlowForConditionalGeneration.from_pretrained(model, **(args.model_init_kwargs or {}))
        if processing_class is None:
            raise ValueError("give the processor as `processing_class`; it is loaded for a model that comes by name")
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        is_adapted = hasattr(model, "get_base_model")
        base = model.get_base_model() if is_adapted else model
        if not is_adapted:
            base.model.vq_model.requires_grad_(False)
        elif args.gradient_checkpointing:
            model.enable_input_require_grads()
        self.reward_funcs = list(reward_funcs) if isinstance(reward_funcs, Sequence) else [reward_funcs]
        weights = args.reward_weights or [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs):
            raise ValueError(f"reward_weights must have {len(self.reward_funcs)} entries, got {len(weights)}")
        self.reward_weights = torch.tensor(weights)
        defaults = base.config.image_generation
        self.schedule = base.model.schedules.by_aspect_ratio(
            args.aspect_ratio or defaults["aspect_ratio"], args.rollout_level or defaults["level"]
        )
        self.model_schedule = base.model.schedules.by_aspect_ratio(
            args.aspect_ratio or defaults["aspect_ratio"], defaults["level"]
        )
        self.prefix = self.schedule.prefix(num_prefix_scales(self.schedule, args.scale_prefix, args.prefix_tokens))
        self.token_weights = token_weights(self.prefix, args.scale_loss_alpha)
        self.token_mask_func = token_mask_func
        if token_mask_func is not None and args.optimize == "text":
            raise ValueError("token_mask_func says which codes are optimised, optimize='text' optimises none")
        if args.sync_ref_model and (is_adapted or not args.beta):
            raise ValueError("sync_ref_model needs beta > 0 and a model without adapters")
        self.ref_model = None
        if args.beta and not is_adapted:
            self.ref_model = copy.deepcopy(model).requires_grad_(False).eval()
        super().__init__(model, args, _rows, train_dataset, eval_dataset, processing_class=processing_class, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("rollouts need whole weights on every device: use DDP, not FSDP or DeepSpeed")
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
            if args.sync_ref_model:
                self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))
        self._step, self._logged_at, self._buffer = 0, 0, []
        self._metrics: dict[str, list[tuple[float, float]]] = defaultdict(list)  # values with their weights
        self._pictures: list[tuple[str, Image.Image, float]] = []
        self._reports = PictureReports("completions")
        self.add_callback(_Buffer(self))

    @property
    def _nextflow(self) -> NextFlowForConditionalGeneration:
        """The model below the wrappers of devices and adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def _batches_of_generation(self) -> int:
        """How many batches train on the rollouts of a generation, repetitions included."""
        return self.args.steps_per_generation * self.args.num_iterations

    # Prompts

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        order = PromptOrder(
            len(self.train_dataset),
            args.generation_batch_size // args.num_generations,
            args.num_generations,
            self._batches_of_generation,
            seed if args.shuffle_dataset else None,
        )
        if not len(order):
            raise ValueError(
                f"a generation takes {order.prompts_at_once} prompts, the dataset has {len(self.train_dataset)}"
            )
        # a batch holds one device's prompts of a generation; each of its steps gets it again
        size = args.per_device_train_batch_size * args.steps_per_generation
        loader = DataLoader(Numbered(self.train_dataset), size, sampler=order, collate_fn=_rows)
        return self.accelerator.prepare(loader)

    def _prepare_inputs(self, inputs: list[tuple[int, dict]]) -> Rollouts:
        """The rollouts of a step: new ones at the beginning of a generation, else the next of those that are there."""
        if self._step % self._batches_of_generation == 0:
            started = time.perf_counter()
            self._buffer = self._split(self._generate(inputs))
            self._note("rollout_seconds", time.perf_counter() - started)
        rollouts = self._buffer[self._step % self.args.steps_per_generation]
        self._step += 1
        return rollouts

    def _split(self, rollouts: Rollouts) -> list[Rollouts]:
        size = self.args.per_device_train_batch_size
        return [rollouts.rows(slice(start, start + size)) for start in range(0, len(rollouts.codes), size)]

    # Rollouts

    def _generate(self, rows: list[tuple[int, dict]]) -> Rollouts:
        """Sample, judge, and compare within groups."""
        args = self.args
        self.model.eval()
        rollouts, pictures, conversations = self._sample(rows, self._seeds(rows, range(1)))
        texts = None if rollouts.text_mask is None else rollouts.texts()
        with self._at_fault_together():
            rewards_NKF = self._judge(rows, conversations, pictures, texts)[:, None]
            if args.vmr_continuations > 1:
                rewards_NKF = torch.cat([rewards_NKF, self._judge_further(rollouts, rows, conversations)], dim=1)
        if texts is not None:
            self._count_texts(rollouts)
        rewards_NKF = self.accelerator.gather(rewards_NKF.to(args.device)).cpu()
        rewards = prefix_values(combine(rewards_NKF, self.reward_weights), args.vmr_eta)
        self._count_rewards(rewards_NKF.flatten(0, 1), rewards)
        first = self.accelerator.process_index * len(rows)
        own = slice(first, first + len(rows))
        advantages = group_advantages(rewards, args.num_generations, args.scale_rewards)
        rollouts.advantages = advantages[own].to(args.device)
        if self.token_mask_func is not None:
            rollouts.token_mask = self._mask(rollouts, rows, conversations, pictures)
        with torch.no_grad():
            # where an update falls into a generation, what follows still compares with the policy that sampled
            if args.gradient_accumulation_steps % self._batches_of_generation:
                rollouts.old_logps = torch.cat([self._logps(self.model, part)[0] for part in self._split(rollouts)])
            if args.beta:
                rollouts.ref_logps = torch.cat([self._reference_logps(part) for part in self._split(rollouts)])
            if self.schedule != self.model_schedule and args.optimize != "text":
                self._count_levels(self._split(rollouts)[0])
        captions = list(map(_text, conversations))
        if texts is not None:
            captions = [f"{prompt} -> {self._decode(text)}" for prompt, text in zip(captions, texts)]
        self._pictures = list(zip(captions, pictures, rewards[own].tolist()))
        self.model.train()
        return rollouts

    def _seeds(self, rows: list, numbers: range) -> list[int]:
        """Of numbered pictures of this process's rows, by their place in the whole generation."""
        generation, first = self._step // self._batches_of_generation, self.accelerator.process_index * len(rows)
        return [
            seed_of(self.args.seed, generation, first + place, number)
            for place in range(len(rows))
            for number in numbers
        ]

    def _sample(
        self, rows: list[tuple[int, dict]], seeds: list[int]
    ) -> tuple[Rollouts, list[Image.Image], list[list[dict]]]:
        """A picture and the conversation it answers for each row; equal neighbours share one reading of the prompt."""
        groups: list[tuple[int, list[dict], int]] = []
        for index, row in rows:
            if groups and groups[-1][0] == index:
                groups[-1] = (*groups[-1][:2], groups[-1][2] + 1)
                continue
            images = row.get("images", row.get("image"))
            images = [images] if isinstance(images, Image.Image) else images
            groups.append((index, with_images(row["prompt"], images, f"prompt {index}"), 1))
        counts = {count for _, _, count in groups}
        repeats = counts.pop() if len(counts) == 1 else 1
        if repeats == 1:
            groups = [(index, chat, 1) for index, chat, count in groups for _ in range(count)]
        chats = [chat for _, chat, _ in groups]
        rollouts, codes = self._roll_out(chats, repeats, seeds)
        return rollouts, self._pictures_of(codes), [chat for chat in chats for _ in range(repeats)]

    def _roll_out(
        self, conversations: list[list[dict]], num_pictures: int, seeds: list[int], shared: Rollouts | None = None
    ) -> tuple[Rollouts, torch.Tensor]:
        """[`roll_out`] in the precision of training's forward."""
        policy = self._nextflow, self.processing_class
        controls = self.prefix, self.schedule, self.args
        with self.accelerator.autocast():
            return roll_out(*policy, conversations, num_pictures, seeds, *controls, shared)

    @torch.no_grad()
    def _pictures_of(self, codes: torch.Tensor) -> list[Image.Image]:
        pixels = self._nextflow.model.vq_model.decode(codes, self.schedule.final_grid)
        return self.processing_class.post_process_image(pixels)

    def _decode(self, token_ids: list[int]) -> str:
        return self.processing_class.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _judge(
        self, rows, conversations: list[list[dict]], pictures: list[Image.Image], texts: list[list[int]] | None
    ) -> torch.Tensor:
        """(pictures, functions) rewards of answers, pictures after texts where there are some."""
        contents = [[{"type": "image", "image": picture}] for picture in pictures]
        if texts is not None:
            contents = [
                [{"type": "text", "text": self._decode(text)}, *content] for text, content in zip(texts, contents)
            ]
        return call_rewards(
            self.reward_funcs,
            len(pictures),
            self.args.reward_timeout,
            prompts=conversations,
            completions=[[{"role": "assistant", "content": content}] for content in contents],
            completion_ids=[None] * len(pictures) if texts is None else texts,
            images=pictures,
            trainer_state=self.state,
            log_extra=lambda name, values: None,
            log_metric=self._note,
            **_columns(rows),
        )

    def _judge_further(self, rollouts: Rollouts, rows, conversations) -> torch.Tensor:
        """(rows, further, functions) rewards of further pictures that continue the same prefixes."""
        numbers = range(1, self.args.vmr_continuations)
        seeds, further = self._seeds(rows, numbers), len(numbers)
        _, codes = self._roll_out(conversations, further, seeds, rollouts)
        texts = None if rollouts.text_mask is None else rollouts.texts()
        repeat = lambda values: [value for value in values for _ in numbers]  # noqa: E731
        texts = None if texts is None else repeat(texts)
        rewards_NF = self._judge(repeat(rows), repeat(conversations), self._pictures_of(codes), texts)
        return rewards_NF.view(len(rows), further, -1)

    @contextmanager
    def _at_fault_together(self):
        """A reward at fault on one process raises on all of them, so that none waits and all save."""
        error = None
        try:
            yield
        except RewardError as raised:
            error = raised
        faults = self.accelerator.gather(torch.tensor([error is not None], device=self.args.device))
        if error is not None:
            raise error
        if faults.any():
            raise RewardError(f"a reward function is at fault on process {int(faults.int().argmax())}")

    def _mask(self, rollouts: Rollouts, rows, conversations, pictures) -> torch.Tensor:
        mask = self.token_mask_func(prompts=conversations, images=pictures, prefix=self.prefix, **_columns(rows))
        if mask.shape != rollouts.codes.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"token_mask_func must return bool of the shape {tuple(rollouts.codes.shape)}, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        return mask.to(rollouts.codes.device)

    def _count_levels(self, rollouts: Rollouts) -> None:
        schedules = self.schedule, self.model_schedule
        differences, kl = level_difference(self.model, rollouts, self.prefix, *schedules, self.args)
        for scale, values in enumerate(zip(differences, kl), start=1):
            for name, value in zip(("logp_difference", "kl"), values):
                self._count(f"level/{name}/scale_{scale}", value)

    def _count_texts(self, rollouts: Rollouts) -> None:
        lengths = rollouts.text_mask.sum(dim=1).float()
        self._count("completions/mean_length", lengths.mean())
        self._count("completions/clipped_ratio", (~rollouts.text_mask[:, -1]).float().mean())

    def _count_rewards(self, rewards_NF: torch.Tensor, rewards: torch.Tensor) -> None:
        deviations = nanstd(rewards.view(-1, self.args.num_generations))
        self._note("reward", rewards.nanmean())
        self._note("reward_std", nanstd(rewards[None]))
        self._note("frac_reward_zero_std", (deviations < 1e-8).float().mean())
        for function, column in zip(self.reward_funcs, rewards_NF.T):
            name = f"rewards/{reward_name(function)}"
            self._note(f"{name}/mean", column.nanmean())
            self._note(f"{name}/std", nanstd(column[None]))

    # Loss

    def _logps(self, model, rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
        return rollout_logps(model, rollouts, self.prefix, self.schedule, self.args)

    def _reference_logps(self, rollouts: Rollouts) -> torch.Tensor:
        if self.ref_model is not None:
            return self._logps(self.ref_model, rollouts)[0]
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return self._logps(self.model, rollouts)[0]

    def compute_loss(self, model, inputs: Rollouts, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("the loss of GRPO comes without outputs")
        rollouts, parts = inputs, self._parts(inputs)
        logps, entropies = self._logps(model, rollouts)
        old = logps.detach() if rollouts.old_logps is None else rollouts.old_logps
        ref = logps if rollouts.ref_logps is None else rollouts.ref_logps
        widths = [part.weights.shape[1] for part in parts]
        columns = (values.split(widths, dim=1) for values in (logps, old, ref, rollouts.sampling_logps, entropies))
        return sum(
            part.share * self._part_loss(part, rollouts.advantages, *own) for part, *own in zip(parts, *columns)
        )

    def _parts(self, rollouts: Rollouts) -> list[Part]:
        """What is optimised of a batch, in the order of its log-probabilities."""
        args, parts = self.args, []
        if args.optimize != "image":
            weights = rollouts.text_mask / rollouts.text_mask.sum(dim=1, keepdim=True)
            parts.append(Part("text/", weights, rollouts.text_mask, (1,) * weights.shape[1], args.text_loss_weight))
        if args.optimize != "text":
            weights = self.token_weights.to(rollouts.codes.device).expand_as(rollouts.codes)
            if rollouts.token_mask is not None:
                weights = weights * rollouts.token_mask
                weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
            parts.append(Part("", weights, torch.ones_like(weights, dtype=torch.bool), self.prefix.lengths, 1.0))
        return parts

    def _part_loss(self, part: Part, advantages, logps, old, ref, sampling_logps, entropies) -> torch.Tensor:
        args, name, sampled = self.args, part.name, part.sampled
        ratios = log_ratios(logps, old, part.lengths, args.importance_sampling_level)
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        losses, clipped_low, clipped_high = clipped_policy_loss(ratios, advantages, args.epsilon, high)
        mean = lambda values: (values * part.weights).sum(dim=1).mean()  # noqa: E731
        loss = mean(losses)
        if args.beta:
            kl = kl_to_reference(logps, ref, old if args.use_bias_correction_kl else None)
            loss = loss + args.beta * mean(kl)
            self._count(f"{name}kl", mean(kl))
        share = lambda name, values: self._count(name, values[sampled].float().mean(), int(sampled.sum()))  # noqa: E731
        share(f"{name}entropy", entropies)
        for bound, clipped in (("low", clipped_low), ("high", clipped_high), ("region", clipped_low | clipped_high)):
            share(f"{name}clip_ratio/{bound}_mean", clipped)
        self._count(f"{name}clip_ratio/low_min", clipped_low[sampled].float().mean(), over="min")
        self._count(f"{name}clip_ratio/high_max", clipped_high[sampled].float().mean(), over="max")
        difference = (old.detach() - sampling_logps).abs()
        share(f"{name}sampling/sampling_logp_difference/mean", difference)
        self._count(f"{name}sampling/sampling_logp_difference/max", difference[sampled].max(), over="max")
        return loss

    def _count(self, name: str, value: torch.Tensor, weight: int = 1, over: str | None = None) -> None:
        """Note a metric of all processes: the mean by their weights, or the extreme that `over` names."""
        pair = torch.stack([value.detach().float(), value.new_tensor(weight, dtype=torch.float32)])
        values, weights = self.accelerator.gather(pair[None]).T
        of_all = getattr(values, over)() if over else (values * weights).sum() / weights.sum()
        self._note(name, of_all, float(weights.sum()))

    def _note(self, name: str, value: float | torch.Tensor, weight: float = 1.0) -> None:
        self._metrics[name].append((float(value), weight))

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._note("step_seconds", time.perf_counter() - started)
        return loss

    # What comes out

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """See `Trainer.train`. `True` goes on from the newest whole checkpoint in `output_dir`, whatever a killed run
        left beside it. A reward at fault ends the training with its last step saved.

        Raises:
            RewardError: if a reward is at fault.
            ValueError: if what should be resumed is no whole checkpoint.
        """
        self.args.resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        try:
            return super().train(self.args.resume_from_checkpoint, *args, **kwargs)
        except RewardError:
            if self.state.global_step:
                self._save_checkpoint(self.model, trial=None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            raise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            metrics, self._metrics = dict(self._metrics), defaultdict(list)
            rollouts, steps = (
                sum(seconds for seconds, _ in metrics.pop(f"{name}_seconds", [])) for name in ("rollout", "step")
            )
            counted, self._logged_at = self.state.global_step - self._logged_at, self.state.global_step
            logs = logs | {name: _over_steps(name.removeprefix("text/"), values) for name, values in metrics.items()}
            logs |= {"step_time": steps / max(counted, 1), "rollout_share": rollouts / max(steps, 1e-9)}
            if self.args.log_completions and self.is_world_process_zero():
                self._draw_completions()
        super().log(logs, start_time)

    def _draw_completions(self) -> None:
        kept = self._pictures[: self.args.num_completions_to_print]
        captions, pictures = [f"{reward:.3g}: {text}" for text, _, reward in kept], [image for _, image, _ in kept]
        sheet = draw_sheet([(caption, [picture]) for caption, picture in zip(captions, pictures)])
        path = Path(self.args.output_dir) / "completions" / f"step-{self.state.global_step}.png"
        write_atomically(path, lambda partial: sheet.save(partial, format="PNG"))
        self._reports.log(self.args, self.state.global_step, pictures, captions)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Rewards of `num_generations_eval` pictures for each prompt of the dataset, or of each of several datasets by
        name, sampled as in training; pictures depend on the seed and the prompt's number alone."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        if isinstance(dataset, dict):
            results = (
                self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}") for name, each in dataset.items()
            )
            return {name: value for result in results for name, value in result.items()}
        count = self.args.num_generations_eval or self.args.num_generations
        at_once = max(self.args.per_device_eval_batch_size // count, 1)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.model.eval()
        own, rewards = range(rank, len(dataset), world), [torch.empty(0, len(self.reward_funcs))]
        of_training, self._metrics = self._metrics, defaultdict(list)
        with self._at_fault_together():
            for start in range(0, len(own), at_once):
                numbered = [(index, n) for index in own[start : start + at_once] for n in range(count)]
                rows = [(index, dataset[index]) for index, _ in numbered]
                seeds = [seed_of(self.args.seed, -1, *each) for each in numbered]
                rollouts, pictures, conversations = self._sample(rows, seeds)
                texts = None if rollouts.text_mask is None else rollouts.texts()
                rewards.append(self._judge(rows, conversations, pictures, texts))
        logged, self._metrics = self._metrics, of_training
        rewards_NF = self.accelerator.pad_across_processes(
            torch.cat(rewards).to(self.args.device), pad_index=float("nan")
        )
        rewards_NF = self.accelerator.gather(rewards_NF).cpu()
        metrics = {f"{metric_key_prefix}_reward": float(combine(rewards_NF, self.reward_weights).nanmean())}
        for function, column in zip(self.reward_funcs, rewards_NF.T):
            metrics[f"{metric_key_prefix}_rewards/{reward_name(function)}/mean"] = float(column.nanmean())
        metrics |= {f"{metric_key_prefix}_{name}": _over_steps(name, values) for name, values in logged.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Buffer(TrainerCallback):
    """The rollouts that a checkpoint finds unfinished; ends what reports pictures."""

    def __init__(self, trainer: NextFlowGRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        trainer = self.trainer
        trainer._step = self._batches(args, state, train_dataloader)
        trainer._logged_at = state.global_step
        if trainer._step % trainer._batches_of_generation:
            tensors = load_file(self._path(Path(args.resume_from_checkpoint)), device=str(args.device))
            trainer._buffer = trainer._split(Rollouts(**tensors))

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._reports.close()

    def on_save(self, args, state, control, train_dataloader=None, **kwargs):
        if self._batches(args, state, train_dataloader) % self.trainer._batches_of_generation:
            parts = [part.tensors() for part in self.trainer._buffer]
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            path = self._path(Path(args.output_dir, f"checkpoint-{state.global_step}"))
            write_atomically(path, lambda partial: save_file(tensors, partial))

    def _batches(self, args, state, loader: DataLoader) -> int:
        """How many the steps so far took; the last one of an epoch takes what is left of it."""
        epochs, steps = divmod(state.global_step, math.ceil(len(loader) / args.gradient_accumulation_steps))
        return epochs * len(loader) + steps * args.gradient_accumulation_steps

    def _path(self, checkpoint: Path) -> Path:
        return checkpoint / ROLLOUTS.format(rank=self.trainer.accelerator.process_index)


def _rows(items: list) -> list:
    return items


def _columns(rows: list[tuple[int, dict]]) -> dict[str, list]:
    """The dataset's columns for reward functions."""
    names = [name for name in rows[0][1] if name not in PROMPT_COLUMNS]
    return {name: [row[name] for _, row in rows] for name in names}


def _text(conversation: list[dict]) -> str:
    """The texts of the last message."""
    return " ".join(item["text"] for item in conversation[-1]["content"] if item["type"] == "text")


def _over_steps(name: str, noted: list[tuple[float, float]]) -> float:
    """What is logged of a metric's weighted values."""
    if name in EXTREMES:
        return EXTREMES[name](value for value, _ in noted)
    return sum(value * weight for value, weight in noted) / sum(weight for _, weight in noted)
