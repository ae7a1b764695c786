"""Tune a NextFlow's coarse scales by GRPO (NextFlow sec. 3.2.5).

On a dataset of prompts (rows with `prompt`, optionally `images`, other columns for the rewards), with reward functions
by dotted path, adapters, and a picture sheet at every log; under `accelerate launch -m` on several devices:

    transformers_nextflow train grpo --dataset_name owner/prompts --reward_funcs my_package.rewards.aesthetic \
        --use_lora --lora_r 16 --num_generations 8 --per_device_train_batch_size 16 \
        --max_steps 100 --logging_steps 5 --log_completions --output runs/grpo

Adapters as `--model` are trained on. For one small GPU see `docs/grpo.md`.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import ScriptArguments, TrlParser

from ...data.sources import Source
from ..ema import EMACallback
from ..grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer
from ..grpo.reward_models import ClipScore
from .options import ModelOptions


@dataclass
class GRPOOptions(ScriptArguments):
    dataset_name: str | None = field(
        default=None, metadata={"help": "prompts: file, folder, or id of a dataset on the Hub"}
    )
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "clip:MODEL (also SigLIP, PickScore), or dotted paths of functions"}
    )
    ema_decay: float | None = field(default=None, metadata={"help": "keep a moving average of the trained weights"})


def reward_function(name: str):
    """A reward by its name, see `--reward_funcs`."""
    if name.startswith("clip:"):
        return ClipScore(name.removeprefix("clip:"))
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"a reward is clip:MODEL or a dotted path, got {name!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    return getattr(importlib.import_module(module), attribute)


def main(argv: Sequence[str] | None = None) -> None:
    """Train by the options of a command line; without `argv` the process's own."""
    parser = TrlParser(
        (GRPOOptions, NextFlowGRPOConfig, ModelOptions),
        prog="transformers-nextflow train grpo",
        description=__doc__.split("\n")[0],
    )
    script, arguments, of_model = parser.parse_args_and_config(argv)
    if script.dataset_name is None or not script.reward_funcs:
        parser.error("give --dataset_name and --reward_funcs")
    if script.dataset_streaming:
        parser.error("prompts are drawn by their numbers: leave out --dataset_streaming")
    model, processor, adapters = of_model.load()

    def prompts(split: str):
        return Source(script.dataset_name, split, script.dataset_config).load(decode=True)

    trainer = NextFlowGRPOTrainer(
        model,
        [reward_function(reward) for reward in script.reward_funcs],
        arguments,
        prompts(script.dataset_train_split),
        prompts(script.dataset_test_split) if arguments.eval_strategy != "no" else None,
        processing_class=processor,
        peft_config=adapters,
    )
    if script.ema_decay is not None:
        trainer.add_callback(EMACallback(script.ema_decay))
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
