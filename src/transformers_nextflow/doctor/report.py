"""A diagnosis as text and as one page of HTML: tables by rich, curves and pictures by matplotlib."""

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..utils.files import write_atomically
from .examination import Diagnosis

COLOURS = {"ok": "green", "unchecked": "bright_black", "warning": "yellow", "error": "red"}
PARTS = ("weights", "tokenizer", "shards", "transformer", "sampling")


def tables(diagnosis: Diagnosis) -> Group:
    """The headline, the alarms in full, and a table of every part's checks, to be printed by rich."""
    blocks: list = [Text(diagnosis.headline, style="bold")]
    for finding in diagnosis.alarms:
        table = Table(title=f"{finding.severity}: {finding.fault}", show_header=False, title_style="bold", expand=True)
        table.add_row("check", f"{finding.part}: {finding.check}")
        for name in ("measured", "expected", "cause", "next_step"):
            table.add_row(name.replace("_", " "), Text(getattr(finding, name)))
        blocks.append(table)
    for part in PARTS:
        if found := [finding for finding in diagnosis.findings if finding.part == part]:
            table = Table("", "check", "measured", title=part, title_style="bold", expand=True)
            for finding in found:
                mark = Text(finding.severity, style=COLOURS[finding.severity])
                table.add_row(mark, finding.check, Text(finding.measured))
            blocks.append(table)
    return Group(*blocks)


def to_text(diagnosis: Diagnosis, width: int = 100) -> str:
    """The tables without colours."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(tables(diagnosis))
    return text.getvalue()


def to_html(diagnosis: Diagnosis, title: str) -> str:
    """One self-contained page.

    Raises:
        ImportError: without matplotlib.
    """
    console = Console(file=io.StringIO(), width=140, record=True, color_system="truecolor")
    console.print(tables(diagnosis))
    page = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    figures = ""
    for name, figure in plots(diagnosis):
        figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
        data = base64.b64encode(buffer.getvalue()).decode()
        figures += f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>body{{font-family:sans-serif;max-width:75em;margin:2em auto}}</style><h1>{html.escape(title)}</h1><p>"
        "Read the first alarm first: what must hold exactly is checked before means, so a later one may follow from "
        f"an earlier one. {diagnosis.seconds:.0f} seconds.</p>{page}<h2>Curves and pictures</h2>{figures}</html>\n"
    )


def plots(diagnosis: Diagnosis) -> Iterator[tuple]:
    """A figure of every group of curves, and of every group of rows of pictures, by title."""
    from matplotlib.figure import Figure

    for title, lines in diagnosis.curves.items():
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        for name, values in lines.items():
            axes.plot(range(1, len(values) + 1), values, marker="o", label=name)
        axes.set(title=title, xlabel="scale")
        axes.legend()
        yield title, figure
    for title, rows in diagnosis.images.items():
        columns = max(map(len, rows))
        figure = Figure(figsize=(1.5 * columns, 1.5 * len(rows) + 0.5), layout="constrained")
        figure.suptitle(title)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for row, pictures in zip(grid, rows):
            for axes, picture in zip(row, pictures):
                axes.imshow(picture)
        yield title, figure


def write_report(diagnosis: Diagnosis, folder: str | Path, title: str) -> Path:
    """Write `report.html` into a folder; returns its path.

    Raises:
        ImportError: without matplotlib.
    """
    path, page = Path(folder) / "report.html", to_html(diagnosis, title)
    write_atomically(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    return path
