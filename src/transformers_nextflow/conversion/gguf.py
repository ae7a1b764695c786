"""A GGUF file as a folder of safetensors, by transformers' own reading of it; needs the package gguf.

transformers leaves out what it does not know of a file without an error. Here such files are refused by name.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..utils.files import read_json
from ..utils.lazy import needing_extra
from ..utils.loading import naming
from ..utils.safetensors_folder import SINGLE, listing

WEIGHTS = r"(token_embd|output_norm|output|blk\.\d+\.(attn_norm|ffn_norm|attn_[qkv]|attn_output|ffn_(gate|up|down)))"
FIELDS = ("general.architecture", ".rope.scaling.type")
TENSORS = {  # of each architecture
    "llama": re.compile(rf"{WEIGHTS}\.weight"),
    "qwen2": re.compile(rf"{WEIGHTS}\.weight|blk\.\d+\.attn_[qkv]\.bias"),
}


@contextmanager
def safetensors_folder(path: str | Path) -> Iterator[Path]:
    """A folder with the float32 weights, configuration and text tokenizer of a GGUF file, for the length of the
    context. The whole model is in memory once, and on disk among the system's temporary files.

    Raises:
        ValueError: if the file is damaged, of another architecture than Llama or Qwen2, or holds what transformers
            does not read: other tensors, or a scaled rotary embedding.
        ImportError: without the package gguf.
    """
    path = Path(path)
    _check(path)
    with tempfile.TemporaryDirectory() as folder:
        with naming(str(path)):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, output_loading_info=True
            )
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"it lacks {listing(missing)}")
        config = model.config
        tokenizer.save_pretrained(folder)
        _drop_tokens_from(config.vocab_size, Path(folder) / "tokenizer.json")
        config.save_pretrained(folder)
        state = model.state_dict()  # the library does not save what came from blocks, though nothing is in blocks now
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file(state, Path(folder) / SINGLE)
        del model, state
        yield Path(folder)


def _drop_tokens_from(rows: int, path: Path) -> None:
    """Leave out the added tokens of a tokenizer.json without a row: the library gives byte-level tokenizers of GGUF
    files GPT-2's `<|endoftext|>`, whether the file has it or not."""
    values = read_json(path)
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < rows]
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _check(path: Path) -> None:
    with needing_extra("gguf", str(path)):
        from gguf import GGUFReader
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with naming(str(path)):
        reader = GGUFReader(path)
        names = [tensor.name for tensor in reader.tensors]
        fields = {name: field.contents() for name, field in reader.fields.items() if name.endswith(FIELDS)}
    architecture = fields.get("general.architecture")
    scaling = fields.get(f"{architecture}.rope.scaling.type")
    if architecture not in TENSORS:
        raise ValueError(f"{path} must hold one of {', '.join(TENSORS)}, got the architecture {architecture!r}")
    if scaling not in (None, "none"):
        raise ValueError(
            f"{path} scales its rotary embedding ({scaling}), which is not read from GGUF: take safetensors"
        )
    if unknown := [name for name in names if not TENSORS[architecture].fullmatch(name)]:
        raise ValueError(f"{path} holds {listing(unknown)}, which is not read from GGUF: take safetensors")
