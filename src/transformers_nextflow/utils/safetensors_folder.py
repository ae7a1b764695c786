"""The tensors of a checkpoint folder, checked before they are read.

Everything wrong with a file is a `ValueError` that names the file and the tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import str_to_torch_dtype

from .files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def folder_of(name: str, revision: str | None = None, **hub) -> str:
    """The folder that holds a Hub model, of a revision if one is named; a local folder is one itself. `hub`: arguments
    of `snapshot_download`, where to get it and how."""
    if Path(name).is_dir():
        return name
    patterns = ["*.json", "*.jinja", "*.safetensors"]
    return snapshot_download(name, revision=revision, allow_patterns=patterns, **hub)


class SafetensorsFolder:
    """The tensors of a checkpoint folder, one file or else shards with an index, as transformers chooses, read one by
    one.

    Raises:
        ValueError: if there are no safetensors, the index names files that are absent or outside of the folder, a file
            is truncated or declares sizes that it does not have, or index and files disagree.

    Attributes:
        files: names, each once; of shards the index among them.
        shapes, dtypes: of every tensor, by name.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotADirectoryError(f"there is no checkpoint folder {folder}")
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        weight_map = self._weight_map()
        shards = list(dict.fromkeys(weight_map.values()))
        self.files = [*shards, INDEX] if shards else [SINGLE]
        for file in shards or [SINGLE]:
            self._read_header(self.folder / file)
        for name, file in weight_map.items():
            if self._file_of.get(name) != self.folder / file:
                raise ValueError(f"{self.folder / INDEX} says that {file} holds {name}, which it does not")
        if weight_map and (extra := [name for name in self._file_of if name not in weight_map]):
            raise ValueError(f"{self.folder / INDEX} does not list {listing(extra)}, which its files hold")

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file():  # saved after the shards of an index that is there still
            return {}
        if not path.is_file():
            raise ValueError(f"{self.folder} holds neither {INDEX} nor {SINGLE}; other formats are not read")
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path} is no index of safetensors: weight_map must list tensors, got {weight_map!r}")
        for file in weight_map.values():
            inside = isinstance(file, str) and file == Path(file).name and not set(file) & set("\\:\0")
            if not inside or not file.endswith(".safetensors"):
                raise ValueError(f"{path} must name .safetensors files of its own folder, got {file!r}")
            if not (self.folder / file).is_file():
                raise ValueError(f"{self.folder} lacks {file}, which {INDEX} names")
        return weight_map

    def _read_header(self, path: Path) -> None:
        with _opened(path) as file:
            for name in file.keys():
                if name in self._file_of:
                    raise ValueError(f"{name} is in {self._file_of[name].name} and in {path.name}")
                view = file.get_slice(name)
                if view.get_dtype() not in str_to_torch_dtype:
                    raise ValueError(f"{name} in {path} has the unsupported dtype {view.get_dtype()}")
                self._file_of[name] = path
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = str_to_torch_dtype[view.get_dtype()]

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the files."""
        return iter(self._file_of)

    def tensor(self, name: str) -> torch.Tensor:
        """Mapped, so that it takes memory where it is read."""
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name)


@contextmanager
def _opened(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def listing(names: list[str]) -> str:
    """Some of many names, for an error."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
