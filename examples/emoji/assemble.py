"""Put the trained parts together: `python -m examples.emoji.assemble RUN OUTPUT` writes a checkpoint to load.

- The transformer: the last stage's average, of its last save where the stage is not finished.
- The vision tokenizer: the one that the documents were coded by, with the larger pixel decoder if that is trained.
- Guidance and temperature: what `choose_sampling` found on dev, if RUN holds its `sampling.json`.

All weights are stored in bfloat16 but those that codes depend on, where bfloat16 would change them; everything loads
as float32. The codes of pictures are compared before and after.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.harness import report
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor, NextFlowVQModel
from transformers_nextflow.training.ema import FILE as AVERAGE
from transformers_nextflow.utils.files import output_folder, read_json
from transformers_nextflow.utils.loading import load_vq_model

from .stages import is_finished
from .transformer import TRAININGS
from .world import World, to_pixel_values

CODES_DEPEND_ON = ("semantic_encoder", "semantic_to_code", "pixel_encoder", "quantizer")
COMPARED = 64  # pictures
SAMPLING = "sampling.json"


def last_transformer(run: Path) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor, str]:
    """The average of the last stage that saved anything, its processor, and where they come from.

    Raises:
        ValueError: if none did, or an average is of other weights than the model's.
    """
    for stage in reversed(TRAININGS):
        folder = run / stage
        if is_finished(folder):
            model = NextFlowForConditionalGeneration.from_pretrained(folder)
            return model, NextFlowProcessor.from_pretrained(folder), f"{stage}, finished"
        if folder.exists() and (checkpoint := get_last_checkpoint(folder)):
            model = NextFlowForConditionalGeneration.from_pretrained(checkpoint)
            processor = NextFlowProcessor.from_pretrained(checkpoint)
            report = model.load_state_dict(load_file(Path(checkpoint, AVERAGE)), strict=False)
            if report.unexpected_keys:
                raise ValueError(f"the average in {checkpoint} holds weights unknown to the model: {report}")
            return model, processor, f"{stage}, the average at {Path(checkpoint).name}"
    raise ValueError(f"{run} holds no transformer; its stages are {', '.join(TRAININGS)}")


def with_larger_decoder(model: NextFlowForConditionalGeneration, folder: Path) -> None:
    """Put the vision tokenizer of the decoder's stage in the place of the model's.

    Raises:
        ValueError: if anything but the pixel decoder is another.
    """
    larger, before = NextFlowVQModel.from_pretrained(folder), model.model.vq_model.state_dict()
    for name, tensor in larger.state_dict().items():
        if not name.startswith("pixel_decoder.") and not torch.equal(tensor, before[name]):
            raise ValueError(f"{folder} is the decoder of another vision tokenizer: {name} differs")
    model.model.vq_model = larger
    model.config.vq_config = larger.config
    larger.config._name_or_path = ""


def assemble(run: Path) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor, dict]:
    """Model and processor of a run, in float32, and what they were put together from."""
    model, processor, transformer = last_transformer(run)
    parts = {"transformer": transformer, "pixel decoder": "as the transformer was trained with"}
    if is_finished(run / "decoder"):
        with_larger_decoder(model, run / "decoder")
        parts["pixel decoder"] = "of the decoder's stage"
    if (run / SAMPLING).exists():
        best = read_json(run / SAMPLING)["best"]
        model.config.image_generation |= best
        parts["sampling"] = best
    return model.eval(), processor, parts


def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight of the model as the checkpoint holds it."""
    rounded = tensor.bfloat16()
    depend = name.startswith(tuple(f"model.vq_model.{part}." for part in CODES_DEPEND_ON))
    return tensor if depend and not torch.equal(rounded.float(), tensor) else rounded


def _is_tokenizer(name: str) -> bool:
    return name.startswith("model.vq_model.")


@torch.no_grad()
def save(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    output: Path,
    pictures: Sequence[np.ndarray],
) -> dict[str, int]:
    """Write the checkpoint, whole or not at all; the model keeps what was stored.

    Args:
        output: a new folder.
        pictures: uint8 (H, W, 3) of one size, whose codes are compared.

    Returns:
        Bytes of the weights by their type.

    Raises:
        ValueError: if the stored vision tokenizer gives other codes.
    """
    pixels = to_pixel_values(list(pictures))
    codes = model.model.vq_model.encode(pixels)
    for name, parameter in model.named_parameters():
        parameter.data = stored(name, parameter.data)
    for config in (model.config, model.config.text_config, model.config.vq_config):
        config._name_or_path = ""
    with output_folder(output) as partial:
        # files of their own: training the transformer further leaves the tokenizer's as they are
        parts = model.state_dict()
        parts = {name: parts[name] for name in sorted(parts, key=_is_tokenizer)}
        transformer = sum(each.nbytes for name, each in model.named_parameters() if not _is_tokenizer(name))
        model.save_pretrained(partial, state_dict=parts, max_shard_size=transformer)
        for config in (model.config, model.config.text_config, model.config.vq_config):
            config.dtype = torch.float32  # what it loads as
        model.config.save_pretrained(partial)
        processor.save_pretrained(partial)
        again = load_vq_model(str(partial)).encode(pixels)
        if not torch.equal(again, codes):
            share = float((again != codes).float().mean())
            raise ValueError(f"the stored vision tokenizer gives other codes: {share:.2%} of {codes.numel()}")
    sizes = {"bfloat16": 0, "float32": 0}
    for parameter in model.parameters():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel() * parameter.element_size()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that `examples.emoji.train` wrote")
    parser.add_argument("output", type=Path, help="new folder of the checkpoint")
    parser.add_argument("--data", type=Path, help="of `examples.emoji.data` (default: data in the run)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    model, processor, parts = assemble(arguments.run)
    world = World(arguments.data or arguments.run / "data")
    pictures = world.pictures[:: len(world) // COMPARED][:COMPARED]
    sizes = save(model, processor, arguments.output, pictures)
    if "sampling" in parts:
        shutil.copy(arguments.run / SAMPLING, arguments.output)
    total = sum(path.stat().st_size for path in arguments.output.iterdir())
    codes = f"those of {len(pictures)} pictures are the same after loading"
    report(parts | {"codes": codes, "bytes of weights": sizes, "bytes in all": total}, arguments.json)


if __name__ == "__main__":
    main()
