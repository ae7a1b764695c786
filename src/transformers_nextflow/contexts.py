"""Contexts: rows of one length over a cache of their own, which read prompts, tokens and scales.

Rows of different lengths run apart, so that a scale step never has a mask: its positions see all that their row has
read, and each other.

Shape suffixes: R rows of a call, r rows of a context, L prompt, l new positions, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicCache

from .attention import sequence_mask
from .cache_name import CACHE
from .layout import build_layout, scale_coordinates
from .lora import adapter_names, using_adapters
from .prompts import Picture, padded
from .scales import ScaleSchedule

if TYPE_CHECKING:
    from .modeling_nextflow import NextFlowForConditionalGeneration

Layers = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Context:
    """Rows that have read equally much.

    A step replaces the tensors of the cache and never writes into them, so that what one context holds others may
    hold too.

    Attributes:
        rows: (r,) which rows of the call these are, ascending. Wherever the model's parts are, what goes between them
            is on this device.
        cache: their keys and values.
        counters: (r,) float32, the position counter of what comes next (NextFlow fig. 5).
        token_ids: each row's ids so far, `<image>` for a visual input.
        hidden_rlD: of what was read last.
        adapters: each row's, where PEFT was given some, see [`~transformers_nextflow.lora.using_adapters`].
    """

    model: "NextFlowForConditionalGeneration"
    rows: torch.Tensor
    cache: Cache
    counters: torch.Tensor
    token_ids: list[list[int]]
    hidden_rlD: torch.Tensor
    adapters: list[str] | None = None

    @classmethod
    def empty(cls, model: "NextFlowForConditionalGeneration", num_rows: int, device: torch.device) -> "Context":
        config = model.config.text_config
        rows, hidden = torch.arange(num_rows, device=device), torch.empty(num_rows, 0, config.hidden_size)
        counters = torch.zeros(num_rows, device=device)
        return cls(model, rows, DynamicCache(config=config), counters, [[] for _ in rows], hidden.to(device))

    @property
    def length(self) -> int:
        """How much each row has read."""
        return len(self.token_ids[0])

    def take(self, at: Sequence[int]) -> "Context":
        """Some of the rows, in that order; a row may be taken several times."""
        whole = list(at) == list(range(len(self.rows)))
        index = torch.tensor(at, device=self.rows.device)
        rows, counters, hidden_rlD = (
            tensor if whole else tensor[index] for tensor in (self.rows, self.counters, self.hidden_rlD)
        )
        layers = self.layers if whole else [tuple(x[index.to(x.device)] for x in layer) for layer in self.layers]
        cache = DynamicCache(config=self.model.config.text_config)
        adapters = self.adapters and [self.adapters[row] for row in at]
        taken = Context(self.model, rows, cache, counters, [self.token_ids[row] for row in at], hidden_rlD, adapters)
        taken.layers = layers
        return taken

    def fork(self, count: int) -> "Context":
        """Every row `count` times: row n becomes rows n * count and on."""
        forked = self.take([at for at in range(len(self.rows)) for _ in range(count)])
        copies = torch.arange(count, device=self.rows.device).repeat(len(self.rows))
        return replace(forked, rows=forked.rows * count + copies)

    @property
    def layers(self) -> Layers:
        """Keys and values (r, heads, length, head size) of every layer; none before anything is read."""
        return [(layer.keys, layer.values) for layer in self.cache.layers if layer.is_initialized]

    @layers.setter
    def layers(self, layers: Layers) -> None:
        for layer, (keys, values) in zip(self.cache.layers, layers):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values

    def read(
        self,
        inputs_rlD: torch.Tensor,
        positions_3rl: torch.Tensor,
        token_ids: Sequence[list[int]],
        mask: dict | None = None,
        in_block: bool = False,
    ) -> None:
        """Run new positions: causal ones, those of one scale block, or what `mask` says."""
        with using_adapters(self.model, self.adapters):
            output = self.model.model.language_model(
                inputs_embeds=inputs_rlD,
                position_ids=positions_3rl,
                attention_mask={"full_attention": None} if in_block else mask,
                use_cache=True,
                in_block=in_block,
                **{CACHE: self.cache},
            )
        self.hidden_rlD = output.last_hidden_state.to(self.rows.device)
        self.counters = positions_3rl[0, :, -1] + 1
        self.token_ids = [before + new for before, new in zip(self.token_ids, token_ids)]

    def read_tokens(self, token_ids: Sequence[int], opens: ScaleSchedule | None = None) -> None:
        """One token for each row; `opens`: it is the `<boi>` of a picture of this schedule."""
        ids_r1 = torch.tensor(token_ids, device=self.rows.device)[:, None]
        with using_adapters(self.model, self.adapters):
            embeds_r1D = self.model.get_input_embeddings()(ids_r1).to(self.rows.device)
        if opens is not None:
            embeds_r1D = embeds_r1D + self._scale_embedding(0, opens).to(embeds_r1D)
        self.read(embeds_r1D, self.counters[:, None].expand(3, -1, -1), [[token] for token in token_ids])

    def read_scale(self, inputs_rlD: torch.Tensor, schedule: ScaleSchedule, scale: int) -> None:
        """The block of scale `scale` (0-based; len(schedule) is the further block of the last codes)."""
        inputs_rlD = inputs_rlD.to(self.hidden_rlD)
        inputs_rlD = inputs_rlD + self._scale_embedding(scale, schedule).to(inputs_rlD)
        grid = schedule[min(scale, len(schedule) - 1)]
        cells_2l = scale_coordinates(grid, self.model.config.finest_edge).to(inputs_rlD.device)
        counter_rl = self.counters[:, None].expand(-1, cells_2l.shape[1])
        positions_3rl = torch.stack([counter_rl, *(cells.expand_as(counter_rl) for cells in cells_2l)])
        slots = [self.model.config.image_token_id] * cells_2l.shape[1]
        self.read(inputs_rlD, positions_3rl, [slots] * len(self.rows), in_block=True)

    def rewind(self, length: int) -> None:
        """Forget the last block, of `length` positions."""
        self.cache.crop(-length)
        self.counters = self.counters - 1
        self.token_ids = [ids[:-length] for ids in self.token_ids]

    def _scale_embedding(self, scale: int, schedule: ScaleSchedule) -> torch.Tensor:
        index, count = torch.tensor([[scale + 1], [len(schedule)]], device=self.rows.device)
        return self.model.model.scale_embedding(index, count)


def last_hidden(contexts: Sequence[Context]) -> torch.Tensor:
    """(R, l, D) of what all rows read last, in their order."""
    order = torch.cat([context.rows for context in contexts]).argsort()
    hidden_RlD = torch.cat([context.hidden_rlD for context in contexts])
    return hidden_RlD if len(contexts) == 1 else hidden_RlD[order]


def adapters_of(contexts: Sequence[Context]) -> list[str] | None:
    """The adapters of all rows, in their order."""
    if contexts[0].adapters is None:
        return None
    of_row = {row: name for each in contexts for row, name in zip(each.rows.tolist(), each.adapters)}
    return [of_row[row] for row in sorted(of_row)]


def keep_rows(contexts: Sequence[Context], num_rows: int) -> list[Context]:
    """The contexts of the first `num_rows` rows alone."""
    counts = [int((context.rows < num_rows).sum()) for context in contexts]
    return [context.take(range(count)) for context, count in zip(contexts, counts) if count]


def read_prompts(
    model: "NextFlowForConditionalGeneration",
    rows: Sequence[list[int]],
    pictures: Sequence[Sequence[Picture]],
    schedule: ScaleSchedule,
    device: torch.device,
    held: Sequence[Context] | None = None,
) -> list[Context]:
    """Contexts that have read rows of ids; `hidden_rlD` is that of the last tokens alone.

    Args:
        rows: of the prompts, the null prompts, and those without images; some may end in `<boi>`.
        pictures: each prompt's finished images.
        schedule: of the picture that a last `<boi>` opens.
        held: contexts that have read the beginnings of the rows; they stay as they are.

    Raises:
        ValueError: if a context holds anything but the beginning of its rows, or a row brings nothing new.
    """
    input_ids, attention_mask = padded(rows, model.config.eoi_token_id, device)
    attention_mask = attention_mask.bool()
    grids, codes = [], []
    for row, ids in enumerate(rows):
        own = pictures[row % len(pictures)] if row < 2 * len(pictures) else []
        grids += [grid for grid, _ in own] + [schedule.final_grid] * (ids[-1] == model.config.boi_token_id)
        codes += [each for _, each in own]
    layout = build_layout(model.config, input_ids, grids, attention_mask)
    model.check_reach(layout.position_ids[0], len(schedule) - 1 if rows[0][-1] == model.config.boi_token_id else 0)
    names = adapter_names(model)
    if names and len(names) != len(pictures):
        raise ValueError(f"adapter_names must hold one for each of {len(pictures)} prompts, got {len(names)}")
    names = names and [names[row % len(names)] for row in range(len(rows))]
    contexts = held or [Context.empty(model, len(rows), device)]
    contexts = [replace(each, adapters=names and [names[row] for row in each.rows.tolist()]) for each in contexts]
    if (num_held := sum(len(context.rows) for context in contexts)) != len(rows):
        raise ValueError(
            f"contexts must come from interleaved generation over {len(rows)} rows (prompts and null prompts), "
            f"got {num_held}"
        )
    codes = torch.cat([input_ids.new_empty(0), *codes])
    with using_adapters(model, names):
        embeds_RLD = model.get_input_embeddings()(input_ids).to(input_ids.device)
    embedded = {}
    for name in dict.fromkeys(names or [None]):
        with using_adapters(model, name and [name]):  # images of all rows are embedded as one
            embedded[name] = model.model.embed_images(embeds_RLD, layout, codes)
    embeds_RLD = torch.stack([embedded[name][row] for row, name in enumerate(names or [None] * len(rows))])
    columns = [row.nonzero().flatten() for row in attention_mask]
    blocks = [ids[at] for ids, at in zip(layout.block_ids, columns)]
    implementation = model.config.text_config._attn_implementation
    is_flash = implementation is not None and "flash" in implementation

    done = []
    for context in contexts:
        length, parts = context.length, {}
        for at, row in enumerate(context.rows.tolist()):
            if rows[row][:length] != context.token_ids[at] or len(rows[row]) <= length:
                raise ValueError(
                    f"row {row} must begin with the {length} tokens that contexts hold of it and go on, got "
                    f"{len(rows[row])} tokens"
                )
            runs = _runs(blocks[row][length:].tolist())
            # the mask of whole rows is fast; behind a cache, or where there are no masks, runs are read one by one
            whole = not length and not is_flash
            key = (len(rows[row]), any(is_block for _, is_block in runs)) if whole else tuple(runs)
            parts.setdefault(key, (runs, whole, []))[2].append(at)
        for runs, whole, members in parts.values():
            part = context.take(members)
            numbers = part.rows.tolist()
            of_rows = part.rows[:, None], torch.stack([columns[row] for row in numbers])[:, length:]
            inputs_rlD, positions_3rl = embeds_RLD[of_rows], layout.position_ids[(slice(None), *of_rows)]
            mask = None
            if whole:
                own = layout.block_ids[of_rows] if any(is_block for _, is_block in runs) else None
                mask = sequence_mask(model.config.text_config, inputs_rlD, None, own, None, None)
                runs = [(inputs_rlD.shape[1], False)]
            start = 0
            for run, is_block in runs:
                at = slice(start, start := start + run)
                ids = [rows[row][length:][at] for row in numbers]
                part.read(inputs_rlD[:, at], positions_3rl[:, :, at], ids, mask=mask, in_block=is_block)
            part.hidden_rlD = part.hidden_rlD[:, -1:]
            done.append(part)
    return done


def _runs(block_ids: list[int]) -> list[tuple[int, bool]]:
    """Lengths of neighbours that attend alike: text, or one scale block, and whether they are a block."""
    return [(len(list(run)), block >= 0) for block, run in groupby(block_ids)]
