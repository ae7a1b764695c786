"""Runs of a training, alone or, as `sharded.py PACKS OUTPUT` in the environment that `accelerate launch` makes, by two
processes that share a model by FSDP2 on a CPU."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import get_peft_model
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.utils.data import Subset
from transformers import EarlyStoppingCallback

from tests.ranks import on_ranks
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data.loading import PackCollator, PackReader
from transformers_nextflow.data.shards import open_shards, sequence_spec
from transformers_nextflow.doctor import DoctorCallback, alterations, examination
from transformers_nextflow.doctor.pictures import default_pictures
from transformers_nextflow.lora import lora_config
from transformers_nextflow.losses import IGNORE
from transformers_nextflow.training import EMACallback, NextFlowTrainer, NextFlowTrainingArguments, SamplesCallback

BATCHES = 4  # of an optimizer step


class ShardedOnCPU(NextFlowTrainer):
    """accelerate turns FSDP on for accelerators alone; all that follows from that switch runs on a CPU too."""

    mixed_precision = None

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # of the environment that accelerate launch made
        if self.mixed_precision is not None:
            state.fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.is_fsdp_enabled = True

    def training_step(self, *args, **kwargs):
        result = super().training_step(*args, **kwargs)
        self.loss_dtype = result.dtype
        return result


class SomeWithoutPictures(PackReader):
    """Of packs 1 and 2 only the text before their first picture."""

    padded = False

    def __init__(self, folder: Path, manifest: dict, config):
        super().__init__(folder, manifest, sequence_spec(manifest["identity"]))
        self.config = config

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pack = super().__getitem__(index)
        if index not in (1, 2):
            return pack
        end = int(np.flatnonzero(pack["input_ids"] == self.spec.special.boi)[0])
        text = {name: pack[name][:end] for name in ("input_ids", "document_ids")}
        text["shift_labels"] = np.append(text["input_ids"][1:], IGNORE)
        return text | {name: pack[name][:0] for name in ("image_grid_hw", "image_codes", "image_input_codes")}


def run(packs: Path, output: Path, name: str, trainer_class=NextFlowTrainer, resume=None, **arguments):
    """A few steps of 4 batches each; the first process has no picture in the first step."""
    folder, manifest = open_shards(packs, "packs")
    model = NextFlowForConditionalGeneration.from_pretrained(output / "model")
    dataset = SomeWithoutPictures(folder, manifest, model.config)
    processor = NextFlowProcessor.from_pretrained(output / "model")
    callbacks = [EMACallback(0.9), EarlyStoppingCallback(1)]
    if name == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, lora_config(r=2))
    else:
        images = [[], [Image.new("RGB", (24, 24), "red")]]
        callbacks.append(SamplesCallback(processor, ["a red circle", "make it blue"], every=4, images=images, top_k=1))
    if name == "plain":
        callbacks.append(DoctorCallback(processor, every=4))
    world = int(os.environ.get("WORLD_SIZE", 1))
    values = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "gradient_accumulation_steps": BATCHES // world}
    values |= {"logging_steps": 1, "seed": 5, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    values |= {"lr_scheduler_type": "constant", "output_dir": str(output / f"{name}-{world}")}
    values |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    arguments = NextFlowTrainingArguments(**(values | arguments))
    trainer = trainer_class(
        model, arguments, PackCollator(dataset), dataset, eval_dataset=Subset(dataset, range(3)), callbacks=callbacks
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination, "default_pictures", partial(default_pictures, each=4))
        patch.setattr(alterations, "FEW", 1)
        trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
        if name == "plain":
            diagnoses = {step: diagnosis.to_dict() for step, diagnosis in callbacks[-1].diagnoses.items()}
            Path(trainer.args.output_dir, "diagnoses.json").write_text(json.dumps(diagnoses))
    return trainer


def main(packs: Path, output: Path) -> None:
    trainer = run(packs, output, "plain", ShardedOnCPU)
    shards = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(isinstance(shard, DTensor) and 0 < shard.to_local().numel() < shard.numel() for shard in shards)
    run(packs, output, "resumed", ShardedOnCPU, resume=str(output / "plain-2" / "checkpoint-2"))
    run(packs, output, "lora", ShardedOnCPU, max_steps=2)
    ShardedOnCPU.mixed_precision = "bf16"
    assert (
        run(packs, output, "bf16", ShardedOnCPU, max_steps=1, save_steps=1, eval_steps=1).loss_dtype == torch.float32
    )


if __name__ == "__main__":
    on_ranks(lambda: main(*map(Path, sys.argv[1:])))
