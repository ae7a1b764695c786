"""What a guided picture of the 7B model costs on one GPU: `python -m benchmarks.gpu_decode --json`.

The default configuration with random weights in bfloat16 draws pictures of 1024 x 1024 pixels with guidance, and its
vision tokenizer of full size decodes them. The paper takes 5 s for one; the arithmetic alone would take an H200 about
0.4 s.

- `seconds_per_picture`, `pictures_per_second` in batches, `peak_gigabytes` in bfloat16 and in 4 bits, and `goals`;
- `parts`: a picture's seconds by part, each waited for, so that together they are more than the whole; the scale steps
  hold the next-scale features;
- `seconds_without`: a picture with one optimisation taken away; `seconds_with`: with one added that is no default;
- `decode_at_once`: the vision decoder over a batch, and over its pictures one at a time.

`generate` has no sampling kernel of its own: a scale is sampled by top-k, softmax and one cumulative sum, `parts` says
for how long. Its attention is PyTorch's; over rows of one length it has no mask, and so runs as flash attention. The
last scale's keys and values are written to the cache, although nothing reads them.

Without a GPU there is nothing to measure, and the program refuses. `--tiny` runs all of it at a size that any machine
can take, to check the program: it prints what would be measured, and no figure.
"""

import argparse
import gc
import importlib.util
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from transformers import BitsAndBytesConfig

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowModel,
    NextFlowVQModel,
    contexts,
    drawing,
    generation_nextflow,
)
from transformers_nextflow.contexts import Contexts
from transformers_nextflow.flops import image_passes, model_cost

from . import decode
from .harness import interleaved_seconds, machine, median, names_in, report, wait

GUIDANCE, TOP_K, TOP_P = 4.0, 600, 0.95
PROMPT_TOKENS = 100
PAPER_SECONDS = 5.0
GOALS = {"seconds_per_picture": 0.8, "peak_gigabytes, bfloat16": 24.0, "peak_gigabytes, 4 bits": 12.0}
CHECK = "tiny model: shows that this program runs, and nothing about speed or memory"


class Drawing:
    """Guided pictures of one level by one model."""

    def __init__(self, model: NextFlowForConditionalGeneration, level: str):
        self.model, self.device, self.level = model, model.device, level
        self.schedule = model.model.schedules.by_aspect_ratio("1:1", level)

    def tokens(self, count: int = 1) -> torch.Tensor:
        """(count, codes) ids; prompts and null prompts have one length, as a batch of equal prompts has."""
        boi = self.model.config.boi_token_id
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, min(boi, 1000), (2 * count, PROMPT_TOKENS), generator=generator)
        prompts[:, -1] = boi
        conditional, null = prompts.to(self.device).chunk(2)
        return self.model.generate(
            input_ids=conditional,
            negative_input_ids=null,
            generation_mode="image",
            level=self.level,
            guidance_scale=GUIDANCE,
            top_k=TOP_K,
            top_p=TOP_P,
            seed=0,
        )

    def pixels(self, count: int = 1) -> torch.Tensor:
        """(count, 3, H, W)."""
        return self.model.decode_image_tokens(self.tokens(count), self.schedule.final_grid)

    def peak_gigabytes(self, count: int = 1) -> float | None:
        """Most memory that PyTorch held while it drew, weights included; `None` without a GPU."""
        if self.device.type != "cuda":
            self.pixels(count)
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.pixels(count)
        return round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)

    def parts(self) -> dict[str, float]:
        """Seconds of one picture by part."""
        seconds: dict[str, float] = defaultdict(float)

        def timed(part: str, function: Callable) -> Callable:
            def run(*args, **kwargs):
                wait(self.device)
                started = time.perf_counter()
                result = function(*args, **kwargs)
                wait(self.device)
                seconds[part] += time.perf_counter() - started
                return result

            return run

        measured = {
            "prompt": (generation_nextflow, "read_prompts"),
            "scale steps": (Contexts, "read_scale"),
            "code head": (self.model.code_head, "forward"),
            "guidance": (drawing, "guide"),
            "sampling": (drawing, "sample"),
            "next-scale features": (NextFlowModel, "scale_inputs"),
            "vision decoder": (NextFlowVQModel, "decode"),
        }
        self.pixels()
        patches = [
            mock.patch.object(owner, name, timed(part, getattr(owner, name)))
            for part, (owner, name) in measured.items()
        ]
        for patch in patches:
            patch.start()
        try:
            self.pixels()
        finally:
            for patch in patches:
                patch.stop()
        return {part: round(seconds[part], 5) for part in measured}


def without(model: NextFlowForConditionalGeneration) -> dict[str, Callable]:
    """What takes one optimisation away each: a context in which pictures are drawn without it."""
    head, lm_head, rows = model.code_head.forward, model.lm_head, model.config.text_vocab_size

    def both_heads(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([lm_head(hidden), head(hidden)], dim=-1)[..., rows:]

    def masked(model, parts, inputs, *others):
        parts = [replace(part, mask=mask_of(part, inputs.device)) if part.in_block else part for part in parts]
        return run(model, parts, inputs, *others)

    def mask_of(part, device):
        rows, length = part.shape
        keys = part.cache.get_seq_length() + length
        return torch.ones(rows, 1, length, keys, dtype=torch.bool, device=device)

    @contextmanager
    def eager() -> Iterator[None]:
        before = model.config.text_config._attn_implementation
        model.model.language_model.set_attn_implementation("eager")
        yield
        model.model.language_model.set_attn_implementation(before)

    run = contexts.run_apart
    return {
        "only the code rows of the heads": lambda: mock.patch.object(model.code_head, "forward", both_heads),
        "attention without a mask": lambda: mock.patch.object(contexts, "run_apart", masked),
        "PyTorch's fused attention": eager,
    }


def compiled(model: NextFlowForConditionalGeneration, backend: str):
    """A context in which the decoder is compiled, once for all scales."""
    decoder = model.model.language_model
    forward = torch.compile(decoder.forward, dynamic=True, backend=backend)
    return mock.patch.object(decoder, "forward", forward)


def full_model(device: torch.device) -> NextFlowForConditionalGeneration:
    """The default configuration with random weights in bfloat16; what defines the codes stays float32."""
    torch.manual_seed(0)
    with device:
        model = NextFlowForConditionalGeneration(NextFlowConfig()).eval().to(torch.bfloat16)
    model.model.code_embeddings.float()
    model.model.vq_model.quantizer.float()
    return model


def four_bits(model: NextFlowForConditionalGeneration, device: torch.device) -> NextFlowForConditionalGeneration:
    """The same model loaded in 4 bits, as users load it."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.to("meta")
        gc.collect()
        torch.cuda.empty_cache()
        return NextFlowForConditionalGeneration.from_pretrained(
            folder, quantization_config=settings, device_map={"": device}, dtype=torch.bfloat16
        ).eval()


def measure(drawing: Drawing, repeats: int, batch: int, backend: str | None) -> dict:
    """All figures of one model; `backend` is `torch.compile`'s, `None` leaves it out."""
    model, device, schedule = drawing.model, drawing.device, drawing.schedule

    def seconds_of(job: Callable[[], object]) -> float:
        return median(interleaved_seconds({"job": job}, repeats, device)["job"])

    result = {"seconds_per_picture": seconds_of(drawing.pixels), "parts": drawing.parts()}
    result["pictures_per_second"] = {f"batch {batch}": round(batch / seconds_of(lambda: drawing.pixels(batch)), 3)}
    result["seconds_without"] = {}
    for name, context in without(model).items():
        with context():
            result["seconds_without"][name] = seconds_of(drawing.pixels)
    if backend is not None:
        with compiled(model, backend):
            result["seconds_with"] = {"a compiled decoder": seconds_of(drawing.pixels)}
    tokens = drawing.tokens(batch)
    decoders = {
        "at once": lambda: model.decode_image_tokens(tokens, schedule.final_grid),
        "one at a time": lambda: [model.decode_image_tokens(row, schedule.final_grid) for row in tokens.split(1)],
    }
    taken = interleaved_seconds(decoders, repeats, device)
    result["decode_at_once"] = {f"batch {batch}, {name}": median(values) for name, values in taken.items()}
    result["peak_gigabytes"] = {"bfloat16": drawing.peak_gigabytes(), f"batch {batch}": drawing.peak_gigabytes(batch)}
    passes = 2 * image_passes(schedule, PROMPT_TOKENS - 1)  # with its null prompt
    cost = model_cost(model.config.text_config, model.config.vq_config.codebook_size, passes)
    result["teraflops"] = {
        "of the decoder and its head": round(cost.total / 1e12, 3),
        "per second": round(cost.total / 1e12 / result["seconds_per_picture"], 1),
    }
    return result


def goals(result: dict) -> dict:
    """Each goal beside what was measured, `None` where it was not."""
    peaks = result["peak_gigabytes"]
    got = (result["seconds_per_picture"], peaks["bfloat16"], peaks["4 bits"])
    return {
        name: {"goal": goal, "measured": value, "met": None if value is None else value <= goal}
        for (name, goal), value in zip(GOALS.items(), got)
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="1024")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled decoder out")
    parser.add_argument("--tiny", action="store_true", help="check this program on any machine; prints no figures")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    if options.tiny:
        device = torch.device("cpu")
        drawing = Drawing(decode.new_model(64, 1, torch.float32, device), "256")
        result = names_in(measure(drawing, repeats=1, batch=2, backend="eager"))
        report({"check": CHECK, "would_measure": result, "machine": machine(device)}, options.json, options.output)
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU, and without one nothing to measure; --tiny checks this program")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("high")
    drawing = Drawing(full_model(device), options.level)
    result = measure(drawing, options.repeats, options.batch, None if options.no_compile else "inductor")
    result["peak_gigabytes"]["4 bits"] = None
    if importlib.util.find_spec("bitsandbytes") is None:
        result["note"] = "bitsandbytes is not installed: nothing was measured in 4 bits"
    else:
        result["peak_gigabytes"]["4 bits"] = Drawing(four_bits(drawing.model, device), options.level).peak_gigabytes()
    result = {
        "model": {"configuration": "default (7B)", "dtype": "bfloat16", "level": options.level, "guidance": GUIDANCE},
        "codes": drawing.schedule.num_codes,
        "paper_seconds_per_picture": PAPER_SECONDS,
        "goals": goals(result),
        **result,
        "machine": machine(device),
        "seed": 0,
    }
    report(result, options.json, options.output)


if __name__ == "__main__":
    main()
