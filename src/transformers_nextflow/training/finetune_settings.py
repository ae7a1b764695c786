"""[`FinetuneSettings`], whose defaults are those of the console too."""

from dataclasses import dataclass

RATE_OF_ADAPTERS, RATE_OF_ALL = 1e-3, 1e-5


@dataclass(frozen=True)
class FinetuneSettings:
    """How a model is tuned to pictures.

    Args:
        full: train all weights but the vision tokenizer's, instead of adapters.
        lora_r: rank of the adapters.
        learning_rate: by default 1e-3 of adapters, 1e-5 of all weights.
        steps: of the optimizer, at most.
        batch_size: pictures of a step.
        evaluations: how often on the way the held-out loss is measured and pictures are drawn.
        patience: evaluations without a better held-out loss after which training stops.
        held_out: share of the pictures that are not trained on, at least one and never all.
        level: of the scale schedules; by default the one that the model draws at.
        drop_captions: share of pictures without a caption, for guidance.
        prior: prompts whose pictures, drawn before by the model itself, are trained on too, so that what it could draw
            stays (DreamBooth, arXiv 2208.12242); the new pictures come again until they are half of all.
        samples: pictures drawn at each evaluation, for captions of held-out pictures first.
        seed: of all draws.

    Raises:
        ValueError: for values outside of these.
    """

    full: bool = False
    lora_r: int = 16
    learning_rate: float | None = None
    steps: int = 400
    batch_size: int = 8
    evaluations: int = 20
    patience: int = 3
    held_out: float = 0.1
    level: str | None = None
    drop_captions: float = 0.1
    prior: tuple[str, ...] = ()
    samples: int = 6
    seed: int = 0

    def __post_init__(self):
        for name in ("lora_r", "steps", "batch_size", "evaluations", "patience", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    @property
    def rate(self) -> float:
        return self.learning_rate or (RATE_OF_ALL if self.full else RATE_OF_ADAPTERS)

    @property
    def every(self) -> int:
        """Steps from one evaluation to the next."""
        return max(1, self.steps // self.evaluations)
