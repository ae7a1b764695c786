"""What a training step costs on one GPU, and what each optimisation is worth: `python -m benchmarks.gpu_train --json`.

Models of Qwen2.5's sizes with random weights in bfloat16 take AdamW's steps on packs of documents of the 512-level
stage's mixture: random texts and codes, packed by length and padded to one length, so that a compiled layer needs no
new graph. Each size has `rows`:

- the full set: flex attention, the loss in chunks, gradient checkpointing, `torch.compile` of the decoder's layers;
- the full set with one of them switched, and with Liger's kernels where liger-kernel is installed. Attention by blocks
  cannot be traced inside a checkpoint, so its layers run uncompiled.

A row has `seconds_per_step`, `tokens_per_second` without padding, `teraflops_per_second`, `mfu`, and `peak_gigabytes`
of all that PyTorch held. FLOPs are those of forward and backward over real positions, pairs that attend to each other,
and supervised rows of the heads; what checkpointing computes again is not counted. The learning rate is 0: all rows
see the same weights, and their `loss` shows that they computed the same.

The result is written after every row, to benchmarks/results/gpu_train.json unless `--output` names another file. A row
that runs out of memory or fails otherwise says so in `failed`, as do those that no time is left for.

Without a GPU there is nothing to measure, and the program refuses. `--tiny` runs all of it at a size that any machine
can take, to check the program: it prints what would be measured, and no figure.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import is_liger_kernel_available

from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration, modeling_nextflow
from transformers_nextflow.configuration_nextflow import QWEN2_5_7B_TEXT
from transformers_nextflow.data import CostModel, FixedLength
from transformers_nextflow.data.loading import collate
from transformers_nextflow.data.packing import EXTENTS, Extents
from transformers_nextflow.data.sequences import SequenceSpec
from transformers_nextflow.liger import apply_liger_kernel
from transformers_nextflow.losses import IGNORE

from .harness import machine, names_in, report, save
from .loss import naive
from .packing import SPECIAL, Corpus, two_layer_model

RESULT = Path(__file__).parent / "results" / "gpu_train.json"
LEVEL = "512"
DOCUMENTS = 300
PEAK_TERAFLOPS = {"H200": 989.4, "H100 80GB HBM3": 989.4, "A100": 312.0}  # dense bfloat16, the vendor's data sheets
CHECK = "tiny model: shows that this program runs, and nothing about speed or memory"

# Qwen2.5's text decoders, as far as they differ from that of 7B
SIZES = {
    "1.5B": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960}
    | {"num_attention_heads": 12, "num_key_value_heads": 2},
    "3B": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    | {"num_attention_heads": 16, "num_key_value_heads": 2},
    "7B": {},
}


@dataclass(frozen=True)
class Setting:
    """What a row trains with."""

    attention: str
    loss_in_chunks: bool = True
    gradient_checkpointing: bool = True
    compiled: bool = True
    liger: bool = False


def settings(attention: str, liger: bool) -> dict[str, Setting]:
    """The rows: the full set under this attention, and each optimisation switched alone."""
    full = Setting(attention)
    others = [name for name in ("blocks", "sdpa") if name != attention]
    rows = {"the full set": full}
    rows |= {f"attention by {name}": replace(full, attention=name) for name in others}
    rows |= {
        "all logits at once": replace(full, loss_in_chunks=False),
        "no gradient checkpointing": replace(full, gradient_checkpointing=False),
        "no torch.compile": replace(full, compiled=False),
    }
    if liger:  # last, because the replaced layers stay
        rows |= {
            "Liger's kernels": replace(full, liger=True),
            "Liger's kernels, no torch.compile": replace(full, liger=True, compiled=False),
        }
    return rows


def logits_at_once(
    hidden, heads, num_rows, targets, weights, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the place of `joint_cross_entropy`, but for the z-loss, for which no row asks."""
    return naive(hidden, *(head.weight for head in heads), targets, weights)


@contextmanager
def applied(model: NextFlowForConditionalGeneration, setting: Setting, backend: str) -> Iterator[None]:
    """The model as a row trains it; all but Liger's layers is put back."""
    decoder = model.model.language_model
    before = decoder.config._attn_implementation
    with ExitStack() as undo:
        decoder.set_attn_implementation(setting.attention)
        undo.callback(decoder.set_attn_implementation, before)
        if setting.liger:
            apply_liger_kernel(model)
        if setting.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            undo.callback(model.activation_checkpointing_disable)
        if not setting.loss_in_chunks:
            undo.enter_context(mock.patch.object(modeling_nextflow, "joint_cross_entropy", logits_at_once))
        if setting.compiled:
            undo.callback(torch._dynamo.reset)
            for layer in decoder.layers:
                forward = torch.compile(layer.forward, backend=backend, dynamic=False)
                undo.enter_context(mock.patch.object(layer, "forward", forward))
        yield


@dataclass(frozen=True)
class Packs:
    """Packs of one padded length.

    Attributes:
        batches: what the forward takes, one pack each.
        work: (3,) positions without padding, attended pairs and targets of all of them.
    """

    batches: list[dict[str, torch.Tensor]]
    work: np.ndarray

    @classmethod
    def draw(cls, model: NextFlowForConditionalGeneration, length: int, count: int) -> "Packs":
        """`count` of the packs that documents of the mixture make; documents longer than a pack are left out."""
        spec = SequenceSpec(model.model.schedules, SPECIAL, model.config.condition_last_scale)
        corpus = Corpus(spec, LEVEL, DOCUMENTS, seed=0)
        extents = corpus.extents()
        fits = np.flatnonzero(extents.num_tokens <= length)
        extents = Extents(*extents.of(fits))
        plan = FixedLength(length).plan(extents, CostModel.from_config(model.config), multiple_of=1, seed=0)
        if len(plan) < count:
            raise ValueError(
                f"{len(fits)} documents of at most {length} positions fill {len(plan)} packs, not {count}"
            )
        packs = [plan[index] for index in np.random.default_rng(0).permutation(len(plan))[:count]]
        batches = [_padded(corpus.expand(fits[pack]), length, model.device) for pack in packs]
        return cls(batches, np.array([getattr(extents, name)[np.concatenate(packs)].sum() for name in EXTENTS]))


def _padded(pack: dict[str, np.ndarray], length: int, device: torch.device) -> dict[str, torch.Tensor]:
    batch = collate([pack], SPECIAL.pad, padded=False)
    for name, fill in {"input_ids": SPECIAL.pad, "document_ids": -1, "shift_labels": IGNORE}.items():
        batch[name] = F.pad(batch[name], (0, length - batch[name].shape[1]), value=fill)
    return {name: values.to(device) for name, values in batch.items()}


def train(model, optimizer: torch.optim.Optimizer, packs: Packs) -> tuple[float, float]:
    """Seconds and mean loss of one optimizer step on each pack."""
    started = time.perf_counter()
    losses = []
    for batch in packs.batches:
        loss = model(**batch, logits_over="none", use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    mean = torch.stack(losses).mean().item()  # waits for the device
    return time.perf_counter() - started, mean


def rates(work: np.ndarray, seconds: float, costs: CostModel, peak_teraflops: float | None) -> dict:
    """Figures of (3,) positions, attended pairs and targets in these seconds."""
    teraflops = float(work @ costs.coefficients[:3]) / seconds / 1e12
    return {
        "tokens_per_second": round(float(work[0]) / seconds, 1),
        "teraflops_per_second": round(teraflops, 2),
        "mfu": None if peak_teraflops is None else round(teraflops / peak_teraflops, 4),
    }


def measure(model, optimizer, packs: Packs, setting: Setting, backend: str, peak_teraflops: float | None) -> dict:
    """A row: one pass over the packs that compiles and warms up, and one that counts."""
    on_gpu = model.device.type == "cuda"
    with applied(model, setting, backend):
        warm_up, _ = train(model, optimizer, packs)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds, loss = train(model, optimizer, packs)
    return {
        "seconds_per_step": round(seconds / len(packs.batches), 5),
        **rates(packs.work, seconds, CostModel.from_config(model.config), peak_teraflops),
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None,
        "loss": round(loss, 6),
        "warm_up_seconds": round(warm_up, 2),
    }


def measure_or_say_why_not(model, optimizer, **options) -> dict:
    """A row, or `failed` alone; of a failed row nothing stays in memory."""
    try:
        return measure(model, optimizer, **options)
    except Exception as error:  # of whatever kind: the next row may do without what failed
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        failed = "out of memory" if out_of_memory else f"{type(error).__name__}: {error}".strip().splitlines()[0]
    optimizer.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    return {"failed": failed}


def new_model(size: str, device: torch.device) -> NextFlowForConditionalGeneration:
    """A model of full size with random weights in bfloat16; what defines the codes stays float32. Its ids are those of
    the synthetic documents."""
    config = NextFlowConfig(
        text_config=QWEN2_5_7B_TEXT | SIZES[size],
        boi_token_id=SPECIAL.boi,
        eoi_token_id=SPECIAL.eoi,
        image_token_id=SPECIAL.image,
        tie_word_embeddings=size != "7B",
    )
    torch.manual_seed(0)
    with device:
        model = NextFlowForConditionalGeneration(config).to(torch.bfloat16)
    model.model.code_embeddings.float()
    model.model.vq_model.quantizer.float()
    return model


def tiny_model() -> NextFlowForConditionalGeneration:
    """Two layers, and pictures of 85 codes, for a CPU."""
    config = two_layer_model(64).config
    vq = config.vq_config.to_dict() | {"scale_schedules": [[[n, n] for n in (1, 2, 4, 8)]], "levels": {LEVEL: 4}}
    ids = {name: getattr(config, name) for name in ("boi_token_id", "eoi_token_id", "image_token_id")}
    torch.manual_seed(0)
    return NextFlowForConditionalGeneration(NextFlowConfig(text_config=config.text_config, vq_config=vq, **ids))


def measure_size(
    model: NextFlowForConditionalGeneration,
    settings: dict[str, Setting],
    length: int,
    count: int,
    deadline: float,
    after_row: Callable[[dict], None],
    **options,
) -> None:
    """Measure a size's rows; `after_row` gets its result so far, which grows. After the deadline no row is begun."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    packs = Packs.draw(model, length, count)
    result = {
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "weights": str(model.dtype).removeprefix("torch."),
        "optimizer": "torch.optim.AdamW, fused, state in the precision of the weights",
        "tokens_per_step": round(float(packs.work[0]) / count, 1),
        "rows": {},
    }
    for name, setting in settings.items():
        if time.monotonic() < deadline:
            figures = measure_or_say_why_not(model, optimizer, packs=packs, setting=setting, **options)
        else:
            figures = {"failed": "not run: no time was left"}
        result["rows"][name] = {"setting": asdict(setting), **figures}
        after_row(result)


def measure_sizes(
    models: dict[str, Callable[[], NextFlowForConditionalGeneration]],
    minutes: float,
    after_row: Callable[[dict], None],
    **options,
) -> None:
    """Measure all sizes, each in its share of the time that is left; `after_row` gets their results so far."""
    results: dict[str, dict] = {}
    ends = time.monotonic() + 60 * minutes

    def of_size(size: str, result: dict) -> None:
        results[size] = result
        after_row(results)

    for place, (size, build) in enumerate(models.items()):
        now = time.monotonic()
        deadline = now + (ends - now) / (len(models) - place)
        measure_size(build(), deadline=deadline, after_row=partial(of_size, size), **options)
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1.5B", "7B"], help="default: 1.5B 7B")
    parser.add_argument("--length", type=int, default=16_384, metavar="N", help="of a pack (default: %(default)s)")
    parser.add_argument("--packs", type=int, default=3, metavar="N", help="a step for each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7, help="no row is begun after them (default: %(default)s)")
    parser.add_argument("--peak-teraflops", type=float, metavar="X", help="for the MFU; default: by the GPU's name")
    parser.add_argument("--tiny", action="store_true", help="check this program on any machine; prints no figures")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, metavar="JSON", help="default: benchmarks/results/gpu_train.json")
    options = parser.parse_args(arguments)
    if options.tiny:
        checked: dict[str, dict] = {}
        rows = settings("blocks", liger=False)  # flex attention has no backward on a CPU
        sizes = {"length": 256, "count": 1, "backend": "eager", "peak_teraflops": 1.0}
        measure_sizes({"tiny": tiny_model}, float("inf"), checked.update, settings=rows, **sizes)
        check = {"check": CHECK, "would_measure": names_in(checked), "machine": machine(torch.device("cpu"))}
        report(check, options.json, options.output)
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU, and without one nothing to measure; --tiny checks this program")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    peak = options.peak_teraflops or next((peak for part, peak in PEAK_TERAFLOPS.items() if part in name), None)
    rows = settings("flex_attention", liger=is_liger_kernel_available())
    result = {
        "packs": {"level": LEVEL, "length": options.length, "count": options.packs},
        "peak_teraflops": peak,
        "sizes": {},
        "machine": machine(device),
        "seed": 0,
    }
    if not is_liger_kernel_available():
        result["note"] = "liger-kernel is not installed: nothing was measured with Liger's kernels"

    def after_row(sizes: dict[str, dict]) -> None:
        result["sizes"] = sizes
        save(result, options.output or RESULT)
        size, of_size = list(sizes.items())[-1]
        print(f"{size}: {len(of_size['rows'])} of {len(rows)} rows", file=sys.stderr, flush=True)

    measure_sizes(
        {size: partial(new_model, size, device) for size in options.sizes},
        options.minutes,
        after_row,
        settings=rows,
        length=options.length,
        count=options.packs,
        backend="inductor",
        peak_teraflops=peak,
    )
    report(result, options.json)


if __name__ == "__main__":
    main()
