"""Preferences between pictures: `python -m benchmarks.preferences MODEL --data runs/emoji/data --json`.

Pairs of seen pictures: chosen is the one that the prompt asks for, rejected the same thing in another style. From one
checkpoint, with equal adapters, steps and rates:

- `preferred`: `NextFlowDPOTrainer` on the codes of the first scales;
- `supervised`: the control, `NextFlowSFTTrainer` on the chosen pictures alone.

Scored are drawings of the prompts of those pairs, and of `--prompts` held-out pairs of name and style, before and
after: the share of right pictures, names and styles, and the differences to before with their 95% intervals; by the
checkpoint's own sampling, and without guidance, since no prompt of these trainings is a null prompt, which so learns
what it should not know. `--split dev` is for choosing settings.

Whether a training did its work at all says `lead`: the share of its pairs whose chosen picture is the likelier one by
its first scales, and as a difference by how many nats that lead grew.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, SFTConfig

from benchmarks.harness import machine, report
from examples.emoji.artist import Artist
from examples.emoji.evaluate import load_artist
from examples.emoji.intervals import paired_difference, proportion
from examples.emoji.scoring import DRAWING, Exam, judged
from examples.emoji.splits import PAIR
from examples.emoji.stages import bfloat16_is_fast
from examples.emoji.tasks import Item, Tasks
from examples.emoji.world import World
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training import NextFlowDPOTrainer, NextFlowSFTTrainer
from transformers_nextflow.training.preferences import PreferenceCollator

OUTPUT = Path(__file__).parent / "results" / "preferences.json"
ANSWER = [{"role": "assistant", "content": [{"type": "image"}]}]


def pairs(tasks: Tasks, world: World, count: int, seed: int) -> tuple[list[Item], list[dict]]:
    """Items of training, and rows of them for TRL: the picture asked for, and one of the name in another style."""
    others: dict[str, list[int]] = {}
    for row in world.seen:
        others.setdefault(world.names[row], []).append(row)
    items, rows, number = [], [], 0
    while len(rows) < count:
        item = tasks.draw("text-to-image", "train", number, seed)
        target, number = item.targets[0], number + 1
        different = [row for row in others[world.names[target]] if world.twins[row] != world.twins[target]]
        if different:
            items.append(item)
            pictures = [Image.fromarray(world.pictures[row]) for row in (target, different[number % len(different)])]
            rows.append({"prompt": " ".join(item.user), "chosen": ANSWER, "rejected": ANSWER, "images": pictures})
    return items, rows


def train(arm: str, artist: Artist, rows: list[dict], args: argparse.Namespace) -> None:
    """Train adapters of the artist's model, and leave them in its weights."""
    options = {"learning_rate": args.learning_rate, "num_train_epochs": args.epochs, "seed": args.seed}
    options |= {"per_device_train_batch_size": 8, "save_strategy": "no", "report_to": "none", "logging_steps": 5}
    options |= {"output_dir": "runs/preferences", "use_cpu": not torch.cuda.is_available(), "bf16": bfloat16_is_fast()}
    shared = {"processing_class": artist.processor, "peft_config": lora_config(r=8)}
    artist.model.set_attn_implementation("eager")  # the fastest backward at these lengths on a CPU
    if arm == "preferred":
        trainer = NextFlowDPOTrainer(
            artist.model,
            args=DPOConfig(
                **options,
                beta=args.beta,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, args.sft_weight],
            ),
            train_dataset=Dataset.from_list(rows),
            num_scales=args.num_scales,
            **shared,
        )
    else:
        chosen = [{"prompt": row["prompt"], "completion": row["chosen"], "images": row["images"][:1]} for row in rows]
        trainer = NextFlowSFTTrainer(
            artist.model, args=SFTConfig(**options), train_dataset=Dataset.from_list(chosen), **shared
        )
    trainer.train()
    artist.model = trainer.model.merge_and_unload().eval()
    artist.model.set_attn_implementation("sdpa")


@torch.no_grad()
def leads(artist: Artist, rows: list[dict], num_scales: int | None) -> list[float]:
    """By how many nats the chosen picture of each pair is likelier than the rejected one, in its first scales."""
    collator, found = PreferenceCollator(artist.processor, num_scales), []
    for start in range(0, len(rows), 8):
        batch = collator(rows[start : start + 8])
        weights = batch.pop("loss_weights")
        del batch["completion_mask"]
        inputs = {name: tensor.to(artist.model.device) for name, tensor in batch.items()}
        losses = artist.model(**inputs, logits_over="none").token_losses.cpu()
        chosen, rejected = (losses * weights).sum(dim=1).chunk(2)
        found += (rejected - chosen).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"))
    parser.add_argument("--split", choices=("test", "dev"), default="test")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--num-scales", type=int, help="whose codes count (default: all)")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--sft-weight", type=float, default=5.0, help="of the chosen pictures' own likelihood")
    parser.add_argument("--epochs", type=float, default=7)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    verdicts, of_pairs = {}, {}
    for arm in ("before", "preferred", "supervised"):
        artist = load_artist(args.model, args.data, device)
        tasks = Tasks.of(artist.world)
        trained, rows = pairs(tasks, artist.world, args.pairs, args.seed)
        if arm != "before":
            train(arm, artist, rows, args)
        of_pairs[arm] = leads(artist, rows, args.num_scales)
        exam = Exam(artist, tasks, args.split, args.prompts)
        asked = {"trained": trained, "held out": exam.items("text-to-image", "", (PAIR,))}
        unguided = Artist(artist.model, artist.processor, artist.world, guidance_scale=1.0)
        verdicts[arm] = {
            f"{measure}, {kind}{way}": right
            for way, drawer in (("", artist), (", unguided", unguided))
            for kind, items in asked.items()
            for measure, right in judged(
                exam, drawer.draw(items), [item.targets[0] for item in items], DRAWING
            ).items()
        }
    result = {"machine": machine(device), "settings": {name: str(value) for name, value in vars(args).items()}}
    for arm, values in verdicts.items():
        result[arm] = {measure: proportion(right) for measure, right in values.items()}
        result[arm]["lead"] = proportion([lead > 0 for lead in of_pairs[arm]])
        if arm != "before":
            difference = {name: paired_difference(right, verdicts["before"][name]) for name, right in values.items()}
            difference["lead"] = paired_difference(of_pairs[arm], of_pairs["before"])
            result[f"{arm} - before"] = difference
    report(result, args.json, args.output)


if __name__ == "__main__":
    main()
