"""Dual codebook and multi-scale residual quantisation (NextFlow sec. 2.1 and 3.1; VAR for the scales).

All arithmetic of codes lives here, in float32 whatever the autocast: lookup, residuals, self-correction.

Shape suffixes: B batch, L all codes of an image, l codes of one scale, C code channels, V codebook size, h w grid.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .scales import Grid, ScaleSchedule
from .utils.precision import without_autocast

CODEBOOK_LOSSES = ("tokenflow", "var")
DISTANCES_AT_ONCE = 2**22  # of one chunk of a lookup: 16 MiB in float32


def resize_features(features_BChw: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Bicubic resize of features to `grid`; the upsampling used everywhere codes meet another scale."""
    if features_BChw.shape[-2:] == torch.Size(grid):
        return features_BChw
    return F.interpolate(features_BChw, size=grid, mode="bicubic")


def to_map(entries_BlC: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(B, h*w, C) -> (B, C, h, w)."""
    return entries_BlC.transpose(1, 2).unflatten(2, grid)


def to_sequence(features_BChw: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h*w, C), row-major."""
    return features_BChw.flatten(2).transpose(1, 2)


def straight_through(value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`value` to the last bit, with a gradient to `source` alone, as if `source` had been handed on."""
    return value.detach() + (source - source.detach())


@dataclass(frozen=True)
class SelfCorrection:
    """How input codes are disturbed while the targets stay the nearest codes (NextFlow sec. 3.1).

    A disturbed code is drawn from a multinomial over the `top_k` nearest entries, and the residual continues from it,
    so that the later scales' targets correct it. The paper's best setting is the default: all samples, 60% of the
    tokens of each scale. Open in the paper: `top_k` and the weights of the multinomial.

    Args:
        probability: share of samples that are disturbed at all.
        token_share: share of the tokens of each scale, each token on its own; or `(low, high)`, from which each
            sample draws a share for each scale.
        top_k: entries to draw from; the nearest is one of them.
        temperature: `None` draws uniformly, a number from softmax(-distance / temperature).
        first_scale, last_scale: 0-based, inclusive; `last_scale=None` is the last of the schedule.

    Raises:
        ValueError: if a share lies outside [0, 1], or `top_k` or `temperature` is not positive.
    """

    probability: float = 1.0
    token_share: float | tuple[float, float] = 0.6
    top_k: int = 10
    temperature: float | None = None
    first_scale: int = 0
    last_scale: int | None = None

    def __post_init__(self):
        low, high = self.share_range
        if not (0 <= self.probability <= 1 and 0 <= low <= high <= 1):
            raise ValueError(f"shares must lie in [0, 1], got {self.probability=} and {self.token_share=}")
        if self.top_k < 1 or (self.temperature is not None and self.temperature <= 0):
            raise ValueError(f"top_k and temperature must be positive, got {self.top_k=} and {self.temperature=}")

    @property
    def share_range(self) -> tuple[float, float]:
        share = self.token_share
        low, high = share if isinstance(share, Sequence) else (share, share)
        return low, high

    def draws(self, schedule: ScaleSchedule, seed: int, keys: Sequence[str | int]) -> tuple[torch.Tensor, ...]:
        """Uniform numbers for each sample, from `seed` and the sample's key alone.

        Returns:
            `disturb_BL`, bool: which tokens are drawn; `pick_BL` in [0, 1): where in the multinomial.
        """
        low, high = self.share_range
        last = len(schedule) - 1 if self.last_scale is None else self.last_scale
        takes_part = [float(self.first_scale <= scale <= last) for scale in range(len(schedule))]
        share_S, lengths = (torch.tensor(each, device="cpu") for each in (takes_part, schedule.lengths))
        disturb, pick = [], []
        for key in keys:
            digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            chosen, *shares = torch.rand(1 + len(schedule), generator=generator, dtype=torch.float64, device="cpu")
            uniform = torch.rand(2, schedule.num_codes, generator=generator, dtype=torch.float32, device="cpu")
            share = share_S * (low + (high - low) * torch.stack(shares)) * (chosen < self.probability)
            disturb.append(uniform[0] < share.repeat_interleave(lengths))
            pick.append(uniform[1])
        return torch.stack(disturb), torch.stack(pick)


@dataclass
class QuantizerOutput:
    """One pass of multi-scale quantisation.

    Attributes:
        target_codes: (B, L) int64, the nearest entry at every position, scale by scale.
        input_codes: (B, L) int64, equal to the targets except where self-correction drew another entry.
        quantized: (B, C, h, w) float32, the sum over scales of the input codes' entries; its gradient goes straight
            through to the features.
        pairs: what entries gave and what they stand for, two (B, C, ., .) maps for each scale that took part: the
            training losses bring the one to the other.
        residual_norms: (S,) root mean square of the residual before each scale.
        queries: what each scale looked up, (B * l, C), without gradient, normalised if entries are.
    """

    target_codes: torch.Tensor
    input_codes: torch.Tensor
    quantized: torch.Tensor
    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    residual_norms: torch.Tensor
    queries: list[torch.Tensor]


class DualCodebookQuantizer(nn.Module):
    """One shared index, two entries: the lookup minimises `w_sem * d_sem + w_pix * d_pix` over both halves.

    With `normalize_entries` both halves are L2-normalised, entries and queries alike (TokenFlow); the residual itself
    is never normalised.
    """

    def __init__(self, config):
        super().__init__()
        self.dims = (config.semantic_dim, config.pixel_dim)
        self.weights = (config.semantic_weight, config.pixel_weight)
        self.normalize = config.normalize_entries
        self.semantic_codebook = nn.Parameter(torch.empty(config.codebook_size, config.semantic_dim))
        self.pixel_codebook = nn.Parameter(torch.empty(config.codebook_size, config.pixel_dim))

    def forward(self) -> torch.Tensor:
        """(V, C) float32 entries, as they are looked up and summed."""
        return self.normalized(torch.cat([self.semantic_codebook, self.pixel_codebook], dim=-1).float())

    def normalized(self, vectors: torch.Tensor) -> torch.Tensor:
        """(.., C) with each half of unit length; as they are for VAR's Euclidean lookup."""
        if not self.normalize:
            return vectors
        return torch.cat([F.normalize(half, dim=-1) for half in vectors.split(self.dims, dim=-1)], dim=-1)

    def distances(self, queries_NC: torch.Tensor, codebook_VC: torch.Tensor) -> torch.Tensor:
        """(N, V) weighted sums of the squared distances of the halves, of queries and entries as [`normalized`], less
        the query's own square, which says nothing of which entry is nearest."""
        weights_C = torch.cat([queries_NC.new_full((dim,), weight) for weight, dim in zip(self.weights, self.dims)])
        squares_V = (codebook_VC.square() * weights_C).sum(-1)
        return torch.addmm(squares_V, queries_NC * weights_C, codebook_VC.T, alpha=-2)

    def quantize(
        self,
        features_BChw: torch.Tensor,
        schedule: ScaleSchedule,
        correction: SelfCorrection | None = None,
        seed: int = 0,
        keys: Sequence[str | int] | None = None,
        keep_scales: Sequence[bool] | None = None,
        pixel_only: bool = False,
        codebook_loss: str = "tokenflow",
    ) -> QuantizerOutput:
        """Quantise features of the final grid, coarse to fine.

        At each scale the residual is area-downsampled to the grid, looked up, and the entry, bicubic-upsampled to the
        final grid, subtracted. Codes and values are the same for both kinds of `codebook_loss`, which says what
        training learns from:

        - `"tokenflow"`: each scale's entries stand for its queries (normalised, if so configured), and the gradient
          goes straight through each lookup, so that queries' normalisation and area resize pass it on;
        - `"var"`: the running sum of upsampled entries after each scale stands for the features themselves, and the
          gradient goes from the whole sum straight to the features.

        Args:
            features_BChw: (B, C, h, w), semantic channels first, `(h, w)` the schedule's final grid.
            correction, seed, keys: self-correction; `keys` names each sample, so that its draws depend on neither
                the batch nor the order (required with `correction`).
            keep_scales: which scales take part; a dropped scale subtracts nothing (tokenizer training only).
            pixel_only: as if the semantic halves of all entries were 0, as those of the features must be (the first
                stage of tokenizer training).
        """
        if codebook_loss not in CODEBOOK_LOSSES:
            raise ValueError(f"codebook_loss must be one of {', '.join(CODEBOOK_LOSSES)}, got {codebook_loss!r}")
        grid = tuple(features_BChw.shape[-2:])
        if grid != schedule.final_grid:
            raise ValueError(f"features have the grid {grid}, the schedule ends in {schedule.final_grid}")
        batch = features_BChw.shape[0]
        if correction is not None:
            if keys is None or len(keys) != batch:
                raise ValueError(f"self-correction needs one key for each of the {batch} samples")
            draws = correction.draws(schedule, seed, keys)
            disturb_BL, pick_BL = (draw.to(features_BChw.device) for draw in draws)

        with without_autocast(features_BChw.device):
            codebook_VC = self().to(features_BChw.device)
            if pixel_only:
                codebook_VC = F.pad(codebook_VC[:, self.dims[0] :], (self.dims[0], 0))
            residual_BChw = features_BChw = features_BChw.float()
            total_BChw = torch.zeros_like(residual_BChw)
            targets, inputs, pairs, norms, queries = [], [], [], [], []
            for scale, (h, w) in enumerate(schedule):
                norms.append(residual_BChw.detach().square().mean().sqrt())
                pooled_BChw = F.interpolate(residual_BChw, size=(h, w), mode="area")
                query_BlC = self.normalized(to_sequence(pooled_BChw))
                queries.append(query_BlC.detach().flatten(0, 1))
                at = schedule.slice(scale)
                drawn = None if correction is None else [draw[:, at].flatten() for draw in (disturb_BL, pick_BL)]
                target_N, input_N = self._look_up(queries[-1], codebook_VC, correction, drawn)
                target_Bl, input_Bl = target_N.view(batch, h * w), input_N.view(batch, h * w)
                if keep_scales is None or keep_scales[scale]:
                    entry_BlC = F.embedding(input_Bl, codebook_VC)
                    if codebook_loss == "tokenflow":
                        pairs.append((to_map(entry_BlC, (h, w)), to_map(query_BlC, (h, w))))
                        entry_BlC = straight_through(entry_BlC, query_BlC)
                    step_BChw = resize_features(to_map(entry_BlC, (h, w)), grid)
                    total_BChw = total_BChw + step_BChw
                    residual_BChw = residual_BChw - step_BChw.detach()
                    if codebook_loss == "var":
                        pairs.append((total_BChw, features_BChw))
                targets.append(target_Bl)
                inputs.append(input_Bl)
            if codebook_loss == "var":
                total_BChw = straight_through(total_BChw, features_BChw)
        return QuantizerOutput(
            torch.cat(targets, 1), torch.cat(inputs, 1), total_BChw, pairs, torch.stack(norms), queries
        )

    @torch.no_grad()
    def _look_up(
        self,
        queries_NC: torch.Tensor,
        codebook_VC: torch.Tensor,
        correction: SelfCorrection | None,
        draws: Sequence[torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) nearest entries, and the same with the disturbed ones drawn, a chunk of queries at a time.

        Args:
            draws: (N,) each, of [`SelfCorrection.draws`].
        """
        targets, inputs = [], []
        length = max(1, DISTANCES_AT_ONCE // len(codebook_VC))
        for start in range(0, len(queries_NC), length):
            chunk = slice(start, start + length)
            distance_nV = self.distances(queries_NC[chunk], codebook_VC)
            target_n = distance_nV.argmin(dim=-1)
            targets.append(target_n)
            if correction is not None:
                disturb_n, pick_n = (draw[chunk] for draw in draws)
                drawn = self._draw(distance_nV[disturb_n], pick_n[disturb_n], correction)
                target_n = target_n.masked_scatter(disturb_n, drawn)
            inputs.append(target_n)
        return torch.cat(targets), torch.cat(inputs)

    @staticmethod
    def _draw(distance_NV: torch.Tensor, pick_N: torch.Tensor, correction: SelfCorrection) -> torch.Tensor:
        nearest = distance_NV.topk(min(correction.top_k, distance_NV.shape[-1]), dim=-1, largest=False)
        if correction.temperature is None:
            weights = torch.ones_like(nearest.values)
        else:
            weights = (-(nearest.values - nearest.values[:, :1]) / correction.temperature).exp()
        cumulative = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
        slot = (cumulative[:, :-1] <= pick_N[:, None]).sum(-1, keepdim=True)
        return nearest.indices.gather(-1, slot).squeeze(-1)

    def decode(self, codes_BL: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        """(B, L) codes of the first scales of `schedule`, at least one -> (B, C, h, w) sum of their entries on the
        final grid."""
        codebook_VC = self().to(codes_BL.device)
        total_BChw = 0
        for scale, grid in enumerate(schedule):
            if schedule.offsets[scale] == codes_BL.shape[1]:
                break
            entries_BlC = F.embedding(codes_BL[:, schedule.slice(scale)], codebook_VC)
            total_BChw = total_BChw + resize_features(to_map(entries_BlC, grid), schedule.final_grid)
        return total_BChw
