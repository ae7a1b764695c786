"""Put the trained parts together: `python -m examples.shapes.assemble RUN OUTPUT` writes a checkpoint to load."""

import argparse
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor, NextFlowVQModel

from .stages import is_finished
from .transformer import tuned

CODES_DEPEND_ON = ("semantic_encoder", "semantic_to_code", "pixel_encoder", "quantizer")
# Chosen on the dev split: which cells are taken and what stands in them is guided; what follows from earlier scales
# nearly takes the likeliest.
IMAGE_GENERATION = {
    "guidance_scale": [1.0, 1.5, 1.0, 2.0, 1.0, 1.0],
    "temperature": [0.3, 0.3, 0.1, 0.3, 0.1, 0.1],
}


def assemble(folder: Path) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """Model and processor of a run, in float32: its last transformer, finished or not, and its enlarged decoder."""
    if is_finished(folder / "transformer"):
        model = tuned(folder)
    else:
        model = NextFlowForConditionalGeneration.from_pretrained(get_last_checkpoint(folder / "transformer"))
    if is_finished(folder / "decoder"):
        model.model.vq_model = NextFlowVQModel.from_pretrained(folder / "decoder")
        model.config.vq_config = model.model.vq_model.config
        model.config.vq_config._name_or_path = ""
    model.config.image_generation |= IMAGE_GENERATION
    return model.eval(), NextFlowProcessor.from_pretrained(folder / "start")


def halve(vq_model: NextFlowVQModel) -> None:
    """All that codes do not depend on in bfloat16."""
    for name, part in vq_model.named_children():
        if name not in CODES_DEPEND_ON:
            part.bfloat16()


def save(model: NextFlowForConditionalGeneration, processor: NextFlowProcessor, output: Path) -> None:
    """What codes depend on is stored in float32, everything else in bfloat16; all loads as float32."""
    halve(model.model.vq_model)
    for name, part in [*model.model.named_children(), *model.named_children()]:
        if name not in ("model", "vq_model", "code_embeddings"):
            part.bfloat16()
    model.save_pretrained(output)
    for config in (model.config, model.config.text_config, model.config.vq_config):
        config.dtype = torch.float32
    model.config.save_pretrained(output)
    processor.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder that examples.shapes.train wrote")
    parser.add_argument("output", type=Path, help="folder of the checkpoint")
    arguments = parser.parse_args()
    save(*assemble(arguments.run), arguments.output)


if __name__ == "__main__":
    main()
