"""What tests of trainings share."""

import copy

import torch

from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments


def train(model, dataset, output, resume=None, callbacks=None, collator=None, **arguments) -> NextFlowTrainer:
    values = {"max_steps": 1, "logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no", "seed": 5}
    values |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant"}
    arguments = NextFlowTrainingArguments(output_dir=str(output), **(values | arguments))
    trainer = NextFlowTrainer(model, arguments, collator, dataset, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer) -> list[dict]:
    kept = ("step", "loss", "loss_text", "loss_vision", "grad_norm")
    return [{name: row[name] for name in kept} for row in trainer.state.log_history if "loss" in row]


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def largest_difference(one: dict, other: dict) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def with_dropout(model):
    """A copy whose losses depend on torch's random numbers."""
    model = copy.deepcopy(model)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model
