"""What is examined: a model, its processor, pictures, perhaps shards, and the sequences that its loss is measured on.

Shape suffixes: B batch, L codes of a picture, N supervised codes of a row, V codes of the table, R rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..data.loading import PackReader, collate, unfold
from ..data.sequences import SequenceSpec
from ..data.shards import decodable_codes, documents_of, images_of, open_shards, sequence_spec
from ..layout import num_image_slots
from ..losses import IGNORE
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQOutput, pictures_at_once
from ..processing_nextflow import user_message
from ..scales import Grid, ScaleSchedule
from .pictures import Picture, default_pictures

ROWS, DOCUMENTS = 16, 2  # rows that losses are measured on, and documents of shards in each
LOOKED_THROUGH = 2**12  # documents, for those of a kind
LEAST_DESCRIBED = 3  # pictures with a text; others are drawn where fewer have one
CODES = {"image_codes", "image_input_codes"}
LOOK = "read some documents beside their pictures (`transformers-nextflow data inspect`)"
TEMPERATURES = 2.0 ** torch.linspace(-1, 1, 5)


@dataclass(frozen=True)
class Coded:
    """Pictures of one grid, as the vision tokenizer sees them: (B, 3, H, W) pixels in [-1, 1], (B, L) codes, and all
    that its forward gives."""

    schedule: ScaleSchedule
    pictures: list[Picture]
    pixels: torch.Tensor
    codes: torch.Tensor
    output: NextFlowVQOutput


@dataclass(frozen=True)
class Answer:
    """A prompt, as `generate` takes it, and the picture of (1, L) codes that answers it, supervised in a row of the
    model's forward; its `<boi>` is at `start`."""

    prompt: dict[str, torch.Tensor]
    row: dict[str, torch.Tensor]
    codes: torch.Tensor
    schedule: ScaleSchedule
    start: int

    def after(self, prompt_ids: torch.Tensor) -> "Answer":
        """The same picture after another prompt, (1, l) ids that end in `<boi>`."""
        ids = torch.cat([prompt_ids, self.row["input_ids"][:, self.start + 1 :]], dim=1)
        return replace(self, row=self.row | {"input_ids": ids}, start=prompt_ids.shape[1] - 1)


@dataclass(frozen=True)
class Reading:
    """What the model makes of a row: (N, V) float32 log probabilities over codes at its supervised codes, (N,) which
    these are, their scales, 0-based; the same of text: (T, words) log probabilities, (T,) tokens."""

    log_probs: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    text_log_probs: torch.Tensor
    tokens: torch.Tensor


class Case:
    """A model under examination.

    Args:
        model, processor: as loaded, the model in eval mode.
        pictures: a dozen at least for means over pictures.
        packs: folder of training shards.
        seed: of everything drawn.
    """

    def __init__(
        self,
        model: NextFlowForConditionalGeneration,
        processor,
        pictures: list[Picture],
        packs: Path | None = None,
        seed: int = 0,
    ):
        self.model, self.processor, self.pictures, self.packs, self.seed = model, processor, pictures, packs, seed
        self.config, self.vq_model = model.config, model.model.vq_model
        self.images: dict[str, list] = {}  # rows of pictures for the report
        self.curves: dict[str, dict[str, list[float]]] = {}  # per scale, for the report

    @cached_property
    def groups(self) -> list[Coded]:
        """All pictures, by grid, as many at once as fit."""
        by_grid: dict[Grid, list[tuple[Picture, torch.Tensor]]] = {}
        for picture in self.pictures:
            grid, pixels = self.pixels_of(picture.image)
            by_grid.setdefault(grid, []).append((picture, pixels))
        groups = []
        for grid, members in by_grid.items():
            schedule = self.vq_model.schedules.by_grid(grid)
            count = pictures_at_once(self.vq_model.schedules.image_size(schedule))
            for first in range(0, len(members), count):
                pictures, each = zip(*members[first : first + count])
                output = self.vq_model(pixels := torch.cat(each).float())
                codes = output.quantization.target_codes
                groups.append(Coded(schedule, list(pictures), pixels, codes, output))
        return groups

    def pixels_of(self, image) -> tuple[Grid, torch.Tensor]:
        """A picture as the processor gives it: final grid, and (1, 3, H, W)."""
        grid, pixels = self.processor.image_processor.whole(self.processor.image_processor(image, return_tensors="pt"))
        return grid, pixels.to(self.model.device)

    @cached_property
    def shards(self) -> tuple[Path, dict]:
        """Folder and manifest of the shards."""
        return open_shards(self.packs, hashes=False)

    @cached_property
    def spec(self) -> SequenceSpec:
        """Special ids and schedules that the shards were made with."""
        return sequence_spec(self.shards[1]["identity"])

    @property
    def variants(self) -> int:
        """Codings of every drawn picture in the shards."""
        return self.shards[1]["variants"]

    @cached_property
    def rows(self) -> list[dict[str, torch.Tensor]]:
        """What the loss is measured on, one row of the model's forward each: some documents of the shards, as in
        training; else described pictures."""
        if self.packs is None:
            return [answer.row for answer in self.answers]
        rows = []
        for first in range(0, len(self.documents), DOCUMENTS):
            row = self.row_of(self.documents[first : first + DOCUMENTS])
            markers = row["shift_labels"][row["input_ids"] == self.config.boi_token_id]
            if (markers != IGNORE).any():  # without a picture to predict it says nothing of codes
                rows.append(row)
            if len(rows) == ROWS:
                break
        return rows

    @cached_property
    def documents(self) -> list[dict[str, np.ndarray]]:
        """Those of the shards that are looked through, see [`stored_documents`]."""
        return list(islice(stored_documents(self), LOOKED_THROUGH))

    def row_of(self, documents: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Documents of the shards as one row of the model's forward."""
        row = {name: np.concatenate([each[name] for each in documents]) for name in documents[0]}
        lengths = np.array([len(each["input_ids"]) for each in documents])
        picks = np.random.default_rng(self.seed).integers(max(self.variants, 1), size=len(row["image_grid_hw"]) // 2)
        batch = collate([unfold(row, lengths, self.spec, self.variants, picks)], 0, False)
        return {name: values.to(self.model.device) for name, values in batch.items()}

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Ids before and after the user's text in a prompt of the processor."""
        prompts = [self.processor.apply_chat_template([user_message(text)])["input_ids"][0].tolist() for text in "xy"]
        same = [a == b for a, b in zip(*prompts)]
        return prompts[0][: same.index(False)], prompts[0][len(same) - same[::-1].index(False) :]

    @cached_property
    def answers(self) -> list[Answer]:
        """Texts that a picture answers: those of the shards, else the examined pictures that have a text, else drawn
        ones."""
        found = [] if self.packs is None else list(islice(self._asked_for(), ROWS))
        if len(found) < LEAST_DESCRIBED:
            found = [
                (picture.caption, codes[None], group.schedule)
                for group in self.groups
                for picture, codes in zip(group.pictures, group.codes)
                if picture.caption
            ]
        if len(found) < LEAST_DESCRIBED:
            for picture in default_pictures(self.vq_model.schedules, self.seed):
                grid, pixels = self.pixels_of(picture.image)
                found.append((picture.caption, self.vq_model.encode(pixels), self.vq_model.schedules.by_grid(grid)))
        chosen = np.random.default_rng(self.seed).permutation(len(found))[:ROWS]
        return [self.answer(*found[int(at)]) for at in chosen]

    def _asked_for(self) -> Iterator[tuple[str, torch.Tensor, ScaleSchedule]]:
        """Text, (1, L) codes and schedule of documents of the shards that are a prompt and a picture."""
        (head, tail), image = self.frame, self.spec.special.image
        for document in self.documents:
            ids, images = document["input_ids"].tolist(), images_of(document, self.spec, self.variants)
            if len(images) == 1 and document["supervised"][ids.index(image)] and ids[: len(head)] == head:
                words = ids[len(head) : ids.index(image)]  # compact, without <boi>
                if len(words) > len(tail) and words[-len(tail) :] == tail:  # not one whose text was left out
                    grid, targets, inputs = images[0]
                    codes = as_codes(self, decodable_codes(targets, inputs))
                    text = self.processor.tokenizer.decode(words[: -len(tail)])
                    yield text, codes, self.vq_model.schedules.by_grid(grid)

    def answer(self, text: str, codes: torch.Tensor, schedule: ScaleSchedule, conditions: Sequence = ()) -> Answer:
        """`text`, after the pictures `conditions`, answered by the picture of (1, L) `codes`."""
        chat = [user_message(text, conditions)]
        prompt = dict(self.processor.apply_chat_template(chat, generation_mode="image").to(self.model.device))
        prompt.pop("mm_token_type_ids", None)
        ids = prompt["input_ids"]
        slots = [self.config.image_token_id] * num_image_slots(schedule)
        row = {"input_ids": torch.cat([ids, ids.new_tensor([[*slots, self.config.eoi_token_id]])], dim=1)}
        grids, all_codes = ids.new_tensor([schedule.final_grid]), codes[0]
        if "image_grid_hw" in prompt:
            given = self.model.encode_images(prompt["pixel_values"], prompt["image_grid_hw"])
            grids = torch.cat([prompt["image_grid_hw"].to(ids.device), grids])
            all_codes = torch.cat([given.to(ids.device), all_codes])
        row |= {"image_grid_hw": grids, "image_codes": all_codes}
        start = ids.shape[1] - 1
        row["shift_labels"] = torch.full_like(row["input_ids"], IGNORE)
        row["shift_labels"][:, start : start + schedule.num_codes] = self.config.image_token_id
        return Answer(prompt, row, codes, schedule, start)

    def code_logits(self, answer: Answer) -> torch.Tensor:
        """(L, V) float32 teacher-forced logits of the answer's codes."""
        inputs = {name: values for name, values in answer.row.items() if name != "shift_labels"}
        logits = self.model(**inputs, logits_over="codes", use_cache=False).logits[0]
        return logits[answer.start : answer.start + answer.schedule.num_codes].float()

    def read(self, row: dict[str, torch.Tensor], with_text: bool = True) -> Reading:
        """A row as the model reads it in training."""
        layout, codes = self.model.model.lay_out(**row)
        inputs = {name: values for name, values in row.items() if name != "shift_labels"}
        hidden_ND = self.model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[layout.supervised]
        is_code = layout.target_codes >= 0
        is_text = ~is_code & with_text
        return Reading(
            self.model.code_head(hidden_ND[is_code]).float().log_softmax(-1),
            codes[layout.target_codes[is_code]],
            layout.scale_ids.flatten()[layout.supervised[is_code]] - 1,
            self.model.lm_head(hidden_ND[is_text]).float().log_softmax(-1),
            layout.targets[is_text],
        )

    def losses(self, rows: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """(R,) nats a code of each row, at the temperature that suits all rows together best: whether the model knows
        which codes are likelier, apart from how sure it is."""
        losses_TR = torch.stack([_losses_of(self.read(row, with_text=False)) for row in rows], dim=1)
        return losses_TR[losses_TR.mean(dim=1).argmin()]


def _losses_of(reading: Reading) -> torch.Tensor:
    """(temperatures,) mean costs of the codes; one that is all but impossible counts no more than 30 nats."""
    costs = [F.cross_entropy(reading.log_probs / t, reading.codes, reduction="none") for t in TEMPERATURES.tolist()]
    return torch.stack([cost.nan_to_num(30).clamp(max=30).mean() for cost in costs]).cpu()


def as_codes(case: Case, stored: np.ndarray) -> torch.Tensor:
    """(L,) of shards -> (1, L) int64 where the model is."""
    return torch.from_numpy(stored.astype(np.int64))[None].to(case.model.device)


def stored_documents(case: Case) -> Iterator[dict[str, np.ndarray]]:
    """Documents of the shards, row by row in a random order, each as a row of shards that holds it alone."""
    folder, manifest = case.shards
    reader, none = PackReader(folder, manifest, case.spec), np.empty(0, np.int64)
    for index in np.random.default_rng(case.seed).permutation(len(reader)):
        for _, _, ids, flags, images in documents_of(reader.row(int(index)), case.spec, case.variants):
            arrays = zip(*images) if images else ((), (), ())
            grids, targets, inputs = (np.concatenate([none, *map(np.ravel, each)]) for each in arrays)
            yield {
                "input_ids": ids,
                "supervised": flags,
                "image_grid_hw": grids,
                "image_codes": targets,
                "image_input_codes": inputs,
            }
