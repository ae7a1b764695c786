"""`transformers-nextflow data`: extract, pack, verify, inspect."""

import argparse
import json
from pathlib import Path

TASKS = ("text", "text-to-image", "captioning", "editing", "interleaved", "video", "chat")
STRATEGIES = ("budget", "length", "padding")


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `data`."""
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    add_extract(subparsers)
    add_pack(subparsers)
    add_verify(subparsers)
    add_inspect(subparsers)


def add_extract(subparsers) -> None:
    parser = subparsers.add_parser("extract", help="documents to shards of ids and image codes; resumes")
    parser.add_argument("source", metavar="SOURCE", help="file, folder, or id of a dataset on the Hub")
    _add_common(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the shards")
    parser.add_argument("--split", default="train", help="of the dataset (default: %(default)s)")
    parser.add_argument("--config", help="configuration of a dataset on the Hub")

    documents = parser.add_argument_group("documents")
    documents.add_argument("--task", choices=TASKS, default="chat", help="what the rows are (default: %(default)s)")
    documents.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="the source's own column names: text=caption"
    )
    documents.add_argument("--level", help="level of the scale schedules (default: the highest)")
    documents.add_argument("--max-images", type=int, metavar="N", help="default: 5 at level 512, 3 at 1024")
    documents.add_argument("--min-size", type=int, default=1, metavar="PIXELS", help="of a picture's shorter edge")
    documents.add_argument("--max-aspect-ratio", type=float, metavar="RATIO", help="whichever way")
    documents.add_argument("--min-text", type=int, default=0, metavar="N", help="characters")
    documents.add_argument("--max-text", type=int, metavar="N", help="characters")
    documents.add_argument("--invert-share", type=float, default=0.0, metavar="P", help="text-to-image to captioning")
    documents.add_argument("--drop-text", type=float, default=0.0, metavar="P", help="user's texts, for guidance")
    documents.add_argument("--drop-condition", type=float, default=0.0, metavar="P", help="and condition images too")

    correction = parser.add_argument_group("self-correction")
    correction.add_argument("--no-self-correction", action="store_true", help="store targets alone")
    correction.add_argument("--correction-probability", type=float, default=1.0, metavar="P", help="of samples")
    correction.add_argument("--correction-share", type=float, default=0.6, metavar="P", help="of a scale's tokens")
    correction.add_argument("--correction-top-k", type=int, default=10, metavar="K", help="default: %(default)s")
    correction.add_argument("--variants", type=int, default=1, metavar="N", help="encodings of each picture")

    work = parser.add_argument_group("work")
    work.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures (default: %(default)s)")
    work.add_argument("--documents-per-shard", type=int, default=1024, metavar="N", help="default: %(default)s")
    work.add_argument("--devices", nargs="+", default=["cpu"], metavar="DEVICE", help="cpu, cuda:0, ...")
    work.add_argument("--num-proc", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    work.add_argument("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    work.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.set_defaults(run=extract)


def extract(args: argparse.Namespace) -> None:
    from ..cli import model_name
    from ..quantizer import SelfCorrection
    from .extraction import ExtractionSettings, Source
    from .extraction import extract as run

    correction = None
    if not args.no_self_correction:
        correction = SelfCorrection(
            probability=args.correction_probability, token_share=args.correction_share, top_k=args.correction_top_k
        )
    names = (
        "task level max_images min_size max_aspect_ratio min_text max_text invert_share drop_text drop_condition "
        "variants seed batch_size documents_per_shard"
    ).split()
    settings = ExtractionSettings(
        **{name: getattr(args, name) for name in names},
        columns=_columns(args.columns),
        self_correction=correction,
    )
    manifest = run(
        Source(args.source, args.split, args.config),
        model_name(args.model),
        args.output,
        settings,
        args.devices,
        args.num_proc,
        args.engine,
    )
    _print(manifest["statistics"] | {"shards": len(manifest["shards"])}, args.json)


def _columns(pairs: list[str]) -> dict[str, str]:
    columns = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"--columns reads NAME=COLUMN, got {wrong[0]}")
    return columns


def add_pack(subparsers) -> None:
    parser = subparsers.add_parser("pack", help="shards of documents to shards of packs; resumes")
    parser.add_argument("documents", nargs="+", metavar="DIR", help="folders that extract wrote")
    _add_common(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the shards")
    parser.add_argument("--strategy", choices=STRATEGIES, default="budget", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=16_384, metavar="N", help="most positions of a pack")
    parser.add_argument("--budget", type=float, metavar="FLOPS", help="of a pack (default: from --length)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="documents, of padding")
    parser.add_argument("--backend", choices=("blocks", "dense"), default="blocks", help="what attention computes")
    parser.add_argument("--cost-model", metavar="JSON", help="measured coefficients, as benchmarks/packing.py writes")
    parser.add_argument("--multiple-of", type=int, default=1, metavar="N", help="processes x accumulation steps")
    parser.add_argument("--text-share", type=float, metavar="P", help="of positions, of text-only documents")
    parser.add_argument("--drop-long", action="store_true", help="leave documents longer than --length out")
    parser.add_argument("--packs-per-shard", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.set_defaults(run=pack)


def pack(args: argparse.Namespace) -> None:
    from ..cli import model_name
    from ..configuration_nextflow import NextFlowConfig
    from ..files import read_json
    from ..loading import naming
    from .costs import CostModel
    from .packing import BatchPadding, ComputeBudget, FixedLength
    from .packing import pack as run

    if args.cost_model:
        cost_model = CostModel.from_dict(read_json(Path(args.cost_model)))
    else:
        name = model_name(args.model)
        with naming(f"the config.json of {name}"):
            config = NextFlowConfig.from_pretrained(name)
        cost_model = CostModel.from_config(config, args.backend)
    strategy = {
        "budget": lambda: ComputeBudget(args.length, args.budget),
        "length": lambda: FixedLength(args.length),
        "padding": lambda: BatchPadding(args.batch_size, args.length),
    }[args.strategy]()
    manifest = run(
        args.documents,
        args.output,
        strategy,
        cost_model,
        args.multiple_of,
        args.text_share,
        args.drop_long,
        args.seed,
        args.packs_per_shard,
    )
    _print(manifest["statistics"] | {"shards": len(manifest["shards"])}, args.json)


def add_verify(subparsers) -> None:
    parser = subparsers.add_parser("verify", help="every hash and row, and that samples decode to their inputs")
    parser.add_argument("shards", metavar="DIR", help="folder that extract or pack wrote, or a Hub dataset of it")
    _add_common(parser)
    parser.set_defaults(run=verify)


def verify(args: argparse.Namespace) -> None:
    from ..cli import model_name
    from .shards import verify as run

    _print(run(args.shards, model_name(args.model)), args.json)


def add_inspect(subparsers) -> None:
    parser = subparsers.add_parser("inspect", help="statistics; with --output a cost plot and decoded pictures")
    parser.add_argument("shards", metavar="DIR", help="folder that extract or pack wrote, or a Hub dataset of it")
    _add_common(parser)
    parser.add_argument("--output", metavar="DIR", help="folder of sheet.png, costs.png and index.html")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="documents shown (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which documents (default: %(default)s)")
    parser.set_defaults(run=inspect)


def inspect(args: argparse.Namespace) -> None:
    from ..cli import model_name
    from .inspection import contact_sheet, summarize

    summary = summarize(args.shards)
    summary.pop("costs")
    if args.output:
        contact_sheet(args.shards, model_name(args.model), args.output, args.count, args.seed)
    _print(summary, args.json)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="local folder or Hub id (default: the repository's checkpoint)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _print(figures: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")
