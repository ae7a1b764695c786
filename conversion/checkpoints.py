"""Files of tensors from anyone, read without running what they hold; and a writer that keeps no tensor.

Everything wrong with a file is a `ValueError` that names the file and the tensor.
"""

import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WRAPPERS = ("ema", "model", "state_dict")  # in TokenFlow's own order
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def load_torch_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pt` file, bare or under `ema`, `model` or `state_dict`; nothing in it is executed.

    Raises:
        ValueError: if the file holds other objects than tensors and plain containers, is damaged, or a tensor claims
            more values than it stores.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is refused, it holds more than tensors or is damaged: {reason}") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise ValueError(f"{path} is damaged or no PyTorch checkpoint: {reason}") from error
    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} must hold a state dict, bare or under {', '.join(WRAPPERS)}")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path} must hold tensors by name, {name!r} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} in {path} must be a dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} in {path} declares the shape {tuple(tensor.shape)}, more values than the file stores"
            )
    return loaded


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_keys(
    where: str | Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare names and shapes; the error names what is missing, unknown or of another shape."""
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{where} lacks {_listing(missing)}")
    if unknown := [name for name in found if name not in expected]:
        raise ValueError(f"{where} holds the unknown {_listing(unknown)}")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"{name} in {where} must have the shape {tuple(shape)}, got {tuple(found[name])}")


def _listing(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class SafetensorsFolder:
    """The tensors of a checkpoint folder, one file or shards with an index, read one by one.

    Raises:
        ValueError: if there are no safetensors, the index names files that are absent or outside of the folder, a file
            is truncated or declares sizes that it does not have, or index and files disagree.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotADirectoryError(f"there is no checkpoint folder {folder}")
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        weight_map = self._weight_map()
        for file in dict.fromkeys(weight_map.values()) if weight_map else [SINGLE]:
            self._read_header(self.folder / file)
        if weight_map:
            for name, file in weight_map.items():
                if name not in self._file_of or self._file_of[name].name != file:
                    raise ValueError(f"{self.folder / INDEX} says that {file} holds {name}, which it does not")
            if extra := [name for name in self._file_of if name not in weight_map]:
                raise ValueError(f"{self.folder / INDEX} does not list {_listing(extra)}, which its files hold")

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            if not (self.folder / SINGLE).is_file():
                raise ValueError(f"{self.folder} holds neither {INDEX} nor {SINGLE}; other formats are not read")
            return {}
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = set(weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no index of safetensors: {error}") from error
        for file in names:
            inside = isinstance(file, str) and file == Path(file).name and not set(file) & set("\\:\0")
            if not inside or not file.endswith(".safetensors"):
                raise ValueError(f"{path} must name .safetensors files of its own folder, got {file!r}")
            if not (self.folder / file).is_file():
                raise ValueError(f"{path} names {file}, which is not there")
        if not names:
            raise ValueError(f"{path} lists no tensors")
        return weight_map

    def _read_header(self, path: Path) -> None:
        with _opened(path) as file:
            for name in file.keys():
                if name in self._file_of:
                    raise ValueError(f"{name} is in {self._file_of[name].name} and in {path.name}")
                view = file.get_slice(name)
                if view.get_dtype() not in TORCH_DTYPES:
                    raise ValueError(f"{name} in {path} has the unsupported dtype {view.get_dtype()}")
                self._file_of[name] = path
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = TORCH_DTYPES[view.get_dtype()]

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the files, so that each is opened once."""
        return iter(self._file_of)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, one at a time; at most one file is open."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        for path, members in by_file.items():
            with _opened(path) as file:
                for name in members:
                    yield name, file.get_tensor(name)


@contextmanager
def _opened(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


class ShardedWriter:
    """Writes tensors as they come into safetensors files of at most `max_shard_size` bytes (a larger tensor alone).

    Names, shapes and dtypes are known beforehand, so that headers come first and no tensor is kept.

    Args:
        plan: name to (shape, dtype), in the order in which [`write`] gets them.
    """

    def __init__(self, folder: Path, plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_size: int):
        self.folder = folder
        self.plan = plan
        sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in plan.items()}
        shards: list[list[str]] = [[]]
        room = max_shard_size
        for name, size in sizes.items():
            if size > room and shards[-1]:
                shards.append([])
                room = max_shard_size
            shards[-1].append(name)
            room -= size
        count = len(shards)
        files = [SINGLE]
        if count > 1:
            files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self.total_size = sum(sizes.values())
        self.weight_map = {name: file for file, names in zip(files, shards) for name in names}

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take exactly the planned tensors, in the planned order; then the index, if there are several files."""
        tensors = iter(tensors)
        bar = tqdm(total=self.total_size, unit="B", unit_scale=True, desc="tensors", disable=None)
        for file in dict.fromkeys(self.weight_map.values()):
            names = [name for name, its_file in self.weight_map.items() if its_file == file]
            with open(self.folder / file, "wb") as output:
                output.write(self._header(names))
                for name in names:
                    given, tensor = next(tensors)
                    if (given, (tuple(tensor.shape), tensor.dtype)) != (name, self.plan[name]):
                        raise RuntimeError(f"planned {name} {self.plan[name]}, got {given} {tensor.shape}")
                    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                    output.write(data)
                    bar.update(data.nbytes)
                output.flush()
                os.fsync(output.fileno())
        bar.close()
        if len(set(self.weight_map.values())) > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": self.weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _header(self, names: list[str]) -> bytes:
        header: dict = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            shape, dtype = self.plan[name]
            end = offset + prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded
