"""Items of the tasks as documents of the data pipeline, and the path from them to packs.

`python -m examples.emoji.documents --data runs/emoji/data --output runs/emoji-packs` draws documents of all tasks,
codes them with a checkpoint's tokenizers, packs and verifies them: `packs` in the output is ready to train on.
"""

import argparse
import dataclasses
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from transformers_nextflow import SelfCorrection
from transformers_nextflow.configuration_nextflow import NextFlowConfig
from transformers_nextflow.data import (
    ComputeBudget,
    CostModel,
    Document,
    ExtractionSettings,
    Message,
    Source,
    extract,
    pack,
    verify,
)
from transformers_nextflow.data.packing import Strategy
from transformers_nextflow.scales import ScheduleTable
from transformers_nextflow.utils.files import write_atomically
from transformers_nextflow.utils.loading import model_name

from .sizes import LEVELS, PATCH_SIZE, SCHEDULES
from .splits import SEEN
from .tasks import Item, Picture, Tasks
from .world import World, in_a_row

INVERTED = 0.1  # share of text-to-image turned into captioning in late pretraining (NextFlow sec. 5)
DOCUMENT_KINDS = {"question": "captioning", "analogy": "editing", "sequence": "video"}  # else the task's own name
DIALOGUE = "dialogue"  # several items about one picture and its edit, for training alone
SIZES = ScheduleTable(SCHEDULES, LEVELS, PATCH_SIZE)
# All samples and 60% of the tokens, as the paper found best. Its multinomial is open: drawn uniformly, half of
# all tokens are disturbed and 5% of the last scales' targets are what they are without; so, a quarter and 10%.
EXTRACTION = ExtractionSettings(
    "chat",
    drop_text=0.1,
    self_correction=SelfCorrection(temperature=0.1),
    variants=2,
    batch_size=64,
    documents_per_shard=6_000,
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage of the transformer's training reads.

    Attributes:
        level: of all pictures.
        mixture: share of each task, or of "dialogue", in documents.
        split, part: of the targets, see [`Tasks.draw`]; those that are held out are for held-out losses alone.
    """

    level: str
    mixture: Mapping[str, float]
    split: str = "train"
    part: str = SEEN


def inverted(mixture: Mapping[str, float]) -> dict[str, float]:
    """The mixture with a tenth of text-to-image as captioning, worded as captions are."""
    share = INVERTED * mixture["text-to-image"]
    return {
        **mixture,
        "text-to-image": mixture["text-to-image"] - share,
        "captioning": mixture.get("captioning", 0.0) + share,
    }


STAGES = {
    "alignment": Stage("32", {"text-to-image": 0.5, "captioning": 0.5}),
    "pretraining-32": Stage("32", {"text-to-image": 0.5, "captioning": 0.15, "question": 0.1, "editing": 0.25}),
    "pretraining-64": Stage(
        "64",
        inverted(
            {
                "text-to-image": 0.44,
                "captioning": 0.08,
                "question": 0.08,
                "editing": 0.22,
                "tags": 0.06,
                "reasoning": 0.06,
                "arrangement": 0.06,
            }
        ),
    ),
    # the tasks of many pictures, which want longer packs, come last
    "tuning-64": Stage(
        "64",
        inverted(
            {
                "text-to-image": 0.36,
                "captioning": 0.06,
                "question": 0.08,
                "editing": 0.2,
                "analogy": 0.08,
                "tags": 0.05,
                "reasoning": 0.05,
                "sequence": 0.06,
                "arrangement": 0.06,
            }
        ),
    ),
    # dialogues read a picture four times for the price of an edit
    "continued-64": Stage(
        "64",
        inverted(
            {
                "text-to-image": 0.36,
                "captioning": 0.06,
                "question": 0.05,
                "dialogue": 0.22,
                "editing": 0.08,
                "analogy": 0.03,
                "tags": 0.06,
                "reasoning": 0.06,
                "sequence": 0.03,
                "arrangement": 0.05,
            }
        ),
    ),
}
# the same of so many documents that hardly any seen picture is never asked for
STAGES["covering-64"] = STAGES["continued-64"]


def draw_picture(picture: Picture, world: World, level: str) -> np.ndarray:
    """uint8 (height, width, 3) of the size that its shape has at a level."""
    height, width = SIZES.image_size(SIZES.by_aspect_ratio(picture.aspect_ratio, level))
    return in_a_row([world.pictures[row] for row in picture.rows], height, width)


def to_document(key: str, kind: str, items: Sequence[Item], world: World, level: str) -> Document:
    """Items of one conversation in the pipeline's schema."""
    turns = [turn for item in items for turn in (("user", item.user), ("assistant", item.assistant))]
    messages = tuple(
        Message(role, tuple(part if isinstance(part, str) else None for part in content)) for role, content in turns
    )
    pictures = [part for _, content in turns for part in content if isinstance(part, Picture)]
    images = tuple(_png(draw_picture(picture, world, level)) for picture in pictures)
    return Document(key, kind, messages, images)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def draw_rows(world: World, stage: Stage, numbers: Iterable[int], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of documents of a stage; each depends on the seed and its number alone."""
    tasks = Tasks.of(world)
    for number in numbers:
        rng = random.Random(f"document {seed} {number}")
        task = rng.choices(list(stage.mixture), list(stage.mixture.values()))[0]
        if task == DIALOGUE:
            kind, items = "chat", tasks.dialogue(number, seed)
        else:
            kind = DOCUMENT_KINDS.get(task, task)
            items = [tasks.draw(task, stage.split, number, seed, stage.part)]
        yield to_document(f"emoji-{number}", kind, items, world, stage.level).to_row()


def _draw_rows(folder: str, stage: Stage, parts: list[range], seed: int) -> Iterator[dict[str, Any]]:
    (numbers,) = parts  # those of this process
    yield from draw_rows(World(folder), stage, numbers, seed)


def build_packs(
    output: Path,
    model: str | Path,
    data: str | Path,
    stage: Stage,
    count: int,
    settings: ExtractionSettings,
    strategy: Strategy,
    multiple_of: int = 1,
    num_proc: int = 1,
) -> Path:
    """Documents of a stage, coded and packed; the same call continues a stopped run.

    Args:
        output: gets `source`, `documents` and `packs`.
        model: folder of a NextFlow model, whose tokenizers code the documents.
        data: folder of the emoji data set.
        stage: what to draw; its level takes the place of the settings'.
        count: documents.
        num_proc: processes, of which there are no more than shards.

    Returns:
        The folder of packs.
    """
    num_proc = min(num_proc, -(-count // settings.documents_per_shard))
    parquet = output / "source" / "documents.parquet"
    if not parquet.exists():
        size = -(-count // num_proc)  # each process draws a part, in their order
        parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
        arguments = {"folder": str(data), "stage": stage, "parts": parts, "seed": settings.seed}
        rows = datasets.Dataset.from_generator(_draw_rows, gen_kwargs=arguments, num_proc=len(parts))
        write_atomically(parquet, lambda partial: rows.to_parquet(str(partial)))
    settings = dataclasses.replace(settings, level=stage.level)
    extract(Source(str(parquet)), model, output / "documents", settings, num_proc=num_proc)
    cost_model = CostModel.from_config(NextFlowConfig.from_pretrained(model))
    pack([output / "documents"], output / "packs", strategy, cost_model, multiple_of, seed=settings.seed)
    return output / "packs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="data set (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji-packs"), help="default: %(default)s")
    parser.add_argument("--model", help="local folder or Hub id (default: the repository's checkpoint)")
    parser.add_argument("--stage", choices=STAGES, default="pretraining-64", help="default: %(default)s")
    parser.add_argument("--documents", type=int, default=2_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=2_048, metavar="N", help="of a pack (default: %(default)s)")
    parser.add_argument("--multiple-of", type=int, default=1, metavar="N", help="ranks x accumulation steps")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    model = model_name(arguments.model)
    settings = dataclasses.replace(EXTRACTION, seed=arguments.seed)
    packs = build_packs(
        arguments.output,
        model,
        arguments.data,
        STAGES[arguments.stage],
        arguments.documents,
        settings,
        ComputeBudget(arguments.length),
        arguments.multiple_of,
    )
    print(json.dumps(verify(packs, model), indent=2))


if __name__ == "__main__":
    main()
