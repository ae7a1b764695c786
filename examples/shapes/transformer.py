"""Training of the transformer: documents are coded and packed once, then text and codes are trained on together."""

from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerFast

from transformers_nextflow import (
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQModel,
    SelfCorrection,
)
from transformers_nextflow.data import ExtractionSettings, FixedLength, PackedDataset
from transformers_nextflow.files import output_folder
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments

from .documents import build_packs
from .muon import MuonWithAdamW
from .sizes import nextflow_config
from .stages import finish, is_finished, processes, settings

CORRECTION = SelfCorrection(probability=0.25, token_share=(0.0, 0.3), top_k=4)
MIXTURE = {"t2i": 0.52, "caption": 0.14, "vqa": 0.04, "edit": 0.30}  # of documents; edits are half of the tokens
DOCUMENTS = 120_000
EXTRACTION = ExtractionSettings("chat", drop_text=0.1, self_correction=CORRECTION, variants=2, batch_size=64)
PACK_LENGTH, PACKS = 392, 10  # positions of a pack, packs of a step in each of two processes
STEPS, PEAK = 16_000, 1.2e-3


def new_model(
    tokenizer: PreTrainedTokenizerFast, vq_model: NextFlowVQModel, seed: int = 4, **config
) -> NextFlowForConditionalGeneration:
    """The transformer at its start, around the trained tokenizer; code embeddings begin as its codebook."""
    torch.manual_seed(seed)
    model = NextFlowForConditionalGeneration(nextflow_config(tokenizer, vq_model.config, **config))
    model.model.vq_model.load_state_dict(vq_model.state_dict())
    model.model.code_embeddings.weight.data.copy_(vq_model.quantizer.codebook())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def new_processor(model: NextFlowForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> NextFlowProcessor:
    image_processor = NextFlowImageProcessor.from_vq_config(model.config.vq_config)
    return NextFlowProcessor(image_processor, tokenizer, condition_last_scale=model.config.condition_last_scale)


def code_documents(
    folder: Path,
    model: NextFlowForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    mixture: dict,
) -> Path:
    """Save the untrained model and its processor to `folder`/start, and pack documents coded by them; returns the
    folder of packs. One process works while the others wait."""
    start = folder / "start"
    state = PartialState(cpu=True, backend="gloo" if processes() > 1 else None)
    with state.local_main_process_first():
        if not start.exists():
            with output_folder(start) as partial:
                new_processor(model, tokenizer).save_pretrained(partial)
                model.save_pretrained(partial)
        strategy = FixedLength(PACK_LENGTH)
        return build_packs(folder, start, count, mixture, EXTRACTION, strategy, multiple_of=2 * PACKS, num_proc=2)


def train_on_packs(
    output: Path,
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    packs: Path,
    steps: int,
    seed: int,
) -> None:
    """Train everything but the vision tokenizer into `output`; `seed` orders the packs."""
    model.model.vq_model.requires_grad_(False)
    model.set_attn_implementation("eager")  # the fastest backward at these lengths on a CPU
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)
    values = settings(steps, PEAK) | {"save_steps": 250, "seed": seed}
    arguments = NextFlowTrainingArguments(output, per_device_train_batch_size=PACKS, **values)
    optimizer = MuonWithAdamW(
        model.named_parameters(),
        lambda name: "language_model.layers" in name,
        PEAK,
        arguments.weight_decay,
        (arguments.adam_beta1, arguments.adam_beta2),
    )
    dataset = PackedDataset(packs, model, processor, seed=seed)
    trainer = NextFlowTrainer(
        model, arguments, train_dataset=dataset, processing_class=processor, optimizers=(optimizer, None)
    )
    finish(trainer)


def train_transformer(folder: Path, tokenizer: PreTrainedTokenizerFast, vq_model: NextFlowVQModel) -> None:
    """All tasks together from the start: text-to-image, captions, questions and edits."""
    if is_finished(folder / "transformer"):
        return
    packs = code_documents(folder, new_model(tokenizer, vq_model), tokenizer, DOCUMENTS, MIXTURE)
    model = NextFlowForConditionalGeneration.from_pretrained(folder / "start")
    processor = NextFlowProcessor.from_pretrained(folder / "start")
    train_on_packs(folder / "transformer", model, processor, packs, STEPS, seed=0)
