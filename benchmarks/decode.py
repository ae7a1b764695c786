"""What next-scale decoding costs, as ratios within one run: `python -m benchmarks.decode --json`.

One backbone with random weights draws one guided picture in four ways:

- `generate`: the public call;
- `bare`: nothing but the forwards of the same shapes (prefill, scale steps, code head), on inputs made beforehand;
- `var_loop`: VAR's sampling loop written out plainly, with its running sum of features and sorted filters;
- `token_by_token`: as many codes one at a time by the same backbone, next-token style.

`one_ragged` is the picture with a null prompt of another length, `eight_ragged` are eight prompts of eight lengths
with their null prompts of one, against `one_even` and `eight_even` of one length. `--before COMMIT` draws the even
ones with an earlier build too, in turn with this one.

`matrix_rate` draws a guided picture of VAR's 680 codes, and says which share of the rate of this machine's own matrix
product its FLOPs reach, and which the `bare` forwards do. `memory` is the peak of a process while it draws a guided
picture of 64 x 64 cells from 32,768 codes with 28 layers, as the 7B model has, of width 64, over what must be held:
weights, and the cache of all places. glibc is told to give memory back at once (`MALLOC_MMAP_THRESHOLD_`), else it
keeps what caches leave as they grow.

`cost_over_codes` times `generate` over schedules of growing length; `fit` is the least-squares line through the FLOPs
of [`transformers_nextflow.flops.model_cost`].
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration
from transformers_nextflow.flops import image_passes, model_cost
from transformers_nextflow.layout import scale_coordinates

from .harness import in_processes, interleaved_seconds, machine, median, report

GUIDANCE, TOP_K, TOP_P = 4.0, 200, 0.95
PROMPT_TOKENS = 32
BOI, EOI, IMAGE = 1000, 1001, 1002
VAR_GRIDS = [[edge, edge] for edge in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
CODES_OF_7B, LAYERS_OF_7B = 32_768, 28

DRAW_EVENLY = """
import sys, torch
from benchmarks.decode import PROMPT_TOKENS, Decoding, new_model
width, layers, dtype, level, device, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = new_model(int(width), int(layers), getattr(torch, dtype), torch.device(device))
decoding = Decoding(model, level)
for line in sys.stdin:
    decoding.several([PROMPT_TOKENS] * int(line))
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    print("drawn", flush=True)
"""


def new_model(hidden_size: int, layers: int, dtype: torch.dtype, device: torch.device, **vq_config):
    """A backbone of Qwen2.5's proportions under table 14's schedules, beside the smallest vision tokenizer."""
    torch.manual_seed(0)
    config = NextFlowConfig(
        text_config={
            "vocab_size": 1024,
            "hidden_size": hidden_size,
            "intermediate_size": 11 * hidden_size // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // 64,
            "num_key_value_heads": max(hidden_size // 256, 1),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "bos_token_id": None,
            "eos_token_id": 1003,
            "pad_token_id": 1003,
        },
        vq_config={
            "semantic_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "patch_size": 16,
                "vision_use_head": False,
            },
            "semantic_feature_layer": -1,
            "semantic_decoder_layers": 1,
            "codebook_size": 4096,
            "base_channels": 8,
            "latent_channels": 8,
            "encoder_blocks": 1,
            "decoder_blocks": 1,
            **vq_config,
        },
        boi_token_id=BOI,
        eoi_token_id=EOI,
        image_token_id=IMAGE,
    )
    return NextFlowForConditionalGeneration(config).eval().to(device, dtype)


class Decoding:
    """The four ways to draw one guided picture of a schedule."""

    def __init__(self, model: NextFlowForConditionalGeneration, level: str):
        self.model, self.schedule = model, model.model.schedules.by_aspect_ratio("1:1", level)
        self.level, self.device = level, model.device
        prompt = torch.randint(0, BOI, (2, PROMPT_TOKENS), device=self.device)
        prompt[:, -1] = BOI
        self.prompt, self.null = prompt[:1], prompt[1:]
        width = model.config.text_config.hidden_size
        self.blocks = [
            torch.randn(2, length, width, device=self.device, dtype=model.dtype)
            for length in self.schedule.lengths[1:]
        ]

    def generate(self) -> torch.Tensor:
        return self._draw(input_ids=self.prompt, negative_input_ids=self.null)

    def several(self, lengths: Sequence[int], null_length: int = PROMPT_TOKENS) -> torch.Tensor:
        """Guided pictures of prompts of these lengths."""
        rows = torch.randint(0, BOI, (len(lengths), PROMPT_TOKENS), device=self.device)
        nulls = rows[:, :null_length].clone()
        rows[:, -1] = nulls[:, -1] = BOI
        places = torch.arange(PROMPT_TOKENS, device=self.device)
        mask = (places >= PROMPT_TOKENS - torch.tensor(lengths, device=self.device)[:, None]).long()
        return self._draw(input_ids=rows, attention_mask=mask, negative_input_ids=nulls)

    def _draw(self, **prompts: torch.Tensor) -> torch.Tensor:
        return self.model.generate(
            **prompts,
            generation_mode="image",
            level=self.level,
            guidance_scale=GUIDANCE,
            top_k=TOP_K,
            top_p=TOP_P,
            seed=0,
        )

    def _forward(self, embeddings: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, causal: bool):
        return self.model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True, is_causal=causal
        ).last_hidden_state

    def _prefill(self) -> tuple[DynamicCache, torch.Tensor]:
        cache = DynamicCache(config=self.model.config.text_config)
        ids = torch.cat([self.prompt, self.null])
        positions = torch.arange(PROMPT_TOKENS, device=self.device, dtype=torch.float32).expand(3, 2, -1)
        hidden = self._forward(self.model.get_input_embeddings()(ids), positions, cache, causal=True)
        return cache, hidden[:, -1:]

    def _positions(self, scale: int) -> torch.Tensor:
        """(3, 2, l) float32 coordinates of a block."""
        cells = scale_coordinates(self.schedule[scale], self.model.config.finest_edge).to(self.device)
        step = torch.full_like(cells[:1], PROMPT_TOKENS - 1 + scale)
        return torch.cat([step, cells])[:, None].expand(-1, 2, -1)

    @torch.no_grad()
    def bare(self) -> torch.Tensor:
        cache, hidden = self._prefill()
        logits = self.model.code_head(hidden)
        for scale, block in enumerate(self.blocks, start=1):
            logits = self.model.code_head(self._forward(block, self._positions(scale), cache, causal=False))
        return logits

    @torch.no_grad()
    def var_loop(self) -> torch.Tensor:
        cache, hidden = self._prefill()
        total = torch.zeros(1, self.model.config.vq_config.code_dim, *self.schedule.final_grid, device=self.device)
        codes = []
        for scale, (h, w) in enumerate(self.schedule):
            conditional, unconditional = self.model.code_head(hidden).float().chunk(2)
            ratio = scale / (len(self.schedule) - 1)
            logits = (1 + GUIDANCE * ratio) * conditional - GUIDANCE * ratio * unconditional
            logits = logits.masked_fill(logits < logits.topk(TOP_K)[0].amin(-1, keepdim=True), -torch.inf)
            ascending, order = logits.sort(dim=-1)
            removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - TOP_P
            removed[..., -1:] = False
            logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
            drawn = torch.multinomial(logits.softmax(dim=-1).flatten(0, 1), 1).view(1, -1)
            codes.append(drawn)
            entries = self.model.model.code_embeddings(drawn).float().transpose(1, 2).unflatten(-1, (h, w))
            total = total + F.interpolate(entries, size=self.schedule.final_grid, mode="bicubic")
            if scale + 1 == len(self.schedule):
                break
            features = F.interpolate(total, size=self.schedule[scale + 1], mode="area").flatten(2).transpose(1, 2)
            block = self.model.model.connector(features)
            hidden = self._forward(block.repeat(2, 1, 1), self._positions(scale + 1), cache, causal=False)
        return torch.cat(codes, dim=1)

    @torch.no_grad()
    def token_by_token(self) -> torch.Tensor:
        cache, hidden = self._prefill()
        codes = []
        for step in range(self.schedule.num_codes):
            conditional, unconditional = self.model.code_head(hidden).float().chunk(2)
            logits, kept = (unconditional + GUIDANCE * (conditional - unconditional)).topk(TOP_K)
            codes.append(kept.gather(-1, torch.multinomial(logits.softmax(-1)[0], 1)[None]))
            entries = self.model.model.code_embeddings(codes[-1][..., 0])
            embedding = self.model.model.connector(entries)
            positions = torch.full((3, 2, 1), float(PROMPT_TOKENS + step), device=self.device)
            hidden = self._forward(embedding.repeat(2, 1, 1), positions, cache, causal=True)
        return torch.cat(codes, dim=1)


def matrix_rate(hidden_size: int, layers: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict:
    """FLOPs per second of a guided picture of 680 codes, and of its bare forwards, over those of one large product."""
    model = new_model(hidden_size, layers, dtype, device, scale_schedules=[VAR_GRIDS], levels={"256": len(VAR_GRIDS)})
    decoding = Decoding(model, "256")
    left, right = (torch.randn(4 * hidden_size, 4 * hidden_size, dtype=dtype, device=device) for _ in range(2))
    jobs = {"picture": decoding.generate, "bare": decoding.bare, "product": lambda: left @ right}
    seconds = {name: min(taken) for name, taken in interleaved_seconds(jobs, repeats, device).items()}
    passes = 2 * image_passes(decoding.schedule, PROMPT_TOKENS - 1)  # with its null prompt
    config = model.config
    cost = model_cost(config.text_config, config.vq_config.codebook_size, passes)
    flops = {"picture": cost.total, "bare": cost.total, "product": 2 * len(left) ** 3}
    rates = {name: flops[name] / taken for name, taken in seconds.items()}
    shares = {name: round(rates[name] / rates["product"], 4) for name in ("picture", "bare")}
    rates = {name: float(f"{rate:.4g}") for name, rate in rates.items()}
    return {"codes": decoding.schedule.num_codes, "flops_per_second": rates, "share": shares}


def memory(dtype: str) -> dict:
    """[`peak_memory`] in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    try:
        ((_, found),) = in_processes(peak_memory, [(64, LAYERS_OF_7B, dtype)])
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return found


def peak_memory(hidden_size: int, layers: int, dtype: str) -> dict:
    """Megabytes that this process takes on while it draws one guided picture of 1024 pixels, on a CPU, under Linux."""
    vq_config = {"codebook_size": CODES_OF_7B}
    model = new_model(hidden_size, layers, getattr(torch, dtype), torch.device("cpu"), **vq_config)
    Decoding(model, "256").generate()  # what the libraries take once
    decoding = Decoding(model, "1024")
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    text = model.config.text_config
    positions = PROMPT_TOKENS + sum(decoding.schedule.lengths[1:])
    of_position = 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * model.dtype.itemsize
    cache = 2 * positions * text.num_hidden_layers * of_position
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    decoding.generate()
    megabytes = {"weights": weights, "cache": cache, "peak": weights + _status("VmHWM") - before}
    ratio = megabytes["peak"] / (weights + cache)
    return {name: round(value / 1e6, 1) for name, value in megabytes.items()} | {"ratio": round(ratio, 4)}


def _status(name: str) -> int:
    """Bytes, of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


@contextmanager
def build_of(commit: str, *model: object) -> Iterator[subprocess.Popen]:
    """A process of an earlier build, which draws as many pictures as a line says and answers when they are drawn."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", checkout, commit], check=True)
        try:
            command = [sys.executable, "-c", DRAW_EVENLY, *map(str, model), str(torch.get_num_threads())]
            environment = os.environ | {"PYTHONPATH": f"{checkout / 'src'}:{checkout}"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with subprocess.Popen(command, cwd=checkout, env=environment, **pipes) as process:
                yield process
                process.stdin.close()
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", checkout], check=True)


def over_build(commit: str, decoding: Decoding, repeats: int, *model: object) -> dict:
    """Seconds of even pictures over those of an earlier build, by their number."""
    ratios = {}
    with build_of(commit, *model) as process:

        def before(count: int) -> None:
            print(count, file=process.stdin, flush=True)
            if process.stdout.readline() != "drawn\n":
                raise RuntimeError(f"the build of {commit} did not draw")

        for name, count in (("one", 1), ("eight", 8)):
            evenly = [PROMPT_TOKENS] * count
            jobs = {"now": lambda: decoding.several(evenly), "before": lambda: before(count)}  # noqa: B023
            seconds = interleaved_seconds(jobs, repeats, decoding.device)
            ratios[name] = round(min(seconds["now"]) / min(seconds["before"]), 4)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--level", default="256", help="level of the picture drawn in four ways")
    parser.add_argument("--levels", nargs="+", default=["256", "512", "1024"], help="levels of the cost over codes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--before", metavar="COMMIT", help="also draw the even pictures with the build of this commit")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    model = new_model(arguments.hidden_size, arguments.layers, getattr(torch, arguments.dtype), arguments.device)

    decoding = Decoding(model, arguments.level)
    jobs = {"generate": decoding.generate, "bare": decoding.bare, "var_loop": decoding.var_loop}
    seconds = interleaved_seconds(jobs, arguments.repeats, arguments.device)
    even, ragged = [PROMPT_TOKENS] * 8, list(range(PROMPT_TOKENS - 7, PROMPT_TOKENS + 1))
    jobs = {
        "one_ragged": lambda: decoding.several([PROMPT_TOKENS], PROMPT_TOKENS // 2),
        "one_even": lambda: decoding.several([PROMPT_TOKENS]),
        "eight_ragged": lambda: decoding.several(ragged),
        "eight_even": lambda: decoding.several(even),
    }
    seconds |= interleaved_seconds(jobs, arguments.repeats, arguments.device)
    seconds |= interleaved_seconds({"token_by_token": decoding.token_by_token}, 1, arguments.device)
    medians = {name: median(values) for name, values in seconds.items()}
    ratios = {
        "generate_over_bare": medians["generate"] / medians["bare"],
        "var_loop_over_generate": medians["var_loop"] / medians["generate"],
        "token_by_token_over_generate": medians["token_by_token"] / medians["generate"],
        "one_ragged_over_even": medians["one_ragged"] / medians["one_even"],
        "eight_ragged_over_even": medians["eight_ragged"] / medians["eight_even"],
    }

    text_config, codebook_size = model.config.text_config, model.config.vq_config.codebook_size
    cost = []
    for level in arguments.levels:
        longer = Decoding(model, level)
        taken = interleaved_seconds({"generate": longer.generate}, max(arguments.repeats // 2, 1), arguments.device)
        passes = 2 * image_passes(longer.schedule, PROMPT_TOKENS - 1)  # with its null prompt
        flops = model_cost(text_config, codebook_size, passes).total
        row = {"level": level, "codes": longer.schedule.num_codes, "flops": flops}
        cost.append(row | {"seconds": median(taken["generate"])})
    result = {
        "model": {name: getattr(arguments, name) for name in ("hidden_size", "layers", "dtype", "level")},
        "codes": decoding.schedule.num_codes,
        "seconds": medians,
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "matrix_rate": matrix_rate(
            arguments.hidden_size, arguments.layers, model.dtype, arguments.device, arguments.repeats
        ),
        "memory": memory(arguments.dtype),
        "cost_over_codes": cost,
        "machine": machine(arguments.device),
        "seed": 0,
    }
    if arguments.before:
        settings = [getattr(arguments, name) for name in ("hidden_size", "layers", "dtype", "level", "device")]
        result["even_over_before"] = over_build(arguments.before, decoding, arguments.repeats, *settings)
    if len(cost) > 1:
        flops, taken = (np.array([row[name] for row in cost], dtype=float) for name in ("flops", "seconds"))
        slope, offset = np.polyfit(flops, taken, 1)
        errors = np.abs(slope * flops + offset - taken) / taken
        fit = {"flops_per_second": 1 / slope, "seconds_at_zero": offset, "largest_relative_error": errors.max()}
        result["fit"] = {name: float(f"{value:.4g}") for name, value in fit.items()}
    report(result, arguments.json, arguments.output)


if __name__ == "__main__":
    main()
