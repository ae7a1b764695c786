"""Another vision tokenizer into a trained model, and what has to be trained again after it."""

import copy
from pathlib import Path

import torch
from transformers.utils import logging

from .configuration_nextflow import NextFlowVQConfig
from .data.shards import encoder_settings, vision_identity
from .image_processing_nextflow import NextFlowImageProcessor
from .modeling_nextflow import NextFlowForConditionalGeneration
from .modeling_nextflow_vq import NextFlowVQModel
from .utils.files import output_folder
from .utils.loading import begin_anew, load_merged, load_processor, load_vq_model, same_weights

logger = logging.get_logger(__name__)

# parts of the transformer that depend on the vision tokenizer
CODE_PARTS = ("model.code_embeddings", "model.connector", "model.scale_embedding", "code_head")
ALIGNMENT = "packs and shards: extract the documents again; then the transformer, from the stage `alignment` on"
DECODERS = "diffusion decoders of the tokenizer that was there: they read other features now"


def replace_vision_tokenizer(model: str, tokenizer: str, output: str | Path) -> dict[str, list[str]]:
    """Write a model with the vision tokenizer of another folder into a new one.

    Where codes stay what they were (another pixel decoder alone) the transformer is left as it is. Else the code
    embeddings are the new codebook, as when a model begins, and what no longer fits the tokenizer's sizes begins
    anew; the rest is kept as a place to train on from.

    Args:
        model: folder or Hub id of a NextFlow with its processor, or of adapters, which are merged into theirs.
        tokenizer: folder or Hub id of a vision tokenizer, or of a NextFlow, whose own is taken.
        output: folder.

    Returns:
        `new`: parts of the transformer that begin anew. `train_again`: what is useless before it was trained again.

    Raises:
        ValueError: if one of them is no such model, or damaged.
        FileExistsError: if there is something at `output`.
    """
    whole, processor = load_merged(model), load_processor(model)
    vq_model = load_vq_model(tokenizer)
    report = put_in(whole, vq_model)
    processor.image_processor = fitted(processor.image_processor, vq_model.config)
    with output_folder(output) as folder:
        whole.save_pretrained(folder)
        processor.save_pretrained(folder)
    return report


def fitted(images: NextFlowImageProcessor, config: NextFlowVQConfig) -> NextFlowImageProcessor:
    """An image processor for the pictures of another vision tokenizer, which has no level of it that is not the
    tokenizer's."""
    sizes = {name: getattr(config, name) for name in ("patch_size", "scale_schedules", "levels", "image_size")}
    levels = config.schedule_table().levels
    if images.level is not None and str(images.level) not in levels:
        logger.warning(f"the tokenizer has the levels {', '.join(levels)}, not the image processor's {images.level}")
        sizes["level"] = None
    return NextFlowImageProcessor.from_dict(images.to_dict(), **sizes)


@torch.no_grad()
def put_in(model: NextFlowForConditionalGeneration, vq_model: NextFlowVQModel) -> dict[str, list[str]]:
    """Exchange the vision tokenizer of a model in memory; see [`replace_vision_tokenizer`]."""
    before = model.model.vq_model
    known_by = (_sizes, lambda vq: encoder_settings(vq.config), vision_identity)
    same_codes = all(of(before) == of(vq_model) for of in known_by)
    same_features = same_codes and same_weights(before.semantic_decoder, vq_model.semantic_decoder)
    config = copy.deepcopy(model.config)
    config.vq_config = vq_model.config
    model.model.vq_model = vq_model.requires_grad_(False)
    model.model.schedules = vq_model.schedules
    new = [] if same_codes else _begin_parts_anew(model, config)
    for part in (model, model.model):
        part.config = config
    train_again = [] if same_codes else [ALIGNMENT]
    return {"new": new, "train_again": train_again + ([] if same_features else [DECODERS])}


def _begin_parts_anew(model: NextFlowForConditionalGeneration, config) -> list[str]:
    with torch.device("meta"):
        fresh = NextFlowForConditionalGeneration(config)
    new = []
    for name in CODE_PARTS:
        old, part = model.get_submodule(name), fresh.get_submodule(name)
        if [p.shape for p in old.parameters()] != [p.shape for p in part.parameters()]:
            first = next(old.parameters())
            model.set_submodule(name, begin_anew(fresh, name, first.device).to(first.dtype))
            new.append(name)
    codebook = model.model.vq_model.quantizer()
    embeddings = model.model.code_embeddings.weight
    if "model.code_embeddings" not in new and not torch.equal(embeddings, codebook.to(embeddings)):
        new.insert(0, "model.code_embeddings")
    embeddings.copy_(codebook)
    return new


def _sizes(vq_model: NextFlowVQModel) -> list[tuple]:
    """Every schedule with the pictures it codes."""
    return [(schedule, vq_model.schedules.image_size(schedule)) for schedule in vq_model.schedules]
