"""Prefill: contexts that have read prompts, whose rows differ in length, in pictures, and in what they held before.

Rows of one context that go on with runs of the same lengths are read together; each run, a text or a scale block, of
all of them goes through the decoder as one batch (`contexts.py`).

Shape suffixes: R rows (prompts, then null prompts, then those without images), r rows of one context, L columns of the
padded ids, l positions of a run, N positions of all runs of a step, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers.masking_utils import create_causal_mask

from .attention import Part, runs_of, sequence_mask
from .cache_name import CACHE
from .contexts import Contexts, run_apart
from .layout import SequenceLayout, build_layout
from .lora import adapter_names, each_by_its_adapter, using_adapters
from .prompts import Picture, padded
from .scales import ScaleSchedule

if TYPE_CHECKING:
    from .modeling_nextflow import NextFlowForConditionalGeneration


@dataclass(frozen=True)
class Embedded:
    """Rows of ids as the decoder takes them in.

    Attributes:
        rows: the ids, without padding.
        columns: of each row, where its tokens stand.
        embeds_RLD: of all columns.
    """

    rows: Sequence[list[int]]
    layout: SequenceLayout
    columns: list[torch.Tensor]
    embeds_RLD: torch.Tensor

    def places(self, members: Sequence[int], start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (r, 1) and (r, l) of some positions of some rows."""
        columns = torch.stack([self.columns[row][start : start + length] for row in members])
        return torch.tensor(members, device=columns.device)[:, None], columns


@dataclass(frozen=True)
class Run:
    """The next `length` positions of a context's rows; `is_block`: they see each other."""

    context: Contexts
    members: list[int]
    length: int
    is_block: bool

    @property
    def start(self) -> int:
        """How many tokens the rows have read before."""
        return len(self.context.token_ids[0])


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
        ValueError: if a context holds anything but the beginning of its rows, or a row brings nothing new.
    """
    names = adapter_names(model)
    if names and len(names) != len(pictures):
        raise ValueError(f"adapter_names must hold one for each of {len(pictures)} prompts, got {len(names)}")
    names = names and [names[row % len(names)] for row in range(len(rows))]
    contexts = replace(held or Contexts.empty(model, len(rows), device), adapters=names)
    if (num_held := len(contexts)) != len(rows):
        raise ValueError(
            f"contexts must come from interleaved generation over {len(rows)} rows (prompts and null prompts), "
            f"got {num_held}"
        )
    embedded = _embed(model, rows, pictures, schedule, names, device)
    reading = [(contexts.take(members), members, runs) for members, runs in _alike(contexts, embedded)]
    for step in range(max(len(runs) for _, _, runs in reading)):
        _read([Run(each, members, *runs[step]) for each, members, runs in reading if step < len(runs)], embedded)
    return Contexts.join([each for each, _, _ in reading], [row for _, members, _ in reading for row in members])


def _embed(
    model: "NextFlowForConditionalGeneration",
    rows: Sequence[list[int]],
    pictures: Sequence[Sequence[Picture]],
    schedule: ScaleSchedule,
    names: list[str] | None,
    device: torch.device,
) -> Embedded:
    boi = model.config.boi_token_id
    input_ids, attention_mask = padded(rows, model.config.eoi_token_id, device)
    attention_mask = attention_mask.bool()
    grids, codes = [], [input_ids.new_empty(0)]
    for row, ids in enumerate(rows):
        own = pictures[row % len(pictures)] if row < 2 * len(pictures) else []
        grids += [grid for grid, _ in own] + [schedule.final_grid] * (ids[-1] == boi)
        codes += [each for _, each in own]
    layout = build_layout(model.config, input_ids, grids, attention_mask)
    model.check_reach(layout.position_ids[0], len(schedule) - 1 if rows[0][-1] == boi else 0)
    with using_adapters(model, names):
        embeds_RLD = model.get_input_embeddings()(input_ids).to(input_ids.device)
    embed = partial(model.model.embed_images, embeds_RLD, layout, torch.cat(codes))
    embeds_RLD = each_by_its_adapter(model, names, embed)  # images of all rows are embedded as one
    return Embedded(rows, layout, [row.nonzero().flatten() for row in attention_mask], embeds_RLD)


def _alike(contexts: Contexts, embedded: Embedded) -> list[tuple[list[int], list[tuple[int, bool]]]]:
    """Rows of one cache that go on alike, and the (length, is a block) of the runs by which they do."""
    alike: dict[tuple, list[int]] = {}
    for group, (members, _) in enumerate(contexts.groups):
        length = len(contexts.token_ids[members[0]])
        for row in members:
            ids = embedded.rows[row]
            if ids[:length] != contexts.token_ids[row] or len(ids) <= length:
                raise ValueError(
                    f"row {row} must begin with the {length} tokens that contexts hold of it and go on, got "
                    f"{len(ids)} tokens"
                )
            runs = runs_of(embedded.layout.block_ids[row, embedded.columns[row][length:]].tolist())
            if not length:  # behind a cache runs are read one by one
                runs = [(len(ids), any(is_block for _, is_block in runs))]
            alike.setdefault((group, *runs), []).append(row)
    return [(members, runs) for (_, *runs), members in alike.items()]


def _read(runs: Sequence[Run], embedded: Embedded) -> None:
    """One step: a run of each context."""
    parts, inputs, positions = [], [], []
    for run in runs:
        at = embedded.places(run.members, run.start, run.length)
        inputs.append(embedded.embeds_RLD[at])
        positions.append(embedded.layout.position_ids[:, at[0], at[1]])
        parts.append(_part(run, inputs[-1], embedded.layout.block_ids[at]))
    # each position is a row of its own, as PEFT gives adapters to rows
    inputs_N1D = torch.cat([each.flatten(0, 1) for each in inputs])[:, None]
    positions_3N1 = torch.cat([each.flatten(1) for each in positions], dim=1)[:, :, None]
    names = [name for run in runs for name in run.context.adapters or () for _ in range(run.length)]
    hidden_N1D = run_apart(runs[0].context.model, parts, inputs_N1D, positions_3N1, names or None)
    sizes = [len(run.members) * run.length for run in runs]
    for run, hidden, of_run in zip(runs, hidden_N1D.split(sizes), positions):
        ids = [embedded.rows[row][run.start : run.start + run.length] for row in run.members]
        run.context.hold(hidden.view(len(run.members), run.length, -1)[:, -1:], of_run, ids)


def _part(run: Run, inputs_rlD: torch.Tensor, block_ids_rl: torch.Tensor) -> Part:
    """How a run attends: a block behind a cache sees all; else a mask says what is seen."""
    config, (_, cache) = run.context.model.config.text_config, run.context.groups[0]
    shape = len(run.members), run.length
    if run.is_block and run.start:
        return Part(cache, shape)
    if run.is_block:
        mask = sequence_mask(config, inputs_rlD, None, block_ids_rl, None, None)["full_attention"]
    else:
        mask = create_causal_mask(config, inputs_rlD, **{"attention_mask": None, "position_ids": None, CACHE: cache})
    return Part(cache, shape, in_block=False, mask=mask)
