"""Shards on disk: one record batch of flat columns each, and a manifest that says whose they are.

A folder of shards is a dataset repository as the Hub has it: `README.md` with the configuration that `datasets` reads,
`data/*.arrow`, `manifest.json`, `skipped.jsonl`. Every file appears whole or not at all.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ..scales import ScheduleTable, paper_schedules
from ..stored_tokenizer import vision_tokenizer_hash
from ..utils.files import read_json, write_atomically
from .sequences import SequenceSpec, SpecialIds

FORMAT_VERSION = 2  # 1 knew vision tokenizers by their weights rounded to bfloat16
MANIFEST = "manifest.json"
MANIFEST_ENTRIES = {"content": str, "identity": dict, "statistics": dict, "variants": int, "shards": list}
SHARD_ENTRIES = {"file": str, "rows": int, "bytes": int, "sha256": str}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value) -> None:
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, indent=1) + "\n"))


def code_dtype(codebook_size: int) -> np.dtype:
    return np.dtype(np.uint16 if codebook_size <= 2**16 else np.int32)


def list_schema(codebook_size: int, packs: bool) -> dict[str, pa.DataType]:
    """Columns of a shard. A row of a "documents" shard is a document; a row of a "packs" shard holds the same lists of
    several documents one after the other, and their lengths."""
    codes = pa.from_numpy_dtype(code_dtype(codebook_size))
    flat = {
        "input_ids": pa.list_(pa.int32()),  # compact, see `sequences.py`
        "supervised": pa.list_(pa.uint8()),
        "image_grid_hw": pa.list_(pa.uint16()),  # two for each image
        "image_codes": pa.list_(codes),  # of a supervised image every variant, of others one
        "image_input_codes": pa.list_(codes),  # of supervised images, every variant: scales 1..K-1
    }
    if not packs:
        extent = {"num_tokens": pa.int32(), "attended_pairs": pa.int64(), "num_targets": pa.int32()}
        return {"key": pa.string(), "kind": pa.string(), **flat, **extent}
    lengths = {"document_lengths": pa.list_(pa.int32()), "document_tokens": pa.list_(pa.int32())}
    names = {"keys": pa.list_(pa.string()), "kinds": pa.list_(pa.string())}
    return {**names, **flat, **lengths, "num_tokens": pa.int32(), "cost": pa.float64()}


def write_shard(path: Path, rows: Sequence[Mapping], schema: Mapping[str, pa.DataType]) -> dict:
    """Write rows as one record batch; returns the shard's entry in the manifest."""
    columns = [_column([row[name] for row in rows], kind) for name, kind in schema.items()]
    batch = pa.RecordBatch.from_arrays(columns, schema=pa.schema(list(schema.items())))

    def write(partial: Path) -> None:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)

    write_atomically(path, write)
    return {"file": path.name, "rows": len(rows), "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _column(values: list, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind) or pa.types.is_string(kind.value_type):
        return pa.array(values, type=kind)
    offsets = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    if offsets[-1] >= 2**31:
        raise ValueError(f"a shard's column holds {offsets[-1]} values, more than 2^31; write fewer rows to a shard")
    dtype = kind.value_type.to_pandas_dtype()
    flat = np.concatenate([np.asarray(value, dtype=dtype) for value in values]) if values else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat, type=kind.value_type))


class Shard:
    """One shard, memory-mapped; lists come as views of it."""

    def __init__(self, path: Path):
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            (self.batch,) = list(reader)
        self._flat: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, column in zip(self.batch.schema.names, self.batch.columns):
            if pa.types.is_list(column.type) and not pa.types.is_string(column.type.value_type):
                self._flat[name] = (column.offsets.to_numpy(), column.values.to_numpy())

    def __len__(self) -> int:
        return self.batch.num_rows

    def column(self, name: str) -> np.ndarray:
        """A column of numbers."""
        return self.batch.column(name).to_numpy()

    def row(self, index: int) -> dict:
        """A row: numeric lists as arrays, strings and numbers as Python's."""
        values = {}
        for name in self.batch.schema.names:
            if name in self._flat:
                offsets, flat = self._flat[name]
                values[name] = flat[offsets[index] : offsets[index + 1]]
            else:
                values[name] = self.batch.column(name)[index].as_py()
        return values


# Identity: what codes and ids mean


def text_tokenizer_hash(processor) -> str:
    """sha256 of the text tokenizer's state, without what a padded or truncated call leaves in it, and of the chat
    template."""
    state = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    lasting = {name: value for name, value in state.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(f"{json.dumps(lasting)}\n{processor.chat_template}".encode()).hexdigest()


def vision_identity(vq_model) -> str:
    """sha256 of a loaded vision tokenizer, see [`vision_tokenizer_hash`]."""
    return vision_tokenizer_hash(sorted(vq_model.state_dict().items()), vq_model.config)


def encoder_settings(vq) -> dict:
    """Of a [`NextFlowVQConfig`], what codes depend on and no tensor, and so no [`vision_identity`], shows."""
    semantic = vq.semantic_config
    names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    return {"norm_groups": vq.norm_groups} | {name: getattr(semantic, name) for name in names}


def identity_of(config, processor, vq_model) -> dict:
    """What shards and the model that reads them must agree on.

    Args:
        config: the [`NextFlowConfig`]; `vq_model` may be the model's own or the same loaded alone; where the
            configuration refers to it, it is not looked at.
    """
    vq, referred = config.vq_config, config.vision_tokenizer
    return {
        "vision_tokenizer": vision_identity(vq_model) if referred is None else referred["sha256"],
        "encoder": encoder_settings(vq),
        "text_tokenizer": text_tokenizer_hash(processor),
        "scale_schedules": [[list(grid) for grid in row] for row in (vq.scale_schedules or paper_schedules())],
        "levels": dict(vq.levels),
        "patch_size": vq.patch_size,
        "codebook_size": vq.codebook_size,
        "code_offset": config.text_vocab_size,
        "condition_last_scale": config.condition_last_scale,
        "special_ids": {
            "boi": config.boi_token_id,
            "eoi": config.eoi_token_id,
            "image": config.image_token_id,
            "eos": processor.tokenizer.eos_token_id,
            "pad": processor.tokenizer.pad_token_id,
        },
    }


def check_identity(manifest: Mapping, identity: Mapping) -> None:
    """Raise a ValueError naming the first thing in which shards and model differ."""
    for name, ours in identity.items():
        if name == "encoder" and name not in manifest["identity"]:  # of shards that were made before it was noted
            continue
        theirs = manifest["identity"][name]
        if theirs != ours:
            shown = (f"{_short(theirs)} there, {_short(ours)} here").replace("\n", " ")
            raise ValueError(f"the shards were made with another {name.replace('_', ' ')}: {shown}")


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def sequence_spec(identity: Mapping) -> SequenceSpec:
    try:
        table = ScheduleTable(identity["scale_schedules"], identity["levels"], identity["patch_size"])
        return SequenceSpec(table, SpecialIds(**identity["special_ids"]), identity["condition_last_scale"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the identity of the shards is damaged: {type(error).__name__}: {error}") from error


# Folders


def write_manifest(folder: Path, manifest: Mapping) -> None:
    """The card that makes the folder a dataset repository, then the manifest, which makes it complete."""
    count = sum(shard["rows"] for shard in manifest["shards"])
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.arrow\n---\n\n"
        f"# NextFlow shards: {count:,} {manifest['content']}\n\n"
        "Compact ids and image codes for training with `transformers-nextflow`; `manifest.json` holds hashes, "
        "tokenizers, schedules and settings. Check with `transformers-nextflow data verify`.\n"
    )
    write_atomically(folder / "README.md", lambda partial: partial.write_text(card))
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder of shards.

    Raises:
        FileNotFoundError: if there is none: no shards, or an unfinished run.
        ValueError: if it is damaged, or has another format version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: no shards, or an extraction or packing not finished")
    manifest = read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise ValueError(f"{path} has format version {version}, not {FORMAT_VERSION}: extract and pack anew")
    for name, kind in MANIFEST_ENTRIES.items():
        if not isinstance(manifest.get(name), kind):
            raise ValueError(f"{path} must hold a {kind.__name__} as {name}, got {manifest.get(name)!r}")
    for shard in manifest["shards"]:
        if not isinstance(shard, dict) or {name: type(shard.get(name)) for name in SHARD_ENTRIES} != SHARD_ENTRIES:
            raise ValueError(f"{path} must name file, rows, bytes and sha256 of every shard, got {shard!r}")
    return manifest


def check_files(folder: Path, manifest: Mapping, hashes: bool = True) -> None:
    """Raise for the first shard that is missing, extra, or not what was written.

    Raises:
        FileNotFoundError: for a missing shard.
        ValueError: for another size, a flipped byte, or a file that the manifest does not name.
    """
    for shard in manifest["shards"]:
        path = folder / "data" / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(f"the shard {path} is missing")
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(f"the shard {path} has {path.stat().st_size} bytes instead of {shard['bytes']}")
        if hashes and sha256_of(path) != shard["sha256"]:
            raise ValueError(f"the shard {path} is damaged: its sha256 is not the manifest's")
    named = {shard["file"] for shard in manifest["shards"]}
    if extra := sorted(path.name for path in (folder / "data").glob("*.arrow") if path.name not in named):
        raise ValueError(f"{folder}/data holds files that the manifest does not name: {', '.join(extra)}")


def open_shards(name: str | Path, content: str | None = None, hashes: bool = True) -> tuple[Path, dict]:
    """A folder of shards, or the id of a dataset repository on the Hub, which is downloaded: its path and manifest.

    Args:
        content: `"documents"` or `"packs"`, where only one will do.
        hashes: whether every shard is read and its hash compared, or only its size.

    Raises:
        ValueError, FileNotFoundError: see [`check_files`] and [`read_manifest`].
    """
    folder = Path(name)
    if not folder.is_dir():
        if str(name).count("/") != 1 or str(name).startswith((".", "/")):
            raise FileNotFoundError(f"there is no folder of shards {name}")
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(name), repo_type="dataset"))
    manifest = read_manifest(folder)
    if content is not None and manifest["content"] != content:
        raise ValueError(f"{name} holds {manifest['content']}, not {content}")
    check_files(folder, manifest, hashes)
    return folder, manifest


def push_to_hub(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload a complete folder of shards as a dataset repository; returns its URL. `open_shards(repo_id)` reads it."""
    from huggingface_hub import HfApi

    folder, _ = open_shards(folder)
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, ignore_patterns=[".*", "work/**"])
    return str(url)


def verify(name: str | Path, model: str | None = None, samples: int = 8) -> dict:
    """Check every hash and every row of a folder of shards; with a model also whose they are, and that samples decode
    to the pictures that were coded.

    Returns:
        `rows`, `shards`, `tokens`, and with a model `samples`, the pictures decoded.

    Raises:
        ValueError, FileNotFoundError: for the first thing that is wrong, by name.
    """
    folder, manifest = open_shards(name)
    spec = sequence_spec(manifest["identity"])
    tokens = 0
    for entry in manifest["shards"]:
        shard = Shard(folder / "data" / entry["file"])
        if len(shard) != entry["rows"]:
            raise ValueError(f"the shard {entry['file']} has {len(shard)} rows, its manifest says {entry['rows']}")
        for index in range(len(shard)):
            tokens += _check_row(shard.row(index), spec, manifest, f"row {index} of {entry['file']}")
    report = {"shards": len(manifest["shards"]), "rows": sum(e["rows"] for e in manifest["shards"]), "tokens": tokens}
    if tokens != manifest["statistics"]["tokens"]:
        raise ValueError(f"the shards hold {tokens} tokens, the manifest says {manifest['statistics']['tokens']}")
    if model is not None:
        from ..utils.loading import load_tokenizers

        config, processor, vq_model = load_tokenizers(model)
        check_identity(manifest, identity_of(config, processor, vq_model))
        report["samples"] = _check_samples(folder, manifest, vq_model, spec, samples)
    return report


def images_of(row: Mapping, spec: SequenceSpec, variants: int) -> list[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Each image of a row: its final grid, (V, codes) targets and (V or 0, coarse codes) self-corrected inputs."""
    flags = row["supervised"][row["input_ids"] == spec.special.image].astype(bool)
    images, at, inputs_at = [], 0, 0
    for grid, supervised in zip(row["image_grid_hw"].reshape(-1, 2).tolist(), flags):
        schedule = spec.schedules.by_grid(grid)
        copies = variants if supervised else 0
        size, coarse = max(copies, 1) * schedule.num_codes, copies * schedule.offsets[-1]
        targets = row["image_codes"][at : at + size].reshape(-1, schedule.num_codes)
        inputs = row["image_input_codes"][inputs_at : inputs_at + coarse].reshape(copies, schedule.offsets[-1])
        images.append((tuple(grid), targets, inputs))
        at, inputs_at = at + size, inputs_at + coarse
    if at != len(row["image_codes"]) or inputs_at != len(row["image_input_codes"]):
        raise ValueError(f"codes are too many: {len(row['image_codes'])} and {len(row['image_input_codes'])}")
    return images


def documents_of(row: Mapping, spec: SequenceSpec, variants: int) -> Iterator[tuple]:
    """Each document of a row, of documents or of packs: its key, kind, ids and flags, and images as [`images_of`]."""
    is_pack = "keys" in row
    keys, kinds = (row["keys"], row["kinds"]) if is_pack else ([row["key"]], [row["kind"]])
    ends = np.cumsum(row["document_lengths"])[:-1] if is_pack else []
    images = iter(images_of(row, spec, variants))
    for key, kind, ids, flags in zip(keys, kinds, np.split(row["input_ids"], ends), np.split(row["supervised"], ends)):
        yield key, kind, ids, flags, list(islice(images, int((ids == spec.special.image).sum())))


def decodable_codes(targets: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """(codes,) int64 codes that sum up to a picture, of its first variant.

    Where inputs are self-corrected, the residual continued from them: they count, and of the targets the last scale.
    """
    codes = targets[0] if len(inputs) == 0 else np.concatenate([inputs[0], targets[0, inputs.shape[1] :]])
    return codes.astype(np.int64)


def _check_row(row: Mapping, spec: SequenceSpec, manifest: Mapping, where: str) -> int:
    identity = manifest["identity"]
    ids, supervised = row["input_ids"], row["supervised"]
    if len(ids) != len(supervised) or (len(ids) and not (0 <= ids.min() and ids.max() < identity["code_offset"])):
        raise ValueError(f"{where} holds ids outside of the {identity['code_offset']} text rows, or flags beside ids")
    for codes in (row["image_codes"], row["image_input_codes"]):
        if len(wrong := codes[(codes < 0) | (codes >= identity["codebook_size"])]):
            raise ValueError(f"{where} holds the code {wrong[0]}, the codebook ends at {identity['codebook_size']}")
    if 2 * int((ids == spec.special.image).sum()) != len(row["image_grid_hw"]):
        raise ValueError(f"{where} shows other images than its grids name")
    try:
        images_of(row, spec, manifest["variants"])
        lengths = row["document_lengths"] if "document_lengths" in row else np.array([len(ids)])
        expanded = spec.expand(ids, supervised.astype(bool), row["image_grid_hw"].reshape(-1, 2), lengths)
    except ValueError as error:
        raise ValueError(f"{where} is malformed: {error}") from error
    if len(expanded["input_ids"]) != row["num_tokens"]:
        raise ValueError(f"{where} has {len(expanded['input_ids'])} tokens, its num_tokens is {row['num_tokens']}")
    return row["num_tokens"]


def thumbnail(pixels_CHW: torch.Tensor, edge: int = 8) -> np.ndarray:
    """(edge, edge, 3) uint8 means of a picture in [-1, 1]."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(pixels_CHW.float()[None], edge)[0]
    return ((pooled + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def thumbnail_error(decoded: np.ndarray, sample: Mapping) -> float:
    """Root mean square difference, in grey levels, between a decoded picture's thumbnail and the sample's input's."""
    expected = np.frombuffer(bytes.fromhex(sample["thumbnail"]), dtype=np.uint8).reshape(decoded.shape)
    return float(np.sqrt(((decoded.astype(np.float64) - expected) ** 2).mean()))


def _check_samples(folder: Path, manifest: Mapping, vq_model, spec: SequenceSpec, count: int) -> int:
    """Decode stored codes and compare with thumbnails of the inputs, taken at extraction."""
    samples = manifest["samples"][:count]
    for sample in samples:
        shard = Shard(folder / "data" / manifest["shards"][sample["shard"]]["file"])
        grid, targets, inputs = images_of(shard.row(sample["row"]), spec, manifest["variants"])[sample["image"]]
        codes = torch.from_numpy(decodable_codes(targets, inputs)[None]).to(vq_model.device)
        error = thumbnail_error(thumbnail(vq_model.decode(codes, grid)[0]), sample)
        if error > sample["error"] + 2:
            raise ValueError(
                f"image {sample['image']} of row {sample['row']} decodes {error:.1f} grey levels from its input, "
                f"{sample['error']:.1f} when it was coded: the vision tokenizer drifted"
            )
    return len(samples)
