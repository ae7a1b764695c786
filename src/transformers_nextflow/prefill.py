"""Prefill: contexts that have read prompts, whose rows differ in length, in pictures, and in what they held before.

Rows of one context that go on with runs of the same lengths are read together; each run, a text or a scale block, of
all of them goes through the decoder as one batch (`contexts.py`).

Shape suffixes: R rows (prompts, then null prompts, then those without images), r rows of one context, L columns of the
padded ids, l positions of a run, N positions of all runs of a step, D hidden.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers.masking_utils import create_causal_mask

from .attention import Part, sequence_mask
from .block_attention import Segment, segments_of
from .cache_name import CACHE
from .contexts import Contexts, run_apart
from .layout import SequenceLayout, build_layout
from .lora import adapter_names, each_by_its_adapter, using_adapters
from .prompts import Picture, padded
from .scales import ScaleSchedule

if TYPE_CHECKING:
    from .modeling_nextflow import NextFlowForConditionalGeneration


def read_prompts(
    model: "NextFlowForConditionalGeneration",
    rows: Sequence[list[int]],
    pictures: Sequence[Sequence[Picture]],
    schedule: ScaleSchedule,
    device: torch.device,
    held: Contexts | None = None,
) -> Contexts:
    """Contexts that have read rows of ids; `hidden_RlD` is that of the last tokens alone.

    Args:
        rows: of the prompts, the null prompts, and those without images; some may end in `<boi>`.
        pictures: each prompt's finished images.
        schedule: of the picture that a last `<boi>` opens.
        held: contexts that have read the beginnings of the rows; they stay as they are.

    Raises:
        ValueError: if a context holds anything but the beginning of its rows, or a prompt brings nothing new.
    """
    names = adapter_names(model)
    if names and len(names) != len(pictures):
        raise ValueError(f"adapter_names must hold one for each of {len(pictures)} prompts, got {len(names)}")
    names = names and [names[row % len(names)] for row in range(len(rows))]
    if not isinstance(held, Contexts | None):
        raise ValueError(f"contexts must be those of an interleaved output, got {type(held).__name__}")
    contexts = replace(held or Contexts.empty(model, len(rows), device), adapters=names)
    if (num_held := len(contexts)) != len(rows):
        raise ValueError(
            f"contexts must come from interleaved generation over {len(rows)} rows (prompts and null prompts), "
            f"got {num_held}"
        )
    layout, embeds_RLD = _embed(model, rows, pictures, schedule, names, device)
    reading = [
        (contexts.take(members), members, runs) for members, runs in _alike(contexts, rows, layout, len(pictures))
    ]
    for step in range(max(len(runs) for _, _, runs in reading)):
        now = [(each, members, runs[step]) for each, members, runs in reading if step < len(runs)]
        _read(now, rows, layout, embeds_RLD)
    return Contexts.join([each for each, _, _ in reading], [row for _, members, _ in reading for row in members])


def _embed(
    model: "NextFlowForConditionalGeneration",
    rows: Sequence[list[int]],
    pictures: Sequence[Sequence[Picture]],
    schedule: ScaleSchedule,
    names: list[str] | None,
    device: torch.device,
) -> tuple[SequenceLayout, torch.Tensor]:
    """The layout of the rows, which end together, and what the decoder takes in, (R, L, D)."""
    boi = model.config.boi_token_id
    input_ids, attention_mask = padded(rows, model.config.eoi_token_id, device)
    grids, codes = [], [input_ids.new_empty(0)]
    for row, ids in enumerate(rows):
        own = pictures[row % len(pictures)] if row < 2 * len(pictures) else []
        grids += [grid for grid, _ in own] + [schedule.final_grid] * (ids[-1:] == [boi])
        codes += [each for _, each in own]
    layout = build_layout(model.config, input_ids, grids, attention_mask)
    model.check_reach(layout.position_ids[0], len(schedule) - 1 if rows[0][-1] == boi else 0)
    with using_adapters(model, names):
        embeds_RLD = model.get_input_embeddings()(input_ids).to(input_ids.device)
    embed = partial(model.model.embed_images, embeds_RLD, layout, torch.cat(codes))
    embeds_RLD = each_by_its_adapter(model, names, embed)  # images of all rows are embedded as one
    return layout, embeds_RLD


def _alike(
    contexts: Contexts, rows: Sequence[list[int]], layout: SequenceLayout, num_prompts: int
) -> list[tuple[list[int], list[Segment]]]:
    """Rows of one cache that go on alike, and the runs by which they do; null prompts may go on by none."""
    alike: dict[tuple, list[int]] = {}
    blocks_RL = layout.block_ids.cpu()
    for group, (members, _) in enumerate(contexts.groups):
        length = len(contexts.token_ids[members[0]])
        for row in members:
            ids, num_new = rows[row], len(rows[row]) - length
            if ids[:length] != contexts.token_ids[row] or (not num_new and row < num_prompts):
                raise ValueError(
                    f"row {row} must begin with the {length} tokens that contexts hold of it and go on, got "
                    f"{len(ids)} tokens"
                )
            runs: tuple[Segment, ...] = ()
            if num_new:
                blocks_1l = blocks_RL[row : row + 1, -num_new:]
                (runs,) = segments_of(blocks_1l, torch.zeros_like(blocks_1l)).documents
                if not length:  # behind a cache runs are read one by one
                    runs = (Segment(num_new, any(run.is_block for run in runs)),)
            alike.setdefault((group, *runs), []).append(row)
    return [(members, runs) for (_, *runs), members in alike.items()]


def _read(
    reading: Sequence[tuple[Contexts, list[int], Segment]],
    rows: Sequence[list[int]],
    layout: SequenceLayout,
    embeds_RLD: torch.Tensor,
) -> None:
    """One step: each context, which of the rows it has, and the run that they read."""
    parts, inputs, positions, tokens = [], [], [], []
    for context, members, run in reading:
        start = len(context.token_ids[0])
        first = embeds_RLD.shape[1] - len(rows[members[0]]) + start  # as all rows end together
        columns = slice(first, first + run.length)
        inputs.append(embeds_RLD[members, columns])
        positions.append(layout.position_ids[:, members, columns])
        parts.append(_part(context, run, inputs[-1], layout.block_ids[members, columns]))
        tokens.append([rows[row][start : start + run.length] for row in members])
    # each position is a row of its own, as PEFT gives adapters to rows
    inputs_N1D = torch.cat([each.flatten(0, 1) for each in inputs])[:, None]
    positions_3N1 = torch.cat([each.flatten(1) for each in positions], dim=1)[:, :, None]
    names = [name for context, _, run in reading for name in context.adapters or () for _ in range(run.length)]
    hidden_N1D = run_apart(reading[0][0].model, parts, inputs_N1D, positions_3N1, names or None)
    of_parts = hidden_N1D.split([count * length for count, length in (part.shape for part in parts)])
    for (context, _, _), part, hidden, of_run, ids in zip(reading, parts, of_parts, positions, tokens):
        context.hold(hidden.view(*part.shape, -1)[:, -1:], of_run, ids)


def _part(context: Contexts, run: Segment, inputs_rlD: torch.Tensor, block_ids_rl: torch.Tensor) -> Part:
    """How a run attends: a block behind a cache sees all; else a mask says what is seen."""
    config, (_, cache) = context.model.config.text_config, context.groups[0]
    shape = inputs_rlD.shape[:2]
    if run.is_block and context.token_ids[0]:
        return Part(cache, shape)
    if run.is_block:
        mask = sequence_mask(config, inputs_rlD, None, block_ids_rl, None, None)["full_attention"]
    else:
        mask = create_causal_mask(config, inputs_rlD, **{"attention_mask": None, "position_ids": None, CACHE: cache})
    return Part(cache, shape, in_block=False, mask=mask)
