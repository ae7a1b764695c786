"""PyTorch checkpoints from anyone, read without running what they hold; and a writer that keeps no tensor.

Everything wrong with a file is a `ValueError` that names the file and the tensor.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from zipfile import is_zipfile

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm
from transformers.modeling_utils import str_to_torch_dtype

from ..utils.safetensors_folder import INDEX, listing

DTYPES = {dtype: name for name, dtype in str_to_torch_dtype.items()}  # as safetensors names them
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
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused, it holds more than tensors{_others_in(path)} or is damaged. If you trust its source, "
            "save the tensors alone, under the key that has them: "
            "`torch.save(torch.load(path, map_location='cpu', weights_only=False)['model'], new_path)`"
        ) from error
    except Exception as error:  # of damaged bytes anything may come
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise ValueError(f"{path} is damaged or no PyTorch checkpoint: {reason}") from error
    inner = [loaded.get(wrapper) for wrapper in WRAPPERS] if isinstance(loaded, dict) else []
    loaded = next((state for state in inner if isinstance(state, dict)), loaded)
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} must hold a state dict, bare or under {', '.join(WRAPPERS)}")
    for name, tensor in loaded.items():
        is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if not isinstance(name, str) or not is_dense:
            raise ValueError(f"{path} must hold dense tensors by name, {name!r} is a {type(tensor).__name__}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} in {path} declares the shape {tuple(tensor.shape)}, more values than the file stores"
            )
    return loaded


def _others_in(path: Path) -> str:
    """The classes whose objects a file holds beside tensors, where it can be told without loading it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return ""
    return f" ({', '.join(sorted(names))})" if names else ""


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


def write_shards(
    folder: Path,
    plan: Mapping[str, torch.Tensor],
    tensor_of: Callable[[str], torch.Tensor],
    max_shard_size: int | str,
) -> None:
    """Write safetensors files of at most `max_shard_size` (a larger tensor alone), and the index if there are several.

    Names, shapes and dtypes are known beforehand, so that headers come first and no tensor is kept.

    Args:
        plan: meta tensors by name.
        tensor_of: gives each once, on the CPU and of its shape, and is called in an order of its own.
        max_shard_size: bytes, or a size such as `"5GB"`.

    Raises:
        ValueError: if it is no such size.
    """
    split = split_torch_state_dict_into_shards(dict(plan), max_shard_size=max_shard_size)
    with tqdm(total=split.metadata["total_size"], unit="B", unit_scale=True, desc="tensors", disable=None) as bar:
        for file, names in split.filename_to_tensors.items():
            with open(folder / file, "wb") as output:
                output.write(_header({name: plan[name] for name in names}))
                for name in names:
                    data = tensor_of(name).to(plan[name].dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
                    output.write(data)
                    bar.update(data.nbytes)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    ends = accumulate(tensor.nbytes for tensor in tensors.values())
    header: dict = {"__metadata__": {"format": "pt"}}
    header |= {
        name: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end - tensor.nbytes, end]}
        for (name, tensor), end in zip(tensors.items(), ends)
    }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
