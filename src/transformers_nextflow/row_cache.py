"""A key-value cache whose rows grow apart, in memory laid out beforehand.

Each row holds its own tokens from column 0 on, without padding: a step may take any of the rows, and writes in place
behind what each holds. Shape suffixes: R rows of the cache, r rows of a step, H heads, L columns, n new, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Step:
    """Where one forward writes. Lengths are those of tensors, so that a compiled forward serves them all.

    Attributes:
        rows: (r,) rows of the cache.
        first: the first of them if they are neighbours.
        columns: (r, n) columns of the new keys and values.
        is_even: whether all rows hold as much.
        reach: (columns that the step sees,) on the meta device.
    """

    rows: torch.Tensor
    first: int | None
    columns: torch.Tensor
    is_even: bool
    reach: torch.Tensor


class RowCache(Cache):
    """Keys and values of rows of different lengths.

    A forward is framed by [`~RowCache.begin`], which names its rows, and [`~RowCache.commit`], which says what they
    read. The memory doubles where `capacity` turns out too small.

    Args:
        num_layers: layers of the decoder.
        num_rows: R.
        capacity: columns to lay out at first.

    Attributes:
        token_ids: of each row, the ids it has read, `<image>` for a visual input.
    """

    def __init__(self, num_layers: int, num_rows: int, capacity: int):
        super().__init__(layers=[RowLayer(self) for _ in range(num_layers)])
        self.token_ids: list[list[int]] = [[] for _ in range(num_rows)]
        self.capacity = capacity
        self.rows: list[int] = []
        self.step: Step | None = None

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def past(self) -> list[int]:
        """How many tokens each row of the step holds."""
        return [len(self.token_ids[row]) for row in self.rows]

    def begin(self, rows: Sequence[int], length: int, device: torch.device) -> None:
        """The next forward is over `length` new columns of `rows`."""
        self.rows = list(rows)
        past, end = self.past, max(self.past) + length
        if end > self.capacity:
            self.capacity = max(end, 2 * self.capacity)
            for layer in self.layers:
                layer.grow()
        self.step = Step(
            rows=torch.tensor(self.rows, device=device),
            first=self.rows[0] if self.rows == list(range(self.rows[0], self.rows[0] + len(self.rows))) else None,
            columns=torch.tensor(past, device=device)[:, None] + torch.arange(length, device=device),
            is_even=len(set(past)) == 1,
            reach=torch.empty(end, device="meta"),
        )

    def commit(self, token_ids: Sequence[Sequence[int]]) -> None:
        """The step's rows have read these ids; columns beyond them were padding and will be written over."""
        for row, ids in zip(self.rows, token_ids, strict=True):
            self.token_ids[row].extend(ids)
        self.rows, self.step = [], None

    def truncate(self, row: int, length: int) -> None:
        """Forget what `row` read after its first `length` tokens."""
        del self.token_ids[row][length:]

    def select(self, rows: Sequence[int]) -> None:
        """Keep, order and repeat rows."""
        self.token_ids = [list(self.token_ids[row]) for row in rows]
        for layer in self.layers:
            layer.reorder_cache(torch.tensor(rows))

    def last_columns(self, rows: Sequence[int], length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every layer, keys and values (r, n, H, D) of the last `length` columns."""
        at = self._columns(rows, length)
        return [(layer.keys[at], layer.values[at]) for layer in self.layers]

    def restore_columns(self, rows: Sequence[int], kept: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Put back what [`~RowCache.last_columns`] gave."""
        at = self._columns(rows, kept[0][0].shape[1])
        for layer, (keys, values) in zip(self.layers, kept):
            layer.keys[at], layer.values[at] = keys, values

    def _columns(self, rows: Sequence[int], length: int) -> tuple:
        starts = torch.tensor([len(self.token_ids[row]) - length for row in rows])
        return torch.tensor(rows)[:, None], slice(None), starts[:, None] + torch.arange(length)


class RowLayer(CacheLayerMixin):
    """One layer of a [`RowCache`]: keys and values (R, H, L, D)."""

    is_sliding = False

    def __init__(self, cache: RowCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        size = (self.cache.num_rows, key_states.shape[1], self.cache.capacity)
        # zeros, because a masked column still enters the sum of values with weight 0
        self.keys = key_states.new_zeros(*size, key_states.shape[-1])
        self.values = value_states.new_zeros(*size, value_states.shape[-1])
        self.is_initialized = True

    def grow(self) -> None:
        """Lay out what the cache's capacity has come to."""
        if self.is_initialized:
            missing = self.cache.capacity - self.keys.shape[2]
            self.keys, self.values = (F.pad(states, (0, 0, 0, missing)) for states in (self.keys, self.values))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.cache.step
        rows, columns = step.rows.to(self.device), step.columns.to(self.device)
        held = rows if step.first is None else slice(step.first, step.first + len(key_states))
        for states, new in ((self.keys, key_states), (self.values, value_states)):
            if step.is_even and step.first is not None:
                states[held].index_copy_(2, columns[0], new)
            else:
                states[rows[:, None], :, columns] = new.transpose(1, 2)
        end = step.reach.shape[0]
        return self.keys[held, :, :end], self.values[held, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.cache.rows:
            raise ValueError("past_key_values of interleaved generation go on in interleaved generation alone")
        return max(self.cache.past) + query_length, 0

    def get_seq_length(self) -> int:
        lengths = self.cache.past or [len(ids) for ids in self.cache.token_ids]
        return max(lengths)

    def get_max_length(self) -> int:
        return -1
