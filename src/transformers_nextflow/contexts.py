"""Contexts: what the rows of a call have read, over caches of their own; they read tokens and scales.

Rows of one length share a cache. A step of any rows runs through the decoder as one batch, and each cache's rows
attend apart, so that a scale step never has a mask: its positions see all that their row has read, and each other.

Shape suffixes: R rows of a call, r rows of one cache, B pictures, L codes so far, l new positions, D hidden.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicCache

from .attention import Apart, Part
from .cache_name import CACHE
from .layout import scale_coordinates
from .lora import using_adapters
from .scales import ScaleSchedule

if TYPE_CHECKING:
    from .modeling_nextflow import NextFlowForConditionalGeneration


@dataclass
class Contexts:
    """What the rows of a call have read.

    A step replaces the tensors of a cache and never writes into them, so that what is taken of contexts shares them.

    Attributes:
        groups: rows, ascending, and the cache that they share, as they have read equally much; every row is in one.
        counters: (R,) float32, the position counter of what comes next (NextFlow fig. 5). Wherever the model's parts
            are, what goes between them is on this device.
        token_ids: each row's ids so far, `<image>` for a visual input.
        hidden_RlD: of what was read last.
        adapters: each row's, where PEFT was given some, see [`~transformers_nextflow.lora.using_adapters`].
    """

    model: "NextFlowForConditionalGeneration"
    groups: list[tuple[list[int], Cache]]
    counters: torch.Tensor
    token_ids: list[list[int]]
    hidden_RlD: torch.Tensor
    adapters: list[str] | None = None

    @classmethod
    def empty(cls, model: "NextFlowForConditionalGeneration", num_rows: int, device: torch.device) -> "Contexts":
        config, rows = model.config.text_config, list(range(num_rows))
        hidden = torch.zeros(num_rows, 1, config.hidden_size, device=device, dtype=model.model.language_model.dtype)
        groups = [(rows, DynamicCache(config=config))]
        return cls(model, groups, torch.zeros(num_rows, device=device), [[] for _ in rows], hidden)

    def __len__(self) -> int:
        """How many rows."""
        return len(self.token_ids)

    @classmethod
    def join(cls, parts: "Sequence[Contexts]", rows: Sequence[int]) -> "Contexts":
        """Contexts whose row `rows[n]` is the n-th of the parts', which have read equally many positions last."""
        groups, count = [], 0
        for part in parts:
            groups += [([count + row for row in members], cache) for members, cache in part.groups]
            count += len(part)
        joined = replace(
            parts[0],
            groups=groups,
            counters=torch.cat([part.counters for part in parts]),
            token_ids=[ids for part in parts for ids in part.token_ids],
            hidden_RlD=torch.cat([part.hidden_RlD for part in parts]),
            adapters=parts[0].adapters and [name for part in parts for name in part.adapters],
        )
        return joined.take(sorted(range(count), key=rows.__getitem__))

    def take(self, rows: Sequence[int]) -> "Contexts":
        """Some of the rows, in that order; a row may be taken several times."""
        groups = []
        for members, cache in self.groups:
            number = {row: index for index, row in enumerate(members)}
            taken = [(place, number[row]) for place, row in enumerate(rows) if row in number]
            if taken:
                places, chosen = map(list, zip(*taken))
                groups.append((places, _rows_of(cache, None if chosen == list(range(len(members))) else chosen)))
        index = torch.tensor(rows, dtype=torch.long, device=self.counters.device)
        return replace(
            self,
            groups=groups,
            counters=self.counters[index],
            token_ids=[self.token_ids[row] for row in rows],
            hidden_RlD=self.hidden_RlD[index],
            adapters=self.adapters and [self.adapters[row] for row in rows],
        )

    def put(self, rows: Sequence[int], changed: "Contexts") -> "Contexts":
        """These contexts with `changed` in the place of `rows`."""
        kept = [row for row in range(len(self)) if row not in rows]
        return Contexts.join([changed, self.take(kept)], [*rows, *kept])

    def read(
        self, inputs_RlD: torch.Tensor, positions_3Rl: torch.Tensor, token_ids: Sequence[list[int]], keep: bool = True
    ) -> None:
        """New positions that see each other: those of one scale block, or a lone token. Unless they are kept, nothing
        can be read after them."""
        rows = [row for members, _ in self.groups for row in members]
        order = torch.tensor(rows, device=self.counters.device)
        length = inputs_RlD.shape[1]
        parts = [Part(cache, (len(members), length), is_kept=keep) for members, cache in self.groups]
        adapters = self.adapters and [self.adapters[row] for row in rows]
        hidden = run_apart(self.model, parts, inputs_RlD[order], positions_3Rl[:, order], adapters)
        self.hold(hidden[order.argsort()], positions_3Rl, token_ids)

    def hold(self, hidden_RlD: torch.Tensor, positions_3Rl: torch.Tensor, token_ids: Sequence[list[int]]) -> None:
        """What the decoder made of new positions, whose keys and values the caches have."""
        self.hidden_RlD = hidden_RlD
        self.counters = positions_3Rl[0, :, -1] + 1
        self.token_ids = [before + new for before, new in zip(self.token_ids, token_ids)]

    def read_tokens(self, token_ids: Sequence[int], opens: ScaleSchedule | None = None) -> None:
        """One token for each row; `opens`: it is the `<boi>` of a picture of this schedule."""
        ids_R1 = torch.tensor(token_ids, device=self.counters.device)[:, None]
        with using_adapters(self.model, self.adapters):
            embeds_R1D = self.model.get_input_embeddings()(ids_R1).to(self.counters.device)
        if opens is not None:
            embeds_R1D = embeds_R1D + self._scale_embedding(0, opens).to(embeds_R1D)
        self.read(embeds_R1D, self.counters[:, None].expand(3, -1, -1), [[token] for token in token_ids])

    def read_scale(self, codes_BL: torch.Tensor, schedule: ScaleSchedule, scale: int, keep: bool = True) -> None:
        """The block of scale `scale` (0-based; len(schedule) is the further block of the last codes), as the codes so
        far make it; row n is of picture n modulo B."""
        with using_adapters(self.model, self.adapters and self.adapters[: len(codes_BL)]):
            inputs_BlD = self.model.model.scale_inputs(codes_BL, schedule, scale).to(self.hidden_RlD)
        inputs_BlD = inputs_BlD + self._scale_embedding(scale, schedule).to(inputs_BlD)
        grid = schedule[min(scale, len(schedule) - 1)]
        cells_2l = scale_coordinates(grid, self.model.config.finest_edge).to(inputs_BlD.device)
        counter_Rl = self.counters[:, None].expand(-1, cells_2l.shape[1])
        positions_3Rl = torch.stack([counter_Rl, *(cells.expand_as(counter_Rl) for cells in cells_2l)])
        inputs_RlD = inputs_BlD.repeat(len(self) // len(codes_BL), 1, 1)
        slots = [self.model.config.image_token_id] * cells_2l.shape[1]
        self.read(inputs_RlD, positions_3Rl, [slots] * len(self), keep)

    def rewind(self, length: int) -> None:
        """Forget the last block, of `length` positions."""
        for _, cache in self.groups:
            cache.crop(-length)
        self.counters = self.counters - 1
        self.token_ids = [ids[:-length] for ids in self.token_ids]

    def _scale_embedding(self, scale: int, schedule: ScaleSchedule) -> torch.Tensor:
        index, count = torch.tensor([[scale + 1], [len(schedule)]], device=self.counters.device)
        return self.model.model.scale_embedding(index, count)


def run_apart(
    model: "NextFlowForConditionalGeneration",
    parts: Sequence[Part],
    inputs_BlD: torch.Tensor,
    positions_3Bl: torch.Tensor,
    adapters: list[str] | None,
) -> torch.Tensor:
    """(B, l, D) hidden states of the positions of all parts, one part after the other, in a batch of any shape."""
    with using_adapters(model, adapters):
        output = model.model.language_model(
            inputs_embeds=inputs_BlD,
            position_ids=positions_3Bl,
            attention_mask={"full_attention": [part.mask for part in parts]},  # to the device of each layer
            use_cache=True,
            return_dict=True,
            **{CACHE: Apart(parts)},
        )
    return output.last_hidden_state.to(inputs_BlD.device)


def _rows_of(cache: Cache, rows: list[int] | None) -> Cache:
    """A cache of some of the rows; `None`: of all, in the same tensors."""
    taken = copy(cache)
    taken.layers = list(map(copy, cache.layers))
    if rows is not None:
        taken.batch_select_indices(torch.tensor(rows, device="cpu"))
    return taken
