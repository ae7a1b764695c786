"""What tests of trainings share; as a script, trainings that are killed, and what a fresh process draws."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, TrainerState

from diffusers_nextflow import NextFlowConditioner
from diffusers_nextflow.training import DecoderTrainingArguments, NextFlowDecoderTrainer
from tests.diffusers.tiny_decoders import WIDE, decoder, random_codes, tiny_vq_model
from tests.ranks import on_ranks


class Batches(Dataset):
    """Random pictures and random codes."""

    def __init__(self, upscale: int = 1, kill_after: int | None = None, count: int = 12):
        self.upscale, self.kill_after, self.count, self.seen = upscale, kill_after, count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict:
        self.seen += 1
        if self.seen == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(number)
        pixels = torch.rand(2, 3, 32 * self.upscale, 64 * self.upscale, generator=generator) * 2 - 1
        codes = random_codes(2, WIDE, seed=number)
        return {"pixel_values": pixels, "codes": codes, "grid": WIDE, "captions": ["a cat", str(number)]}


def arguments(output: Path, **values) -> DecoderTrainingArguments:
    defaults = {"max_steps": 2, "learning_rate": 1e-2, "save_steps": 1, "logging_steps": 1, "sample_steps": 2}
    defaults |= {"num_inference_steps": 1, "num_samples": 2, "use_cpu": True, "report_to": "none"}
    return DecoderTrainingArguments(str(output), **defaults | {"disable_tqdm": True} | values)


def train(pipe, batches, arguments, resume: bool = False, **kwargs) -> NextFlowDecoderTrainer:
    """Train and save."""
    trainer = NextFlowDecoderTrainer(pipe, arguments, batches, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def picture(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for part in (pipe.conditioner, getattr(pipe, pipe.backbone)):
            part.eval()
        codes = {"codes": random_codes(1), "grid": WIDE}
        return pipe("a cat", **codes, num_inference_steps=2, generator=generator, output_type="pt").images


def run(
    output: Path,
    rank: int | None = None,
    kill_after: int | None = None,
    resume: bool = False,
    dies_saving: bool = False,
) -> None:
    """A whole UNet, or with `rank` adapters of Flux."""
    pipe = decoder("unet" if rank is None else "flux", vq_model=tiny_vq_model())
    for module in pipe.components[pipe.backbone].modules():  # so that a step depends on torch's random numbers
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    values = {"max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 2, "rank": rank}
    values |= {"use_ema": rank is None, "lr_scheduler_type": "cosine"}
    if dies_saving:
        TrainerState.save_to_json = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    batches = Batches(kill_after=kill_after, count=8)  # an epoch and a half
    trainer = train(pipe, batches, arguments(output, **values), resume, samples=Batches()[0])
    logged = [{name: row[name] for name in ("step", "loss")} for row in trainer.state.log_history if "loss" in row]
    Path(output, "losses.json").write_text(json.dumps(logged))


def run_with_everything(output: Path, **values) -> None:
    """Average, drawings, held-out losses, early stopping and the best checkpoint; the last of three steps resumed."""
    defaults = {"use_ema": True, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    defaults |= {"sample_steps": 1, "optim": "sgd", "ddp_find_unused_parameters": True}
    for steps in (2, 3):
        torch.manual_seed(0)
        pipe = decoder("unet", vq_model=tiny_vq_model())
        callbacks = [EarlyStoppingCallback(2)]
        data = {"eval_dataset": Batches(count=3), "samples": Batches()[0], "callbacks": callbacks}
        given = arguments(output, max_steps=steps, **defaults | values)
        trainer = train(pipe, Batches(), given, steps == 3, **data)
    assert trainer.state.global_step == 3
    if trainer.is_world_process_zero():
        Path(output, "log.json").write_text(json.dumps(trainer.state.log_history))


def in_a_process(*args, **kwargs) -> int:
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        run(*args, **kwargs)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(output: Path) -> None:
    for kind, rank in (("", None), ("-lora", 2)):
        whole, killed = output / f"whole{kind}", output / f"killed{kind}"
        assert in_a_process(whole, rank) == 0
        assert in_a_process(killed, rank, kill_after=8) == -signal.SIGKILL  # within the fourth step
        assert in_a_process(killed, rank, resume=True, dies_saving=True) == -signal.SIGKILL
        (output / f"left{kind}.json").write_text(json.dumps([path.name for path in killed.iterdir()]))
        assert in_a_process(killed, rank, resume=True) == 0

    conditioner = NextFlowConditioner.from_pretrained(output / "flux", subfolder="conditioner")
    pipe = decoder("flux", conditioner=conditioner)
    pipe.load_lora_weights(output / "flux")
    save_file({"picture": picture(pipe)}, output / "picture.safetensors")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        on_ranks(lambda: run_with_everything(Path(sys.argv[1])), int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
