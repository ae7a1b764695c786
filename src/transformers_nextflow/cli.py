"""The console command `transformers-nextflow`.

Each subcommand is one function of the parsed arguments and one that adds its parser; `SUBCOMMANDS` lists the latter.
Libraries are imported where a subcommand needs them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_nextflow import NextFlowConfig


def load_config(model: str | None) -> "NextFlowConfig":
    """The configuration in a model directory, or the paper's 7B model.

    Raises:
        OSError: if there is no such directory, or no readable `config.json` in it.
        ValueError: if it is not NextFlow's.
    """
    from .configuration_nextflow import NextFlowConfig

    if model is None:
        return NextFlowConfig()
    if not Path(model).is_dir():
        raise NotADirectoryError(f"there is no model directory {model}")
    values, _ = NextFlowConfig.get_config_dict(model)
    if values.get("model_type") != NextFlowConfig.model_type:
        raise ValueError(
            f'{model} must hold a model of type "{NextFlowConfig.model_type}", got {values.get("model_type")!r}'
        )
    return NextFlowConfig.from_dict(values)


def add_flops(subparsers) -> None:
    parser = subparsers.add_parser(
        "flops", help="cost of one image: the paper's estimate (appendix A.2) and this model's own count"
    )
    parser.add_argument("--aspect-ratio", default="1:1", metavar="W:H", help="width:height (default: %(default)s)")
    parser.add_argument("--level", help="level of the scale schedules, e.g. 256, 512, 1024 (default: the highest)")
    parser.add_argument("--prompt-tokens", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--denoising-steps", type=int, default=18, metavar="N", help="of the MMDiT compared (default: %(default)s)"
    )
    parser.add_argument("--no-guidance", action="store_true", help="count one pass of the model instead of two")
    parser.add_argument("--model", metavar="DIR", help="model directory (default: the paper's 7B configuration)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=flops)


def flops(args: argparse.Namespace) -> None:
    from .flops import PAPER_WIDTHS, image_passes, mmdit_passes, model_cost, paper_layer_cost

    config = load_config(args.model)
    table = config.vq_config.schedule_table()
    schedule = table.by_aspect_ratio(args.aspect_ratio, args.level)
    passes = image_passes(schedule, args.prompt_tokens)
    nextflow = paper_layer_cost(passes)
    mmdit = paper_layer_cost(mmdit_passes(schedule, args.denoising_steps))
    cost = model_cost(config.text_config, config.vq_config.codebook_size, passes, guidance=not args.no_guidance)
    height, width = table.image_size(schedule)

    figures = {
        "height": height,
        "width": width,
        "scales": len(schedule),
        "codes": schedule.num_codes,
        "prompt_tokens": args.prompt_tokens,
        "paper_per_layer": {
            "nextflow": asdict(nextflow),
            "mmdit": {**asdict(mmdit), "steps": args.denoising_steps},
            "ratio": {str(h): mmdit.flops(h) / nextflow.flops(h) for h in PAPER_WIDTHS},
        },
        "model": {
            "hidden_size": config.text_config.hidden_size,
            "num_hidden_layers": config.text_config.num_hidden_layers,
            "guidance": not args.no_guidance,
            **asdict(cost),
            "total": cost.total,
        },
    }
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{width}x{height} pixels (width x height), {len(schedule)} scales, {schedule.num_codes:,} codes,", end=" ")
    print(f"{args.prompt_tokens} prompt tokens\n")
    print("The paper's estimate, FLOPs of one layer of hidden size h (appendix A.2)")
    print_rows(
        ("NextFlow", f"{nextflow.quadratic:,} h^2 + {nextflow.linear:,} h"),
        (f"MMDiT, {args.denoising_steps} steps", f"{mmdit.quadratic:,} h^2 + {mmdit.linear:,} h"),
        *((f"ratio at h = {h}", f"{mmdit.flops(h) / nextflow.flops(h):.2f}") for h in PAPER_WIDTHS),
    )
    print(f"\nThis model, FLOPs of all {config.text_config.num_hidden_layers} layers and heads,", end=" ")
    print("without guidance" if args.no_guidance else "with guidance (two rows)")
    parts = {**asdict(cost), "total": cost.total}
    print_rows(*((name.replace("_", " "), f"{value:.4e}  {value / cost.total:6.1%}") for name, value in parts.items()))


def print_rows(*rows: tuple[str, str]) -> None:
    """Two columns, the first as wide as its longest entry."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


SUBCOMMANDS = (add_flops,)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transformers-nextflow", description="Text and images from one next-token, next-scale model."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_subcommand in SUBCOMMANDS:
        add_subcommand(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; a user's error (bad value, missing file) is one line on stderr and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
