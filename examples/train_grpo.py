"""Tune a NextFlow's coarse scales by GRPO (NextFlow sec. 3.2.5).

On a dataset of prompts (rows with `prompt`, optionally `images`, other columns for the rewards), with reward functions
by dotted path, adapters, and a picture sheet at every log; under `accelerate launch` on several devices:

    python -m examples.train_grpo --dataset_name owner/prompts --reward_funcs my_package.rewards.aesthetic \
        --use_peft --lora_r 16 --learning_rate 1e-4 --num_generations 8 --per_device_train_batch_size 16 \
        --max_steps 100 --logging_steps 5 --log_completions --output_dir runs/grpo

For one small GPU see `docs/grpo.md`.
"""

import importlib
from dataclasses import dataclass, field

import datasets
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from transformers_nextflow.lora import DECODER_LINEARS
from transformers_nextflow.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer
from transformers_nextflow.training.grpo.policy import load_policy
from transformers_nextflow.training.grpo.reward_models import ClipScore
from transformers_nextflow.utils.loading import model_name


@dataclass
class GRPOScriptArguments(ScriptArguments):
    dataset_name: str | None = field(default=None, metadata={"help": "Hub or local dataset of prompts"})
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "clip:MODEL (also SigLIP, PickScore), or dotted paths of functions"}
    )


@dataclass
class PolicyConfig(ModelConfig):
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout; rollouts are without"})


def reward_function(name: str):
    """A reward by its name, see `--reward_funcs`."""
    if name.startswith("clip:"):
        return ClipScore(name.removeprefix("clip:"))
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"a reward is clip:MODEL or a dotted path, got {name!r}")
    return getattr(importlib.import_module(module), attribute)


def main() -> None:
    parser = TrlParser((GRPOScriptArguments, NextFlowGRPOConfig, PolicyConfig))
    script, arguments, model_arguments = parser.parse_args_and_config()
    if script.dataset_name is None or not script.reward_funcs:
        parser.error("give --dataset_name and --reward_funcs")
    loading = {
        "dtype": model_arguments.dtype,
        "attn_implementation": model_arguments.attn_implementation,
        "revision": model_arguments.model_revision,
        "quantization_config": get_quantization_config(model_arguments),
    }
    model, processor = load_policy(model_name(model_arguments.model_name_or_path), **loading)
    adapters = get_peft_config(model_arguments)
    if hasattr(model, "peft_config"):  # trained on as they are
        if adapters != get_peft_config(PolicyConfig(use_peft=model_arguments.use_peft)):
            parser.error("the model has adapters, which are trained on: leave the options of LoRA out")
        adapters = None
    elif adapters is not None and adapters.target_modules is None:
        adapters.target_modules = DECODER_LINEARS
    prompts = datasets.load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split)
    trainer = NextFlowGRPOTrainer(
        model,
        [reward_function(reward) for reward in script.reward_funcs],
        arguments,
        prompts,
        processing_class=processor,
        peft_config=adapters,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
