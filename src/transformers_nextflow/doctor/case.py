"""What is examined: a model, its processor, pictures, documents, and what the model makes of them.

Shape suffixes: L codes of a picture, N supervised targets, T temperatures, V codes of the table, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data.loading import PackReader, collate, unfold
from ..data.sequences import SequenceSpec
from ..data.shards import decodable_codes, documents_of, open_shards, sequence_spec
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQOutput
from ..processing_nextflow import user_message
from ..scales import Grid, ScaleSchedule
from .pictures import Picture, default_pictures

ROWS, DOCUMENTS = 16, 2  # rows that parts are tried on, and documents of shards in each
LOOKED_THROUGH, READ = 2**12, 192  # documents of shards, and those of them that the model reads
TEMPERATURES = (0.5, 0.5**0.5, 1.0, 2.0**0.5, 2.0)
AS_IT_IS = 2  # of the temperatures
IMPOSSIBLE = 30.0  # nats, which nothing costs more than
TEXT = -1  # in the place of a scale
CODES = ("image_codes", "image_input_codes")

Row = dict[str, torch.Tensor]  # what the model's forward takes


class Document(NamedTuple):
    """Compact ids and whether each is supervised; of each picture its final grid, (variants or 1, L) targets and
    (variants or 0, coarse) inputs, and whether it is drawn, not shown."""

    ids: np.ndarray
    flags: np.ndarray
    images: list[tuple[Grid, np.ndarray, np.ndarray]]
    draws: list[bool]

    @property
    def prompt(self) -> np.ndarray:
        """Ids before what is supervised."""
        return self.ids[: self.flags.argmax()]

    def after(self, prompt: np.ndarray) -> "Document":
        """What is supervised here, after another prompt."""
        first = len(self.prompt)
        flags = np.append(np.zeros(len(prompt), bool), self.flags[first:])
        return self._replace(ids=np.append(prompt, self.ids[first:]), flags=flags)


class Reading(NamedTuple):
    """What the model makes of supervised targets: (N,) codes or ids, their scales, 0-based or [`TEXT`], what they cost
    at each temperature, and what the model expects that they cost (its entropy), in nats."""

    targets_N: torch.Tensor
    scales_N: torch.Tensor
    costs_TN: torch.Tensor
    expected_N: torch.Tensor

    @classmethod
    def of(cls, logits_NV: torch.Tensor, targets_N: torch.Tensor, scales_N: torch.Tensor) -> "Reading":
        costs = [F.cross_entropy(logits_NV / t, targets_N, reduction="none") for t in TEMPERATURES]
        costs_TN = torch.stack(costs).nan_to_num(IMPOSSIBLE).clamp(max=IMPOSSIBLE)
        expected_N = torch.special.entr(logits_NV.softmax(-1)).sum(-1)
        return cls(*(each.cpu() for each in (targets_N, scales_N, costs_TN, expected_N)))

    def where(self, chosen_N: torch.Tensor) -> "Reading":
        return Reading(*(each[..., chosen_N] for each in self))

    @property
    def codes(self) -> "Reading":
        return self.where(self.scales_N != TEXT)

    @property
    def cost(self) -> torch.Tensor:
        """Mean, not a number without targets; so is `surprise`, what they cost above the expected."""
        return self.costs_TN[AS_IT_IS].mean()

    @property
    def surprise(self) -> torch.Tensor:
        return self.cost - self.expected_N.mean()


def by_part(readings: Sequence[Reading]) -> dict[str, list[Reading]]:
    """Readings of texts and of every scale, of the documents that have such."""
    scales = torch.cat([reading.scales_N for reading in readings]).unique().tolist()
    names = {scale: "text" if scale == TEXT else f"scale {scale + 1}" for scale in scales}
    each = {scale: [reading.where(reading.scales_N == scale) for reading in readings] for scale in scales}
    return {names[scale]: [part for part in each[scale] if len(part.targets_N)] for scale in scales}


@dataclass
class Case:
    """A model under examination, in eval mode, with its processor; a dozen pictures at least for means over them; the
    folder of its training's shards; the seed of everything drawn; and pictures in rows and curves for the report."""

    model: NextFlowForConditionalGeneration
    processor: Any
    pictures: list[Picture]
    packs: Path | None = None
    seed: int = 0
    images: dict[str, list[list[Image.Image]]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def __post_init__(self):
        self.config, self.vq_model = self.model.config, self.model.model.vq_model
        self.schedules, self.image_id = self.vq_model.schedules, self.config.image_token_id

    @cached_property
    def coded(self) -> list[tuple[torch.Tensor, ScaleSchedule, NextFlowVQOutput]]:
        """(1, 3, H, W) pixels of every picture, its schedule, and what the vision tokenizer makes of it."""
        each = [self.pixels_of(picture.image) for picture in self.pictures]
        return [(pixels, self.schedules.by_grid(grid), self.vq_model(pixels)) for grid, pixels in each]

    def pixels_of(self, image: Image.Image) -> tuple[Grid, torch.Tensor]:
        """A picture as the processor gives it: final grid, and (1, 3, H, W)."""
        grid, pixels = self.processor.image_processor.whole(self.processor.image_processor(image, return_tensors="pt"))
        return grid, pixels.to(self.model.device)

    @cached_property
    def shards(self) -> tuple[Path | None, dict]:
        """Folder and manifest of the shards, if any."""
        return (None, {"variants": 0}) if self.packs is None else open_shards(self.packs, hashes=False)

    @cached_property
    def spec(self) -> SequenceSpec:
        """Special ids and schedules that the documents were made with."""
        return SequenceSpec.of(self.processor) if self.packs is None else sequence_spec(self.shards[1]["identity"])

    @cached_property
    def documents(self) -> list[Document]:
        """Of the shards, row by row in a random order; without shards those of pictures."""
        folder, manifest = self.shards
        if folder is None:
            return self.described
        reader, documents = PackReader(folder, manifest, self.spec), []
        for index in np.random.default_rng(self.seed).permutation(len(reader)):
            for _, _, ids, flags, images in documents_of(reader.row(int(index)), self.spec, manifest["variants"]):
                flags = flags.astype(bool)
                documents.append(Document(ids, flags, images, flags[ids == self.image_id].tolist()))
            if len(documents) >= LOOKED_THROUGH:
                break
        return documents

    @cached_property
    def described(self) -> list[Document]:
        """Pictures that have a text, or drawn ones, after their texts."""
        described = [each for each in self.pictures if each.caption] or default_pictures(self.schedules, self.seed)
        chosen = np.random.default_rng(self.seed).permutation(len(described))[:ROWS]
        return [self.document(described[at].caption, described[at].image) for at in chosen]

    def document(self, text: str, *images: Image.Image) -> Document:
        """A text and pictures, the last of which answers them; all its codings are alike."""
        prompt = self.processor.apply_chat_template([user_message(text, images[:-1])], generation_mode="image")
        ids, variants = np.append(self.compact(prompt["input_ids"]), self.image_id), self.shards[1]["variants"]
        pictures = []
        for grid, pixels in map(self.pixels_of, images):
            codes, coarse = self.vq_model.encode(pixels).cpu().numpy(), self.schedules.by_grid(grid).offsets[-1]
            pictures.append((grid, codes, codes[:0, :coarse]))
        drawn = (grid, codes.repeat(max(variants, 1), 0), codes[:, :coarse].repeat(variants, 0))
        draws = [False] * (len(images) - 1) + [True]
        return Document(ids, np.arange(len(ids)) == len(ids) - 1, [*pictures[:-1], drawn], draws)

    def compact(self, prompt_ids: torch.Tensor) -> np.ndarray:
        """(1, l) ids of a prompt with one `<image>` for each picture, without the `<boi>` at the end."""
        ids = prompt_ids[0].cpu().numpy()
        is_more = (ids == self.image_id) & (np.roll(ids, 1) == self.image_id)
        return ids[~is_more & ~np.isin(ids, (self.config.boi_token_id, self.config.eoi_token_id))]

    @cached_property
    def stored(self) -> list[tuple[Grid, np.ndarray, np.ndarray]]:
        """Pictures of all documents."""
        return [image for document in self.documents for image in document.images]

    def codes_of(self, targets: np.ndarray, inputs: np.ndarray) -> torch.Tensor:
        """(1, L) codes of a picture of a document that show it."""
        return torch.from_numpy(decodable_codes(targets, inputs))[None].to(self.model.device)

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Ids before and after the user's text in a prompt of the processor."""
        prompts = [self.processor.apply_chat_template([user_message(text)])["input_ids"][0].tolist() for text in "xy"]
        same = [a == b for a, b in zip(*prompts)]
        return prompts[0][: same.index(False)], prompts[0][len(same) - same[::-1].index(False) :]

    @cached_property
    def asked(self) -> list[Document]:
        """Prompts of texts and the picture that answers each, without a text before it: those of the shards, else
        described pictures."""
        null, (head, _) = self.compact(self.null_prompt).tolist(), self.frame
        drawn = [(each.prompt.tolist(), each) for each in self.documents if each.draws == [True]]
        framed = [(len(ids), each) for ids, each in drawn if ids != null and ids[: len(head)] == head]
        asked = [each for first, each in framed if each.ids[first] == self.image_id]
        return asked[:ROWS] or self.described

    @cached_property
    def null_prompt(self) -> torch.Tensor:
        """(1, l) ids with which prompts of text alone are guided."""
        inputs = self.processor.apply_chat_template([user_message("a text")], generation_mode="image")
        return inputs["negative_input_ids"].to(self.model.device)

    def row_of(self, *documents: Document) -> Row:
        """Documents as one row of the model's forward."""
        images = [image for document in documents for image in document.images]
        columns = ([np.empty(0, np.int64), *(np.ravel(image[at]) for image in images)] for at in range(3))
        row = dict(zip(("image_grid_hw", *CODES), map(np.concatenate, columns)))
        row["input_ids"], row["supervised"] = (np.concatenate([each[at] for each in documents]) for at in (0, 1))
        lengths, variants = np.array([len(each.ids) for each in documents]), self.shards[1]["variants"]
        picks = np.random.default_rng(self.seed).integers(max(variants, 1), size=len(images))
        batch = collate([unfold(row, lengths, self.spec, variants, picks)], 0, False)
        return {name: values.to(self.model.device) for name, values in batch.items()}

    def decoded(self, row: Row) -> torch.Tensor:
        """(1, L) codes that show a row's last picture: its inputs, which lack the last scale."""
        schedule = self.schedules.by_grid(row["image_grid_hw"][-1])
        inputs = row["image_input_codes"][-schedule.offsets[-1] :]
        return torch.cat([inputs, row["image_codes"][-schedule.lengths[-1] :]])[None]

    @cached_property
    def rows(self) -> list[Row]:
        """What parts are tried on: documents that draw, as in training."""
        drawing = [document for document in self.documents if any(document.draws)]
        step = DOCUMENTS if self.packs else 1
        return [self.row_of(*drawing[first : first + step]) for first in range(0, len(drawing), step)[:ROWS]]

    @cached_property
    def readings(self) -> list[Reading]:
        """Of the first [`READ`] documents."""
        return [self.read(self.row_of(document)) for document in self.documents[:READ]]

    def logits(self, row: Row) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of a row's supervised codes, and of its text: float32 logits around 0, targets and scales."""
        layout, codes = self.model.model.lay_out(**row)
        output = self.model.model(**row | {"image_codes": codes}, layout=layout, use_cache=False, return_dict=True)
        scales_N, is_code = layout.scale_ids.flatten()[layout.supervised] - 1, layout.target_codes >= 0
        hidden_ND = output.last_hidden_state.flatten(0, 1)[layout.supervised]
        of_codes = self.model.code_head(hidden_ND[is_code]), codes[layout.target_codes[is_code]], scales_N[is_code]
        of_text = self.model.lm_head(hidden_ND[~is_code]), layout.targets[~is_code], scales_N[~is_code]
        return [(each.float() - each.float().mean(-1, keepdim=True), *others) for each, *others in (of_codes, of_text)]

    def read(self, row: Row) -> Reading:
        """A row as the model reads it in training."""
        return Reading(*(torch.cat(pair, dim=-1) for pair in zip(*starmap(Reading.of, self.logits(row)))))

    def losses(self, rows: Sequence[Row]) -> torch.Tensor:
        """(R,) nats a code of each row, at the temperature that suits all rows together best: whether the model knows
        which codes are likelier, apart from how sure it is."""
        losses_TR = torch.stack([self.read(row).codes.costs_TN.mean(dim=1) for row in rows], dim=1)
        return losses_TR[losses_TR.mean(dim=1).argmin()]


def redrawn(row: Row, codes: torch.Tensor) -> Row:
    """A row of one picture with other (L,) codes; as inputs the last scale's are left out."""
    return row | {name: codes[: len(row[name])] for name in CODES}
