"""`transformers-nextflow data`: extract, pack, verify, inspect."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option, Typer

from ..utils.commands import Json, Model, command, print_figures
from ..utils.files import read_json
from ..utils.lazy import needing_extra
from ..utils.loading import load_config, model_name

app = Typer()

Task = Literal["text", "text-to-image", "captioning", "editing", "interleaved", "video", "chat"]
Output = Annotated[str, Option(metavar="DIR", help="Folder of the shards.")]
Shards = Annotated[str, Argument(metavar="DIR", help="Folder that extract or pack wrote, or a Hub dataset of it.")]
Seed = Annotated[int, Option(metavar="N")]


@dataclass
class Documents:
    """Documents."""

    task: Annotated[Task, Option(help="What the rows are.")] = "chat"
    columns: Annotated[
        list[str] | None,
        Option(metavar="NAME=COLUMN", help="The source's own column names, text=caption; repeatable."),
    ] = None
    level: Annotated[str | None, Option(help="Level of the scale schedules; default: the highest.")] = None
    max_images: Annotated[int | None, Option(metavar="N", help="Default: 5 at level 512, 3 at 1024.")] = None
    min_size: Annotated[int, Option(metavar="PIXELS", help="Of a picture's shorter edge.")] = 1
    max_aspect_ratio: Annotated[float | None, Option(metavar="RATIO", help="Whichever way.")] = None
    min_text: Annotated[int, Option(metavar="N", help="Characters.")] = 0
    max_text: Annotated[int | None, Option(metavar="N", help="Characters.")] = None
    invert_share: Annotated[float, Option(metavar="P", help="Text-to-image to captioning.")] = 0.0
    drop_text: Annotated[float, Option(metavar="P", help="User's texts, for guidance.")] = 0.0
    drop_condition: Annotated[float, Option(metavar="P", help="And condition images too.")] = 0.0


@dataclass
class Correction:
    """Self-correction."""

    no_self_correction: Annotated[bool, Option("--no-self-correction", help="Store targets alone.")] = False
    correction_probability: Annotated[float, Option(metavar="P", help="Of samples.")] = 1.0
    correction_share: Annotated[float, Option(metavar="P", help="Of a scale's tokens.")] = 0.6
    correction_top_k: Annotated[int, Option(metavar="K")] = 10
    correction_temperature: Annotated[
        float | None, Option(metavar="T", help="softmax(-distance / T) over these; default: all alike.")
    ] = None
    variants: Annotated[int, Option(metavar="N", help="Encodings of each picture.")] = 1


@dataclass
class Work:
    """Work."""

    batch_size: Annotated[int, Option(metavar="N", help="Pictures.")] = 16
    documents_per_shard: Annotated[int, Option(metavar="N")] = 1024
    devices: Annotated[list[str] | None, Option(metavar="DEVICE", help="Default: cpu; repeatable.")] = None
    num_proc: Annotated[int, Option(metavar="N", help="Processes.")] = 1
    num_workers: Annotated[
        int | None, Option(metavar="N", help="Of each process, to read pictures; default: the cores left, 8 at most.")
    ] = None
    engine: Annotated[Literal["local", "ray"], Option()] = "local"
    seed: Seed = 0


@dataclass
class Packs:
    """Packs."""

    strategy: Annotated[Literal["budget", "length", "padding"], Option()] = "budget"
    length: Annotated[int, Option(metavar="N", help="Most positions of a pack.")] = 16_384
    budget: Annotated[float | None, Option(metavar="FLOPS", help="Of a pack; default: from --length.")] = None
    batch_size: Annotated[int, Option(metavar="N", help="Documents, of padding.")] = 8
    multiple_of: Annotated[int, Option(metavar="N", help="Processes x accumulation steps.")] = 1
    text_share: Annotated[float | None, Option(metavar="P", help="Of positions, of text-only documents.")] = None
    drop_long: Annotated[bool, Option("--drop-long", help="Leave documents longer than --length out.")] = False
    packs_per_shard: Annotated[int, Option(metavar="N")] = 256
    seed: Seed = 0


@dataclass
class Costs:
    """What positions cost."""

    backend: Annotated[Literal["blocks", "dense"], Option(help="What attention computes.")] = "blocks"
    cost_model: Annotated[
        str | None, Option(metavar="JSON", help="Measured coefficients, as benchmarks/packing.py writes.")
    ] = None


@command(app)
def extract(
    source: Annotated[str, Argument(metavar="SOURCE", help="File, folder, or id of a dataset on the Hub.")],
    output: Output,
    documents: Documents,
    correction: Correction,
    work: Work,
    model: Model = None,
    split: Annotated[str, Option(help="Of the dataset.")] = "train",
    config: Annotated[str | None, Option(help="Configuration of a dataset on the Hub.")] = None,
    json: Json = False,
) -> None:
    """Documents to shards of ids and image codes; resumes."""
    with needing_extra("train", "data extract"):
        from ..quantizer import SelfCorrection
        from .extraction import ExtractionSettings, Source
        from .extraction import extract as run

    self_correction = None
    if not correction.no_self_correction:
        self_correction = SelfCorrection(
            probability=correction.correction_probability,
            token_share=correction.correction_share,
            top_k=correction.correction_top_k,
            temperature=correction.correction_temperature,
        )
    settings = ExtractionSettings(
        **vars(documents) | {"columns": _columns(documents.columns or [])},
        self_correction=self_correction,
        variants=correction.variants,
        seed=work.seed,
        batch_size=work.batch_size,
        documents_per_shard=work.documents_per_shard,
    )
    manifest = run(
        Source(source, split, config),
        model_name(model),
        output,
        settings,
        work.devices or ["cpu"],
        work.num_proc,
        work.engine,
        _workers(work),
    )
    print_figures(manifest["statistics"] | {"shards": len(manifest["shards"])}, json)


def _workers(work: Work) -> int:
    """Of each process."""
    if work.num_workers is not None:
        return work.num_workers
    return 0 if work.engine == "ray" else min(max((os.cpu_count() or 1) // max(work.num_proc, 1) - 1, 0), 8)


def _columns(pairs: list[str]) -> dict[str, str]:
    columns = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"--columns reads NAME=COLUMN, got {wrong[0]}")
    return columns


@command(app)
def pack(
    documents: Annotated[list[str], Argument(metavar="DIR...", help="Folders that extract wrote.")],
    output: Output,
    packs: Packs,
    costs: Costs,
    model: Model = None,
    json: Json = False,
) -> None:
    """Shards of documents to shards of packs; resumes."""
    with needing_extra("train", "data pack"):
        from .costs import CostModel
        from .packing import BatchPadding, ComputeBudget, FixedLength
        from .packing import pack as run

    if costs.cost_model:
        cost_model = CostModel.from_dict(read_json(Path(costs.cost_model)))
    else:
        cost_model = CostModel.from_config(load_config(model_name(model)), costs.backend)
    strategies: dict = {
        "budget": lambda: ComputeBudget(packs.length, packs.budget),
        "length": lambda: FixedLength(packs.length),
        "padding": lambda: BatchPadding(packs.batch_size, packs.length),
    }
    manifest = run(
        documents,
        output,
        strategies[packs.strategy](),
        cost_model,
        packs.multiple_of,
        packs.text_share,
        packs.drop_long,
        packs.seed,
        packs.packs_per_shard,
    )
    print_figures(manifest["statistics"] | {"shards": len(manifest["shards"])}, json)


@command(app)
def verify(shards: Shards, model: Model = None, json: Json = False) -> None:
    """Every hash and row, and that samples decode to their inputs."""
    with needing_extra("train", "data verify"):
        from .shards import verify as run

    print_figures(run(shards, model_name(model)), json)


@command(app)
def inspect(
    shards: Shards,
    model: Model = None,
    output: Annotated[str | None, Option(metavar="DIR", help="Folder of sheet.png, costs.png and index.html.")] = None,
    count: Annotated[int, Option(metavar="N", help="Documents shown.")] = 12,
    seed: Annotated[int, Option(metavar="N", help="Which documents.")] = 0,
    json: Json = False,
) -> None:
    """Statistics; with --output a cost plot and decoded pictures."""
    with needing_extra("train", "data inspect"):
        from .inspection import contact_sheet, summarize

    summary = contact_sheet(shards, model_name(model), output, count, seed) if output else summarize(shards)
    summary.pop("costs")
    print_figures(summary, json)
