"""Write the checkpoint's model card and the README's table from `scores.json`: `python -m examples.shapes.card RUN`.

`scores.json` is what `examples.shapes.evaluate --json` printed; minutes and steps of the stages come from RUN's log.
"""

import argparse
import json
import platform
import re
from pathlib import Path

from .evaluate import CHECKPOINT
from .tokenizer import BATCH, TEACHER_BATCH
from .transformer import DOCUMENTS, EXTRACTION, PACK_LENGTH, PACKS, TUNED_SHARE, TUNING_DOCUMENTS

README = Path(__file__).parents[2] / "README.md"
CATEGORIES = {
    "overall": "text-to-image, overall",
    "single_object": "&nbsp;&nbsp;single object",
    "colors": "&nbsp;&nbsp;colors",
    "two_objects": "&nbsp;&nbsp;two objects",
    "counting": "&nbsp;&nbsp;counting",
    "position": "&nbsp;&nbsp;position",
    "color_attribution": "&nbsp;&nbsp;color attribution",
}
EDIT_NAMES = {"overall": "edit done, everything else unchanged"} | {
    name: f"&nbsp;&nbsp;{name}" for name in ("recolour", "kind", "remove", "add", "background")
}
STAGES = {
    "pixel": ("pixel decoder, on codes fitted in closed form", f"{BATCH} pictures"),
    "teacher": ("teacher, a contrastive SigLIP2", f"{TEACHER_BATCH} pictures"),
    "joint": ("semantic branch and both decoders", f"{BATCH} pictures"),
    "transformer": (
        "transformer",
        f"{2 * PACKS} packs of at most {PACK_LENGTH} positions: {DOCUMENTS:,} documents, {EXTRACTION.variants} "
        "self-corrected codings of each picture",
    ),
    "tuning": (
        "tuning, its cues under noise",
        f"{2 * PACKS} packs: {TUNING_DOCUMENTS:,} documents, more captions and removals among them",
    ),
    "tuning_2": ("a second round of it", f"{2 * PACKS} packs of the same documents"),
    "tuning_3": ("a third, at half the rate", f"{2 * PACKS} packs of the same documents"),
    "decoder": ("pixel decoder alone, twice as deep", f"{BATCH} pictures"),
}
CURVE = (100, 250, 500, 1000, 2000, 3000, 4000, 4500, 5000)  # steps shown
SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")


def score_table(scores: dict) -> str:
    """The scores as a Markdown table."""
    share = lambda row: f"{row['score']:.2f} ({row['low']:.2f}-{row['high']:.2f})"  # noqa: E731
    quality = lambda row: f"{row['psnr']:.1f} dB / {row['ssim']:.3f}"  # noqa: E731
    vision, judge = scores["tokenizer"], scores["judge"]
    usage = f"codes used at each scale, of {vision['codebook_size']:,} (over {vision['pictures']} pictures)"
    rows = {name: share(scores["text_to_image"][key]) for key, name in CATEGORIES.items()}
    rows["caption matches the scene"] = share(scores["caption_scene_match"])
    rows |= {name: share(scores["edit"][key]) for key, name in EDIT_NAMES.items()}
    rows |= {
        "&nbsp;&nbsp;the source handed back instead": share(scores["edit"]["copy_the_source"]),
        "judge on the tokenizer's reconstructions (the ceiling)": share(vision["ceiling"]),
        "tokenizer PSNR / SSIM on shapes": quality(vision["shapes"]),
        "tokenizer PSNR / SSIM on held-out photographs": quality(vision["photographs"]),
        usage: ", ".join(map(str, vision["codes_used"])),
        "judge accepts true pictures / rejects one planted error": " / ".join(
            f"{judge[name]['score']:.3f}" for name in ("accepts_true_pictures", "rejects_one_error")
        ),
        "seconds for one 64 x 64 picture, 2 CPU cores": f"{scores['seconds_per_picture']:.2f}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| held-out combinations | score (95% interval) |", "|---|---|", *lines])


def training_table(rows: list[dict]) -> str:
    """Steps and minutes of every stage that the log's rows are of."""
    last = {row["stage"]: row for row in rows}
    lines = [
        f"| {name} | {last[stage]['step']:,} of {batch} | {last[stage]['seconds'] / 60:.0f} |"
        for stage, (name, batch) in STAGES.items()
        if stage in last
    ]
    return "\n".join(["| stage | steps | minutes |", "|---|---|---|", *lines])


def curve_table(rows: list[dict], stage: str) -> str:
    """Losses of the transformer along a stage."""
    # of steps that were trained again after a stop, the last time counts
    rows = list({row["step"]: row for row in rows if row["stage"] == stage}.values())
    losses = {"text": "loss_text"} | {f"scale {scale}": f"loss_scale_{scale}" for scale in range(1, 7)}
    head = ["step", "rate", *losses]
    lines = [
        [f"{row['step']:,}", f"{row['learning_rate']:.1e}", *(f"{row[name]:.3f}" for name in losses.values())]
        for row in rows
        if row["step"] in CURVE or row is rows[-1]
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def card(scores: dict, rows: list[dict]) -> str:
    """The model card; `rows` are the training log's."""
    settings = scores["settings"]
    sampling = {name: settings["sampling"][name] for name in SAMPLING}
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-image
tags: [nextflow, next-scale-prediction, shapes]
---
# nextflow-shapes

A small NextFlow that draws, edits and describes coloured shapes at 64 x 64, 64 x 96 and 96 x 64 pixels. It is the
embedded default of its repository, a real checkpoint of the recipe in `examples/shapes`, not a useful image model.

```python
import transformers_nextflow
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("checkpoints/nextflow-shapes")
processor = AutoProcessor.from_pretrained("checkpoints/nextflow-shapes")
inputs = processor.apply_chat_template([{{"role": "user", "content": "a large red circle"}}], generation_mode="image")
tokens = model.generate(**inputs, generation_mode="image", seed=0)
picture = processor.post_process_image(model.decode_image_tokens(tokens, (8, 8)))[0]
```

## Scores

`python -m examples.shapes.evaluate --json` ({settings["prompts_per_category"]} prompts a category, \
{settings["pictures_per_prompt"]} pictures a prompt, seed {settings["seed"]}, {settings["split"]} split) gives \
`scores.json`:

{score_table(scores)}

Sampling: {json.dumps(sampling)}, chosen on the dev split.

## Training

`OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m examples.shapes.train`, then `python -m examples.shapes.assemble`.
Seeds are fixed in the code and every batch is drawn from (stage, step, process). Hardware: 2 CPU cores with AVX-512
in bfloat16 ({platform.machine()}), no GPU; some other work shared them, so the minutes are upper bounds.

{training_table(rows)}

One departure from the recipe: the first 2,250 steps of the transformer had a weight decay of 0.05, the others the
recipe's 0.5. Mean cross-entropies of the transformer in training, in nats; what a prompt leaves open, such as places
and sizes, keeps those of scales 1, 2 and 4 from zero:

{curve_table(rows, "transformer")}

The tuning goes on with other documents and noise on its inputs (`examples/shapes/noise.py`): a share of the words
of answers is replaced by others, and of pictures that are drawn the colours; of pictures that are described the
colours, while no colours are asked for, or the patterns, while nothing but colours is. Each round moves the weights by
{TUNED_SHARE:g} of the way to what it trained them to (WiSE-FT, arXiv 2109.01903). Cross-entropies of the first round,
under that noise:

{curve_table(rows, "tuning")}

Where it differs from the paper: the pixel branch splits windows into two colours and the pattern between them instead
of a CNN, every scale has entries of its own, the lookup is Euclidean, the transformer's visual inputs are VAR's
accumulated features, and its connector reads where a code lies. Each makes codes that a short training learns sooner;
the package's defaults are the paper's.

## Limits

Training shows no picture of four (kind, colour) pairs, nor of a tenth of the pairs, relations and counts of objects,
and a model learns that there are none. Before the tuning it described 0.83 of such pictures of the test split right
and did 0.82 of the edits; of the removals, whose sources are such pictures, 0.38, as another object was taken away
than the one named. Noise under which colours were asked for all the same taught to guess them from the kind, and gave
0.91 of captions. What is still wrong in captions of the dev split is nearly always one thing: of two objects of one
colour, a circle and a ring above all, it says that they are two of one kind.

Text outside the grammar of the shapes world means nothing to it. Photographs become posters of two colours to
every 16 pixels: they were 12% of the tokenizer's training, and the transformer never saw one.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that examples.shapes.train wrote")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of the checkpoint and its scores.json")
    arguments = parser.parse_args()
    scores = json.loads((arguments.model / "scores.json").read_text())
    rows = [json.loads(line) for line in (arguments.run / "log.jsonl").read_text().splitlines()]
    (arguments.model / "README.md").write_text(card(scores, rows))
    table = f"<!-- scores -->\n{score_table(scores)}\n<!-- /scores -->"
    README.write_text(re.sub("<!-- scores -->.*<!-- /scores -->", lambda _: table, README.read_text(), flags=re.S))


if __name__ == "__main__":
    main()
