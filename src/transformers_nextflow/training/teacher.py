"""The teacher of the vision tokenizer's joint stage, whose features are distilled (NextFlow sec. 3.1)."""

import copy
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.files import output_folder
from ..utils.loading import load_vq_model, model_name, naming, same_weights

FOLDER = "teacher"  # in the output folder of a joint stage


def load_teacher(model: NextFlowVQModel, name: str, teacher: str | None = None) -> PreTrainedModel:
    """A vision model of the semantic encoder's kind.

    The encoder of a tokenizer without a joint stage is its own teacher. A joint stage moves the encoder and leaves
    its teacher in its output folder, so that another one distils from the same.

    Args:
        model: the tokenizer as the stage begins with it.
        name: folder or Hub id that it came from.
        teacher: folder or Hub id of a vision model or of one with a text model beside it, as SigLIP2; or of a vision
            tokenizer or a NextFlow, whose own teacher is taken.

    Raises:
        ValueError: if it is of another kind or size, or a tokenizer after a joint stage has no teacher with it.
    """
    if teacher is not None:
        found = _named(teacher)
    elif "joint" not in (model.config.training_stages or []):
        return copy.deepcopy(model.semantic_encoder)
    else:
        found = _left_by_a_stage(name)
    own, its = model.config.semantic_config, found.config
    for field in ("model_type", "patch_size", "hidden_size"):
        expected = getattr(own, field)
        if field == "hidden_size" and model.config.teacher_dim is not None:
            expected = model.config.teacher_dim
        if getattr(its, field) != expected:
            raise ValueError(f"a teacher of {name} has the {field} {expected}, {teacher} has {getattr(its, field)}")
    return found


def keep_teacher(teacher: PreTrainedModel, folder: Path) -> None:
    """Leave a stage's teacher in a folder; one that is there already is the only one, perhaps, and stays."""
    if folder.is_dir():
        if same_weights(_named(str(folder)), teacher):
            return
        shutil.rmtree(folder)
    with output_folder(folder) as partial:
        teacher.save_pretrained(partial)


def _named(teacher: str) -> PreTrainedModel:
    teacher = model_name(teacher)
    with naming(f"the teacher {teacher}"):
        config = AutoConfig.from_pretrained(teacher)
    if isinstance(config, (NextFlowConfig, NextFlowVQConfig)):
        return load_teacher(load_vq_model(teacher), teacher)
    with naming(f"the teacher {teacher}"):
        loaded = AutoModel.from_pretrained(teacher, dtype=torch.float32)
    return getattr(loaded, "vision_model", loaded)


def _left_by_a_stage(name: str) -> PreTrainedModel:
    for folder in (Path(name) / FOLDER, Path(name).parent / FOLDER):  # `name` may be a checkpoint of the stage
        if folder.is_dir():
            return _named(str(folder))
    raise ValueError(
        f"a joint stage has moved the semantic encoder of {name}, which is no teacher any more, and the stage's own "
        f"is not in {Path(name) / FOLDER}: name it by --teacher"
    )
