"""What training shards hold: documents, their pictures, and prompts that the model was trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data.shards import Shard, decodable_codes, images_of, open_shards, sequence_spec

if TYPE_CHECKING:
    from .case import Case, Sequence


def stored_pictures(case: "Case", limit: int = 24) -> list[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Grid, targets and inputs of pictures of rows drawn at random."""
    pictures = (image for document in stored_documents(case) for image in document.images)
    return list(islice(pictures, limit))


@dataclass(frozen=True)
class StoredDocument:
    """One document as it is stored: compact ids, which of them are supervised, and its pictures' grids and codes."""

    ids: np.ndarray
    supervised: np.ndarray
    images: list[tuple]


def stored_documents(case: "Case") -> Iterator[StoredDocument]:
    """All documents, from rows drawn at random."""
    folder, manifest = open_shards(case.packs, hashes=False)
    spec = sequence_spec(manifest["identity"])
    rows = [(entry["file"], row) for entry in manifest["shards"] for row in range(entry["rows"])]
    shards: dict[str, Shard] = {}
    for place in np.random.default_rng(case.seed).permutation(len(rows)):
        file, index = rows[place]
        row = shards.setdefault(file, Shard(folder / "data" / file)).row(index)
        images = iter(images_of(row, spec, manifest["variants"]))
        ends = np.cumsum(row.get("document_lengths", [len(row["input_ids"])]))[:-1]
        for ids, flags in zip(np.split(row["input_ids"], ends), np.split(row["supervised"], ends)):
            yield StoredDocument(ids, flags, [next(images) for _ in range(int((ids == spec.special.image).sum()))])


def stored_sequences(case: "Case", limit: int, edits: bool = False) -> "list[Sequence]":
    """Documents whose one supervised picture is their last: after a text alone, or as an edit of another picture of
    its size."""
    spec = sequence_spec(open_shards(case.packs, hashes=False)[1]["identity"])
    empty = case.processor.apply_chat_template([{"role": "user", "content": ""}], generation_mode="image")
    null = empty["input_ids"].to(case.model.device)
    found = []
    for document in stored_documents(case):
        at = np.flatnonzero(document.ids == spec.special.image)
        flags = document.supervised[at].astype(bool)
        if len(at) == 0 or not flags[-1] or flags[:-1].any() or edits != (len(at) > 1):
            continue
        if edits and document.images[-2][0] != document.images[-1][0]:
            continue
        # a text that was dropped leaves the null prompt
        if not edits and at[0] + 1 <= null.shape[1]:
            continue
        before = slice(0, at[-1])
        *given, (grid, targets, inputs) = document.images
        targets, inputs = _least_disturbed(targets, inputs)
        codes, targets = (
            torch.from_numpy(each).to(case.model.device)
            for each in (decodable_codes(targets, inputs), targets[0].astype(np.int64))
        )
        grids = np.array([each[0] for each in given]).reshape(-1, 2)
        opened = spec.expand(document.ids[before], document.supervised[before], grids, np.array([at[-1]]))
        prompt = null.new_tensor([[*opened["input_ids"].tolist(), spec.special.boi]])
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "negative_input_ids": null}
        if given:
            inputs["image_codes"] = torch.from_numpy(np.concatenate([each[1][0] for each in given]).astype(np.int64))
            inputs["image_grid_hw"] = torch.from_numpy(grids)
        found.append(case.answered(inputs, codes[None], case.vq_model.schedules.by_grid(grid), targets))
        if len(found) == limit:
            break
    return found


def _least_disturbed(targets: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a picture's stored codings the one whose inputs are most like its targets."""
    if len(inputs) == 0:
        return targets, inputs
    best = int((inputs != targets[:, : inputs.shape[1]]).sum(axis=1).argmin())
    return targets[best : best + 1], inputs[best : best + 1]
