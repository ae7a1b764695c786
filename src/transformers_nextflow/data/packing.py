"""Which documents share a pack (NextFlow sec. 4, fig. 13 and table 3), and the shards of packs.

A strategy is a plan: from every document's extent and cost to lists of documents. Nothing is dropped or truncated; a
document too long for a strategy is an error that names it, unless dropping is asked for, and then it is counted. The
number of packs divides what every optimizer step consumes, so that all ranks end together.
"""

import heapq
import shutil
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm.auto import tqdm
from transformers.utils import logging

from ..sampling import integer
from ..utils.files import read_json
from .costs import CostModel
from .extraction import check_plan, finished
from .shards import (
    FORMAT_VERSION,
    MANIFEST,
    Shard,
    list_schema,
    open_shards,
    sha256_of,
    write_json,
    write_manifest,
    write_shard,
)

logger = logging.get_logger(__name__)

EXTENTS = ("num_tokens", "attended_pairs", "num_targets")
NO_PACK = (inf, -1, -1)  # costlier than any
FULLEST = 0.97  # mean share of a cap on length: in fuller packs the last texts find room only beside the costliest


@dataclass(frozen=True)
class Extents:
    """(documents,) extents of every document, see [`~sequences.Extent`]."""

    num_tokens: np.ndarray
    attended_pairs: np.ndarray
    num_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    def of(self, documents: Sequence[int] | np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(getattr(self, name)[documents] for name in EXTENTS)


class Strategy(Protocol):
    """How documents are put into packs. `padded`: whether a pack's documents are rows of their own, padded."""

    padded: bool
    max_length: int

    def plan(self, extents: Extents, cost_model: CostModel, multiple_of: int, seed: int) -> list[list[int]]:
        """Documents, by index, of each pack; the number of packs is a multiple of `multiple_of`."""
        ...


@dataclass(frozen=True)
class BatchPadding:
    """Random batches of `batch_size` documents, each a row padded to the batch's longest."""

    batch_size: int
    max_length: int
    padded = True

    def plan(self, extents: Extents, cost_model: CostModel, multiple_of: int, seed: int) -> list[list[int]]:
        order = np.random.default_rng([seed, 0]).permutation(len(extents)).tolist()
        packs = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return split_to_multiple(packs, extents.num_tokens, multiple_of)


@dataclass(frozen=True)
class FixedLength:
    """Rows of at most `max_length` positions, filled by length alone: best fit, longest documents first."""

    max_length: int
    padded = False

    def plan(self, extents: Extents, cost_model: CostModel, multiple_of: int, seed: int) -> list[list[int]]:
        packs: list[list[int]] = []
        with_room: dict[int, list[int]] = {}  # packs by the room they have left
        rooms: list[int] = []  # the keys of `with_room`, sorted
        lengths = extents.num_tokens.tolist()
        for document in np.argsort(-extents.num_tokens, kind="stable").tolist():
            length = lengths[document]
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms[place]
                pack = with_room[room].pop()
                if not with_room[room]:
                    del with_room[room]
                    rooms.pop(place)
            else:
                room, pack = self.max_length, len(packs)
                packs.append([])
            packs[pack].append(document)
            left = room - length
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(pack)
        return split_to_multiple(packs, extents.num_tokens, multiple_of)


@dataclass(frozen=True)
class ComputeBudget:
    """Packs of equal cost: `budget` each, in the cost model's unit, and at most `max_length` positions.

    The costliest documents first, each into the cheapest pack that has room for its length. `budget=None` is the mean
    cost of `max_length * fill` positions, under which the cap on length is slack; or the costliest document's where
    that is more, because ranks wait for it whatever the others hold.
    """

    max_length: int
    budget: float | None = None
    fill: float = 0.75
    padded = False

    def plan(self, extents: Extents, cost_model: CostModel, multiple_of: int, seed: int) -> list[list[int]]:
        filled = self.max_length * self.fill
        costs = cost_model.document_costs(*extents.of(slice(None)), row_length=filled)
        tokens = int(extents.num_tokens.sum())
        if self.budget is None:
            fewest = min(tokens / filled, float(costs.sum() / costs.max()))
        elif self.budget < costs.max():
            raise ValueError(f"budget {self.budget:.6g} is below the costliest document's {costs.max():.6g}")
        else:
            fewest = float(costs.sum()) / self.budget
        fewest = max(fewest, tokens / (self.max_length * FULLEST))
        num_packs = -(-int(np.ceil(fewest)) // multiple_of) * multiple_of
        order = np.argsort(-costs, kind="stable")
        most = len(extents) // multiple_of * multiple_of
        while True:
            check_enough(len(extents), num_packs)
            packs = self._balance(order, costs, extents.num_tokens, num_packs)
            if packs is not None:
                return packs
            more = -(-num_packs // (50 * multiple_of)) * multiple_of  # 2%
            num_packs += more if num_packs == most else min(more, most - num_packs)

    def _balance(self, order, costs, lengths, num_packs: int) -> list[list[int]] | None:
        """None where the cap on length leaves some document no pack."""
        packs: list[list[int]] = [[] for _ in range(num_packs)]
        rooms, open_packs = [self.max_length] * num_packs, OpenPacks(np.unique(lengths).tolist())
        for pack in range(num_packs):
            open_packs.put(0.0, pack, self.max_length)
        for document, cost, length in zip(order.tolist(), costs[order].tolist(), lengths[order].tolist()):
            taken = open_packs.take_cheapest(length)
            if taken is None:
                return None
            filled, pack = taken
            packs[pack].append(document)
            rooms[pack] -= length
            open_packs.put(filled + cost, pack, rooms[pack])
        return packs


class OpenPacks:
    """Packs by their cost and the room they have left: a heap for each of the `lengths` (sorted), of packs where it is
    the longest to find room, and above the heaps a binary tree of their cheapest packs."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self.heaps: list[list[tuple[float, int, int]]] = [[] for _ in lengths]  # cost, pack, which heap
        self.num_leaves = 1 << (len(lengths) - 1).bit_length()
        self.cheapest = [NO_PACK] * (2 * self.num_leaves)  # node n is above 2n and 2n + 1

    def put(self, cost: float, pack: int, room: int) -> None:
        place = bisect_right(self.lengths, room) - 1
        if place >= 0:
            heapq.heappush(self.heaps[place], (cost, pack, place))
            self._update(place)

    def take_cheapest(self, length: int) -> tuple[float, int] | None:
        """Cost and number of the cheapest pack that has room for one of the lengths, which is then no longer here."""
        node = self.num_leaves + bisect_left(self.lengths, length)
        found = self.cheapest[node]
        while node > 1:  # what has more room stands to the right
            if node % 2 == 0 and self.cheapest[node + 1] < found:
                found = self.cheapest[node + 1]
            node //= 2
        if found == NO_PACK:
            return None
        cost, pack, place = found
        heapq.heappop(self.heaps[place])
        self._update(place)
        return cost, pack

    def _update(self, place: int) -> None:
        node, cheapest = self.num_leaves + place, (self.heaps[place] or [NO_PACK])[0]
        while node and self.cheapest[node] != cheapest:
            self.cheapest[node] = cheapest
            cheapest = min(cheapest, self.cheapest[node ^ 1])
            node //= 2


def check_enough(documents: int, packs: int) -> None:
    if documents < packs:
        raise ValueError(f"{documents} documents cannot fill {packs} packs; lower multiple_of")


def split_to_multiple(packs: list[list[int]], lengths: np.ndarray, multiple_of: int) -> list[list[int]]:
    """Halve the longest packs until their number is a multiple."""
    packs = [list(pack) for pack in packs if pack]
    missing = -len(packs) % multiple_of
    check_enough(sum(map(len, packs)), len(packs) + missing)
    heap = [(-int(lengths[pack].sum()), number) for number, pack in enumerate(packs) if len(pack) > 1]
    heapq.heapify(heap)
    for _ in range(missing):
        _, number = heapq.heappop(heap)
        pack = packs[number]
        half = int(np.searchsorted(lengths[pack].cumsum(), lengths[pack].sum() / 2)) + 1
        half = min(half, len(pack) - 1)
        packs[number] = pack[:half]
        packs.append(pack[half:])
        for new in (number, len(packs) - 1):
            if len(packs[new]) > 1:
                heapq.heappush(heap, (-int(lengths[packs[new]].sum()), new))
    return packs


def efficiency(costs: np.ndarray, ranks: int, seed: int = 0) -> float:
    """Sum of the steps' mean costs over the sum of their maxima, for packs drawn at random onto `ranks`."""
    order = np.random.default_rng(seed).permutation(len(costs))
    steps = costs[order[: len(costs) // ranks * ranks]].reshape(-1, ranks)
    return float(steps.mean(1).sum() / steps.max(1).sum()) if len(steps) else float("nan")


def pack_costs(packs: Sequence[Sequence[int]], extents: Extents, cost_model: CostModel, padded: bool) -> np.ndarray:
    """(packs,) costs."""
    return np.array([cost_model.pack_cost(*extents.of(pack), padded) for pack in packs])


def pack(
    folders: Sequence[str | Path],
    output: str | Path,
    strategy: Strategy,
    cost_model: CostModel,
    multiple_of: int = 1,
    text_share: float | None = None,
    drop_long: bool = False,
    seed: int = 0,
    packs_per_shard: int = 256,
) -> dict:
    """Pack the documents of folders of shards; the same call continues a stopped run. Returns the manifest.

    Args:
        folders: of documents, made by one model's tokenizers.
        multiple_of: processes x accumulation x packs in a batch: what divides the number of packs.
        text_share: share of all positions that text-only documents make up (NextFlow table 1: 0.25); those beyond it
            are left out and counted. Texts so long that it is not reached by 1% are told in a warning.
        drop_long: leave documents longer than `strategy.max_length` out, and count them, instead of raising.

    Raises:
        ValueError: if the folders' identities differ, two hold the same documents, a document is too long, or there is
            too little text or none that is short.
    """
    output = Path(output)
    integer("multiple_of", multiple_of, 1)
    integer("packs_per_shard", packs_per_shard, 1)
    integer("seed", seed, 0)
    if not folders:
        raise ValueError("name at least one folder of documents to pack")
    sources = [open_shards(folder, "documents") for folder in folders]
    first = sources[0][1]
    for folder, manifest in sources[1:]:
        for name in ("identity", "variants"):
            if manifest[name] != first[name]:
                parts = (
                    [k for k in first[name] if first[name][k] != manifest[name].get(k)] if name == "identity" else []
                )
                raise ValueError(f"{folder} was made with another {' and '.join(parts) or name} than {sources[0][0]}")
    settings = {
        "strategy": {"name": type(strategy).__name__, **vars(strategy)},
        "cost_model": cost_model.to_dict(),
        "multiple_of": multiple_of,
        "text_share": text_share,
        "drop_long": drop_long,
        "seed": seed,
        "packs_per_shard": packs_per_shard,
    }
    inputs = [sha256_of(folder / MANIFEST) for folder, _ in sources]
    for place, digest in enumerate(inputs):
        if (same := inputs.index(digest)) < place:
            raise ValueError(f"{folders[place]} holds the documents of {folders[same]}, name one of them")
    check_plan(output, {"settings": settings, "documents": {"manifests": inputs}})
    if (manifest := finished(output)) is not None:
        return manifest

    shards = [Shard(folder / "data" / entry["file"]) for folder, manifest in sources for entry in manifest["shards"]]
    starts = np.cumsum([0, *map(len, shards)])
    extents = Extents(*(np.concatenate([shard.column(name) for shard in shards]) for name in EXTENTS))
    num_images = np.concatenate(
        [np.diff(shard.batch.column("image_grid_hw").offsets.to_numpy()) // 2 for shard in shards]
    )
    is_text = num_images == 0
    chosen, counts = _choose(extents, is_text, strategy.max_length, drop_long, text_share, seed, shards, starts)
    kept = Extents(*extents.of(chosen))
    packs = [chosen[pack].tolist() for pack in map(np.array, strategy.plan(kept, cost_model, multiple_of, seed))]
    costs = pack_costs(packs, extents, cost_model, strategy.padded)

    schema = list_schema(first["identity"]["codebook_size"], packs=True)
    entries = []
    for number, start in enumerate(tqdm(range(0, len(packs), packs_per_shard), desc="shards")):
        group = packs[start : start + packs_per_shard]
        entries.append(_write_packs(output, number, group, costs[start:], shards, starts, schema))
    manifest = {
        "format_version": FORMAT_VERSION,
        "content": "packs",
        "identity": first["identity"],
        "variants": first["variants"],
        "padded": strategy.padded,
        "settings": settings,
        "documents": {"manifests": inputs, "settings": [manifest["settings"] for _, manifest in sources]},
        "statistics": counts | statistics(packs, extents, costs, strategy.padded),
        "samples": _place_samples(sources, starts, num_images, packs, packs_per_shard),
        "shards": entries,
    }
    write_manifest(output, manifest)
    shutil.rmtree(output / "work", ignore_errors=True)
    return manifest


def _choose(extents, is_text, max_length, drop_long, text_share, seed, shards, starts) -> tuple[np.ndarray, dict]:
    """The documents to pack, and what was left out."""
    kept = extents.num_tokens <= max_length
    counts = {"dropped documents": int((~kept).sum()), "dropped tokens": int(extents.num_tokens[~kept].sum())}
    if counts["dropped documents"] and not drop_long:
        longest = int(extents.num_tokens.argmax())
        shard = int(np.searchsorted(starts, longest, side="right")) - 1
        key = shards[shard].batch.column("key")[longest - starts[shard]].as_py()
        raise ValueError(
            f"{counts['dropped documents']} documents are longer than {max_length} positions, document {key} has "
            f"{extents.num_tokens[longest]}: raise the maximal length, or ask for them to be dropped"
        )
    if text_share is not None:
        kept, counts["text left out"] = _limit_text(extents.num_tokens, is_text, kept, text_share, seed)
    if not kept.any():
        raise ValueError("there is no document to pack")
    return np.flatnonzero(kept), counts


def _limit_text(tokens, is_text, kept, share: float, seed: int) -> tuple[np.ndarray, int]:
    if not 0 <= share < 1:
        raise ValueError(f"text_share must lie in [0, 1), got {share}")
    others = int(tokens[kept & ~is_text].sum())
    wanted = share / (1 - share) * others
    texts = np.flatnonzero(kept & is_text)
    texts = texts[np.random.default_rng([seed, 1]).permutation(len(texts))]
    reached = tokens[texts].cumsum()
    if wanted and (len(texts) == 0 or reached[-1] < wanted * 0.99):
        have = int(reached[-1]) if len(texts) else 0
        raise ValueError(
            f"text_share {share} asks for {wanted:.0f} positions of text beside {others} of other documents, "
            f"there are {have}: at most {have / (have + others):.3f}"
        )
    fits = reached <= wanted * 1.01
    have = int(tokens[texts[fits]].sum())
    if wanted and not have:
        raise ValueError(
            f"text_share {share} asks for {wanted:.0f} positions of text beside {others} of other documents, the "
            f"first text drawn has {tokens[texts[0]]} alone: raise text_share, add documents, or take another seed"
        )
    if have < wanted * 0.99:
        logger.warning(
            f"{have} positions of text are packed instead of {wanted:.0f}, that text_share {share} asks for beside "
            f"{others} of other documents: the next text drawn has {tokens[texts[fits.sum()]]}"
        )
    kept = kept.copy()
    kept[texts[~fits]] = False
    return kept, int((~fits).sum())


def _write_packs(output: Path, number: int, packs, costs, shards, starts, schema) -> dict:
    """Write one shard of packs unless it is there."""
    report = output / "work" / f"{number:05d}.json"
    if report.exists():
        return read_json(report)
    rows = []
    for documents, cost in zip(packs, costs):
        members = []
        for document in documents:
            shard = int(np.searchsorted(starts, document, side="right")) - 1
            members.append(shards[shard].row(document - int(starts[shard])))
        flat = ("input_ids", "supervised", "image_grid_hw", "image_codes", "image_input_codes")
        rows.append(
            {
                "keys": [member["key"] for member in members],
                "kinds": [member["kind"] for member in members],
                **{name: np.concatenate([member[name] for member in members]) for name in flat},
                "document_lengths": [len(member["input_ids"]) for member in members],
                "document_tokens": [member["num_tokens"] for member in members],
                "num_tokens": sum(member["num_tokens"] for member in members),
                "cost": float(cost),
            }
        )
    entry = write_shard(output / "data" / f"packs-{number:05d}.arrow", rows, schema)
    write_json(report, entry)
    return entry


def _place_samples(sources, starts, num_images, packs, packs_per_shard: int) -> list[dict]:
    """The samples taken at extraction, with their shard, row and image among the packs."""
    of_document, before = {}, 0
    for _, manifest in sources:
        for sample in manifest["samples"]:
            of_document[int(starts[before + sample["shard"]]) + sample["row"]] = sample
        before += len(manifest["shards"])
    placed = []
    for number, pack in enumerate(packs):
        for place, document in enumerate(pack):
            if document in of_document:
                sample = of_document[document]
                image = int(num_images[pack[:place]].sum()) + sample["image"]
                where = {"shard": number // packs_per_shard, "row": number % packs_per_shard, "image": image}
                placed.append(sample | where)
    return placed


def statistics(packs: Sequence[Sequence[int]], extents: Extents, costs: np.ndarray, padded: bool) -> dict:
    """What a plan wastes: padding, uneven costs, and idle ranks."""
    lengths = [extents.num_tokens[pack] for pack in packs]
    tokens = int(sum(int(length.sum()) for length in lengths))
    positions = sum(len(length) * int(length.max()) if padded else int(length.sum()) for length in lengths)
    return {
        "packs": len(packs),
        "documents": sum(map(len, packs)),
        "tokens": tokens,
        "padded positions": positions - tokens,
        "targets": int(sum(int(extents.num_targets[pack].sum()) for pack in packs)),
        "longest pack": max(int(length.sum()) for length in lengths),
        "mean cost": float(costs.mean()),
        "coefficient of variation of cost": float(costs.std() / costs.mean()),
        "step efficiency": {str(ranks): efficiency(costs, ranks) for ranks in (8, 64, 512) if len(costs) >= ranks},
    }
