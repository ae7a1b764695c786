"""A diagnosis as text and as one page of HTML: tables by rich, curves by matplotlib, which these need."""

import html
import io
from pathlib import Path

from PIL import Image
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..data.inspection import draw_sheet
from ..utils.files import png_base64, write_atomically
from .examination import Diagnosis

COLOURS = {"ok": "green", "unchecked": "bright_black", "warning": "yellow", "error": "red"}


def tables(diagnosis: Diagnosis) -> Group:
    """The headline, the alarms in full, and a table of every part's checks, to be printed by rich."""
    blocks: list = [Text(diagnosis.headline, style="bold")]
    for finding in diagnosis.alarms:
        table = Table(title=f"{finding.severity}: {finding.fault}", show_header=False, title_style="bold", expand=True)
        table.add_row("check", f"{finding.part}: {finding.check}")
        for name in ("measured", "expected", "cause", "next_step"):
            table.add_row(name.replace("_", " "), Text(getattr(finding, name)))
        blocks.append(table)
    for part in ("weights", "tokenizer", "shards", "transformer", "sampling"):
        table = Table("", "check", "measured", title=part, title_style="bold", expand=True)
        for finding in (finding for finding in diagnosis.findings if finding.part == part):
            table.add_row(Text(finding.severity, COLOURS[finding.severity]), finding.check, Text(finding.measured))
        blocks.append(table)
    return Group(*blocks)


def to_text(diagnosis: Diagnosis, width: int = 100) -> str:
    """The tables without colours."""
    Console(file=(text := io.StringIO()), width=width, color_system=None).print(tables(diagnosis))
    return text.getvalue()


def to_html(diagnosis: Diagnosis, title: str) -> str:
    """One self-contained page."""
    console = Console(file=io.StringIO(), width=140, record=True, color_system="truecolor")
    console.print(tables(diagnosis))
    page = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    shown = {name: plot(name, lines) for name, lines in diagnosis.curves.items()}
    shown |= {name: draw_sheet([("", row) for row in rows], columns=1) for name, rows in diagnosis.images.items()}
    figure = '<h3>{0}</h3><img alt="{0}" src="data:image/png;base64,{1}">'
    figures = "".join(figure.format(html.escape(name), png_base64(image)) for name, image in shown.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>body{{font-family:sans-serif;max-width:75em;margin:2em auto}}</style><h1>{html.escape(title)}</h1><p>"
        "Read the first alarm first: what must hold exactly is checked before means, so a later one may follow from "
        f"an earlier one. {diagnosis.seconds:.0f} seconds.</p>{page}<h2>Curves and pictures</h2>{figures}</html>\n"
    )


def plot(title: str, lines: dict[str, list[float]]) -> Image.Image:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", label=name)
    axes.set(ylabel=title, xlabel="scale")
    axes.legend()
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    return Image.open(buffer)


def write_report(diagnosis: Diagnosis, folder: str | Path, title: str) -> Path:
    """Write `report.html` into a folder; returns its path."""
    path, page = Path(folder) / "report.html", to_html(diagnosis, title)
    write_atomically(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    return path
