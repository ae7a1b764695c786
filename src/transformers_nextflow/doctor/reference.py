"""The paper's formulas once more, written apart from the model's code, which is compared with them.

Shape suffixes: B batch, L sequence or codes, l one scale, C code channels, D hidden, h w grid.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..scales import Grid, ScaleSchedule

Resize = Callable[[torch.Tensor, Grid], torch.Tensor]


def bicubic(maps_BChw: torch.Tensor, grid: Grid) -> torch.Tensor:
    return F.interpolate(maps_BChw, size=tuple(grid), mode="bicubic", align_corners=False)


OTHER_RESIZES: dict[str, Resize] = {
    "bilinear": lambda maps, grid: F.interpolate(maps, size=tuple(grid), mode="bilinear"),
    "nearest": lambda maps, grid: F.interpolate(maps, size=tuple(grid), mode="nearest"),
    "area": lambda maps, grid: F.interpolate(maps, size=tuple(grid), mode="area"),
    "bicubic with aligned corners": lambda maps, grid: F.interpolate(
        maps, size=tuple(grid), mode="bicubic", align_corners=True
    ),
}


def as_map(rows_BlC: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(B, h*w, C) row by row -> (B, C, h, w)."""
    return rows_BlC.reshape(len(rows_BlC), *grid, -1).permute(0, 3, 1, 2)


def as_transposed_map(rows_BlC: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The same read column by column: height and width confused."""
    return rows_BlC.reshape(len(rows_BlC), grid[1], grid[0], -1).permute(0, 3, 2, 1)


def as_rows(maps_BChw: torch.Tensor) -> torch.Tensor:
    return maps_BChw.permute(0, 2, 3, 1).flatten(1, 2)


def halves(vectors: torch.Tensor, config) -> list[torch.Tensor]:
    """The semantic and the pixel half of (..., C), normalised where the config says so."""
    parts = vectors.split((config.semantic_dim, config.pixel_dim), -1)
    if not config.normalize_entries:
        return list(parts)
    return [part / part.norm(dim=-1, keepdim=True).clamp(min=1e-12) for part in parts]


def codebook(quantizer: nn.Module, config) -> torch.Tensor:
    """(V, C) float32 entries."""
    books = [book.detach().float() for book in (quantizer.semantic_codebook, quantizer.pixel_codebook)]
    return torch.cat(halves(torch.cat(books, dim=-1), config), dim=-1)


def sum_of_entries(
    codes_BL: torch.Tensor,
    codebook_VC: torch.Tensor,
    schedule: ScaleSchedule,
    resize: Resize = bicubic,
    to_map: Callable = as_map,
) -> torch.Tensor:
    """(B, C, h, w): entries of every scale, brought to the final grid and summed (NextFlow sec. 2.1)."""
    total = 0.0
    for scale, grid in enumerate(schedule):
        total = total + resize(to_map(codebook_VC[codes_BL[:, schedule.slice(scale)]], grid), schedule.final_grid)
    return total


def queries(
    features_BChw: torch.Tensor, codes_BL: torch.Tensor, codebook_VC: torch.Tensor, schedule: ScaleSchedule
) -> list[torch.Tensor]:
    """What each scale looks up, (B, l, C), when the residual continues from `codes_BL` (sec. 2.1 and 3.1)."""
    residual, asked = features_BChw.float(), []
    for scale, grid in enumerate(schedule):
        asked.append(as_rows(F.interpolate(residual, size=grid, mode="area")))
        if schedule.slice(scale).stop <= codes_BL.shape[1]:
            entries = codebook_VC[codes_BL[:, schedule.slice(scale)]]
            residual = residual - bicubic(as_map(entries, grid), schedule.final_grid)
    return asked


def distances(asked_BlC: torch.Tensor, codebook_VC: torch.Tensor, config) -> torch.Tensor:
    """(B, l, V) weighted squared distances of both halves of the codebook."""
    weights, total = (config.semantic_weight, config.pixel_weight), 0.0
    for weight, half, entries in zip(weights, halves(asked_BlC, config), halves(codebook_VC, config)):
        total = total + weight * torch.cdist(half, entries.expand(len(half), -1, -1)).square()
    return total


def next_features(
    entries_BLC: torch.Tensor,
    schedule: ScaleSchedule,
    accumulate: bool,
    resize: Resize = bicubic,
    to_map: Callable = as_map,
) -> torch.Tensor:
    """(B, positions of scales 2..K, C): what predicts each next scale (NextFlow sec. 2.2, or VAR's running sum)."""
    features, total = [], 0.0
    for scale, grid in enumerate(schedule.grids[:-1]):
        entries = to_map(entries_BLC[:, schedule.slice(scale)], grid)
        if accumulate:
            total = total + resize(entries, schedule.final_grid)
            features.append(as_rows(F.interpolate(total, size=schedule[scale + 1], mode="area")))
        else:
            features.append(as_rows(resize(entries, schedule[scale + 1])))
    return torch.cat(features, dim=1)


def cells(grid: Grid) -> list[tuple[int, int]]:
    return [(row, column) for row in range(grid[0]) for column in range(grid[1])]


@dataclass(frozen=True)
class Places:
    """Where everything stands in one row (NextFlow fig. 5 and eq. 1).

    Attributes:
        positions: (3, L) float64, rows counter, row, column.
        scales: of each position, 0 for text and `<eoi>`, 1 for `<boi>`, k for the block of scale k.
        counts: the image's number of scales there, 0 for text.
        blocks: of each position the first and last position of its block, itself for text.
    """

    positions: torch.Tensor
    scales: list[int]
    counts: list[int]
    blocks: list[tuple[int, int]]


def places(
    ids: Sequence[int],
    schedules: Sequence[ScaleSchedule],
    boi: int,
    image: int,
    edge: float,
    documents: Sequence[int] | None = None,
) -> Places:
    positions, scales, counts, blocks = [], [], [], []
    remaining, counter, index = iter(schedules), 0, 0
    while index < len(ids):
        if documents is not None and index and documents[index] != documents[index - 1]:
            counter = 0
        is_image = ids[index] == boi
        positions.append((counter,) * 3)
        blocks.append((index, index))
        scales.append(1 if is_image else 0)
        counter, index = counter + 1, index + 1
        if not is_image:
            counts.append(0)
            continue
        schedule = next(remaining)
        counts.append(len(schedule))
        grids, scale = [*schedule.grids[1:], schedule.final_grid], 2
        while index < len(ids) and ids[index] == image:
            grid = grids[scale - 2]
            step = edge / math.sqrt(grid[0] * grid[1])
            positions += [(counter, (row + 0.5) * step, (column + 0.5) * step) for row, column in cells(grid)]
            size = grid[0] * grid[1]
            scales += [scale] * size
            counts += [len(schedule)] * size
            blocks += [(index, index + size - 1)] * size
            counter, index, scale = counter + 1, index + size, scale + 1
    return Places(torch.tensor(positions, dtype=torch.float64).T, scales, counts, blocks)


def scale_embedding(weights, scale: int, count: int) -> torch.Tensor:
    """(D,): the index's row, and the sinusoid of the number of scales through its linear map (sec. 2.2)."""
    half = weights.length.in_features // 2
    angles = count * torch.exp(torch.arange(half) * (-math.log(10_000) / half))
    wave = torch.cat([angles.sin(), angles.cos()]).to(weights.length.weight)
    return weights.index.weight[scale] + weights.length.weight @ wave


def rotate(heads_HLd: torch.Tensor, positions_3L: torch.Tensor, rope: dict) -> torch.Tensor:
    """Rotary positions of three axes: frequency n turns by the axis that its section names, in turn over the three."""
    half = heads_HLd.shape[-1] // 2
    axes = [number % 3 for number, size in enumerate(rope["mrope_section"]) for _ in range(size)]
    frequencies = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angles_Ld = (positions_3L[axes] * frequencies[:, None]).T.to(heads_HLd.device)
    cosines, sines = (wave.to(heads_HLd.dtype) for wave in (angles_Ld.cos(), angles_Ld.sin()))
    first, second = heads_HLd.split(half, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def normalised(hidden_LD: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm, in float32."""
    hidden = hidden_LD.float()
    return (hidden * (hidden.square().mean(-1, keepdim=True) + eps).rsqrt()).to(hidden_LD.dtype) * weight


def decoder_states(
    layers: Sequence[nn.Module], config, embeds_LD: torch.Tensor, positions_3L: torch.Tensor, seen_LL: torch.Tensor
) -> list[torch.Tensor]:
    """(L, D) after every layer of Qwen2.5's decoder, for one row; only its linear maps are the model's.

    Args:
        config: the text decoder's.
        positions_3L: float64.
        seen_LL: bool, whether a position (row) sees another (column).
    """
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    split = lambda rows_LD: rows_LD.unflatten(-1, (-1, config.hidden_size // heads)).transpose(0, 1)  # noqa: E731
    hidden, states = embeds_LD, []
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = normalised(hidden, layer.input_layernorm.weight, config.rms_norm_eps)
        queries, keys, values = (
            split(project(inputs)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = (rotate(each, positions_3L, config.rope_parameters) for each in (queries, keys))
        keys, values = (each.repeat_interleave(groups, dim=0) for each in (keys, values))
        scores = (queries @ keys.transpose(1, 2)).float() / queries.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen_LL, -math.inf).softmax(-1).to(values.dtype)
        hidden = hidden + attention.o_proj((weights @ values).transpose(0, 1).flatten(1))
        inputs = normalised(hidden, layer.post_attention_layernorm.weight, config.rms_norm_eps)
        hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs))
        states.append(hidden)
    return states
