"""Time of packs under four strategies: `python -m benchmarks.packing --json`.

Documents of a mixture like the paper's 512-level stage (table 2: text, text-to-image, editing, interleaved) with
random ids and codes are packed by batch padding, concatenate-and-cut, best fit by length, and computation budget.
Packs drawn at random are measured, forward and backward of a two-layer model, on this machine. The cost model is
fitted on packs of one half of the documents and compared with packs of the other half. What 64 ranks would take, a
step waiting for its slowest rank, is composed from the measured packs, not measured.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration
from transformers_nextflow.data import BatchPadding, ComputeBudget, CostModel, FixedLength
from transformers_nextflow.data.loading import collate
from transformers_nextflow.data.packing import Extents
from transformers_nextflow.data.sequences import SequenceSpec, SpecialIds

from .harness import machine

SPECIAL = SpecialIds(boi=1, eoi=2, image=3, eos=4, pad=0)
TEXT_ROWS, CODES = 4096, 4096
MIXTURE = {"text": 700, "text-to-image": 345, "editing": 20, "interleaved": 5}  # million samples, table 2
MEAN_TEXT = 400  # positions, which table 2's 1.8 T tokens leave for each of 700 M texts


def two_layer_model(width: int) -> NextFlowForConditionalGeneration:
    """Two layers of the real class over table 14's schedules; the tokenizer is as small as can be and not used."""
    text = {
        "vocab_size": TEXT_ROWS,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(width // 256, 1),
        "max_position_embeddings": 65_536,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": SPECIAL.eos,
        "pad_token_id": SPECIAL.pad,
    }
    semantic = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vq = {
        "semantic_config": {**semantic, "patch_size": 16, "num_patches": 16, "vision_use_head": False},
        "semantic_decoder_layers": 1,
        "codebook_size": CODES,
        "base_channels": 8,
        "latent_channels": 8,
        "encoder_blocks": 1,
        "decoder_blocks": 1,
    }
    ids = {"boi_token_id": SPECIAL.boi, "eoi_token_id": SPECIAL.eoi, "image_token_id": SPECIAL.image}
    torch.manual_seed(0)
    return NextFlowForConditionalGeneration(NextFlowConfig(text_config=text, vq_config=vq, **ids)).train()


class Corpus:
    """Synthetic documents in compact form."""

    def __init__(self, spec: SequenceSpec, level: str, count: int, seed: int):
        self.spec = spec
        self.grids_of_level = [schedule.final_grid for schedule in spec.schedules.of_level(level)]
        self.rng = np.random.default_rng(seed)
        kinds = self.rng.choice(list(MIXTURE), count, p=np.array(list(MIXTURE.values())) / sum(MIXTURE.values()))
        self.documents = [self._draw(kind) for kind in kinds]

    def _text(self, mean: float, most: int = 4096) -> list[int]:
        length = min(int(self.rng.lognormal(np.log(mean) - 0.5, 1.0)) + 1, most)
        return self.rng.integers(5, TEXT_ROWS, length).tolist()

    def _draw(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compact ids, supervision and grids."""
        image = SPECIAL.image
        if kind == "text":
            parts = [(self._text(MEAN_TEXT), True)]
        elif kind == "text-to-image":
            parts = [(self._text(100), False), ([image], True)]
        elif kind == "editing":
            parts = [([image], False), (self._text(30), False), ([image], True)]
        else:
            frames = int(self.rng.integers(2, 6))
            parts = [part for _ in range(frames) for part in ((self._text(60), True), ([image], True))]
        ids = [token for tokens, _ in parts for token in tokens] + [SPECIAL.eos]
        flags = [flag for tokens, flag in parts for _ in tokens] + [True]
        pictures = ids.count(image)
        grids = self.rng.choice(self.grids_of_level, pictures) if pictures else np.empty((0, 2))
        return np.array(ids, np.int32), np.array(flags), grids.astype(np.int64)

    def extents(self) -> Extents:
        measured = [self.spec.measure(*document) for document in self.documents]
        return Extents(*(np.array([asdict(extent)[name] for extent in measured]) for name in asdict(measured[0])))

    def expand(self, members: Sequence[int]) -> dict[str, np.ndarray]:
        """A pack as the loader gives it, with random codes."""
        ids, flags, grids = zip(*(self.documents[member] for member in members))
        lengths = np.array([len(tokens) for tokens in ids])
        pack = self.spec.expand(np.concatenate(ids), np.concatenate(flags), np.concatenate(grids), lengths)
        pack["image_grid_hw"] = np.concatenate(grids)
        schedules = [self.spec.schedules.by_grid(grid) for grid in pack["image_grid_hw"]]
        pack["image_codes"] = self.rng.integers(0, CODES, sum(s.num_codes for s in schedules))
        pack["image_input_codes"] = self.rng.integers(0, CODES, sum(s.offsets[-1] for s in schedules))
        return pack


def concatenate_and_cut(corpus: Corpus, length: int, seed: int) -> tuple[Corpus, list[list[int]], int]:
    """Documents in random order, one after the other into rows of `length`, cut where a row ends: between tokens of
    text, or before a picture that does not fit whole. Returns pieces, rows, and how many documents were cut."""
    pieces, rows, room, cut = [], [[]], length, 0
    for document in np.random.default_rng(seed).permutation(len(corpus.documents)):
        ids, flags, grids = corpus.documents[document]
        start, picture, first_picture, cuts = 0, 0, 0, 0
        for place, token in enumerate(ids):
            size = 1
            if token == SPECIAL.image:
                size = 2 + corpus.spec.num_slots(tuple(grids[picture]), bool(flags[place]))
            if size > room:
                if place > start:
                    rows[-1].append(len(pieces))
                    pieces.append((ids[start:place], flags[start:place], grids[first_picture:picture]))
                    cuts = 1
                start, first_picture, room = place, picture, length
                rows.append([])
            room -= size
            picture += int(token == SPECIAL.image)
        rows[-1].append(len(pieces))
        pieces.append((ids[start:], flags[start:], grids[first_picture:]))
        cut += cuts
    cut_corpus = Corpus.__new__(Corpus)
    cut_corpus.spec, cut_corpus.rng, cut_corpus.documents = corpus.spec, corpus.rng, pieces
    return cut_corpus, [row for row in rows if row], cut


def step(model, pack: dict[str, np.ndarray], padded: bool) -> tuple[float, float]:
    """Seconds and loss of forward and backward."""
    batch = collate([pack], SPECIAL.pad, padded)
    device = model.device
    batch = {name: values.to(device) for name, values in batch.items()}
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = model(**batch, use_cache=False, logits_over="none").loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss.item()


def check_attention(model, corpus: Corpus) -> float:
    """Relative difference of the loss from that of SDPA under the whole mask."""
    shortest = np.argsort(corpus.extents().num_tokens)
    pictures = [document for document in shortest if len(corpus.documents[document][2])]
    pack = corpus.expand([shortest[0], pictures[0], shortest[1]])
    model.model.language_model.set_attn_implementation("sdpa")
    _, expected = step(model, pack, padded=False)
    model.model.language_model.set_attn_implementation("blocks")
    _, loss = step(model, pack, padded=False)
    return abs(loss - expected) / expected


def compose(seconds: np.ndarray, tokens: np.ndarray, ranks: int, steps: int = 2000) -> dict:
    """What `ranks` take for steps that wait for their slowest, each rank's pack drawn from the measured ones."""
    drawn = np.random.default_rng(0).integers(len(seconds), size=(steps, ranks))
    slowest = seconds[drawn].max(axis=1)
    return {
        "seconds_per_step": float(slowest.mean()),
        "tokens_per_second": float(tokens[drawn].sum() / slowest.sum()),
        "mean_over_max": float(seconds[drawn].mean(axis=1).sum() / slowest.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--packs", type=int, default=24, metavar="N", help="measured for each strategy")
    parser.add_argument("--level", default="512", help="of the pictures (default: %(default)s)")
    parser.add_argument("--length", type=int, default=32_768, metavar="N", help="most positions of a pack")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="documents of a padded batch")
    parser.add_argument("--width", type=int, default=256, metavar="N", help="of the model (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=64, metavar="N", help="composed (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--cost-model", type=Path, metavar="JSON", help="write the fitted coefficients")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()

    model = two_layer_model(arguments.width).to(arguments.device)
    spec = SequenceSpec(model.model.schedules, SPECIAL, model.config.condition_last_scale)
    theory = CostModel.from_config(model.config, "blocks")
    measured: dict[str, list[dict]] = {}
    strategies = {
        "padding": BatchPadding(arguments.batch_size, arguments.length),
        "concatenate and cut": None,
        "length": FixedLength(arguments.length),
        "budget": ComputeBudget(arguments.length),
    }
    notes = {}
    for half in ("fit", "held out"):
        corpus = Corpus(spec, arguments.level, arguments.documents // 2, arguments.seed + (half == "held out"))
        longest = int(corpus.extents().num_tokens.max())
        if longest > arguments.length:
            raise SystemExit(f"--length {arguments.length} is shorter than the longest document, {longest} positions")
        if half == "fit":
            notes["attention_check"] = check_attention(model, corpus)
            if notes["attention_check"] > 1e-5:
                raise SystemExit(f"the attention of the benchmark is wrong: {notes['attention_check']}")
        for name, strategy in strategies.items():
            source, padded = corpus, strategy is not None and strategy.padded
            if strategy is None:
                source, plan, cut = concatenate_and_cut(corpus, arguments.length * 3 // 4, arguments.seed)
                notes["documents_cut"] = notes.get("documents_cut", 0) + cut
                extents = source.extents()
            else:
                extents = source.extents()
                plan = strategy.plan(extents, theory, 1, arguments.seed)
                packed = sum(int(extents.num_tokens[members].sum()) for members in plan)
                notes["dropped_tokens"] = notes.get("dropped_tokens", 0) + int(extents.num_tokens.sum()) - packed
            chosen = np.random.default_rng(arguments.seed).permutation(len(plan))[: -(-arguments.packs // 2)]
            for index in chosen if measured else [chosen[0], *chosen]:  # the first of all only warms up
                pack = source.expand(plan[index])
                seconds, _ = step(model, pack, padded)
                measures = theory.measures(*extents.of(plan[index]), padded)
                tokens = int(extents.num_tokens[plan[index]].sum())
                entry = {"half": half, "seconds": seconds, "tokens": tokens, "measures": measures}
                measured.setdefault(name, []).append(entry)
            if half == "fit" and name == "padding":
                measured[name].pop(0)

    entries = [entry for group in measured.values() for entry in group]
    halves = {half: [entry for entry in entries if entry["half"] == half] for half in ("fit", "held out")}
    columns = lambda group, name: np.array([entry[name] for entry in group])  # noqa: E731
    source = {**theory.source, "device": arguments.device, "threads": torch.get_num_threads()}
    fitted = CostModel.fit(columns(halves["fit"], "measures"), columns(halves["fit"], "seconds"), "blocks", source)
    seconds = columns(halves["held out"], "seconds")
    predicted = columns(halves["held out"], "measures") @ fitted.coefficients
    figures = {
        **notes,
        "cost_model": {
            "backend": "blocks",
            "median_relative_error": float(np.median(np.abs(predicted - seconds) / seconds)),
            "r2": float(1 - ((predicted - seconds) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()),
            "packs_fitted": len(halves["fit"]),
            "packs_held_out": len(seconds),
        },
        "strategies": {},
        "machine": machine(torch.device(arguments.device)),
        "seed": arguments.seed,
    }
    for strategy, group in measured.items():
        seconds, tokens = columns(group, "seconds"), columns(group, "tokens")
        figures["strategies"][strategy] = {
            "packs_measured": len(group),
            "seconds_per_pack": {
                "mean": float(seconds.mean()),
                "min": float(seconds.min()),
                "max": float(seconds.max()),
            },
            "real_tokens_per_pack": float(tokens.mean()),
            "one_rank_tokens_per_second": float(tokens.sum() / seconds.sum()),
            f"composed_{arguments.ranks}_ranks": compose(seconds, tokens, arguments.ranks),
        }
    speed = {n: s[f"composed_{arguments.ranks}_ranks"]["tokens_per_second"] for n, s in figures["strategies"].items()}
    figures[f"budget_over, composed {arguments.ranks} ranks"] = {
        name: speed["budget"] / value for name, value in speed.items() if name != "budget"
    }
    if arguments.cost_model:
        arguments.cost_model.write_text(json.dumps(fitted.to_dict(), indent=1) + "\n")
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"cost model, {len(halves['held out'])} held-out packs: median relative error", end=" ")
    print(f"{figures['cost_model']['median_relative_error']:.1%}, R2 {figures['cost_model']['r2']:.3f}")
    print(f"{'':<20} {'s / pack':>9} {'tokens / pack':>14} {'tokens/s, 1 rank':>17} {'composed':>10}")
    for name, values in figures["strategies"].items():
        print(
            f"{name:<20} {values['seconds_per_pack']['mean']:>9.2f} {values['real_tokens_per_pack']:>14.0f} "
            f"{values['one_rank_tokens_per_second']:>17.0f} {speed[name]:>10.0f}"
        )


if __name__ == "__main__":
    main()
