"""Prefix-tuning GRPO on the shapes world: `python -m benchmarks.grpo MODEL PACKS --json`.

From one checkpoint of the recipe, stopped early, and for several seeds:

- `prefix`: GRPO on the scales whose codes fit `--prefix-tokens`, the judge as reward;
- `vanilla`: the same on all scales (the paper's fig. 12 compares the two);
- `shuffled`: the control, `prefix` with the rewards of a batch dealt out at random;
- `supervised`: training goes on, on PACKS, for as many seconds as `prefix` took.

The sampler that judges all of them is chosen for the checkpoint as it was, on the dev split; scores are of held-out
prompts of the test split, which share none with training's. An arm that is finished is not run again.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmarks.harness import in_processes, interval, machine, report
from examples.shapes.evaluate import Evaluator, text_to_image
from examples.shapes.rewards import shapes_judge, training_prompts
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data import PackedDataset
from transformers_nextflow.files import write_atomically
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer
from transformers_nextflow.training.grpo.rollouts import rollout_logps

OUTPUT = Path(__file__).parent / "results" / "grpo.json"
ARMS = ("prefix", "vanilla", "shuffled", "supervised")
SAMPLERS = {
    "one guidance, temperature 1": {"guidance_scale": 2.0, "temperature": 1.0},
    "one guidance, temperature 0.6": {"guidance_scale": 2.0, "temperature": 0.6},
    "by scale": {"guidance_scale": [3.0, 3.0, 1.5, 2.0, 1.0, 1.0], "temperature": [0.6, 0.6, 0.1, 0.3, 0.1, 0.1]},
}


class Shuffled:
    """The judge's rewards, dealt out at random."""

    def __init__(self, seed: int):
        self.generator, self.__name__ = torch.Generator().manual_seed(seed), "shuffled_judge"

    def __call__(self, **kwargs) -> list[float]:
        rewards = shapes_judge(**kwargs)
        return [rewards[place] for place in torch.randperm(len(rewards), generator=self.generator)]


class GradientNorms(TrainerCallback):
    """At some steps, the norm of the gradient that each scale of the prefix contributes alone."""

    def __init__(self, every: int):
        self.every, self.rows, self.trainer = every, [], None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        trainer, rollouts = self.trainer, self.trainer._buffer[0]
        logps, _ = rollout_logps(trainer.model, rollouts, trainer.prefix, trainer.schedule, args)
        terms = -logps * rollouts.advantages[:, None] * trainer.token_weights
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        norms = []
        for part in terms.split(list(trainer.prefix.lengths), dim=1):
            gradients = torch.autograd.grad(part.sum(dim=1).mean(), parameters, retain_graph=True, allow_unused=True)
            norms.append(
                torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm().item()
            )
        self.rows.append({"step": state.global_step, "norms": [round(norm, 5) for norm in norms]})


class Deadline(TrainerCallback):
    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.end = time.perf_counter() + self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.perf_counter() > self.end


def score(model, processor, sampling: dict, prompts: int, split: str) -> dict:
    """Share of pictures that show what held-out prompts ask, over all and by category."""
    evaluator = Evaluator(model.eval(), processor, seed=0, **sampling)
    rows = text_to_image(evaluator, prompts, 1, split)
    return {name: row["score"] for name, row in rows.items()}


def run_arm(arm: str, seed: int, sampling: dict, options, seconds: float | None = None) -> dict:
    """Train one arm from the checkpoint and score it; `seconds` bounds the supervised one."""
    folder = options.folder
    path = folder / f"{arm}-{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    model = NextFlowForConditionalGeneration.from_pretrained(options.model)
    processor = NextFlowProcessor.from_pretrained(options.model)
    common = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": seed, "use_cpu": True}
    common |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "weight_decay": 0.0}
    if arm == "supervised":
        model.model.vq_model.requires_grad_(False)
        model.set_attn_implementation("eager")
        arguments = NextFlowTrainingArguments(
            folder / "work", learning_rate=options.supervised_learning_rate, per_device_train_batch_size=10,
            max_steps=100_000, logging_steps=50, **common,
        )  # fmt: skip
        packs = PackedDataset(options.packs, model, processor, seed=seed)
        trainer = NextFlowTrainer(model, arguments, train_dataset=packs, callbacks=[Deadline(seconds)])
        norms = None
    else:
        arguments = NextFlowGRPOConfig(
            folder / "work",
            learning_rate=options.learning_rate,
            num_generations=options.group,
            per_device_train_batch_size=options.group * options.prompts_at_once,
            prefix_tokens=None if arm == "vanilla" else options.prefix_tokens,
            beta=options.beta,
            max_steps=options.steps,
            logging_steps=5,
            gradient_checkpointing=False,
            **common,
        )
        reward, norms = Shuffled(seed) if arm == "shuffled" else shapes_judge, GradientNorms(every=20)
        prompts = training_prompts(4_000, seed)
        trainer = NextFlowGRPOTrainer(model, reward, arguments, prompts, processing_class=processor, callbacks=[norms])
        norms.trainer = trainer
    started = time.perf_counter()
    trainer.train()
    result = {
        "seconds": round(time.perf_counter() - started, 1),
        "steps": trainer.state.global_step,
        "score": score(trainer._nextflow, processor, sampling, options.prompts, "test"),
        "curve": [
            {name: round(row[name], 4) for name in ("step", "reward", "entropy", "kl") if name in row}
            for row in trainer.state.log_history
            if "reward" in row
        ],
        "gradient_norms": norms and norms.rows,
    }
    write_atomically(path, lambda partial: partial.write_text(json.dumps(result, indent=1)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("packs", help="folder of the recipe's packs")
    parser.add_argument("--folder", type=Path, default=Path("runs/grpo-benchmark"), help="of finished arms")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=150, help="of GRPO (default: %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="pictures of a prompt (default: %(default)s)")
    parser.add_argument("--prompts-at-once", type=int, default=4, help="of a step (default: %(default)s)")
    parser.add_argument("--prefix-tokens", type=int, default=10, help="default: %(default)s, four of six scales")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--supervised-learning-rate", type=float, default=3e-4, help="default: %(default)s")
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=50, help="for each of six categories (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    model = NextFlowForConditionalGeneration.from_pretrained(options.model)
    processor = NextFlowProcessor.from_pretrained(options.model)
    dev = {name: score(model, processor, sampling, options.prompts, "dev") for name, sampling in SAMPLERS.items()}
    chosen = max(dev, key=lambda name: dev[name]["overall"])
    before = score(model, processor, SAMPLERS[chosen], options.prompts, "test")
    print(f"sampler {chosen}: dev {dev[chosen]}, test before {before}", flush=True)
    seeds = range(1, options.seeds + 1)
    done: dict[str, dict[int, dict]] = {arm: {} for arm in ARMS}

    def run(jobs: list[tuple]) -> None:
        for (arm, seed, *_), outcome in in_processes(run_arm, jobs):
            print(f"{arm}, seed {seed}: {outcome['score']['overall']} after {outcome['seconds']} s", flush=True)
            done[arm][seed] = outcome

    run([(arm, seed, SAMPLERS[chosen], options) for seed in seeds for arm in ARMS if arm != "supervised"])
    spent = {seed: done["prefix"][seed]["seconds"] for seed in seeds}
    run([("supervised", seed, SAMPLERS[chosen], options, spent[seed]) for seed in seeds])
    gains = {
        arm: interval([done[arm][seed]["score"]["overall"] - before["overall"] for seed in seeds]) for arm in ARMS
    }
    result = {
        "sampler": {"chosen": chosen, "dev": {name: row["overall"] for name, row in dev.items()}},
        "before": before,
        "gain": gains,
        "categories": {
            arm: {name: round(statistics.mean(done[arm][seed]["score"][name] for seed in seeds), 4) for name in before}
            for arm in ARMS
        },
        "arms": {arm: {str(seed): done[arm][seed] for seed in seeds} for arm in ARMS},
        "settings": {name: str(value) for name, value in vars(options).items() if name not in ("json", "folder")},
        "machine": machine(torch.device("cpu")),
    }
    report(result, options.json, OUTPUT)


if __name__ == "__main__":
    main()
