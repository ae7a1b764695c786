"""PyTorch checkpoints from anyone, read without running what they hold; and a writer that keeps no tensor.

Everything wrong with a file is a `ValueError` that names the file and the tensor.
"""

import json
import os
import pickle
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm

from ..utils.safetensors_folder import DTYPES, INDEX, SINGLE, listing

WRAPPERS = ("ema", "model", "state_dict")  # in TokenFlow's own order


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
        raise ValueError(
            f"{path} is refused, it holds more than tensors{_others_in(path)} or is damaged. If you trust its source, "
            "save the tensors alone, under the key that has them: "
            "`torch.save(torch.load(path, map_location='cpu', weights_only=False)['model'], new_path)`"
        ) from error
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


def _others_in(path: Path) -> str:
    """The classes whose objects a file holds beside tensors, where it can be told without loading it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError):
        return ""
    return f" ({', '.join(sorted(names))})" if names else ""


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_keys(
    where: str | Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare names and shapes; the error names what is missing, unknown or of another shape."""
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{where} lacks {listing(missing)}")
    if unknown := [name for name in found if name not in expected]:
        raise ValueError(f"{where} holds the unknown {listing(unknown)}")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"{name} in {where} must have the shape {tuple(shape)}, got {tuple(found[name])}")


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
