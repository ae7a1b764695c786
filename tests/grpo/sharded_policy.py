"""GRPO by processes, with the environment that `accelerate launch` makes, that share a model by FSDP2 on a CPU.

`sharded_policy.py POLICY FOLDER` writes what two processes come to, and what they raise where one's reward dies while
others still need its weights.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_grpo_trainer import rows, trainer
from torch.distributed.tensor import DTensor
from two_processes import PICTURES, ROWS, SETTINGS, TIMES, dies_on_the_second_process

from tests.ranks import on_ranks
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.training.grpo import NextFlowGRPOTrainer, RewardError

SHARDED = {"per_device_train_batch_size": ROWS}
# of pictures under a reference that moves, with checkpoints and evaluations
VALUES = PICTURES | {"gradient_checkpointing": False, "sync_ref_model": True, "ref_model_sync_steps": 1}
VALUES |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "beta": 1.0}
VALUES |= {"per_device_eval_batch_size": 4}
# a reward's call that dies before all roll out again: further pictures of prefixes, an evaluation's next prompt
FAULTS = {
    "continuations": {"vmr_continuations": 2, "eval_strategy": "no", "call": 3},
    "evaluation": {"eval_steps": 1, "max_steps": 1, "call": 2},
}


class ShardedOnCPU(NextFlowGRPOTrainer):
    """accelerate turns FSDP on for accelerators alone; all that follows from that switch runs on a CPU too."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # of the environment that accelerate launch made
        self.is_fsdp_enabled = True


def train(policy, processor, folder: Path, layout: dict, trainer_class=NextFlowGRPOTrainer, **values) -> dict:
    """The log, and weights as saved."""
    prompts = {"eval_dataset": rows()[:4], "trainer_class": trainer_class}
    run = trainer(policy, processor, folder, **prompts, **SETTINGS | layout | VALUES | values)
    run.train()
    run.save_model()
    log = [
        {k: v for k, v in row.items() if k not in TIMES} for row in run.state.log_history if "train_loss" not in row
    ]
    return {"log": log, "sharded": all(isinstance(p, DTensor) for p in run.model.parameters())}


def fault_of(policy, processor, folder: Path, call: int, **values) -> str:
    """What a training raises; one that waits for the other process ends after a minute."""
    reward = dies_on_the_second_process(call)
    try:
        train(policy, processor, folder, SHARDED, ShardedOnCPU, reward=reward, ddp_timeout=60, **values)
    except RewardError as error:
        return str(error)
    return "none"


def main() -> None:
    policy_folder, folder = map(Path, sys.argv[1:])
    policy = NextFlowForConditionalGeneration.from_pretrained(policy_folder)
    processor = NextFlowProcessor.from_pretrained(policy_folder)
    results = train(policy, processor, folder / "sharded", SHARDED, ShardedOnCPU)
    results["faults"] = {name: fault_of(policy, processor, folder / name, **values) for name, values in FAULTS.items()}
    if PartialState().is_main_process:
        torch.save(results, folder / "sharded.pt")


if __name__ == "__main__":
    on_ranks(main)
