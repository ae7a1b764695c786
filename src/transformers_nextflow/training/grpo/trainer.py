"""[`NextFlowGRPOTrainer`]: prefix-tuning GRPO (NextFlow sec. 3.2.5) on transformers' Trainer, in TRL's shape."""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from ...data.inspection import draw_sheet
from ...lora import below_adapters
from ...modeling_nextflow import NextFlowForConditionalGeneration
from ...processing_nextflow import NextFlowProcessor
from ...utils.files import save_png, write_atomically
from ..fsdp import whole_weights
from ..loading import PrecisionTrainer, load_to_train
from ..measuring import MeasuringTrainer
from ..samples import PictureReports
from .config import RATE, RATE_OF_ADAPTERS, NextFlowGRPOConfig
from .metrics import Metrics
from .objective import (
    clipped_policy_loss,
    combine,
    group_advantages,
    kl_to_reference,
    log_ratios,
    nanstd,
    normalized_sum_advantages,
    num_prefix_scales,
    prefix_values,
    token_weights,
)
from .prompts import Numbered, PromptOrder, Rows, check_prompts, columns, conversations, seed_of
from .reference import FollowPolicy, Reference
from .reward_models import prompt_text
from .rewards import RewardError, RewardFunction, Rewards
from .rollouts import PrefixControls, Rollouts, level_difference, roll_out, rollout_logps

ROLLOUTS = "rollouts-{rank}.safetensors"
REFERENCE = "reference.safetensors"


@dataclass(frozen=True)
class Part:
    """Texts, or prefixes of pictures, in a batch that is optimised.

    Attributes:
        name: before its metrics.
        weights: (B, a) of its tokens or codes, which sum to 1 in a row.
        sampled: (B, a) bool, which count.
        lengths: codes of each scale; 1 for every token of a text.
        share: of its loss in the batch's.
    """

    name: str
    weights: torch.Tensor
    sampled: torch.Tensor
    lengths: tuple[int, ...]
    share: float


class NextFlowGRPOTrainer(PrecisionTrainer, MeasuringTrainer):
    """GRPO on the coarse scales of pictures.

    One step: every prompt of the batch draws a group of pictures over one reading of the prompt, reward functions
    judge them, and one forward that ends with the scale prefix gives the log-probabilities that eq. 5 moves.

    Logged with TRL's names and meaning: `reward`, `reward_std`, `frac_reward_zero_std`, `rewards/<function>/mean` and
    `/std`, `kl` and `entropy` by code, `clip_ratio/*`, `step_time`, and `sampling/sampling_logp_difference/mean` and
    `/max` between the log-probabilities of sampling and of training; beside them `rollout_share` of the step's time,
    and `vmr/value` of prefixes with several continuations. Texts have `kl`, `entropy`, `clip_ratio/*` and `sampling/*`
    of their own after `text/`, `completions/mean_length`, and `completions/clipped_ratio`, the share that reached the
    limit without `<boi>`. With `log_completions` the last batch's pictures, `num_completions_to_print` of them or all,
    are drawn to `output_dir/completions` and go to the trackers of `report_to`, see [`PictureReports`].

    Rollouts of a lower `rollout_level` than the model's have the same first scales, but not quite the same policy: the
    number of an image's scales is embedded too. `level/kl/scale_1` .. and `level/logp_difference/scale_1` .. say how
    far its distributions, and the log-probabilities of the rollouts' codes, are from those of the model's level.

    Differs from TRL's trainer, which it does not subclass: rollouts depend on seed, prompt and step alone, and a
    checkpoint between two steps of one generation holds its rollouts, so that resuming is exact. The KL's reference is
    the model as it is handed over, see [`~reference.Reference`]. FSDP2 gathers whole weights for rollouts, and takes
    prompts of an evaluation that divide by the processes; DeepSpeed's ZeRO-3 is refused.

    Args:
        model: a [`NextFlowForConditionalGeneration`], adapters on one, or the name of either, see
            [`~loading.load_to_train`]; with `args.model_init_kwargs`. Adapters that it has are trained on.
        reward_funcs: one or more, see `rewards.py`; weighted by `args.reward_weights`.
        train_dataset, eval_dataset: rows with `prompt`, a text or messages, optionally `images` (or `image`), PIL
            pictures for its image items; other columns go to the reward functions.
        processing_class: [`NextFlowProcessor`]; loaded with a model that comes by name.
        peft_config: adapters to train instead of the weights of a model that has none.
        token_mask_func: `f(prompts, images, prefix, **columns)` -> (B, n) bool, which codes of the prefix are
            optimised (arXiv 2601.02256, mask propagation).

    Raises:
        ValueError: if a prefix or sampler setting does not fit the schedule, weights and functions differ in number, a
            dataset has no length or no prompts or is smaller than a generation, or there are adapters already.
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
        self.rewards = Rewards(reward_funcs, args.reward_weights, args.reward_timeout)
        for name, dataset in {"train_dataset": train_dataset, **self._evaluations(eval_dataset)}.items():
            if dataset is not None:
                check_prompts(name or "eval_dataset", dataset)
        if isinstance(model, str):
            model, processing_class = load_to_train(model, processing_class, **(args.model_init_kwargs or {}))
        if processing_class is None:
            raise ValueError("give the processor as `processing_class`; it is loaded for a model that comes by name")
        if peft_config is not None:
            from peft import get_peft_model

            if hasattr(model, "peft_config"):
                raise ValueError("the model has adapters, which are trained on: leave peft_config out, or merge them")
            model = get_peft_model(model, peft_config)
        base = below_adapters(model)
        if base is model:
            base.model.vq_model.requires_grad_(False)
        elif args.gradient_checkpointing:
            model.enable_input_require_grads()
        defaults = base.config.image_generation
        aspect_ratio, schedules = args.aspect_ratio or defaults["aspect_ratio"] or "1:1", base.model.schedules
        self.schedule = schedules.by_aspect_ratio(aspect_ratio, args.rollout_level or defaults["level"], exact=False)
        self.model_schedule = schedules.by_aspect_ratio(aspect_ratio, defaults["level"], exact=False)
        self.prefix = self.schedule.prefix(num_prefix_scales(self.schedule, args.scale_prefix, args.prefix_tokens))
        self.token_weights = token_weights(self.prefix, args.scale_loss_alpha)
        PrefixControls.create(args, self.prefix, self.schedule)
        self.token_mask_func = token_mask_func
        if token_mask_func is not None and args.optimize == "text":
            raise ValueError("token_mask_func says which codes are optimised, optimize='text' optimises none")
        if args.sync_ref_model and not args.beta:
            raise ValueError("sync_ref_model needs beta > 0")
        super().__init__(model, args, list, train_dataset, eval_dataset, processing_class=processing_class, **kwargs)
        self._check_devices()
        if args.learning_rate is None:
            self.args = copy.copy(args)  # which may serve another trainer, of a model with adapters or without
            self.args.learning_rate = RATE_OF_ADAPTERS if hasattr(model, "peft_config") else RATE
        self.reference = Reference(self.model) if args.beta else None
        if args.sync_ref_model:
            self.add_callback(FollowPolicy(self.reference))
        self._step, self._logged_at, self._buffer = 0, 0, []
        self._fault: RewardError | None = None
        self._begin_logs()
        self._pictures: list[tuple[str, Image.Image, float]] = []
        self._reports = PictureReports("completions")
        self.add_callback(_Resume(self))

    def _begin_logs(self) -> None:
        """Of a training; one before it may have ended between two logs, or in an evaluation."""
        self._metrics, self._from_rewards = Metrics(), defaultdict(list)
        self._seconds = {"rollout": 0.0, "step": 0.0}

    @staticmethod
    def _evaluations(eval_dataset) -> dict:
        """Datasets of evaluations, by name."""
        return eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}

    def _check_devices(self) -> None:
        """Raise a `ValueError` for what rollouts and evaluations cannot run on."""
        shards = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        if shards or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError("rollouts need whole weights, which FSDP2 gathers for them: not FSDP1 or ZeRO-3")
        sharing = self.accelerator.num_processes if self.is_fsdp_enabled else 1
        for dataset in self._evaluations(self.eval_dataset).values():
            if dataset is not None and len(dataset) % sharing:
                raise ValueError(
                    f"under FSDP2 an evaluation's prompts must divide by the {sharing} processes, got {len(dataset)}"
                )

    @property
    def _nextflow(self) -> NextFlowForConditionalGeneration:
        """The model below the wrappers of devices and adapters."""
        return below_adapters(self.accelerator.unwrap_model(self.model))

    @property
    def _batches_of_generation(self) -> int:
        """How many batches train on the rollouts of a generation, repetitions included."""
        return self.args.steps_per_generation * self.args.num_iterations

    # Prompts

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
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
        return self._get_dataloader(Numbered(self.train_dataset), "Training", size, lambda _: order, is_training=True)

    def _prepare_inputs(self, inputs: Rows) -> Rollouts:
        """The rollouts of a step: new ones at the beginning of a generation, else the next of those that are there."""
        if self._step % self._batches_of_generation == 0:
            started = time.perf_counter()
            self._buffer = self._split(self._generate(inputs))
            self._seconds["rollout"] += time.perf_counter() - started
        rollouts = self._buffer[self._step % self.args.steps_per_generation]
        self._step += 1
        return rollouts

    def _split(self, rollouts: Rollouts) -> list[Rollouts]:
        size = self.args.per_device_train_batch_size
        return [rollouts.rows(slice(start, start + size)) for start in range(0, len(rollouts.codes), size)]

    # Rollouts

    def _generate(self, rows: Rows) -> Rollouts:
        """Sample, judge, and compare within groups."""
        args = self.args
        self.model.eval()
        rollouts, pictures, chats = self._sample(rows, self._seeds(rows, range(1)))
        rewards_NKF = self._judge(rows, chats, pictures, rollouts)[:, None]
        if args.vmr_continuations > 1:
            rewards_NKF = torch.cat([rewards_NKF, self._judge_further(rollouts, rows, chats)], dim=1)
        self._raise_together()
        self._count_rollouts(rollouts)
        rewards_NKF = self.accelerator.gather(rewards_NKF.to(args.device)).cpu()
        advantages, values = self._compare(rewards_NKF, args.num_generations)
        first = self.accelerator.process_index * len(rows)
        own = slice(first, first + len(rows))
        rollouts.advantages = advantages[own].to(args.device)
        if self.token_mask_func is not None:
            rollouts.token_mask = self._mask(rollouts, rows, chats, pictures)
        with torch.no_grad():
            # where an update falls into a generation, what follows still compares with the policy that sampled
            if args.gradient_accumulation_steps % self._batches_of_generation:
                rollouts.old_logps = torch.cat([self._logps(self.model, part)[0] for part in self._split(rollouts)])
            if self.reference is not None:
                rollouts.ref_logps = torch.cat([self._reference_logps(part) for part in self._split(rollouts)])
            if self.schedule != self.model_schedule and args.optimize != "text":
                self._count_levels(self._split(rollouts)[0])
        captions = list(map(prompt_text, chats))
        if rollouts.text_mask is not None:
            captions = [f"{prompt} -> {self._decode(text)}" for prompt, text in zip(captions, rollouts.texts())]
        self._pictures = list(zip(captions, pictures, values[own].tolist()))
        self.model.train()
        return rollouts

    def _seeds(self, rows: Rows, numbers: range) -> list[int]:
        """Of numbered pictures of this process's rows, by their place in the whole generation."""
        generation, first = self._step // self._batches_of_generation, self.accelerator.process_index * len(rows)
        return [
            seed_of(self.args.seed, generation, first + place, number)
            for place in range(len(rows))
            for number in numbers
        ]

    def _sample(self, rows: Rows, seeds: list[int]) -> tuple[Rollouts, list[Image.Image], list[list[dict]]]:
        """A picture and the conversation it answers for each row."""
        chats, repeats = conversations(rows)
        rollouts, codes = self._roll_out(chats, repeats, seeds)
        return rollouts, self._pictures_of(codes), [chat for chat in chats for _ in range(repeats)]

    def _roll_out(
        self, chats: list[list[dict]], num_pictures: int, seeds: list[int], shared: Rollouts | None = None
    ) -> tuple[Rollouts, torch.Tensor]:
        """[`roll_out`] in the precision of training's forward."""
        policy, controls = (self._nextflow, self.processing_class), (self.prefix, self.schedule, self.args)
        with self.accelerator.autocast(), whole_weights(self.model):
            return roll_out(*policy, chats, num_pictures, seeds, *controls, shared)

    @torch.no_grad()
    def _pictures_of(self, codes: torch.Tensor) -> list[Image.Image]:
        with whole_weights(self.model):
            pixels = self._nextflow.model.vq_model.decode(codes, self.schedule.final_grid)
        return self.processing_class.post_process_image(pixels)

    def _decode(self, token_ids: list[int]) -> str:
        return self.processing_class.tokenizer.decode(token_ids, skip_special_tokens=True)

    # Rewards

    def _judge(
        self, rows: Rows, chats: list[list[dict]], pictures: list[Image.Image], rollouts: Rollouts, each: int = 1
    ) -> torch.Tensor:
        """(pictures, functions) rewards of answers, pictures after texts where there are some; `each` of a rollout.
        NaN from a reward at fault on, for [`_raise_together`]: other processes still share the next rollouts."""
        if self._fault is not None:
            return self._no_rewards(pictures)
        repeated = lambda values: [value for value in values for _ in range(each)]  # noqa: E731
        contents, texts = [[{"type": "image", "image": picture}] for picture in pictures], [None] * len(pictures)
        if rollouts.text_mask is not None:
            texts = repeated(rollouts.texts())
            contents = [
                [{"type": "text", "text": self._decode(text)}, *content] for text, content in zip(texts, contents)
            ]
        try:
            return self.rewards(
                len(pictures),
                prompts=repeated(chats),
                completions=[[{"role": "assistant", "content": content}] for content in contents],
                completion_ids=texts,
                images=pictures,
                trainer_state=self.state,
                log_extra=lambda name, values: None,
                log_metric=lambda name, value: self._from_rewards[name].append(value),
                **columns(repeated(rows)),
            )
        except RewardError as error:
            self._fault = error
            return self._no_rewards(pictures)

    def _no_rewards(self, pictures: list[Image.Image]) -> torch.Tensor:
        return torch.full((len(pictures), len(self.rewards.functions)), torch.nan)

    def _judge_further(self, rollouts: Rollouts, rows: Rows, chats) -> torch.Tensor:
        """(rows, further, functions) rewards of further pictures that continue the same prefixes."""
        numbers = range(1, self.args.vmr_continuations)
        _, codes = self._roll_out(chats, len(numbers), self._seeds(rows, numbers), rollouts)
        rewards = self._judge(rows, chats, self._pictures_of(codes), rollouts, each=len(numbers))
        return rewards.view(len(rows), len(numbers), -1)

    def _raise_together(self) -> None:
        """A reward at fault on one process raises on all of them, so that none waits and all save; all come here."""
        error, self._fault = self._fault, None
        faults = self.accelerator.gather(torch.tensor([error is not None], device=self.args.device))
        if error is not None:
            raise error
        if faults.any():
            raise RewardError(f"a reward function is at fault on process {int(faults.int().argmax())}")

    def _compare(self, rewards_NKF: torch.Tensor, num_generations: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) advantages of all processes' rollouts, and their values."""
        args, weights, eta = self.args, self.rewards.weights, self.args.vmr_eta
        values = prefix_values(combine(rewards_NKF, weights), eta)
        if args.multi_objective_aggregation == "normalize_then_sum":
            values_NF = torch.stack([prefix_values(each, eta) for each in rewards_NKF.unbind(dim=2)], dim=1)
            advantages, deviations = normalized_sum_advantages(values_NF, weights, num_generations)
        else:
            advantages, deviations = group_advantages(values, num_generations, args.scale_rewards)
        self._count_rewards(rewards_NKF.flatten(0, 1), deviations)
        if rewards_NKF.shape[1] > 1:
            self._metrics.mean("vmr/value", values.nanmean())
        return advantages, values

    def _count_rewards(self, rewards_NF: torch.Tensor, deviations: torch.Tensor) -> None:
        rewards = combine(rewards_NF, self.rewards.weights)
        self._metrics.mean("reward", rewards.nanmean())
        self._metrics.mean("reward_std", nanstd(rewards[None]))
        self._metrics.mean("frac_reward_zero_std", (deviations <= 1e-8).float().mean())
        for name, column in zip(self.rewards.names, rewards_NF.T):
            self._metrics.mean(f"rewards/{name}/mean", column.nanmean())
            self._metrics.mean(f"rewards/{name}/std", nanstd(column[None]))
        noted, self._from_rewards = self._from_rewards, defaultdict(list)
        of_all = gather_object([dict(noted)])
        for name in sorted({name for own in of_all for name in own}):
            values = [float(value) for own in of_all for value in own.get(name, [])]
            self._metrics.mean(name, sum(values) / len(values))

    def _mask(self, rollouts: Rollouts, rows: Rows, chats, pictures) -> torch.Tensor:
        mask = self.token_mask_func(prompts=chats, images=pictures, prefix=self.prefix, **columns(rows))
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
                self._metrics.mean(f"level/{name}/scale_{scale}", value)

    def _count_rollouts(self, rollouts: Rollouts) -> None:
        if rollouts.text_mask is not None:
            self._metrics.mean("completions/mean_length", rollouts.text_mask.sum(dim=1))
            self._metrics.mean("completions/clipped_ratio", ~rollouts.text_mask[:, -1])

    # Loss

    def _logps(self, model, rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
        return rollout_logps(model, rollouts, self.prefix, self.schedule, self.args)

    def _reference_logps(self, rollouts: Rollouts) -> torch.Tensor:
        with self.reference.in_place():
            return self._logps(self.model, rollouts)[0]

    def compute_loss(self, model, inputs: Rollouts, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("the loss of GRPO comes without outputs")
        rollouts, parts = inputs, self._parts(inputs)
        logps, entropies = self._logps(model, rollouts)
        old = logps.detach() if rollouts.old_logps is None else rollouts.old_logps
        ref = logps if rollouts.ref_logps is None else rollouts.ref_logps
        widths = [part.weights.shape[1] for part in parts]
        of_parts = (values.split(widths, dim=1) for values in (logps, old, ref, rollouts.sampling_logps, entropies))
        return sum(
            part.share * self._part_loss(part, rollouts.advantages, *own) for part, *own in zip(parts, *of_parts)
        )

    def _parts(self, rollouts: Rollouts) -> list[Part]:
        """What is optimised of a batch, in the order of its log-probabilities."""
        args, parts = self.args, []
        if args.optimize != "image":
            sampled = rollouts.text_mask
            parts.append(Part("text/", _shares(sampled), sampled, (1,) * sampled.shape[1], args.text_loss_weight))
        if args.optimize != "text":
            sampled = rollouts.token_mask
            sampled = torch.ones_like(rollouts.codes, dtype=torch.bool) if sampled is None else sampled
            weights = _shares(self.token_weights.to(sampled.device) * sampled)
            parts.append(Part("", weights, sampled, self.prefix.lengths, 1.0))
        return parts

    def _part_loss(self, part: Part, advantages, logps, old, ref, sampling_logps, entropies) -> torch.Tensor:
        args, metrics, name, sampled = self.args, self._metrics, part.name, part.sampled
        ratios = log_ratios(logps, old, part.lengths, args.importance_sampling_level, sampled)
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        losses, clipped_low, clipped_high = clipped_policy_loss(ratios, advantages, args.epsilon, high)
        loss = (losses * part.weights).sum(dim=1).mean()
        if args.beta:  # of eq. 5, whose scale weights are the policy's alone
            kl = kl_to_reference(logps, ref, old if args.use_bias_correction_kl else None)
            loss = loss + args.beta * (kl * _shares(sampled)).sum(dim=1).mean()
            metrics.mean(f"{name}kl", kl[sampled])
        metrics.mean(f"{name}entropy", entropies[sampled])
        for bound, clipped in (("low", clipped_low), ("high", clipped_high), ("region", clipped_low | clipped_high)):
            metrics.mean(f"{name}clip_ratio/{bound}_mean", clipped[sampled])
        counted = sampled.any(dim=1)
        for bound, clipped in (("low_min", clipped_low), ("high_max", clipped_high)):
            metrics.extreme(f"{name}clip_ratio/{bound}", (clipped * _shares(sampled)).sum(dim=1)[counted])
        difference = (old.detach() - sampling_logps).abs()[sampled]
        metrics.mean(f"{name}sampling/sampling_logp_difference/mean", difference)
        metrics.extreme(f"{name}sampling/sampling_logp_difference/max", difference)
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._seconds["step"] += time.perf_counter() - started
        return loss

    # What comes out

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """See [`SavingTrainer.train`]. A reward at fault ends the training with its last step saved.

        Raises:
            RewardError: if a reward is at fault.
            ValueError: if what should be resumed is no whole checkpoint.
        """
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except RewardError:
            if self.state.global_step:
                self._save_checkpoint(self.model, trial=None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            raise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
            counted, self._logged_at = self.state.global_step - self._logged_at, self.state.global_step
            logs = logs | self._metrics.pop()
            logs["step_time"] = seconds["step"] / max(counted, 1)
            logs["rollout_share"] = seconds["rollout"] / max(seconds["step"], 1e-9)
            if self.args.log_completions and self.is_world_process_zero():
                self._draw_completions()
        super().log(logs, start_time)

    def _draw_completions(self) -> None:
        kept = self._pictures[: self.args.num_completions_to_print]
        captions, pictures = [f"{reward:.3g}: {text}" for text, _, reward in kept], [image for _, image, _ in kept]
        sheet = draw_sheet([(caption, [picture]) for caption, picture in zip(captions, pictures)])
        path = Path(self.args.output_dir) / "completions" / f"step-{self.state.global_step}.png"
        save_png(sheet, path)
        self._reports.log(self.args, self.state.global_step, pictures, captions)

    def measure(self, dataset, prefix: str) -> dict[str, float]:
        """Rewards, and the loss with its metrics, of `num_generations_eval` pictures for each prompt of the dataset,
        sampled as in training; pictures depend on the seed and the prompt's number alone. The loss is `beta` times the
        KL, as the advantages of a group have no mean."""
        count = self.args.num_generations_eval or self.args.num_generations
        at_once = max(self.args.per_device_eval_batch_size // count, 1)
        own = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        of_training, self._metrics = self._metrics, Metrics()
        self._from_rewards = defaultdict(list)  # also where one before this failed
        rewards = [torch.empty(0, len(self.rewards.functions))]
        for start in range(0, len(own), at_once):
            numbered = [(index, n) for index in own[start : start + at_once] for n in range(count)]
            rows = [(index, dataset[index]) for index, _ in numbered]
            seeds = [seed_of(self.args.seed, -1, *each) for each in numbered]
            rewards.append(self._judge_held_out(rows, seeds, count))
            if self._fault is not None and not self.is_fsdp_enabled:  # which shares weights until all are through
                break
        self._raise_together()
        self._compare(torch.cat(gather_object([torch.cat(rewards)]))[:, None], count)
        measured, self._metrics = self._metrics.pop(), of_training
        return measured

    def _judge_held_out(self, rows: Rows, seeds: list[int], count: int) -> torch.Tensor:
        """(rows, functions) rewards of whole groups, whose loss is counted."""
        rollouts, pictures, chats = self._sample(rows, seeds)
        rewards = self._judge(rows, chats, pictures, rollouts)
        advantages, _ = group_advantages(combine(rewards, self.rewards.weights), count)
        rollouts.advantages = advantages.to(self.args.device)
        self._count_rollouts(rollouts)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.reference is not None:
                rollouts.ref_logps = self._reference_logps(rollouts)
            self._metrics.mean("loss", self.compute_loss(self.model, rollouts).expand(len(rows)))
        return rewards

    def _save_rng_state(self, output_dir: str) -> None:
        """Also what else resuming needs; before the state of the Trainer, which says that a checkpoint is whole."""
        super()._save_rng_state(output_dir)
        if self._batches_so_far() % self._batches_of_generation:
            parts = [part.tensors() for part in self._buffer]
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            write_atomically(self._rollouts_of(output_dir), lambda partial: save_file(tensors, partial))
        if self.args.sync_ref_model:
            self.reference.save(Path(output_dir, REFERENCE), self.args.should_save)
        self.accelerator.wait_for_everyone()

    def _rollouts_of(self, checkpoint: str) -> Path:
        return Path(checkpoint, ROLLOUTS.format(rank=self.accelerator.process_index))

    def _batches_so_far(self) -> int:
        """How many the steps so far took; the last one of an epoch takes what is left of it."""
        batches, accumulated = len(self.callback_handler.train_dataloader), self.args.gradient_accumulation_steps
        epochs, steps = divmod(self.state.global_step, math.ceil(batches / accumulated))
        return epochs * batches + steps * accumulated


class _Resume(TrainerCallback):
    """Takes up the rollouts that a checkpoint found unfinished; ends what reports pictures."""

    def __init__(self, trainer: NextFlowGRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.reference is not None:
            trainer.reference.shard(trainer.model)
        trainer._step = trainer._batches_so_far()
        trainer._logged_at = state.global_step
        trainer._begin_logs()
        if not state.global_step:
            return
        if trainer._step % trainer._batches_of_generation:
            path = trainer._rollouts_of(args.resume_from_checkpoint)
            if not path.is_file():
                raise ValueError(f"{path.parent} has no {path.name}: resume it with as many processes as wrote it")
            trainer._buffer = trainer._split(Rollouts(**load_file(path, device=str(args.device))))
        if args.sync_ref_model:
            trainer.reference.load(Path(args.resume_from_checkpoint, REFERENCE))

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._reports.close()


def _shares(weights: torch.Tensor) -> torch.Tensor:
    """(B, a) weights or bools, in every row divided by their sum; rows without any stay 0."""
    weights = weights.float()
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
