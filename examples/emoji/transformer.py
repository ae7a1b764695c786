"""Training of the transformer: documents of each stage are coded and packed once, then trained on (table 2)."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from transformers_nextflow import (
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQModel,
)
from transformers_nextflow.data import FixedLength, PackCollator, PackedDataset
from transformers_nextflow.training import EMACallback, NextFlowTrainer, NextFlowTrainingArguments, Stage
from transformers_nextflow.utils.files import output_folder

from .attention import DOCUMENTS
from .documents import EXTRACTION, build_packs
from .documents import STAGES as MIXTURES
from .muon import MuonWithAdamW
from .sizes import nextflow_config
from .stages import finish, is_finished, own_share, process_state, settings

WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Training:
    """How long and how fast a stage trains.

    Attributes:
        documents: coded and packed for it; steps go over them again and again.
        pack_length, packs: positions of a pack, and packs of a step.
        steps, peak: of the optimizer, and its learning rate, which falls over the last `decay_share` of them.
        trains, scale_loss_alpha: see [`Stage`].
        variants: self-corrected codings of each picture of a document, of which an epoch takes one.
        ema_decay: of the average that is kept of the weights. At a rate of 2e-3 a longer one is better: on pictures'
            codes the weights' own loss is 4.04, that of an average of 200 steps 3.63, that of four such ones 3.55.
    """

    documents: int
    pack_length: int
    packs: int
    steps: int
    peak: float
    decay_share: float
    trains: str = "all"
    scale_loss_alpha: float = 0.9
    variants: int = 2
    ema_decay: float = 0.995


# Table 2's order: connector and head alone, then everything, at the lower level without and at the higher with eq. 2.
TRAININGS = {
    "alignment": Training(4_000, 192, 32, 60, 1e-3, 0.5, "connector_and_head", 0.0),
    "pretraining-32": Training(12_000, 192, 32, 200, 3e-3, 0.1, scale_loss_alpha=0.0),
    "pretraining-64": Training(72_000, 416, 20, 12_000, 3e-3, 1 / 3),
    "tuning-64": Training(24_000, 848, 10, 1_000, 1.5e-3, 0.9),
    "continued-64": Training(36_000, 848, 10, 5_200, 2e-3, 0.0),
    "covering-64": Training(180_000, 848, 10, 12_000, 2e-3, 0.85, variants=1, ema_decay=0.999),
}
SHARDS = 2  # of a stage's many documents; a picture is coded once in each


def new_model(
    tokenizer: PreTrainedTokenizerFast, vq_model: NextFlowVQModel, seed: int = 4, **config
) -> NextFlowForConditionalGeneration:
    """The transformer at its start, around the trained tokenizer; code embeddings begin as its codebook."""
    torch.manual_seed(seed)
    model = NextFlowForConditionalGeneration(nextflow_config(tokenizer, vq_model.config, **config))
    model.model.vq_model.load_state_dict(vq_model.state_dict())
    model.model.code_embeddings.weight.data.copy_(vq_model.quantizer())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def new_processor(model: NextFlowForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> NextFlowProcessor:
    image_processor = NextFlowImageProcessor.from_vq_config(model.config.vq_config)
    return NextFlowProcessor(image_processor, tokenizer, condition_last_scale=model.config.condition_last_scale)


def code_documents(folder: Path, model: Path, data: Path, stage: str) -> Path:
    """Pack a stage's documents, coded by the tokenizers of `model`; returns the folder of packs. One process works,
    on all cores, while the others wait."""
    training = TRAININGS[stage]
    size = max(-(-training.documents // SHARDS), EXTRACTION.documents_per_shard)
    with process_state().local_main_process_first():
        return build_packs(
            folder / f"{stage}-data",
            model,
            data,
            MIXTURES[stage],
            training.documents,
            replace(EXTRACTION, variants=training.variants, documents_per_shard=size),
            FixedLength(training.pack_length),
            training.packs,
            len(os.sched_getaffinity(0)),
        )


def new_optimizer(
    model: NextFlowForConditionalGeneration, arguments: NextFlowTrainingArguments, peak: float
) -> MuonWithAdamW:
    """Muon for the decoder's layers, whatever else is trained by AdamW.

    Differs from the paper, whose optimizer is AdamW: at these sizes Muon needs fewer steps.
    """
    return MuonWithAdamW(
        model.named_parameters(),
        lambda name: "language_model.layers" in name,
        peak,
        arguments.weight_decay,
        (arguments.adam_beta1, arguments.adam_beta2),
    )


def train_stage(folder: Path, stage: str, before: Path, data: Path) -> Path:
    """Train one stage from the model in `before`, unless it is finished; returns the folder of its average."""
    training, output = TRAININGS[stage], folder / stage
    if is_finished(output):
        return output
    packs = code_documents(folder, before, data, stage)
    model = NextFlowForConditionalGeneration.from_pretrained(before, dtype=torch.float32)
    processor = NextFlowProcessor.from_pretrained(before)
    mixture = dict(MIXTURES[stage].mixture)
    Stage(stage, training.trains, MIXTURES[stage].level, 1, training.peak, training.scale_loss_alpha, mixture).prepare(
        model
    )
    if not torch.cuda.is_available():
        model.set_attn_implementation({"text_config": DOCUMENTS})
    if training.trains == "all":
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)
    values = settings(training.steps, training.peak, training.decay_share)
    values |= {"weight_decay": WEIGHT_DECAY, "per_device_train_batch_size": own_share(training.packs)}
    arguments = NextFlowTrainingArguments(output, **values)
    average, dataset = EMACallback(training.ema_decay), PackedDataset(packs, model, processor)
    optimizer = new_optimizer(model, arguments, training.peak) if training.trains == "all" else None
    trainer = NextFlowTrainer(
        model,
        arguments,
        PackCollator(dataset, training.pack_length),
        dataset,
        processing_class=processor,
        optimizers=(optimizer, None),
        callbacks=[average],
    )
    finish(trainer, before_saving=lambda: average.copy_to(model))
    return output


def train_transformer(folder: Path, tokenizer: PreTrainedTokenizerFast, vq_model: NextFlowVQModel, data: Path) -> Path:
    """All stages in order; returns the folder of the last model."""
    start = folder / "start"
    with process_state().local_main_process_first():
        if not start.exists():
            model = new_model(tokenizer, vq_model)
            with output_folder(start) as partial:
                new_processor(model, tokenizer).save_pretrained(partial)
                model.save_pretrained(partial)
    before = start
    for stage in TRAININGS:
        before = train_stage(folder, stage, before, data)
    return before
