"""[`NextFlowGRPOConfig`]: TRL's configuration, and what next-scale pictures add to it."""

from dataclasses import dataclass, field, fields

from trl import GRPOConfig

LOGPROB_MODES = ("conditional", "behaviour")
LEVELS = ("token", "scale")
# fields of TRL's that say nothing about pictures drawn by scale
NOT_APPLICABLE = (
    *("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged", "cache_implementation"),
    *("repetition_penalty", "min_p", "generation_kwargs", "mask_truncated_completions", "max_tool_calling_iterations"),
    *("use_liger_kernel", "cast_lm_head_to_fp32", "disable_dropout", "router_aux_loss_coef", "pad_to_multiple_of"),
    *("loss_type", "delta", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"),
    *("off_policy_mask_threshold", "multi_objective_aggregation", "log_completions_hub_repo", "log_unique_prompts"),
)


@dataclass
class NextFlowGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig`; `num_generations` is the paper's G, `epsilon` and `beta` those of eq. 5.

    Open in the paper: clip range, KL weight, G and learning rate; the defaults are TRL's. `bf16` is off by default:
    rollouts are sampled in the weights' own precision, and training's log-probabilities should agree with them.

    Args:
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
        guidance_scale (`float`, defaults to 1.0): of the rollouts.
        aspect_ratio, rollout_level (`str`, *optional*):
            Of the rollouts' pictures; by default the model's. The first scales of a lower level have the same grids.
        vmr_continuations (`int`, defaults to 1), vmr_eta (`float`, defaults to 1.0):
            With more than one, every prefix is continued so many times and rewarded by
            `eta * log(mean(exp(R / eta)))` (arXiv 2601.02256, VMR; prefix updates alone).
        reward_timeout (`float`, *optional*): seconds after which a reward function counts as hanging.

    Raises:
        ValueError: for values outside these, or a field of TRL's that does not apply.
    """

    bf16: bool | None = field(default=False, metadata={"help": "autocast in training"})
    scale_prefix: int | None = field(default=None, metadata={"help": "number of scales that are optimised"})
    prefix_tokens: int | None = field(default=256, metadata={"help": "most codes of the scales that are optimised"})
    scale_loss_alpha: float = field(default=0.9, metadata={"help": "exponent of the scales' weights"})
    logprob_mode: str = field(default="conditional", metadata={"help": "conditional or behaviour"})
    guidance_scale: float = field(default=1.0, metadata={"help": "of the rollouts"})
    aspect_ratio: str | None = field(default=None, metadata={"help": "of the rollouts, width:height"})
    rollout_level: str | None = field(default=None, metadata={"help": "level of the rollouts' schedule"})
    vmr_continuations: int = field(default=1, metadata={"help": "pictures that continue each prefix"})
    vmr_eta: float = field(default=1.0, metadata={"help": "softness of the value over continuations"})
    reward_timeout: float | None = field(default=None, metadata={"help": "seconds before a reward counts as hanging"})

    def __post_init__(self):
        super().__post_init__()
        defaults = {entry.name: entry for entry in fields(GRPOConfig)}
        for name in NOT_APPLICABLE:
            value, default = getattr(self, name), defaults[name].default
            if name == "pad_to_multiple_of" and value is None:
                continue  # what TRL makes of its default
            if value != default:
                raise ValueError(f"{name} does not apply to pictures drawn by scale: leave {default!r}, got {value!r}")
        if self.importance_sampling_level not in LEVELS:
            raise ValueError(
                f"importance_sampling_level must be one of {', '.join(LEVELS)}, got {self.importance_sampling_level!r}"
            )
        if self.logprob_mode not in LOGPROB_MODES:
            raise ValueError(f"logprob_mode must be one of {', '.join(LOGPROB_MODES)}, got {self.logprob_mode!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, rollouts are sampled; got {self.temperature}")
        if self.vmr_continuations < 1 or not self.vmr_eta > 0:
            raise ValueError(
                f"vmr_continuations must be at least 1 and vmr_eta positive, got {self.vmr_continuations} and "
                f"{self.vmr_eta}"
            )
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ValueError(f"reward_timeout must be positive, got {self.reward_timeout}")
