"""How much of extraction's time the encoder works: `python -m benchmarks.extraction --json`.

JPEG files of 1.8 megapixels are coded by the repository's tokenizer as `data extract` does it, while workers read,
decode and resize what comes next. Counted are the encoder and the quantizer with its self-correction.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from transformers_nextflow.data import ExtractionSettings, Source
from transformers_nextflow.data.extraction import Extractor
from transformers_nextflow.utils.loading import model_name

from .harness import machine, report

SIZE = (1600, 1125)


def write_photos(folder: Path, count: int) -> None:
    """Pictures with as much detail as photographs, and their captions."""
    lines = []
    for number in range(count):
        rng = np.random.default_rng(number)
        picture = np.zeros((*SIZE[::-1], 3))
        for cells in (4, 16, 64, 256):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            picture += np.asarray(noise.resize(SIZE, Image.Resampling.BICUBIC)) / cells**0.5
        picture *= 255 / picture.max()
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        lines.append(f'{{"file_name": "{number}.jpg", "text": "picture {number}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))


class Timed(Extractor):
    """Counts the seconds in which pictures are coded."""

    seconds = 0.0

    def code(self, *args, **kwargs):
        started = time.perf_counter()
        coded = super().code(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        return coded


def measure(photos: Path, model: str, count: int, batch_size: int, workers: int) -> dict:
    settings = ExtractionSettings("text-to-image", batch_size=batch_size, documents_per_shard=count)
    extractor = Timed(Source(str(photos)), model, settings, num_workers=workers)
    with tempfile.TemporaryDirectory() as output:
        started = time.perf_counter()
        extractor.extract_shard(0, Path(output))
        wall = time.perf_counter() - started
    return {
        "workers": workers,
        "pictures_per_second": count / wall,
        "wall_seconds": wall,
        "encoder_seconds": extractor.seconds,
        "encoder_share": extractor.seconds / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="default: the repository's checkpoint")
    parser.add_argument("--pictures", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to a file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), arguments.pictures)
        sizes = arguments.pictures, arguments.batch_size
        runs = [measure(Path(folder), model_name(arguments.model), *sizes, workers) for workers in arguments.workers]
    figures = {"pixels": SIZE[0] * SIZE[1], "pictures": arguments.pictures, "batch_size": arguments.batch_size}
    report(figures | {"runs": runs, "machine": machine(torch.device("cpu"))}, arguments.json, arguments.output)


if __name__ == "__main__":
    main()
