"""A diagnosis as plain text, and with its curves and pictures as one page of HTML or one PNG."""

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..utils.files import write_atomically
from .examination import Diagnosis
from .findings import Finding

INK, PAPER = "#222222", "white"
LINES = ("#4477aa", "#cc6677", "#228833", "#aa7700")
COLOURS = {"ok": "#227722", "note": "#555555", "warning": "#aa6600", "error": "#aa0000"}
MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}
PARTS = {
    "tokenizer": "The vision tokenizer turns pictures into codes, scale by scale, and back.",
    "shards": "Shards hold the codes and texts that the transformer is trained on.",
    "transformer": "The transformer predicts the codes of a scale from the prompt and the scales before.",
    "sampling": "Sampling draws the codes of a new picture, scale by scale.",
}


WORDS = {
    "code": "an entry's number in the vision tokenizer's table; a picture is some hundred of them.",
    "scale": "one of a picture's grids of codes, coarse to fine; scale 1 is a single cell.",
    "teacher forcing": "predicting a scale after the true codes of the scales before, as training does; sampling goes "
    "on from the model's own.",
    "logits": "the scores that the model gives every code; a softmax makes them probabilities.",
    "nats": "what a code costs, -log of its probability: 0 is certain, 0.7 a coin's toss, ln(N) one of N at random.",
    "unigram": "guessing codes by how often they occur.",
    "guidance": "pushing the logits away from those of a null prompt, the same chat without the user's text.",
    "grey levels (RMS)": "root mean square difference of pixels, which go from 0 to 255.",
    "PSNR": "20 log10(255 / RMS difference), in dB: 20 is blurred, 30 good.",
    "standard errors": "how far a mean is from chance, in its own uncertainty; 4 and more are no chance.",
    "self-correction": "training on inputs where some codes are replaced by near ones, which later scales mend.",
}


def headline(diagnosis: Diagnosis) -> str:
    """The outcome in a sentence."""
    if diagnosis.first is None:
        return f"Nothing wrong was found in {len(diagnosis.findings)} checks."
    others = len(diagnosis.alarms) - 1
    rest = "" if not others else f" {others} further alarm{'s' * (others > 1)} may follow from it."
    return f"Most likely: {diagnosis.first.fault} ({diagnosis.first.check}).{rest}"


def to_text(diagnosis: Diagnosis, width: int = 100) -> str:
    """For a terminal: the alarms in full, the rest a line each."""
    blocks = [headline(diagnosis)]
    for finding in diagnosis.alarms:
        lines = [f"{MARKS[finding.severity]}  {finding.fault}  ({finding.part}: {finding.check})"]
        for name, value in explained(finding):
            lines.append(textwrap.fill(f"{name}: {value}", width, initial_indent="  ", subsequent_indent="      "))
        blocks.append("\n".join(lines))
    rest = [finding for finding in diagnosis.findings if not finding.is_alarm]
    blocks.append("\n".join(f"{MARKS[f.severity]:<5} {f.part}: {f.check}: {f.measured}" for f in rest))
    return "\n\n".join(blocks) + "\n"


def explained(finding: Finding) -> list[tuple[str, str]]:
    return [
        ("measured", finding.measured),
        ("expected", finding.expected),
        ("likely cause", finding.cause),
        ("next step", finding.next_step),
    ]


def to_html(diagnosis: Diagnosis, title: str) -> str:
    """One self-contained page."""
    style = (
        "body{font-family:sans-serif;max-width:60em;margin:2em auto;color:#222;line-height:1.4}"
        "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ccc;padding:.3em;text-align:left;"
        "vertical-align:top}.error{color:#a00}.warning{color:#a60}.ok{color:#272}section{margin:1.5em 0}"
        "dt{font-weight:bold}dd{margin:0 0 .4em 1em}img{margin:0 .5em .5em 0}"
    )
    alarms = "".join(_alarm(finding) for finding in diagnosis.alarms)
    parts = "".join(_part(name, text, diagnosis.findings) for name, text in PARTS.items())
    curves = "".join(_image(draw_curves(name, lines), name) for name, lines in diagnosis.curves.items())
    pictures = "".join(
        f"<section><h3>{html.escape(name)}</h3>{''.join(_image(_row(row), name) for row in rows)}</section>"
        for name, rows in diagnosis.images.items()
    )
    words = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(text)}</dd>" for word, text in WORDS.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><p><strong>{html.escape(headline(diagnosis))}</strong> "
        f"Read the first alarm first: checks go from the picture on its way to the sample, exact ones before those "
        f"that compare means, so a later alarm may follow from an earlier one. {diagnosis.seconds:.0f} seconds.</p>"
        f"{alarms}<h2>All checks</h2>{parts}<h2>Curves, scale by scale from coarse to fine</h2>{curves}"
        f"<h2>Pictures</h2>{pictures}<h2>Words</h2><dl>{words}</dl></html>\n"
    )


def _alarm(finding: Finding) -> str:
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in explained(finding))
    title = html.escape(f"{finding.severity}: {finding.fault}")
    return f'<section><h2 class="{finding.severity}">{title}</h2><dl>{rows}</dl></section>'


def _part(name: str, text: str, findings: Sequence[Finding]) -> str:
    rows = "".join(
        f'<tr><td class="{f.severity}">{f.severity}</td><td>{html.escape(f.check)}</td><td>{html.escape(f.measured)}'
        f"</td><td>{html.escape(f.expected)}</td></tr>"
        for f in findings
        if f.part == name
    )
    if not rows:
        return ""
    head = "<tr><th></th><th>check</th><th>measured</th><th>expected</th></tr>"
    return f"<section><h3>{name}</h3><p>{text}</p><table>{head}{rows}</table></section>"


def draw_curves(title: str, lines: Mapping[str, Sequence[float]], size: tuple[int, int] = (440, 240)) -> Image.Image:
    """Figures of every scale as lines, from 0 on where none is negative."""
    image = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    values = [value for line in lines.values() for value in line]
    low, high = min(0.0, *values), max(max(values), 1e-9)
    left, right, top, bottom = 50, size[0] - 15, 60, size[1] - 25
    count = max(map(len, lines.values()))
    place = lambda index, value: (  # noqa: E731
        left + (right - left) * index / max(count - 1, 1),
        bottom - (bottom - top) * (value - low) / (high - low or 1),
    )
    pen.text((5, 5), title, INK, font)
    pen.line([(left, top), (left, bottom), (right, bottom)], INK)
    for value in (low, (low + high) / 2, high):
        pen.text((5, place(0, value)[1] - 7), f"{value:.3g}", INK, font)
    first = 0 if "given" in "".join(lines) else 1
    for index in range(count):
        pen.text((place(index, low)[0] - 3, bottom + 5), str(index + first), INK, font)
    at, row = left, 22
    for (name, line), colour in zip(lines.items(), LINES):
        points = [place(index, value) for index, value in enumerate(line)]
        pen.line(points, colour, width=2)
        for x, y in points:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        length = font.getlength(name)
        if at > left and at + length > right:
            at, row = left, row + 16
        pen.text((at, row), name, colour, font)
        at += length + 15
    return image


class Sheet:
    """A page that grows downward."""

    def __init__(self, width: int = 1100, margin: int = 24):
        self.width, self.margin, self.top = width, margin, margin
        self.image = Image.new("RGB", (width, 2 * margin), PAPER)

    def _grow(self, height: int) -> None:
        bottom = self.top + height + self.margin
        if bottom > self.image.height:
            taller = Image.new("RGB", (self.width, bottom), PAPER)
            taller.paste(self.image)
            self.image = taller

    def text(self, text: str, size: int = 14, colour: str = INK, indent: int = 0) -> None:
        """A paragraph, broken into lines."""
        font, lines = ImageFont.load_default(size), [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= self.width - 2 * self.margin - indent:
                lines[-1] = longer
            else:
                lines.append(word)
        self._grow(len(lines) * (size + 5) + size // 2)
        pen = ImageDraw.Draw(self.image)
        for line in lines:
            pen.text((self.margin + indent, self.top), line, colour, font)
            self.top += size + 5
        self.top += size // 2

    def pictures(self, pictures: Sequence[Image.Image]) -> None:
        """Side by side, and below each other where the page ends; a picture wider than the page is made smaller."""
        left = row = 0
        for picture in pictures:
            picture.thumbnail((self.width - 2 * self.margin, picture.height))
            if left and left + picture.width > self.width - 2 * self.margin:
                self.top, left, row = self.top + row + 6, 0, 0
            self._grow(picture.height)
            self.image.paste(picture, (self.margin + left, self.top))
            left, row = left + picture.width + 12, max(row, picture.height)
        self.top += row + 10


def to_png(diagnosis: Diagnosis, title: str, alarms: int = 3) -> Image.Image:
    """One picture of the outcome: the first alarms in full, what every check measured, curves and pictures."""
    sheet = Sheet()
    sheet.text(title, 26)
    sheet.text(headline(diagnosis), 18, COLOURS[diagnosis.first.severity if diagnosis.first else "ok"])
    for finding in diagnosis.alarms[:alarms]:
        sheet.text(
            f"{MARKS[finding.severity]}: {finding.fault} ({finding.part}: {finding.check})",
            18,
            COLOURS[finding.severity],
        )
        for name, value in explained(finding):
            sheet.text(f"{name}: {value}", indent=16)
    for part, text in PARTS.items():
        if findings := [finding for finding in diagnosis.findings if finding.part == part]:
            sheet.text(text, 16)
        for finding in findings:
            line = f"{MARKS[finding.severity]}  {finding.check}: {finding.measured}"
            sheet.text(line, 12, COLOURS[finding.severity], 16)
    if diagnosis.curves:
        sheet.text("Curves, scale by scale from coarse to fine", 20)
        sheet.pictures([draw_curves(name, lines) for name, lines in diagnosis.curves.items()])
    for name, rows in diagnosis.images.items():
        sheet.text(name[0].upper() + name[1:], 16)
        sheet.pictures([_row(row) for row in rows])
    sheet.text("Words", 20)
    for word, text in WORDS.items():
        sheet.text(f"{word}: {text}", 12, indent=16)
    return sheet.image


def _row(pictures: Sequence[Image.Image], edge: int = 96) -> Image.Image:
    """Pictures side by side, of one height."""
    scaled = [
        picture.convert("RGB").resize(
            (max(round(picture.width * edge / picture.height), 1), edge), Image.Resampling.BOX
        )
        for picture in pictures
    ]
    sheet = Image.new("RGB", (sum(each.width + 4 for each in scaled), edge), PAPER)
    left = 0
    for each in scaled:
        sheet.paste(each, (left, 0))
        left += each.width + 4
    return sheet


def _image(picture: Image.Image, name: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def write_report(diagnosis: Diagnosis, folder: str | Path, title: str) -> Path:
    """Write `report.html`, `report.png` and `report.txt` into a folder; returns the page's path."""
    folder = Path(folder)
    write_atomically(folder / "report.txt", lambda partial: partial.write_text(to_text(diagnosis), encoding="utf-8"))
    sheet = to_png(diagnosis, title)
    write_atomically(folder / "report.png", lambda partial: sheet.save(partial, format="PNG"))
    page = to_html(diagnosis, title)
    write_atomically(folder / "report.html", lambda partial: partial.write_text(page, encoding="utf-8"))
    return folder / "report.html"
