"""What the scale prefix saves in a GRPO step, at the paper's 18 scales on a small model:
`python -m benchmarks.grpo_step --json`.

Forward and backward that end after scale 8, against those of all scales of a 1024-level picture; and whole steps,
rollouts and rewards included, with pictures of the 256-level and of the 1024-level. Steps of all kinds take turns;
figures are medians and ratios of one run.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import machine, report
from tests.tiny_tokenizer import tiny_text_tokenizer
from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
)
from transformers_nextflow.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer

OUTPUT = Path(__file__).parent / "results" / "grpo_step.json"
PREFIX = 8
# name: (level of the rollouts, scales that are optimised)
STEPS = {"prefix, 256": ("256", PREFIX), "prefix, 1024": ("1024", PREFIX), "all scales, 1024": ("1024", 18)}


def small_model(width: int, layers: int) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """Random weights, the paper's schedules."""
    tokenizer = tiny_text_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    teacher = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = NextFlowConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 128,
            "max_position_embeddings": 16_384,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vq_config={
            "semantic_config": teacher | {"patch_size": 16, "num_patches": 256, "vision_use_head": False},
            "semantic_decoder_layers": 1,
            "codebook_size": 1024,
            "base_channels": 8,
            "latent_channels": 8,
            "encoder_blocks": 1,
            "decoder_blocks": 1,
        },
        **dict(zip(("boi_token_id", "eoi_token_id", "image_token_id"), ids)),
    )
    model = NextFlowForConditionalGeneration(config)
    return model, NextFlowProcessor(NextFlowImageProcessor.from_vq_config(config.vq_config), tokenizer)


def brightness(images, **columns) -> list[float]:
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]


class Step:
    """One kind of step, taken again and again by a trainer of its own."""

    def __init__(self, level: str, scales: int, width: int, layers: int, group: int, folder: str):
        model, processor = small_model(width, layers)
        arguments = NextFlowGRPOConfig(
            folder,
            num_generations=group,
            per_device_train_batch_size=group,
            scale_prefix=scales,
            rollout_level=level,
            gradient_checkpointing=False,
            report_to="none",
            max_steps=1,
        )
        prompts = [{"prompt": "a large red circle"}, {"prompt": "two small blue squares"}]
        self.trainer = NextFlowGRPOTrainer(model, brightness, arguments, prompts, processing_class=processor)
        self.rows = [(0, prompts[0])] * group
        self.trainer.create_optimizer_and_scheduler(1)

    def take(self) -> dict[str, float]:
        """Seconds of the rollouts with their rewards, of forward and backward, and of all with the update."""
        trainer, times = self.trainer, [time.perf_counter()]
        rollouts = trainer._generate(self.rows)
        times.append(time.perf_counter())
        trainer.compute_loss(trainer.model, rollouts).backward()
        times.append(time.perf_counter())
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        times.append(time.perf_counter())
        return {"rollouts": times[1] - times[0], "forward_backward": times[2] - times[1], "step": times[3] - times[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="of the transformer (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--group", type=int, default=2, help="pictures of a prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="after one to warm up (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = (arguments.width, arguments.layers, arguments.group, folder)
        steps = {name: Step(*kind, *size) for name, kind in STEPS.items()}
        taken = [{name: step.take() for name, step in steps.items()} for _ in range(1 + arguments.repeats)][1:]
        codes = {name: step.trainer.prefix.num_codes for name, step in steps.items()}
    seconds = {
        name: {part: round(statistics.median(row[name][part] for row in taken), 3) for part in taken[0][name]}
        for name in STEPS
    }
    ratio = lambda a, b, part: round(statistics.median(row[a][part] / row[b][part] for row in taken), 2)  # noqa: E731
    result = {
        "median_seconds": seconds,
        "optimised_codes": codes,
        "speed_up": {
            "forward and backward, prefix against all scales": ratio(
                "all scales, 1024", "prefix, 1024", "forward_backward"
            ),
            "whole step, 256-level rollouts against 1024-level": ratio("prefix, 1024", "prefix, 256", "step"),
            "whole step, prefix and 256-level against all scales and 1024-level": ratio(
                "all scales, 1024", "prefix, 256", "step"
            ),
        },
        "settings": {name: getattr(arguments, name) for name in ("width", "layers", "group", "repeats")},
        "machine": machine(torch.device("cpu")),
    }
    report(result, arguments.json, OUTPUT)


if __name__ == "__main__":
    main()
