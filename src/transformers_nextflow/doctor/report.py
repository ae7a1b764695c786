"""A diagnosis as text and as one page of HTML: tables by rich, curves and pictures by matplotlib."""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..utils.files import write_atomically
from .examination import Diagnosis
from .findings import Finding

COLOURS = {"ok": "green", "note": "bright_black", "unchecked": "bright_black", "warning": "yellow", "error": "red"}
PARTS = {
    "weights": "Weights alone: what training does to every tensor.",
    "tokenizer": "The vision tokenizer turns pictures into codes, scale by scale, and back.",
    "shards": "Shards hold the codes and texts that the transformer is trained on.",
    "transformer": "The transformer predicts the codes of a scale from the prompt and the scales before.",
    "sampling": "Sampling draws the codes of a new picture, scale by scale.",
}
WORDS = {
    "code": "an entry's number in the vision tokenizer's table; a picture is some hundred of them.",
    "scale": "one of a picture's grids of codes, coarse to fine; scale 1 is a single cell.",
    "teacher forcing": "predicting a scale after the true codes of the scales before, as training does.",
    "logits": "the scores that the model gives every code; a softmax makes them probabilities.",
    "nats": "what a code costs, -log of its probability: 0 is certain, ln(N) one of N at random.",
    "unigram": "guessing codes by how often they occur.",
    "guidance": "pushing the logits away from those of a null prompt, the same chat without the user's text.",
    "PSNR": "how near a picture is to another, in dB: 20 is blurred, 30 good.",
    "standard errors": "how far a mean is from chance, in its own uncertainty; 4 and more are no chance.",
}


def tables(diagnosis: Diagnosis) -> Group:
    """The headline, the alarms in full, and a table of every part's checks, to be printed by rich."""
    blocks: list = [Text(diagnosis.headline, style="bold")]
    for finding in diagnosis.alarms:
        table = Table(title=f"{finding.severity}: {finding.fault}", show_header=False, title_style="bold", expand=True)
        for name, value in explained(finding):
            table.add_row(name, Text(value))
        blocks.append(table)
    for part in PARTS:
        if found := [finding for finding in diagnosis.findings if finding.part == part]:
            table = Table("", "check", "measured", title=part, title_style="bold", expand=True)
            for finding in found:
                mark = Text(finding.severity, style=COLOURS[finding.severity])
                table.add_row(mark, finding.check, Text(finding.measured))
            blocks.append(table)
    return Group(*blocks)


def explained(finding: Finding) -> list[tuple[str, str]]:
    return [
        ("check", f"{finding.part}: {finding.check}"),
        ("measured", finding.measured),
        ("expected", finding.expected),
        ("likely cause", finding.cause),
        ("next step", finding.next_step),
    ]


def to_text(diagnosis: Diagnosis, width: int = 100) -> str:
    """The tables without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(tables(diagnosis))
    return console.file.getvalue()


def to_html(diagnosis: Diagnosis, title: str) -> str:
    """One self-contained page.

    Raises:
        ImportError: without matplotlib.
    """
    console = Console(file=io.StringIO(), width=140, record=True, color_system="truecolor")
    console.print(tables(diagnosis))
    page = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    parts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in PARTS.items())
    words = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in WORDS.items())
    figures = "".join(
        f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in plots(diagnosis)
    )
    style = "body{font-family:sans-serif;max-width:75em;margin:2em auto}dt{font-weight:bold}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><p>Read the first alarm first: what must hold exactly is "
        f"checked before what is told from means, so a later alarm may follow from an earlier one. "
        f"{diagnosis.seconds:.0f} seconds.</p>{page}<h2>Curves and pictures</h2>{figures}"
        f"<h2>Words</h2><dl>{parts}{words}</dl></html>\n"
    )


def plots(diagnosis: Diagnosis) -> Iterator[tuple[str, bytes]]:
    """A PNG of every group of curves, and of every group of rows of pictures, by title."""
    from matplotlib.figure import Figure

    for title, lines in diagnosis.curves.items():
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        for name, values in lines.items():
            axes.plot(range(1, len(values) + 1), values, marker="o", label=name)
        axes.set(title=title, xlabel="scale")
        axes.legend()
        yield title, _png(figure)
    for title, rows in diagnosis.images.items():
        columns = max(map(len, rows))
        figure = Figure(figsize=(1.5 * columns, 1.5 * len(rows) + 0.5), layout="constrained")
        figure.suptitle(title)
        for axes, picture in zip(figure.subplots(len(rows), columns, squeeze=False).flat, _padded(rows, columns)):
            axes.set_axis_off()
            if picture is not None:
                axes.imshow(picture)
        yield title, _png(figure)


def _padded(rows: Sequence[Sequence[Image.Image]], columns: int) -> Iterator[Image.Image | None]:
    for row in rows:
        yield from [*row, *[None] * (columns - len(row))]


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def write_report(diagnosis: Diagnosis, folder: str | Path, title: str) -> Path:
    """Write `report.html` into a folder; returns its path.

    Raises:
        ImportError: without matplotlib.
    """
    path, page = Path(folder) / "report.html", to_html(diagnosis, title)
    write_atomically(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    return path
