"""The stages of training (NextFlow table 2): what is trained, at which level, on which mixture, how weighted."""

from dataclasses import dataclass, fields
from importlib.resources import files
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from yaml import YAMLError, safe_load

from ..modeling_nextflow import NextFlowForConditionalGeneration

if TYPE_CHECKING:
    from ..data import PackedDataset

TRAINS = ("connector_and_head", "all")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: of the stage.
        trains: `"connector_and_head"`, all else frozen, or `"all"` but the vision tokenizer (NextFlow sec. 3.2).
        level: of the scale schedules that pictures are brought to.
        epochs: over the stage's packs.
        learning_rate: peak.
        scale_loss_alpha: exponent of the scale weights (eq. 2).
        mixture: documents by kind, in any unit.
        tokens: in trillions; what the paper spent.

    Raises:
        ValueError: for an unknown `trains`, numbers that are none or out of range, or a mixture without documents.
    """

    name: str
    trains: str
    level: str
    epochs: int
    learning_rate: float
    scale_loss_alpha: float
    mixture: dict[str, float]
    tokens: float | None = None

    def __post_init__(self):
        if self.trains not in TRAINS:
            raise ValueError(f"stage {self.name}: trains must be one of {', '.join(TRAINS)}, got {self.trains!r}")
        for name, low in (("epochs", 0), ("learning_rate", 0), ("scale_loss_alpha", -inf)):
            value = getattr(self, name)
            if not _is_number(value) or not low < value < inf:
                above = f" above {low}" if low == 0 else ""
                raise ValueError(f"stage {self.name}: {name} must be a number{above}, got {value!r}")
        amounts = list(self.mixture.values()) if isinstance(self.mixture, dict) else []
        if not all(map(_is_number, amounts)) or min(amounts, default=0) < 0 or sum(amounts) <= 0:
            raise ValueError(f"stage {self.name}: mixture must hold an amount of documents, got {self.mixture}")

    @property
    def shares(self) -> dict[str, float]:
        """The mixture in parts of one."""
        total = sum(self.mixture.values())
        return {kind: amount / total for kind, amount in self.mixture.items()}

    def prepare(self, model: NextFlowForConditionalGeneration, *packs: "PackedDataset") -> None:
        """Freeze and thaw parameters and set the loss's exponent; the vision tokenizer is always frozen.

        Args:
            model: where it has adapters, they are what is trained.
            packs: what the stage is to be trained and evaluated on.

        Raises:
            ValueError: for packs of pictures of another level; for adapters in a stage that trains other parts.
        """
        if others := {level for each in packs for level in each.levels} - {str(self.level)}:
            raise ValueError(
                f"stage {self.name} is of level {self.level}, the packs hold pictures of level "
                f"{', '.join(sorted(others))}: extract them anew with --level {self.level}, or give stages of "
                "your own (stages.yaml is the form)"
            )
        model.config.scale_loss_alpha = self.scale_loss_alpha
        if hasattr(model, "peft_config"):
            if self.trains != "all":
                raise ValueError(f"stage {self.name} trains connector and heads as they are: it takes no adapters")
            return
        for parameter in model.parameters():
            parameter.requires_grad_(self.trains == "all" and parameter.is_floating_point())  # 4-bit weights are not
        if self.trains == "connector_and_head":
            for part in (model.model.connector, model.lm_head, model.code_head):
                part.requires_grad_(True)
        model.model.vq_model.requires_grad_(False)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value):
    """A number, also where YAML reads a text, as 1e-3."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def load_stages(path: str | Path | None = None) -> dict[str, Stage]:
    """Stages by name, in order, from a YAML list of them; by default the paper's.

    Raises:
        ValueError: naming the stage and what it lacks or has too much, or the file if it holds no such list.
    """
    try:
        listed = safe_load((Path(path) if path else files(__package__).joinpath("stages.yaml")).read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(values, dict) for values in listed):
        raise ValueError(f"{path} must hold a list of stages, each with its fields")
    known = {field.name for field in fields(Stage)}
    stages = {}
    for values in listed:
        name = str(values.get("name", "without a name"))
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"stage {name} has unknown fields {', '.join(unknown)}, not {', '.join(sorted(known))}")
        if missing := sorted(known - {"tokens"} - values.keys()):
            raise ValueError(f"stage {name} lacks {', '.join(missing)}")
        if name in stages:
            raise ValueError(f"there are two stages {name}")
        numbers = {field: _number(values[field]) for field in ("epochs", "learning_rate", "scale_loss_alpha")}
        stages[name] = Stage(**values | numbers | {"name": name, "level": str(values["level"])})
    return stages
