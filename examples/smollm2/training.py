"""From a converted text model to one that draws: all that it did not have before is trained, then its layers too.

Before any training the text rows of the joint softmax are far above the rows of codes, so that the first gradients are
huge. Table 2's alignment comes first therefore: the new parts alone, until adapters on the layers join.
"""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback

from examples.emoji.documents import EXTRACTION, Stage, build_packs
from examples.emoji.stages import finish, is_finished, settings
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data import BatchPadding, PackCollator, PackedDataset
from transformers_nextflow.lora import CODE_MODULES, lora_config
from transformers_nextflow.losses import IGNORE
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.utils.files import output_folder

STAGE = Stage("64", {"text-to-image": 1.0})
DOCUMENTS = 16_000  # at most, drawn from the 13,471 seen pictures; a longer training shows them again
PICTURES = 8  # of a step, rows of one batch
LONGEST = 512  # positions of a row: 155 codes and the prompt
PEAK, ADAPTERS_PEAK, DECAY_SHARE = 1e-3, 2e-4, 0.5  # learning rates of new parts and adapters, and their decay
ALIGNMENT = 0.1  # share of the steps in which adapters wait
NEW_PARTS = [*CODE_MODULES, "connector", "scale_embedding"]  # trained whole: no text model has them


class PicturesAlone(PackCollator):
    """Batches whose targets are codes alone: what is said, and when a picture begins, is left to the text model.

    Every prompt of the training asks for a picture, so a model that learnt when to draw would learn to always draw.
    """

    def __init__(self, dataset: PackedDataset):
        super().__init__(dataset)
        self.in_pictures = [dataset.spec.special.boi, dataset.spec.special.image]

    def __call__(self, packs):
        return super().__call__([pack | {"shift_labels": self._codes_alone(pack)} for pack in packs])

    def _codes_alone(self, pack: dict[str, np.ndarray]) -> np.ndarray:
        return np.where(np.isin(pack["input_ids"], self.in_pictures), pack["shift_labels"], IGNORE)


def code_documents(folder: Path, start: Path, data: Path, steps: int) -> Path:
    """Code the pictures of so many steps; returns the folder of packs, each the batch of a step."""
    documents, settings = min(steps * PICTURES, DOCUMENTS), replace(EXTRACTION, documents_per_shard=1_000)
    strategy, num_proc = BatchPadding(PICTURES, LONGEST), len(os.sched_getaffinity(0))
    return build_packs(folder, start, data, STAGE, documents, settings, strategy, num_proc=num_proc)


def adapted(start: Path) -> PeftModel:
    """The converted model with LoRA on its layers, its new parts thawed."""
    model = NextFlowForConditionalGeneration.from_pretrained(start)
    model.set_attn_implementation("eager")  # the fastest backward at these lengths on a CPU
    model = get_peft_model(model, lora_config(modules_to_save=NEW_PARTS))
    for layer in model.get_base_model().model.language_model.layers:
        layer.compile(dynamic=True)
    return model


class AdaptersWait(TrainerCallback):
    """Leaves adapters as they are for the first `steps`."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step < self.steps:
            for _, parameter in _adapters(model):
                parameter.grad = None


def _adapters(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name]


def new_optimizer(model: PeftModel, arguments: NextFlowTrainingArguments) -> torch.optim.AdamW:
    """AdamW, with a lower rate for adapters than for what begins from nothing."""
    adapters = dict(_adapters(model))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    new = [parameter for name, parameter in trained if name not in adapters]
    groups = [{"params": new, "lr": PEAK}, {"params": list(adapters.values()), "lr": ADAPTERS_PEAK}]
    betas = arguments.adam_beta1, arguments.adam_beta2
    return torch.optim.AdamW(groups, betas=betas, weight_decay=arguments.weight_decay)


def train(output: Path, start: Path, packs: Path, steps: int) -> None:
    """Train for `steps`, or go on from the last checkpoint, unless it is finished; `output` holds the adapter.

    Losses go to `log.jsonl` beside the output.
    """
    if is_finished(output):
        return
    torch.manual_seed(0)
    model, processor = adapted(start), NextFlowProcessor.from_pretrained(start)
    values = settings(steps, PEAK, DECAY_SHARE)
    values |= {"logging_steps": max(1, steps // 40), "save_steps": max(1, steps // 20)}
    dataset = PackedDataset(packs, model.get_base_model(), processor)
    arguments = NextFlowTrainingArguments(output, **values)
    trainer = NextFlowTrainer(
        model,
        arguments,
        PicturesAlone(dataset),
        dataset,
        processing_class=processor,
        optimizers=(new_optimizer(model, arguments), None),
        callbacks=[AdaptersWait(math.ceil(ALIGNMENT * steps))],
    )
    finish(trainer)


def merge(adapter: Path, start: Path, output: Path) -> None:
    """Write the trained model as a NextFlow like any other into a new folder."""
    model = NextFlowForConditionalGeneration.from_pretrained(start)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with output_folder(output) as partial:
        model.save_pretrained(partial)
        NextFlowProcessor.from_pretrained(start).save_pretrained(partial)
