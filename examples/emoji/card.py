"""Write the checkpoint's model card, and README's blocks of the same: `python -m examples.emoji.card RUN`.

Figures come from files beside the weights: `scores.json` of `evaluate`, `tokenizer_scores.json` of
`evaluate_tokenizer`, `sampling.json` of `choose_sampling`; steps, hours and losses from RUN's logs; what differs from
the paper from `docs/paper_and_here.md`. Each block stands between comments that name it, in the card as in README.
"""

import argparse
import json
import re
from collections.abc import Iterable
from functools import reduce
from pathlib import Path

from transformers_nextflow.utils.files import read_json, write_atomically
from transformers_nextflow.utils.loading import DEFAULT_MODEL

from .packages import STYLES, WORDS
from .scoring import MODEL, TOKENIZER
from .teacher import BATCH as PAIRS
from .tokenizer import BATCH as PICTURES
from .transformer import TRAININGS
from .wordings import INSTRUCTIONS

ROOT = Path(__file__).parents[2]
PAPER_AND_HERE = ROOT / "docs" / "paper_and_here.md"
README = ROOT / "README.md"
PARTS = {"seen": "seen", "pair": "held-out pairs", "combination": "held-out combinations", "name": "names never seen"}
LOGS = ("log-teacher.jsonl", "log.jsonl")
FILES = {"scores": "scores.json", "tokenizer": "tokenizer_scores.json", "sampling": "sampling.json"}
CURVE = 10  # rows
# What stands first: a group and its kind of prompts, and where their figure is.
SUMMARY = {
    "drawing: the picture asked for (R@1)": (("drawings",), (MODEL, "picture")),
    "its name, in any style": (("drawings",), (MODEL, "name")),
    "its style": (("drawings",), (MODEL, "style")),
    "every attribute": (("drawings",), (MODEL, "every attribute")),
    "the truth through the vision tokenizer (R@1)": (("drawings",), (TOKENIZER, "picture")),
    "drawing from tags alone (R@1)": (("reasoning",), ("tags alone", MODEL, "picture")),
    "from the same tags, reasoning first (R@1)": (("reasoning",), ("reasoning first", "picture")),
    "edit: the target (R@1)": (("edits", "all kinds"), (MODEL, "picture")),
    "caption, to the letter": (("captions",), (MODEL, "exact")),
    "question": (("questions", "all kinds"), (MODEL, "exact")),
    "analogy (R@1)": (("analogies", "all kinds"), (MODEL, "picture")),
    "sequence, all frames": (("sequences", "all kinds"), (MODEL, "all frames")),
    "several things, each in its place": (("arrangements", "all kinds"), (MODEL, "every cell")),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def share(figure: dict | None) -> str:
    """ "0.51 (0.48-0.54)", or nothing."""
    return f"{figure['score']:.2f} ({figure['low']:.2f}-{figure['high']:.2f})" if figure else ""


def plain(figure: dict | None) -> str:
    return f"{figure['score']:.2f}" if figure else ""


def best_baseline(figures: dict, measure: str) -> dict | None:
    """A measure of the best of all that stand beside the model and the tokenizer."""
    others = [each[measure] for who, each in figures.items() if who not in (MODEL, TOKENIZER) and measure in each]
    return max(others, key=lambda figure: figure["score"], default=None)


def row(name: str, figures: dict, measure: str) -> list[str]:
    """A measure of the model, the tokenizer's, the best of the baselines, and how many prompts there were."""
    best, n = best_baseline(figures, measure), str(figures[MODEL][measure]["n"])
    return [name, share(figures[MODEL][measure]), plain(figures.get(TOKENIZER, {}).get(measure)), plain(best), n]


def score_rows(scores: dict) -> list[list[str]]:
    rows = []
    for group, size in (("drawings", "64"), ("drawings-32", "32")):
        for part, figures in scores.get(group, {}).items():
            for measure, name in {"picture": "R@1", "name": "name", "style": "style"}.items():
                rows.append(row(f"drawing, {size} px, {PARTS[part]}: {name}", figures, measure))
            if "every attribute" in figures[MODEL]:
                name = f"drawing, {size} px, {PARTS[part]}: every attribute"
                rows.append(row(name, figures, "every attribute"))
    for part, figures in scores.get("captions", {}).items():
        measure = "exact" if part != "name" else "style"
        rows.append(row(f"caption, {PARTS[part]}: {measure}", figures, measure))
    groups = {
        "questions": ("question", "exact"),
        "edits": ("edit", "picture"),
        "analogies": ("analogy", "picture"),
        "sequences": ("sequence, all frames", "all frames"),
        "arrangements": ("arrangement, every cell", "every cell"),
    }
    for group, (task, measure) in groups.items():
        for kind, parts in scores.get(group, {}).items():
            for part, figures in parts.items():
                rows.append(row(f"{task}, {kind}, {part}", figures, measure))
    for part, figures in scores.get("reasoning", {}).items():
        tags = figures["tags alone"]
        rows.append(row(f"tags alone, {PARTS[part]}: R@1", tags, "picture"))
        reasoned = tags | {MODEL: figures["reasoning first"]}
        rows.append(row(f"the same tags, reasoning first, {PARTS[part]}: R@1", reasoned, "picture"))
        difference = figures["difference"]["picture"]
        rows.append([f"difference, {PARTS[part]}", share(difference), "", "", str(difference["n"])])
    return rows


def score_table(scores: dict) -> str:
    head = ["test split", "model (95% interval)", "truth through the tokenizer", "best baseline", "n"]
    return table(head, score_rows(scores))


def summary_table(scores: dict) -> str:
    """What is right of all kinds of prompts together, by part of the test split, and of the best of the baselines."""
    rows = []
    for name, (group, figure) in SUMMARY.items():
        parts = _found(scores, group)
        of_parts = [parts.get("seen"), parts.get("pair", parts.get("held out")), parts.get("combination")]
        of_parts = [part or {} for part in of_parts]
        *before, who, measure = figure
        others = [best_baseline(_found(part, before), measure) for part in of_parts if who == MODEL]
        baselines = " / ".join(filter(None, map(plain, others)))
        rows.append([name, *(share(_found(part, figure)) for part in of_parts), baselines])
    head = ["share that is right (95% interval)", "seen in training", "held-out pictures", "held-out combinations"]
    return table([*head, "best baseline of each"], [row for row in rows if any(row[1:])])


def _found(figures: dict, path: Iterable[str]) -> dict:
    """What is at the end of a path, or nothing."""
    return reduce(lambda within, name: within.get(name, {}), path, figures)


def wording_table(scores: dict) -> str:
    """What can be said to the model, and how often it is then right."""
    rows = []
    for asked, wordings in scores.get("wordings", {}).items():
        for wording, levels in wordings.items():
            shares = [share(levels.get(level)) for level in ("64", "32")]
            rows.append([asked, f"`{wording}`", *shares, str(levels["64"]["n"])])
    return table(["asked for", "by", "right at 64 px", "right at 32 px", "n"], rows)


def edit_wordings() -> str:
    listed = {kind: [f"`{wording.format('...')}`" for wording in wordings] for kind, wordings in INSTRUCTIONS.items()}
    return ";\n".join(f"{kind}: {' or '.join(wordings)}" for kind, wordings in listed.items())


def untouched_table(scores: dict) -> str:
    """Of edits by kind: errors of the pixels that an instruction leaves as they are."""
    rows = []
    for kind, parts in scores.get("edits", {}).items():
        for part, figures in parts.items():
            if errors := figures.get("squared error of untouched pixels"):
                values = [f"{errors[who]:.0f}" for who in (MODEL, TOKENIZER)]
                rows.append([f"{kind}, {part}", *values, f"{errors['ratio']:.2f}", str(errors["difference"]["n"])])
    return table(["edit", "model", "tokenizer", "ratio", "n"], rows)


def tokenizer_table(scores: dict) -> str:
    """Each score of `evaluate_tokenizer` on a line."""
    rows = []
    for name, value in scores.items():
        named = value if isinstance(value, dict) else {"": value}
        rows += [[f"{name}: {key}" if key else name, str(figure)] for key, figure in named.items()]
    return table(["vision tokenizer", ""], rows)


def sampling_table(sampling: dict) -> str:
    shown = lambda value: json.dumps(value)  # noqa: E731
    rows = [
        [shown(each["guidance_scale"]), shown(each["temperature"]), share(each["picture"]), plain(each["name"])]
        for each in sampling["rows"]
    ]
    return table(["guidance scale", "temperature", "R@1 of held-out pairs of dev", "name"], rows)


def stage_rows(log: list[dict]) -> dict[str, list[dict]]:
    """Each stage's lines in the order of their steps; of a step that was run again, the last."""
    stages: dict[str, dict[int, dict]] = {}
    for line in log:
        stages.setdefault(line["stage"], {})[line["step"]] = line
    return {stage: [rows[step] for step in sorted(rows)] for stage, rows in stages.items()}


def training_command(log: list[dict]) -> str:
    """What trains such a checkpoint, and the stages that it runs beyond the log's last one."""
    command = "`OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m examples.emoji.train`"
    ran, stages = {line["stage"] for line in log}, list(TRAININGS)
    further = [f"`{stage}`" for place, stage in enumerate(stages) if ran.isdisjoint(stages[place:])]
    beyond = f"\nThe command goes on with {', '.join(further)}, which this checkpoint is without." if further else ""
    return f"{command}, then `python -m examples.emoji.assemble`.{beyond}"


def training_table(log: list[dict]) -> str:
    rows, total = [], 0.0
    for stage, lines in stage_rows(log).items():
        last = lines[-1]
        total += last["seconds"]
        steps, batch = last["step"], f"{PICTURES} pictures"
        if stage in TRAININGS:
            training = TRAININGS[stage]
            steps = training.steps  # the last of which may stand between two logs
            batch = f"{training.packs} packs of {training.pack_length} positions, {training.documents:,} documents"
        elif stage == "teacher":
            batch = f"{PAIRS} pictures with their names"
        rows.append([stage, f"{steps:,}", batch, f"{last['seconds'] / 3600:.2f}"])
    return table(["stage", "steps", "of", "hours"], [*rows, ["all", "", "", f"{total / 3600:.2f}"]])


def curve_table(log: list[dict]) -> str:
    """Losses of the transformer's last stage, in some ten rows."""
    stages = stage_rows(log)
    names = [stage for stage in TRAININGS if stage in stages]
    if not names:
        return ""
    lines = stages[names[-1]]
    losses = [name for name in lines[-1] if name == "loss_text" or re.fullmatch(r"loss_scale_\d+", name)]
    lines = lines[-1 :: -max(len(lines) // CURVE, 1)][::-1]
    rows = [[f"{line['step']:,}", *(f"{line[name]:.2f}" for name in losses)] for line in lines]
    return table(["step", *(name.removeprefix("loss_").replace("_", " ") for name in losses)], rows)


def data_table() -> str:
    packages = [*STYLES.items(), ("names and tags", WORDS)]
    rows = [[what, f"{each.name} {each.version}", each.licence, each.attribution] for what, each in packages]
    return table(["what", "package", "licence", "by"], rows)


def blocks(scores: dict, tokenizer: dict | None, sampling: dict | None, log: list[dict]) -> dict[str, str]:
    """Every generated block by its name."""
    found = {
        "summary": summary_table(scores),
        "scores": score_table(scores),
        "wordings": wording_table(scores),
        "untouched": untouched_table(scores),
        "command": training_command(log),
        "training": training_table(log),
        "curve": curve_table(log),
        "data": data_table(),
        "paper and here": PAPER_AND_HERE.read_text().strip(),
    }
    if tokenizer:
        found["tokenizer"] = tokenizer_table(tokenizer)
    if sampling:
        found["sampling"] = sampling_table(sampling)
    return found


def marked(name: str, body: str) -> str:
    return f"<!-- {name} -->\n{body}\n<!-- /{name} -->"


def renewed(text: str, found: dict[str, str]) -> str:
    """The text with new bodies between the comments that name a block."""
    for name, body in found.items():
        block, pattern = marked(name, body), f"<!-- {re.escape(name)} -->.*?<!-- /{re.escape(name)} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def card(scores: dict, found: dict[str, str]) -> str:
    settings, machine = scores["settings"], scores["machine"]
    sampling = {name: settings["sampling"][name] for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    part = lambda name: marked(name, found[name])  # noqa: E731
    by = f"chosen on the dev split.\n\n{part('sampling')}\n" if "sampling" in found else "the library's, not chosen.\n"
    measured = f"### Vision tokenizer\n\n{part('tokenizer')}\n" if "tokenizer" in found else ""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: any-to-any
tags: [nextflow, next-scale-prediction, emoji]
---
# nextflow-emoji

A small NextFlow that draws, edits and describes emoji of five styles, at 64 x 64 pixels. It was also trained to reason
first, on analogies, sequences, pairs and rows, and at 32 x 32 pixels: of these it can what the scores below say, and
what has none there is not claimed. Its mechanisms are the library's defaults and the paper's; it is the embedded
default of its repository.

```python
import transformers_nextflow
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("checkpoints/nextflow-emoji")
processor = AutoProcessor.from_pretrained("checkpoints/nextflow-emoji")
inputs = processor.apply_chat_template([{{"role": "user", "content": "red heart, fluent"}}], generation_mode="image")
tokens = model.generate(**inputs, generation_mode="image", seed=0)
picture = processor.post_process_image(model.decode_image_tokens(tokens, (8, 8)))[0]
```

## Intended use and limits

To see the paper's mechanisms at work, to try the library on, and as a start for experiments of minutes. It knows the
emoji of its five styles and the wordings below, nothing else: other sentences mean nothing to it, and fine detail,
such as text in pictures, blurs. Emoji of people are drawn as their sets draw them, stereotypes included. For artwork
go to the sets themselves.

## What to say to it

Names such as `red apple` or `woman: dark skin tone`, without capitals or a full stop, in the styles
{", ".join(f"`{style}`" for style in STYLES)}.
How often a seen picture of the test split is then drawn, described or answered about to the letter, by every wording
and at both sizes (what is smaller than 64 x 64 pixels is read at 32 x 32):

{part("wordings")}

Questions about pictures of other shapes were not trained. Edits are told by these, `...` being what it becomes:
{edit_wordings()}.
Analogies, sequences, rows and reasoning have their wordings in `examples/emoji/wordings.py`. All figures of the next
section are by the first wording of each.

## Scores

`python -m examples.emoji.evaluate --json`: one picture a prompt from the seed of its number, none chosen. A drawing is
right (R@1) when the nearest of all 16,126 pictures of the world is the one asked for; "name" allows any style. The
tokenizer's column is the truth itself, coded and decoded. Baselines are the mean picture of the style, the nearest
seen picture of the name in another style (chosen by the truth, which no model is shown), the source handed back, and
the most frequent answer: the best of them stands here, all are in `scores.json`. A kind whose interval holds its
baseline is not claimed. All kinds together, at 64 pixels:

{part("summary")}

Each apart:

{part("scores")}

Mean squared error, in levels of 0 to 255, of what an edit leaves as it is (not white, and equal in source and truth):

{part("untouched")}

{measured}
### Sampling

{json.dumps(sampling)}, {by}
## Training

{part("command")}

Measured on {machine["cores"]} cores of {machine["device"]}, other work beside it:

{part("training")}

Mean cross-entropies of the last stage, in nats:

{part("curve")}

## The paper and this checkpoint

{part("paper and here")}

## Data

Made by `python -m examples.emoji.data`; not in the repository. Twemoji's pictures are licensed under
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/); they were rendered to pixels and not changed otherwise.

{part("data")}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that `examples.emoji.train` wrote")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="folder of the checkpoint and its scores")
    arguments = parser.parse_args()
    files = {name: arguments.model / file for name, file in FILES.items()}
    given = {name: read_json(path) if path.exists() else None for name, path in files.items()}
    if given["scores"] is None:
        parser.error(f"{files['scores']} is missing: `examples.emoji.evaluate --output` writes it")
    paths = [arguments.run / name for name in LOGS]
    log = [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]
    found = blocks(given["scores"], given["tokenizer"], given["sampling"], log)
    for path, text in {
        arguments.model / "README.md": card(given["scores"], found),
        README: renewed(README.read_text(), found),
    }.items():
        write_atomically(path, lambda partial, text=text: partial.write_text(text))


if __name__ == "__main__":
    main()
