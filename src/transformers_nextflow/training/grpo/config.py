"""[`NextFlowGRPOConfig`]: TRL's configuration, and what next-scale pictures add to it."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from trl import GRPOConfig

from ...sampling import SAMPLING_LIMITS, per_scale
from ..checkpoints import output_field
from ..order import OWN_STEPS, check_heeded, judge_by

CHOICES = {
    "optimize": ("image", "text", "both"),
    "logprob_mode": ("conditional", "behaviour"),
    "importance_sampling_level": ("token", "scale"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
PER_SCALE = ("guidance_scale", "temperature", "top_k", "top_p")
RATE, RATE_OF_ADAPTERS = 1e-6, 1e-4
# fields of TRL's that say nothing about pictures drawn by scale
NOT_APPLICABLE = (
    *("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged", "cache_implementation"),
    *("repetition_penalty", "min_p", "generation_kwargs", "mask_truncated_completions", "max_tool_calling_iterations"),
    *("cast_lm_head_to_fp32", "disable_dropout", "router_aux_loss_coef", "pad_to_multiple_of"),
    *("chat_template_kwargs", "log_multimodal", "transformers_continuous_batching_config", "delta"),
    *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"),
    *("off_policy_mask_threshold", "log_completions_hub_repo", "log_unique_prompts"),
)


@dataclass
class NextFlowGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig`; `num_generations` is the paper's G, `epsilon` and `beta` those of eq. 5.

    Open in the paper: clip range, KL weight, G and learning rate; the defaults are TRL's, but for adapters' rate.
    `bf16` is off by default: it holds for rollouts and training alike, but rounds the cached steps of one otherwise
    than the whole forward of the other, and their log-probabilities should agree.

    The best model, where it is asked for, is that of the highest `eval_reward`, by which learning rates go that go by
    a metric, unless `metric_for_best_model` says otherwise: `eval_loss` is `beta` times the KL and no measure of what
    is learned.

    Args:
        learning_rate (`float`, *optional*): default: TRL's 1e-6, which hardly moves adapters; of these 1e-4.
        guidance_scale, temperature, top_k, top_p (numbers, or one for each scale, or the named schedules of
            `sampling.py`; default to 1.0, 1.0, 0, 1.0):
            Of the rollouts' pictures. On a command line several values are one for each scale.
        loss_type (`str`, defaults to `"grpo"`):
            The mean over each picture's prefix, then over pictures; TRL's other forms weigh tokens otherwise.
        optimize (`str`, defaults to `"image"`):
            `"image"`: prompts are answered by a picture, whose prefix is optimised. `"text"`, `"both"`: by a text of
            at most `max_completion_length` tokens, then a picture that follows from it; one or both are optimised.
        text_temperature (`float`, defaults to 1.0), text_top_k (`int`, defaults to 0), text_top_p (`float`, defaults
            to 1.0): of the text; `temperature`, `top_k` and `top_p` are the picture's.
        text_loss_weight (`float`, defaults to 1.0):
            The loss is the picture's, plus this times the text's: the mean over the tokens of each text. Long texts
            and short ones weigh the same, and so do a text and a picture's prefix. The ratio is of each token.
        scale_prefix (`int`, *optional*): m, the number of scales that are optimised.
        prefix_tokens (`int`, *optional*, defaults to 256):
            Where `scale_prefix` is absent: m is the most scales whose codes are no more than this; for the paper's
            schedules 8. `None` optimises all scales.
        scale_loss_alpha (`float`, defaults to 0.9): exponent of the scales' weights (eq. 2).
        importance_sampling_level (`str`, defaults to `"token"`):
            Whether r_t is of each code, or of a scale by the geometric mean of its codes (`"scale"`).
        logprob_mode (`str`, defaults to `"conditional"`):
            `"conditional"`, the paper's: probabilities of the prompt alone under the temperature, whatever guidance
            and filters sampled. `"behaviour"`: of the sampling distribution itself, with guidance, inside the codes
            that could be drawn; the gradient is exact, at two forwards.
        aspect_ratio, rollout_level (`str`, *optional*):
            Of the rollouts' pictures; by default the model's. The first scales of a lower level have the same grids.
        vmr_continuations (`int`, defaults to 1), vmr_eta (`float`, defaults to 1.0):
            With more than one, every prefix is continued so many times and rewarded by
            `eta * log(mean(exp(R / eta)))` (arXiv 2601.02256, VMR; prefix updates alone).
        reward_timeout (`float`, *optional*):
            Seconds after which a reward function counts as hanging. A function that is not `async` is interrupted by
            SIGALRM; one that uses that signal itself has its own limit instead.

    Raises:
        ValueError: for values outside these, or a field of TRL's that does not apply.
    """

    output_dir: str | None = output_field()
    learning_rate: float | None = field(default=None, metadata={"help": "peak; 1e-6, of adapters 1e-4"})
    bf16: bool | None = field(default=False, metadata={"help": "autocast of rollouts and training"})
    loss_type: str = field(default="grpo", metadata={"help": "grpo: the mean over each picture, then over pictures"})
    temperature: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "of pictures, or of each scale"})
    top_k: list[int] = field(default_factory=lambda: [0], metadata={"help": "of pictures, or of each scale; 0: all"})
    top_p: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "of pictures, or of each scale"})
    guidance_scale: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "of the rollouts, or of each of their scales"}
    )
    # pictures leave the text head without a gradient, texts the code head
    ddp_find_unused_parameters: bool | None = field(default=True, metadata={"help": "of several devices"})
    optimize: str = field(default="image", metadata={"help": "image, text or both"})
    text_temperature: float = field(default=1.0, metadata={"help": "of the text before a picture"})
    text_top_k: int = field(default=0, metadata={"help": "of the text before a picture, 0 for all tokens"})
    text_top_p: float = field(default=1.0, metadata={"help": "of the text before a picture"})
    text_loss_weight: float = field(default=1.0, metadata={"help": "of the text's loss beside the picture's"})
    scale_prefix: int | None = field(default=None, metadata={"help": "number of scales that are optimised"})
    prefix_tokens: int | None = field(default=256, metadata={"help": "most codes of the scales that are optimised"})
    scale_loss_alpha: float = field(default=0.9, metadata={"help": "exponent of the scales' weights"})
    logprob_mode: str = field(default="conditional", metadata={"help": "conditional or behaviour"})
    aspect_ratio: str | None = field(default=None, metadata={"help": "of the rollouts, width:height"})
    rollout_level: str | None = field(default=None, metadata={"help": "level of the rollouts' schedule"})
    vmr_continuations: int = field(default=1, metadata={"help": "pictures that continue each prefix"})
    vmr_eta: float = field(default=1.0, metadata={"help": "softness of the value over continuations"})
    reward_timeout: float | None = field(default=None, metadata={"help": "seconds before a reward counts as hanging"})

    def __post_init__(self):
        for name in PER_SCALE:
            value = getattr(self, name)
            if isinstance(value, list) and len(value) == 1:
                setattr(self, name, value[0])
        judge_by("reward", self)
        super().__post_init__()
        check_heeded(self, **OWN_STEPS)
        for name in ("beta", "epsilon", "epsilon_high"):
            if (getattr(self, name) or 0.0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        defaults = {entry.name: entry for entry in fields(GRPOConfig)}
        for name in NOT_APPLICABLE:
            value, default = getattr(self, name), defaults[name].default
            if name == "pad_to_multiple_of" and value is None:
                continue  # what TRL makes of its default
            if value != default:
                raise ValueError(f"{name} does not apply to pictures drawn by scale: leave {default!r}, got {value!r}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.loss_type != "grpo":
            raise ValueError(f"loss_type must be 'grpo', the form of this loss, got {self.loss_type!r}")
        batches, accumulated = self.steps_per_generation * self.num_iterations, self.gradient_accumulation_steps
        if accumulated > batches and accumulated % batches:
            raise ValueError(
                "gradient_accumulation_steps must hold whole generations, of steps_per_generation * num_iterations "
                f"batches: got {accumulated} and {batches}"
            )
        if not self.text_temperature > 0 or not self.text_loss_weight > 0:
            raise ValueError(
                f"text_temperature and text_loss_weight must be positive, got {self.text_temperature} and "
                f"{self.text_loss_weight}"
            )
        for name in ("top_k", "top_p"):
            per_scale(f"text_{name}", getattr(self, f"text_{name}"), 1, *SAMPLING_LIMITS[name])
        if self.optimize != "image" and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        if self.optimize == "text" and self.vmr_continuations > 1:
            raise ValueError(
                f"vmr_continuations values prefixes of pictures, which optimize='text' leaves alone: leave 1, got "
                f"{self.vmr_continuations}"
            )
        if self.vmr_continuations < 1 or not self.vmr_eta > 0:
            raise ValueError(
                f"vmr_continuations must be at least 1 and vmr_eta positive, got {self.vmr_continuations} and "
                f"{self.vmr_eta}"
            )
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ValueError(f"reward_timeout must be positive, got {self.reward_timeout}")

    def to_dict(self) -> dict[str, Any]:
        """As of `TrainingArguments`, schedules over the scales by their fields."""
        values = super().to_dict()
        return values | {name: asdict(values[name]) for name in PER_SCALE if is_dataclass(values[name])}
