"""Time of packs under four strategies: `python -m benchmarks.packing --json`.

Documents in the shares of the paper's 512-level stage (table 2), with random ids and codes, are packed by padding
(random batches, each document a row padded to the longest, under SDPA's dense mask), by concatenating and cutting, by
length, and by computation budget. The last three use `attn_implementation="blocks"`; padding under it is measured too,
to tell what the dense mask costs from what the padding does. No pack or batch exceeds `--length` positions.

The cost model is fitted on packs of one half of the documents, padded ones and concatenated ones. Of the other half
every strategy packs all documents, budget by that cost model, and predictions are compared with the times there. From
each plan, packs are measured that stand for it: from strata of predicted cost, finer where costs are high. A
measurement is forward and backward of a two-layer model; all packs are measured in turn, and a pack's time is its
least over the rounds. What 64 ranks take, a step waiting for its slowest rank, is composed from the measured packs,
not measured.

Attention has a larger share of the cost in a narrow model of two layers than in the 7B model, and uneven packs differ
the more for it: `flops_of_7b` is the same comparison by the 7B model's FLOPs, computed over whole plans, not measured.
"""

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration
from transformers_nextflow.data import BatchPadding, ComputeBudget, CostModel, FixedLength
from transformers_nextflow.data.loading import collate
from transformers_nextflow.data.packing import Extents
from transformers_nextflow.data.sequences import SequenceSpec, SpecialIds
from transformers_nextflow.training import load_stages

from .harness import machine, report, wait

SPECIAL = SpecialIds(boi=1, eoi=2, image=3, eos=4, pad=0)
TEXT_ROWS, CODES = 1024, 1024
SHARES = load_stages()["pretrain-512"].shares
MEAN_TEXT = 400  # positions, which table 2's 1.8 T tokens leave for each of 700 M texts
STRATA = (0.25, 0.5, 0.75, 0.9, 0.97)  # of a plan's packs by cost; finer at the end that 64 ranks wait for
FITTED_ON = ("padding", "padding, blocks", "concatenate and cut")  # packs from small to large, under both backends
BACKEND = {"sdpa": "dense", "blocks": "blocks"}  # attn_implementation to the cost model's word


def two_layer_model(width: int) -> NextFlowForConditionalGeneration:
    """Two layers of the real class over table 14's schedules; the tokenizer is as small as can be and not used."""
    text = {
        "vocab_size": TEXT_ROWS,
        "hidden_size": width,
        "intermediate_size": 5 * width,
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
        # one place in each of `count` equal parts of the shares: of 1,070 documents every kind has its exact share
        places = (np.arange(count) + self.rng.random()) / count
        kinds = np.searchsorted(np.cumsum(list(SHARES.values()))[:-1], places, side="right")
        self.kinds = [list(SHARES)[kind] for kind in self.rng.permutation(kinds)]
        self.documents = [self._draw(kind) for kind in self.kinds]

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
    cut_corpus = copy.copy(corpus)
    cut_corpus.documents = pieces
    return cut_corpus, [row for row in rows if row], cut


@dataclass(frozen=True)
class Plan:
    """All packs of a strategy; `documents` are pieces where it cuts."""

    documents: Corpus
    extents: Extents
    packs: list[list[int]]
    padded: bool = False
    attention: str = "blocks"
    documents_cut: int = 0

    @property
    def tokens(self) -> int:
        """Real positions of all packs."""
        return sum(int(self.extents.num_tokens[pack].sum()) for pack in self.packs)

    @property
    def tokens_per_pack(self) -> float:
        return self.tokens / len(self.packs)

    def measures(self, cost_model: CostModel) -> np.ndarray:
        """(packs, 5) of the cost model."""
        return np.array([cost_model.measures(*self.extents.of(pack), self.padded) for pack in self.packs])

    def batch(self, number: int, device: torch.device) -> dict[str, torch.Tensor]:
        pack = self.documents.expand(self.packs[number])
        return {name: values.to(device) for name, values in collate([pack], SPECIAL.pad, self.padded).items()}


def make_plans(corpus: Corpus, length: int, cost_model: CostModel, seed: int) -> dict[str, Plan]:
    """Every strategy's plan of all documents, each pack or batch at most `length` positions."""
    extents = corpus.extents()
    longest = int(extents.num_tokens.max())
    if longest > length:
        raise SystemExit(f"--length {length} is shorter than the longest document, {longest} positions")
    padding = BatchPadding(length // longest, length).plan(extents, cost_model, 1, seed)
    pieces, rows, cut = concatenate_and_cut(corpus, length, seed)
    return {
        "padding": Plan(corpus, extents, padding, padded=True, attention="sdpa"),
        "padding, blocks": Plan(corpus, extents, padding, padded=True),
        "concatenate and cut": Plan(pieces, pieces.extents(), rows, documents_cut=cut),
        "length": Plan(corpus, extents, FixedLength(length).plan(extents, cost_model, 1, seed)),
        "budget": Plan(corpus, extents, ComputeBudget(length).plan(extents, cost_model, 1, seed)),
    }


class Sample:
    """Packs that stand for a plan, one for each stratum of predicted cost.

    Attributes:
        numbers: (packs,) which of the plan's, in the middle of their strata.
        weights: (packs,) shares of the plan's packs for which they stand.
        measures: (packs, 5) of the cost model.
        predicted_over_plan: their weighted mean cost over the plan's mean cost, both predicted: 1 if they are typical.
        seconds: (rounds, packs), to be measured.
    """

    def __init__(self, plan: Plan, rounds: int, cost_model: CostModel):
        self.plan = plan
        measures = plan.measures(cost_model)
        costs = measures @ cost_model.coefficients
        edges = np.ceil(np.array(STRATA) * len(costs)).astype(int)
        strata = [part for part in np.split(np.argsort(costs, kind="stable"), edges) if len(part)]
        self.numbers = np.array([part[len(part) // 2] for part in strata])
        self.weights = np.array([len(part) / len(costs) for part in strata])
        self.measures = measures[self.numbers]
        self.predicted_over_plan = float(costs[self.numbers] @ self.weights / costs.mean())
        self.seconds = np.empty((rounds, len(strata)))

    def job(self, place: int, device: torch.device) -> tuple[dict[str, torch.Tensor], str]:
        """The batch of one of the packs, and the attention to compute it with."""
        return self.plan.batch(self.numbers[place], device), self.plan.attention

    @property
    def least(self) -> np.ndarray:
        """(packs,) seconds in the best round: what disturbs a step only adds to it."""
        return self.seconds.min(axis=0)


def step(model, batch: dict[str, torch.Tensor], attention: str) -> float:
    """Seconds of forward and backward."""
    model.model.language_model.set_attn_implementation(attention)
    model.zero_grad(set_to_none=True)
    wait(model.device)
    start = time.perf_counter()
    model(**batch, use_cache=False, logits_over="none").loss.backward()
    wait(model.device)
    return time.perf_counter() - start


def measure(model, plans: dict[str, Plan], rounds: int, cost_models: dict[str, CostModel]) -> dict[str, Sample]:
    """A sample of every plan, in rounds over all packs; each round in an order of its own, so that what drifts meets
    all alike, cheap or costly."""
    samples = {name: Sample(plan, rounds, cost_models[BACKEND[plan.attention]]) for name, plan in plans.items()}
    places = [(sample, place) for sample in samples.values() for place in range(len(sample.numbers))]
    step(model, *places[0][0].job(0, model.device))  # warms up
    for done in range(rounds):
        for index in np.random.default_rng(done).permutation(len(places)):
            sample, place = places[index]
            sample.seconds[done, place] = step(model, *sample.job(place, model.device))
    return samples


def joined(samples: dict[str, Sample], backend: str) -> tuple[np.ndarray, np.ndarray]:
    """Measures and seconds of all packs under one backend."""
    group = [sample for sample in samples.values() if BACKEND[sample.plan.attention] == backend]
    return np.concatenate([sample.measures for sample in group]), np.concatenate([sample.least for sample in group])


def errors_of(samples: dict[str, Sample], cost_model: CostModel) -> dict:
    """Prediction against measurement."""
    measures, seconds = joined(samples, cost_model.backend)
    predicted = measures @ cost_model.coefficients
    errors = np.abs(predicted - seconds) / seconds
    return {
        "median_relative_error": float(np.median(errors)),
        "largest_relative_error": float(errors.max()),
        "r2": float(1 - ((predicted - seconds) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()),
        "packs": len(seconds),
    }


def compose(seconds: np.ndarray, weights: np.ndarray, tokens_per_pack: float, ranks: int, steps: int = 10_000) -> dict:
    """What `ranks` take for steps that wait for their slowest, each rank's pack drawn by weight."""
    drawn = np.random.default_rng(0).choice(len(seconds), size=(steps, ranks), p=weights)
    slowest = float(seconds[drawn].max(axis=1).mean())
    return {
        "seconds_per_step": slowest,
        "tokens_per_second": ranks * tokens_per_pack / slowest,
        "mean_over_max": float(seconds @ weights / slowest),
    }


def budget_over(speeds: dict[str, float]) -> dict[str, float]:
    return {name: speeds["budget"] / speed for name, speed in speeds.items() if name != "budget"}


def figures_of(sample: Sample, ranks: int) -> dict:
    seconds, plan = sample.least, sample.plan
    mean = float(seconds @ sample.weights)
    return {
        "attn_implementation": plan.attention,
        "packs": len(plan.packs),
        "real_tokens_per_pack": plan.tokens_per_pack,
        "packs_measured": len(seconds),
        "predicted_cost_of_measured_over_all": sample.predicted_over_plan,
        "seconds_per_pack": {"mean": mean, "min": float(seconds.min()), "max": float(seconds.max())},
        "median_spread_of_rounds": float(np.median(np.ptp(sample.seconds, axis=0) / seconds)),
        "one_rank_tokens_per_second": plan.tokens_per_pack / mean,
        f"composed_{ranks}_ranks": compose(seconds, sample.weights, plan.tokens_per_pack, ranks),
    }


def by_flops(corpus: Corpus, length: int, ranks: int, seed: int) -> dict:
    """The comparison by the 7B model's FLOPs, composed from all packs of every plan."""
    cost_models = {backend: CostModel.from_config(NextFlowConfig(), backend) for backend in BACKEND.values()}
    plans, composed = make_plans(corpus, length, cost_models["blocks"], seed), {}
    for name, plan in plans.items():
        cost_model = cost_models[BACKEND[plan.attention]]
        costs = plan.measures(cost_model) @ cost_model.coefficients
        weights = np.full(len(costs), 1 / len(costs))
        composed[name] = compose(costs, weights, plan.tokens_per_pack, ranks)
    return {
        "attention_share": attention_share(plans["budget"], cost_models["blocks"]),
        "mean_over_max": {name: values["mean_over_max"] for name, values in composed.items()},
        "budget_over": budget_over({name: values["tokens_per_second"] for name, values in composed.items()}),
    }


def attention_share(plan: Plan, cost_model: CostModel) -> float:
    """Of the cost, what grows with the pairs."""
    parts = plan.measures(cost_model).sum(axis=0) * cost_model.coefficients
    return float(parts[1] / parts.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1070, metavar="N", help="of each half (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="of measurement (default: %(default)s)")
    parser.add_argument("--level", default="512", help="of the pictures (default: %(default)s)")
    parser.add_argument("--length", type=int, default=36_864, metavar="N", help="most positions of a pack")
    parser.add_argument("--width", type=int, default=128, metavar="N", help="of the model (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=64, metavar="N", help="composed (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--cost-model", type=Path, metavar="JSON", help="write the fitted coefficients")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    length, ranks, seed = arguments.length, arguments.ranks, arguments.seed

    model = two_layer_model(arguments.width).to(arguments.device)
    spec = SequenceSpec(model.model.schedules, SPECIAL, model.config.condition_last_scale)
    halves = [Corpus(spec, arguments.level, arguments.documents, seed + half) for half in range(2)]
    theory = {backend: CostModel.from_config(model.config, backend) for backend in BACKEND.values()}
    source = {**theory["blocks"].source, "device": str(arguments.device), "threads": torch.get_num_threads()}
    plans = make_plans(halves[0], length, theory["blocks"], seed)
    fitted_on = measure(model, {name: plans[name] for name in FITTED_ON}, arguments.rounds, theory)
    cost_models = {backend: CostModel.fit(*joined(fitted_on, backend), backend, source) for backend in theory}
    plans = make_plans(halves[1], length, cost_models["blocks"], seed)
    samples = measure(model, plans, arguments.rounds, cost_models)

    lengths = samples["budget"].plan.extents.num_tokens
    strategies = {name: figures_of(sample, ranks) for name, sample in samples.items()}
    one_rank = {name: values["one_rank_tokens_per_second"] for name, values in strategies.items()}
    composed = {name: values[f"composed_{ranks}_ranks"]["tokens_per_second"] for name, values in strategies.items()}
    result = {
        "documents": {
            **Counter(halves[1].kinds),
            "positions": int(lengths.sum()),
            "longest": int(lengths.max()),
            "cut_by_concatenate_and_cut": samples["concatenate and cut"].plan.documents_cut,
        },
        "model": {"width": arguments.width, "layers": 2},
        "most_positions_of_a_pack": length,
        "documents_of_a_padded_batch": len(samples["padding"].plan.packs[0]),
        "dropped_tokens": sum(int(lengths.sum()) - sample.plan.tokens for sample in samples.values()),
        "cost_model_on_held_out_documents": {
            backend: errors_of(samples, cost_model) for backend, cost_model in cost_models.items()
        },
        "attention_share": attention_share(samples["budget"].plan, cost_models["blocks"]),
        "strategies": strategies,
        "budget_over": {"one_rank": budget_over(one_rank), f"composed_{ranks}_ranks": budget_over(composed)},
        "flops_of_7b": by_flops(halves[1], length, ranks, seed),
        "machine": machine(arguments.device),
        "seed": seed,
    }
    report(result, arguments.json, arguments.output)
    if arguments.cost_model:
        arguments.cost_model.write_text(json.dumps(cost_models["blocks"].to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
