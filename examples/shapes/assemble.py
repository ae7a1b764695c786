"""Put the trained parts together: `python -m examples.shapes.assemble RUN OUTPUT` writes a checkpoint to load."""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowImageProcessor, NextFlowProcessor
from transformers_nextflow.modeling_nextflow_vq import NextFlowVQModel

from .sizes import vq_config
from .text import train_text_tokenizer
from .tokenizer import enlarge_decoder
from .transformer import new_model, trained_parts

# Chosen on the dev split: what is where is guided and sampled; what follows from it nearly takes the likeliest.
IMAGE_GENERATION = {
    "guidance_scale": [3.0, 3.0, 1.5, 2.0, 1.0, 1.0],
    "temperature": [0.6, 0.6, 0.1, 0.3, 0.1, 0.1],
}


def load_vq_model(folder: Path) -> NextFlowVQModel:
    """The tokenizer of a run, with the enlarged decoder if its stage has begun."""
    model = NextFlowVQModel(vq_config(decoder_blocks=1))
    model.load_state_dict(torch.load(folder / "joint.pt", weights_only=True)["modules"])
    if (folder / "decoder.pt").exists():
        model = enlarge_decoder(model)
        model.pixel_decoder.load_state_dict(torch.load(folder / "decoder.pt", weights_only=True)["modules"])
    return model.eval()


def assemble(folder: Path) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """Model and processor of a run's last checkpoints, in float32."""
    tokenizer = train_text_tokenizer()
    model = new_model(tokenizer, load_vq_model(folder))
    trained_parts(model).load_state_dict(torch.load(folder / "transformer.pt", weights_only=True)["modules"])
    return model.eval(), finish(model, tokenizer)


def finish(model: NextFlowForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> NextFlowProcessor:
    """Set a trained model's defaults of generation; returns its processor."""
    model.config.image_generation |= IMAGE_GENERATION
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    image_processor = NextFlowImageProcessor.from_vq_config(model.config.vq_config)
    return NextFlowProcessor(image_processor, tokenizer, condition_last_scale=model.config.condition_last_scale)


def save(model: NextFlowForConditionalGeneration, processor: NextFlowProcessor, output: Path) -> None:
    """What codes depend on is stored in float32, everything else in bfloat16; all loads as float32."""
    vq_model = model.model.vq_model
    for part in (*trained_parts(model).values(), vq_model.pixel_decoder, vq_model.semantic_decoder):
        if part is not model.model.code_embeddings:
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
