"""Documents to shards of compact ids and image codes (NextFlow sec. 4: encoders are off the GPU in training).

A shard is a fixed range of the source's rows, a batch a fixed set of its pictures of one grid; both follow from the
source and the settings alone. So processes share the work in any order, a killed run continues after its last batch,
and the shards come out the same. A picture that cannot be read costs its document, which is counted and logged.
"""

import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..image_processing_nextflow import DAMAGED, NextFlowImageProcessor
from ..quantizer import SelfCorrection
from ..sampling import integer
from ..scales import ScaleSchedule, ScheduleTable
from ..utils.files import read_json, write_atomically
from ..utils.loading import load_tokenizers
from .documents import (
    MAX_IMAGES,
    Document,
    DocumentReader,
    PictureSource,
    Skipped,
    Transformations,
    is_supervised,
    open_image,
    read_size,
)
from .sequences import DocumentTokenizer
from .shards import (
    FORMAT_VERSION,
    MANIFEST,
    check_files,
    code_dtype,
    decodable_codes,
    identity_of,
    list_schema,
    read_manifest,
    sequence_spec,
    thumbnail,
    thumbnail_error,
    write_json,
    write_manifest,
    write_shard,
)
from .sources import LoadedSource, Source, content_hash

logger = logging.get_logger(__name__)

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class ExtractionSettings:
    """What is extracted and how.

    Args:
        task, columns: see [`DocumentReader`].
        level: level of the scale schedules every picture is brought to (default: the highest).
        max_images: see [`DocumentReader`]; by default the paper's, 5 at the 512-level and 3 at the 1024-level.
        min_size: pictures with a shorter edge in pixels leave their documents out.
        max_aspect_ratio: so do pictures more elongated than this, whichever way.
        min_text, max_text: so do documents of fewer or more characters of text.
        invert_share, drop_text, drop_condition: see [`Transformations`].
        self_correction, variants: how the inputs of supervised pictures are disturbed, and how many times; `None`
            stores targets alone.
        seed: of all draws, each by its document's key.
        batch_size: pictures coded at once. documents_per_shard: rows of the source in one shard.
    """

    task: str = "chat"
    columns: dict[str, str] = field(default_factory=dict)
    level: str | int | None = None
    max_images: int | None = None
    min_size: int = 1
    max_aspect_ratio: float | None = None
    min_text: int = 0
    max_text: int | None = None
    invert_share: float = 0.0
    drop_text: float = 0.0
    drop_condition: float = 0.0
    self_correction: SelfCorrection | None = field(default_factory=SelfCorrection)
    variants: int = 1
    seed: int = 0
    batch_size: int = 16
    documents_per_shard: int = 1024

    def __post_init__(self):
        for name in ("variants", "batch_size", "documents_per_shard"):
            integer(name, getattr(self, name), 1)
        if self.max_aspect_ratio is not None and self.max_aspect_ratio < 1:
            raise ValueError(f"max_aspect_ratio must be at least 1, got {self.max_aspect_ratio}")
        self.transformations  # noqa: B018, raises where a share is wrong

    @property
    def transformations(self) -> Transformations:
        return Transformations(self.invert_share, self.drop_text, self.drop_condition, self.seed)

    def reader(self, schedules: ScheduleTable, root: str | None) -> DocumentReader:
        """Of rows, whose images lie in `root`."""
        default = MAX_IMAGES.get(schedules.level_name(self.level))
        max_images = default if self.max_images is None else self.max_images
        return DocumentReader(self.task, self.columns, max_images, root)

    @property
    def num_variants(self) -> int:
        """Stored self-corrected encodings of each supervised picture."""
        return 0 if self.self_correction is None else self.variants


def extract(
    source: Source,
    model: str | Path,
    output: str | Path,
    settings: ExtractionSettings,
    devices: Sequence[str] = ("cpu",),
    num_proc: int = 1,
    engine: str = "local",
    num_workers: int = 0,
) -> dict:
    """Extract a source; the same call continues a stopped run. Returns the manifest.

    Args:
        model: folder or Hub id of a NextFlow model, whose processor and vision tokenizer are used.
        output: folder of the shards.
        devices, num_proc: processes, and the devices they take in turn.
        engine: `"local"`, or `"ray"`, a Ray Data pipeline on the cluster that `ray.init` joins; `output` and the
            source must then be on a file system that all its machines share.
        num_workers: of each process, which read, decode and resize pictures ahead of its encoder; 0 is none, and what
            `"ray"` has.

    Raises:
        ValueError: if `output` was begun with other settings, another source or another model; for no devices or
            processes.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    integer("num_proc", num_proc, 1), integer("num_workers", num_workers, 0)
    if not devices:
        raise ValueError("devices must name one or more, got none")
    output = Path(output)
    extractor = Extractor(source, str(model), settings, devices[0], num_workers)
    plan = extractor.plan()
    check_plan(output, plan)
    if (manifest := finished(output)) is not None:
        return manifest
    todo = [index for index in range(plan["num_shards"]) if not _report_path(output, index).exists()]
    try:
        if engine == "ray":
            from .ray_engine import run_on_ray

            run_on_ray(functools.partial(Extractor, source, str(model), settings), devices[0], num_proc, output, todo)
        elif num_proc == 1:
            for index in tqdm(todo, desc="shards", disable=not todo):
                extractor.extract_shard(index, output)
        else:
            arguments = (source, str(model), settings, list(devices), num_proc, output, todo, num_workers)
            torch.multiprocessing.spawn(_worker, arguments, nprocs=num_proc)
        return _finish(output, plan, extractor.identity)
    except FileNotFoundError:  # of what another run of the same has cleared away, which was done before
        manifest = finished(output)
        if manifest is None:
            raise
        return manifest


def _worker(rank: int, source, model, settings, devices, num_proc, output, todo, num_workers) -> None:
    torch.set_num_threads(max(torch.get_num_threads() // num_proc, 1))
    extractor = Extractor(source, model, settings, devices[rank % len(devices)], num_workers)
    for index in todo[rank::num_proc]:
        extractor.extract_shard(index, output)


def check_plan(output: Path, plan: dict) -> None:
    """Write the plan of a new run; raise where a stopped run had another, naming what differs."""
    path = output / "plan.json"
    if not path.exists():
        # a run that was killed while it wrote its plan leaves a hidden file
        if output.exists() and any(not entry.name.startswith(".") for entry in output.iterdir()):
            raise ValueError(f"{output} is not empty and holds no extraction; choose another folder")
        write_json(path, plan)
        return
    begun = read_json(path)
    for part, values in plan.items():
        for name, value in values.items() if isinstance(values, dict) else ((part, values),):
            before = begun.get(part, {}).get(name) if isinstance(values, dict) else begun.get(part)
            if before != json.loads(json.dumps(value)):
                raise ValueError(
                    f"{output} was begun with another {name.replace('_', ' ')}; continue it with the same, or choose "
                    "another folder"
                )


def finished(output: Path) -> dict | None:
    """The manifest of a complete folder of shards, whose files are checked; None of one that is still to be made."""
    if not (output / MANIFEST).exists():
        return None
    manifest = read_manifest(output)
    check_files(output, manifest)
    shutil.rmtree(output / "work", ignore_errors=True)
    return manifest


def _report_path(output: Path, index: int) -> Path:
    return output / "work" / f"{index:05d}.json"


def _finish(output: Path, plan: dict, identity: dict) -> dict:
    """Collect the shards' reports into the manifest."""
    settings = plan["settings"]
    shards, counts, skipped, samples = [], Counter(), [], []
    for index in range(plan["num_shards"]):
        report = read_json(_report_path(output, index))
        shards.append(report["shard"])
        counts.update(report["counts"])
        skipped += report["skipped"]
        samples += [{"shard": index, **sample} for sample in report["samples"]]
    lines = "".join(json.dumps(entry) + "\n" for entry in skipped)
    write_atomically(output / "skipped.jsonl", lambda partial: partial.write_text(lines))
    manifest = {
        "format_version": FORMAT_VERSION,
        "content": "documents",
        "identity": identity,
        "variants": 0 if settings["self_correction"] is None else settings["variants"],
        "settings": settings,
        "source": plan["source"],
        "statistics": dict(sorted(counts.items())),
        "samples": samples,
        "shards": shards,
    }
    write_manifest(output, manifest)
    shutil.rmtree(output / "work", ignore_errors=True)
    return manifest


class Extractor:
    """One process's part: the source, the vision tokenizer on its device, the settings, workers that read ahead."""

    def __init__(
        self,
        source: Source | LoadedSource,
        model: str,
        settings: ExtractionSettings,
        device: str = "cpu",
        num_workers: int = 0,
    ):
        self.source, self.settings, self.device, self.num_workers = source, settings, device, num_workers
        self.config, self.processor, self.vq_model = load_tokenizers(model, device)
        self.table = source.load()
        self.schedules = self.config.vq_config.schedule_table()
        self.level = self.schedules.level_name(settings.level)
        self.reader = settings.reader(self.schedules, source.root)
        self.reader.check_columns(self.table.column_names)
        self.tokenizer = DocumentTokenizer(self.processor, self.processor.tokenizer.eos_token_id)
        self.identity = identity_of(self.config, self.processor, self.vq_model)
        self.spec = sequence_spec(self.identity)
        self.schema = list_schema(self.config.vq_config.codebook_size, packs=False)

    def plan(self) -> dict:
        """What a resumed run must agree on."""
        size = self.settings.documents_per_shard
        return {
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "source": {**asdict(self.source), "rows": len(self.table), "content": content_hash(self.table)},
            "identity": self.identity,
            "num_shards": -(-len(self.table) // size),
        }

    def extract_shard(self, index: int, output: Path) -> None:
        """Write one shard and its report, from the batches that are there already and the missing ones."""
        size = self.settings.documents_per_shard
        rows = range(index * size, min((index + 1) * size, len(self.table)))
        documents, counts, skipped = self.read(rows)
        work = output / "work" / f"{index:05d}"
        coded: dict[tuple[int, int], dict] = {}
        broken: dict[int, str] = {}
        sample: dict | None = None
        batches = [
            (work / f"{number:05d}-{_names_hash(documents, batch[2])}.npz", batch)
            for number, batch in enumerate(self._batches(documents))
        ]
        read = self._read_ahead(documents, [batch for path, batch in batches if not path.exists()])
        for path, (schedule, supervised, pictures) in batches:
            if not path.exists():
                pixels = [next(read) for _ in pictures]
                self._code_batch(documents, schedule, supervised, pictures, pixels, path, is_sample=sample is None)
            members = [member for places_of_one in pictures for member in places_of_one]
            with np.load(path, allow_pickle=False) as batch:
                failures = {int(m): str(e) for m, e in zip(batch["failed"], batch["errors"])}
                broken |= {members[m][0]: error for m, error in failures.items()}
                good = [member for m, member in enumerate(members) if m not in failures]
                for member, codes, inputs in zip(good, batch["codes"], batch["inputs"]):  # each of which is read once
                    coded[member] = {"codes": codes, "inputs": inputs}
                if good and sample is None:
                    (sampled, image), shown = good[0], batch["thumbnail"].tobytes().hex()
                    sample = {"image": image, "thumbnail": shown, "error": float(batch["error"])}

        rows_out, places = [], {}
        for number, (document, schedules) in enumerate(documents):
            if number in broken:
                skipped.append(_log(document.key, "unreadable image", broken[number]))
                continue
            places[number] = len(rows_out)
            rows_out.append(self.row(document, schedules, [coded[number, i] for i in range(len(schedules))]))
            counts[f"kind {document.kind}"] += 1
        counts["documents"], counts["tokens"] = len(rows_out), sum(int(row["num_tokens"]) for row in rows_out)
        counts["images"] = sum(len(row["image_grid_hw"]) // 2 for row in rows_out)
        for entry in skipped:
            counts[f"skipped: {entry['reason']}"] += 1
            logger.warning("skipped %s: %s", entry["key"], entry["detail"] or entry["reason"])
        shard = write_shard(output / "data" / f"documents-{index:05d}.arrow", rows_out, self.schema)
        samples = [{"row": places[sampled]} | sample] if sample is not None and sampled in places else []
        report = {"shard": shard, "counts": counts, "skipped": skipped, "samples": samples}
        write_json(_report_path(output, index), report)
        shutil.rmtree(work, ignore_errors=True)

    def read(self, rows: range) -> tuple[list[tuple[Document, list[ScaleSchedule]]], Counter, list[dict]]:
        """The rows' documents with each image's schedule, by the pictures' headers alone."""
        documents, counts, skipped = [], Counter(), []
        for index in rows:
            row = self.table[index]
            try:
                read = self.reader.read(row, index)
            except Skipped as skip:
                skipped.append(_log(self.reader.key_of(row, index), skip.reason, str(skip)))
                continue
            for document in read:
                try:
                    self._check(document)
                    document, change = self.settings.transformations(document)
                    schedules = [self._schedule_of(image) for image in document.images]
                except Skipped as skip:
                    skipped.append(_log(document.key, skip.reason, str(skip)))
                    continue
                if change:
                    counts[change] += 1
                documents.append((document, schedules))
        return documents, counts, skipped

    def _check(self, document: Document) -> None:
        if not any(is_supervised(message.role) for message in document.messages):
            raise Skipped("nothing supervised")
        length, settings = len(document.text), self.settings
        if length < settings.min_text:
            raise Skipped("text too short", f"{length} characters")
        if settings.max_text is not None and length > settings.max_text:
            raise Skipped("text too long", f"{length} characters")

    def _schedule_of(self, image: PictureSource) -> ScaleSchedule:
        height, width = read_size(image)
        if min(width, height) < self.settings.min_size:
            raise Skipped("image too small", f"{width}x{height}")
        limit = self.settings.max_aspect_ratio
        if limit is not None and max(width, height) > limit * min(width, height):
            raise Skipped("aspect ratio", f"{width}x{height}")
        return self.schedules.nearest_to_image(height, width, self.level)

    def _batches(self, documents) -> list[tuple[ScaleSchedule, bool, list[list[tuple[int, int]]]]]:
        """Pictures of one schedule and one supervision, `batch_size` at a time, each with the places, as (document,
        image), where the shard shows it."""
        groups: dict[tuple, dict[PictureSource, list]] = {}
        for number, (document, schedules) in enumerate(documents):
            for image, (schedule, supervised) in enumerate(zip(schedules, document.supervised_images)):
                pictures = groups.setdefault((schedule.final_grid, supervised), {})
                pictures.setdefault(document.images[image], []).append((number, image))
        size = self.settings.batch_size
        return [
            (self.schedules.by_grid(grid), supervised, list(pictures.values())[start : start + size])
            for (grid, supervised), pictures in sorted(groups.items())
            for start in range(0, len(pictures), size)
        ]

    def _read_ahead(self, documents, batches) -> Iterator[torch.Tensor | str]:
        """The pictures of batches, one after the other, see [`PictureReader`]."""
        images = [
            (documents[number][0].images[image], schedule)
            for schedule, _, pictures in batches
            for number, image in (places[0] for places in pictures)
        ]
        reader = PictureReader(images, self.processor.image_processor)
        workers = min(self.num_workers, len(images))
        ahead = -(-2 * self.settings.batch_size // workers) if workers else None  # two batches, while one is coded
        return iter(DataLoader(reader, batch_size=None, num_workers=workers, prefetch_factor=ahead))

    @torch.no_grad()
    def _code_batch(
        self,
        documents,
        schedule: ScaleSchedule,
        supervised: bool,
        pictures,
        read: list[torch.Tensor | str],
        path: Path,
        is_sample: bool,
    ) -> None:
        """Code the pictures of a batch and keep the result; what cannot be read is kept as its error, and of a sample
        how the first picture comes back."""
        pixels, keys, failed, errors = [], [], [], []
        first = 0
        for places, picture in zip(pictures, read):
            if isinstance(picture, str):
                failed += range(first, first + len(places))
                errors += [picture] * len(places)
            else:
                pixels.append(picture)
                keys.append(_names(documents, places))
            first += len(places)
        variants = range(self.settings.num_variants if supervised else 0)
        codes, inputs = self.code(pixels, schedule, keys, variants)
        result: dict = {"thumbnail": np.zeros(0, np.uint8), "error": np.zeros(())}
        if pixels and is_sample:
            stored = torch.from_numpy(decodable_codes(codes[0], inputs[0])[None]).to(self.device)
            decoded = thumbnail(self.vq_model.decode(stored, schedule.final_grid)[0])
            result["thumbnail"] = thumbnail(pixels[0])
            result["error"] = thumbnail_error(decoded, {"thumbnail": result["thumbnail"].tobytes().hex()})
        result |= {"codes": codes, "inputs": inputs}
        result |= {"failed": np.array(failed, np.int64), "errors": np.array(errors, str)}

        def write(partial: Path) -> None:
            with open(partial, "wb") as file:
                np.savez(file, **result)

        write_atomically(path, write)

    @torch.no_grad()
    def code(
        self,
        pixels: Sequence[torch.Tensor],
        schedule: ScaleSchedule,
        keys: Sequence[Sequence[str]],
        variants: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Code pictures of one schedule.

        Args:
            pixels: (3, H, W) each.
            keys: the names of each in all its places, on which the draws of self-correction depend.
            variants: numbers of the self-corrected encodings; none for pictures that are only read.

        Returns:
            (places, variants or 1, codes) targets and (places, variants, codes of all scales but the last) inputs,
            picture by picture.
        """
        coarse, dtype = schedule.offsets[-1], code_dtype(self.config.vq_config.codebook_size)
        names, repeats = [name for each in keys for name in each], [len(each) for each in keys]
        codes = np.zeros((len(names), max(len(variants), 1), schedule.num_codes), dtype)
        inputs = np.zeros((len(names), len(variants), coarse), dtype)
        if not pixels:
            return codes, inputs
        quantize, settings = self.vq_model.quantizer.quantize, self.settings
        features = self.vq_model.features(torch.stack(pixels).to(self.device))
        if not variants:
            codes[:, 0] = quantize(features, schedule).target_codes.cpu().numpy().repeat(repeats, axis=0)
        shown = np.repeat(np.arange(len(pixels)), repeats)
        for place, variant in enumerate(variants):
            for first in range(0, len(names), settings.batch_size):
                some = slice(first, first + settings.batch_size)
                draws = [f"{name}/{variant}" for name in names[some]]
                output = quantize(features[shown[some]], schedule, settings.self_correction, settings.seed, draws)
                codes[some, place] = output.target_codes.cpu().numpy()
                inputs[some, place] = output.input_codes[:, :coarse].cpu().numpy()
        return codes, inputs

    def pixels(self, image: PictureSource, schedule: ScaleSchedule) -> torch.Tensor:
        """(3, H, W) float32 in [-1, 1] of the schedule's size."""
        return pixels_of(self.processor.image_processor, image, schedule)

    def row(self, document: Document, schedules: list[ScaleSchedule], coded: list[dict]) -> dict:
        """A document as shards store it."""
        ids, supervised = self.tokenizer(document)
        grids = np.array([schedule.final_grid for schedule in schedules], dtype=np.uint16).reshape(-1, 2)
        extent = self.spec.measure(ids, supervised, grids)
        flat = lambda name: np.concatenate([np.empty(0, np.uint16), *(entry[name].ravel() for entry in coded)])  # noqa: E731
        return {
            "key": document.key,
            "kind": document.kind,
            "input_ids": ids,
            "supervised": supervised.astype(np.uint8),
            "image_grid_hw": grids.ravel(),
            "image_codes": flat("codes"),
            "image_input_codes": flat("inputs"),
            **asdict(extent),
        }


def pixels_of(image_processor: NextFlowImageProcessor, image: PictureSource, schedule: ScaleSchedule) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1] of the schedule's size."""
    level = image_processor.schedule_table().level_of(schedule.final_grid)
    with open_image(image) as picture:
        grid, pixels = image_processor.whole(image_processor(picture, level=level, return_tensors="pt"))
    if grid != schedule.final_grid:
        raise ValueError(f"the picture's header promised the grid {schedule.final_grid}, it has {grid}")
    return pixels[0]


class PictureReader(Dataset):
    """Pictures by [`pixels_of`], or as a text what is wrong with them.

    Args:
        images: each with its schedule.
    """

    def __init__(self, images: Sequence[tuple[PictureSource, ScaleSchedule]], image_processor: NextFlowImageProcessor):
        self.images, self.image_processor = images, image_processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return pixels_of(self.image_processor, *self.images[index])
        except DAMAGED as error:
            return f"{type(error).__name__}: {error}"


def _names(documents, places: Sequence[tuple[int, int]]) -> list[str]:
    """Of a picture in each of its places, as (document, image)."""
    return [f"{documents[number][0].key}/{image}" for number, image in places]


def _names_hash(documents, pictures) -> str:
    """Of a batch: one that a stopped run has coded may hold others, where pictures were mended meanwhile."""
    names = [_names(documents, places) for places in pictures]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def _log(key: str, reason: str, detail: str) -> dict:
    return {"key": key, "reason": reason, "detail": detail}
