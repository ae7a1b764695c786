"""What guidance, temperature and further passes do to the scores of the shapes checkpoint:
`python -m benchmarks.guidance --json`.

Every row changes some of the checkpoint's own controls and draws the dev split's prompts and edits with the same
seeds. Scores are shares by the judge with 95% intervals, see `examples.shapes.evaluate`. Seconds are those the
processor spent on a picture, from prompt to pixels, in the evaluator's batches: other work on the machine hardly moves
them. Image guidance concerns edits alone: prompts hold no image.
"""

import argparse
import time
from pathlib import Path

import torch

from examples.shapes.evaluate import CHECKPOINT, Evaluator, draw_edits, edits, text_to_image
from transformers_nextflow import LinearRamp, NextFlowForConditionalGeneration, NextFlowProcessor, ScaleInterval

from .harness import machine, report

SPLIT, SEED = "dev", 0


class TimedEvaluator(Evaluator):
    """Counts what its pictures cost."""

    seconds, drawn = 0.0, 0

    def pictures(self, *args, **kwargs) -> list:
        started = time.process_time()
        groups = super().pictures(*args, **kwargs)
        self.seconds += time.process_time() - started
        self.drawn += sum(map(len, groups))
        return groups


def new_rows(num_scales: int) -> dict[str, dict]:
    """The controls that each row changes. The checkpoint's own are without image guidance and further passes."""
    half = num_scales // 2
    guidance = {f"text guidance {scale:g}": scale for scale in (1.0, 1.5, 2.0, 3.0, 5.0)}
    guidance |= {f"text guidance 0 to {end:g}": LinearRamp(0.0, end) for end in (3.0, 5.0)}  # TokenFlow's ramp
    guidance["text guidance 3, first half of the scales"] = ScaleInterval(3.0, 0, half - 1)
    guidance["text guidance 3, second half of the scales"] = ScaleInterval(3.0, half, num_scales - 1)
    rows = {"the checkpoint's own": {}} | {name: {"guidance_scale": value} for name, value in guidance.items()}
    rows |= {f"image guidance {scale:g}": {"image_guidance_scale": scale} for scale in (1.25, 1.5, 2.0)}
    passes = {"one more pass": (100,), "two more passes": (100, 1)}  # TokenFlow's top-k
    rows |= {name: {"refine_top_k": top_k} for name, top_k in passes.items()}
    return rows | {"temperature 1": {"temperature": 1.0, "top_k": 0, "top_p": 1.0}}


def tasks_of(controls: dict) -> tuple[str, ...]:
    return ("edit",) if "image_guidance_scale" in controls else ("text_to_image", "edit")


def score(model, processor: NextFlowProcessor, task: str, controls: dict, prompts: int, copies: int) -> dict:
    """Share of right pictures of one task, and their seconds."""
    evaluator = TimedEvaluator(model, processor, SEED, **controls)
    if task == "edit":
        scores = edits(draw_edits(evaluator, prompts, SPLIT))
    else:
        scores = text_to_image(evaluator, prompts, copies, SPLIT)
    return scores["overall"] | {"cpu_seconds_per_picture": round(evaluator.seconds / evaluator.drawn, 4)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, metavar="FOLDER", help="default: the repository's")
    parser.add_argument("--prompts", type=int, default=20, metavar="N", help="of each category, edits of each kind")
    parser.add_argument("--pictures", type=int, default=2, metavar="N", help="of each prompt (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args(argv)
    model = NextFlowForConditionalGeneration.from_pretrained(arguments.model).eval()
    processor = NextFlowProcessor.from_pretrained(arguments.model)
    num_scales = len(model.model.schedules.by_aspect_ratio("1:1"))
    rows = {}
    for name, controls in new_rows(num_scales).items():
        rows[name] = {
            control: value.over(num_scales) if isinstance(value, LinearRamp | ScaleInterval) else value
            for control, value in controls.items()
        }
        for task in tasks_of(controls):
            rows[name][task] = score(model, processor, task, controls, arguments.prompts, arguments.pictures)
    result = {
        "rows": rows,
        "checkpoint": model.config.image_generation,
        "split": SPLIT,
        "seed": SEED,
        "prompts_per_category": arguments.prompts,
        "pictures_per_prompt": arguments.pictures,
        "machine": machine(torch.device("cpu")),
    }
    report(result, arguments.json, arguments.output)


if __name__ == "__main__":
    main()
