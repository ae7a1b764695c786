"""Adapters and the model that they are for, as one model; a checkpoint and the vision tokenizer that it refers to."""

from pathlib import Path

import torch

from .files import output_folder
from .loading import base_of, load_merged, load_processor

README = """\
# {name}

## Licence and sources

The weights of {base} with the adapters of {adapters} added. The licences of both apply.
"""


def merge(adapters: str, output: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the model that adapters make of another, with its processor, into a new folder.

    Args:
        adapters: folder or Hub id.
        dtype: of the weights; by default as those of the model below are stored. Codebook, code embeddings and vision
            tokenizer stay float32.

    Raises:
        ValueError: if there are no adapters, or they do not fit the model that they name.
        FileExistsError: if there is something at `output`.
    """
    base = base_of(adapters)
    if base is None:
        raise ValueError(f"{adapters} holds no adapters: there is no adapter_config.json")
    with output_folder(output) as folder:
        write_whole(adapters, folder, dtype)
        names = {"name": Path(output).name, "base": Path(base).name, "adapters": Path(adapters).resolve().name}
        (folder / "README.md").write_text(README.format(**names), encoding="utf-8")


def write_whole(name: str, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the whole model that a folder or Hub id holds a part of, with its processor."""
    load_merged(name, dtype).save_pretrained(folder)
    load_processor(name).save_pretrained(folder)
