"""Options that the trainings of a NextFlow have in common: those of TRL's `ModelConfig`, and their meaning here."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from trl import ModelConfig, get_peft_config, get_quantization_config

from ...lora import DECODER_LINEARS
from ...processing_nextflow import NextFlowProcessor
from ...utils.loading import model_name
from ..loading import load_to_train

LORA_OPTIONS = ("lora_", "use_rslora", "use_dora")

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class ModelOptions(ModelConfig):
    """`--model` and `--use_lora` are names of `--model_name_or_path` and `--use_peft`.

    Raises:
        ValueError: for options of LoRA without it, or of 4 bits without these.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub id of a model, or of adapters, which are trained on; default: the repository's",
            "aliases": ["--model"],
        },
    )
    use_peft: bool = field(
        default=False, metadata={"help": "train adapters instead of the weights", "aliases": ["--use_lora"]}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout; drawing is without"})

    def __post_init__(self):
        super().__post_init__()
        for name, beginnings in (("use_peft", ("load_in_", *LORA_OPTIONS)), ("load_in_4bit", ("bnb_", "use_bnb_"))):
            if not getattr(self, name) and (given := self._given(*beginnings)):
                raise ValueError(f"{' and '.join(given)} need {name}")

    def load(
        self, modules_to_save: list[str] | None = None, vision_tokenizer: bool = True
    ) -> tuple[torch.nn.Module, NextFlowProcessor, "PeftConfig | None"]:
        """The model, its processor, and the adapters to put on it; those that it has are trained on.

        Args:
            modules_to_save: what is trained whole beside adapters, where `lora_modules_to_save` does not say.
            vision_tokenizer: see [`load_to_train`].

        Raises:
            ValueError: for options of LoRA where the model has adapters, or 4 or 8 bits where it gets none.
        """
        model, processor = load_to_train(
            model_name(self.model_name_or_path),
            vision_tokenizer=vision_tokenizer,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            revision=self.model_revision,
            quantization_config=get_quantization_config(self),
        )
        if hasattr(model, "peft_config"):
            if given := self._given(*LORA_OPTIONS):
                raise ValueError(f"the model has adapters, which are trained on: leave out {', '.join(given)}")
            return model, processor, None
        if not self.use_peft:
            return model, processor, None
        if self.load_in_4bit or self.load_in_8bit:
            from peft import prepare_model_for_kbit_training

            # what is trained, in float32; checkpointing is the trainer's
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        adapters = get_peft_config(self)
        if adapters.target_modules is None and adapters.target_parameters is None:
            adapters.target_modules = DECODER_LINEARS
        if adapters.modules_to_save is None:
            adapters.modules_to_save = modules_to_save
        if self.model_revision != "main":
            adapters.revision = self.model_revision  # which opens them later
        return model, processor, adapters

    def _given(self, *beginnings: str) -> list[str]:
        """Names of options that differ from their defaults."""
        names = [option for option in fields(self) if option.name.startswith(beginnings)]
        return [option.name for option in names if getattr(self, option.name) != option.default]
