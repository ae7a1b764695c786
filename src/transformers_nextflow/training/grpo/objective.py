"""The objective of prefix-tuning GRPO as plain functions (NextFlow sec. 3.2.5, eq. 3 to 5).

A scale is an action, its codes are drawn side by side; the first m scales are optimised. Shape suffixes: B pictures,
m scales of the prefix, n their codes, V codebook size.
"""

from collections.abc import Sequence

import torch

from ...sampling import guide, kept_codes
from ...scales import ScaleSchedule


def num_prefix_scales(schedule: ScaleSchedule, scale_prefix: int | None, prefix_tokens: int | None) -> int:
    """m: as many scales as `scale_prefix` says, or the most whose codes are no more than `prefix_tokens`; by default
    all of them.

    Raises:
        ValueError: if the schedule has fewer scales, or not even one fits.
    """
    if scale_prefix is not None:
        if not 1 <= scale_prefix <= len(schedule):
            raise ValueError(
                f"scale_prefix must lie in [1, {len(schedule)}], the scales of the grid {schedule.final_grid}, got "
                f"{scale_prefix}"
            )
        return scale_prefix
    if prefix_tokens is not None:
        fitting = [m for m in range(1, len(schedule) + 1) if schedule.prefix(m).num_codes <= prefix_tokens]
        if not fitting:
            first = schedule.lengths[0]
            raise ValueError(f"prefix_tokens must hold the first scale of {first} codes, got {prefix_tokens}")
        return fitting[-1]
    return len(schedule)


def combine(rewards: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """(..., F) -> (...): weighted sums of the rewards that are there; NaN where no function spoke."""
    total = (rewards * weights_F).nansum(dim=-1)
    return total.masked_fill(rewards.isnan().all(dim=-1), float("nan"))


def group_advantages(
    rewards: torch.Tensor, num_generations: int, scale_rewards: str = "group"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4: (R - mean) / std within each group of one condition.

    Args:
        rewards: (N,), group after group; NaN where no reward function spoke, which gets the advantage 0 and does not
            count in its group.
        scale_rewards: `"group"`; `"batch"` divides by the deviation of all rewards; `"none"` does not divide.

    Returns:
        (N,), and (groups, 1) or (1, 1) deviations, of all rewards for `"batch"`, else of each group. A deviation is
        Bessel's; 1e-4 is added to what divides, as in TRL.
    """
    groups = rewards.double().view(-1, num_generations)  # in which the mean of equal rewards is equal to them
    deviations = nanstd(groups.view(1, -1) if scale_rewards == "batch" else groups)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    if scale_rewards != "none":
        centred = centred / (deviations + 1e-4)
    return centred.nan_to_num(0.0).flatten().float(), deviations.float()


def normalized_sum_advantages(
    rewards_NF: torch.Tensor, weights_F: torch.Tensor, num_generations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's `"normalize_then_sum"` (GDPO, arXiv 2601.05242): every function's rewards are normalised within their
    group, so that none drowns the others, and their weighted sums over the batch.

    Args:
        rewards_NF: group after group, NaN as in [`group_advantages`].

    Returns:
        (N,), and the (1, 1) deviation of the sums.
    """
    groups = rewards_NF.double().view(-1, num_generations, rewards_NF.shape[1])
    normalized = (groups - groups.nanmean(dim=1, keepdim=True)) / (nanstd(groups) + 1e-4)
    sums = combine(normalized.flatten(0, 1), weights_F)
    return group_advantages(sums, len(sums), "batch")


def prefix_values(rewards_NK: torch.Tensor, eta: float) -> torch.Tensor:
    """(N,) values of prefixes, each continued K times: `eta * log(mean(exp(R / eta)))` over the continuations that
    have a reward, NaN where none has (arXiv 2601.02256, VMR)."""
    if rewards_NK.shape[1] == 1:
        return rewards_NK[:, 0]
    spoken = ~rewards_NK.isnan()
    scaled = (rewards_NK.double() / eta).masked_fill(~spoken, -torch.inf)  # of a large eta nearly 0
    return (eta * (scaled.logsumexp(dim=1) - spoken.sum(dim=1).double().log())).to(rewards_NK)


def nanstd(values: torch.Tensor) -> torch.Tensor:
    """(G, N, ...) -> (G, 1, ...) float64: Bessel's deviation of what is not NaN, 0 of a single value."""
    values = values.double()  # in which equal ones of float32 have none
    count = values.isfinite().sum(dim=1, keepdim=True)
    squares = (values - values.nanmean(dim=1, keepdim=True)).square().nansum(dim=1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def token_weights(schedule: ScaleSchedule, alpha: float) -> torch.Tensor:
    """(n,) weights of a prefix's codes, k_t of eq. 2 for every code of scale t, that sum to 1.

    k_t multiplies the sum over a scale's codes, not their mean. Open in the paper: the normalisation; it only scales
    the learning rate.
    """
    weights = torch.tensor(schedule.weights(alpha), dtype=torch.float32)
    return weights.repeat_interleave(torch.tensor(schedule.lengths)) / schedule.num_codes


def guided_logits(logits_NnV: torch.Tensor, guidance: list[float], schedule: ScaleSchedule) -> torch.Tensor:
    """(2 * B, n, V) logits of prompts, then null prompts -> (B, n, V), guided scale by scale as sampling was."""
    parts = logits_NnV.split(list(schedule.lengths), dim=1)
    return torch.cat([guide(part, scale) for part, scale in zip(parts, guidance)], dim=1)


def sampling_support(
    logits: list[torch.Tensor], temperature: list[float], top_k: list[int], top_p: list[float]
) -> torch.Tensor:
    """(B, n, V) bool: the codes that could be drawn, from the guided logits (B, l, V) of each scale."""
    masks = []
    for logits_BlV, heat, most, mass in zip(logits, temperature, top_k, top_p):
        indices, last, _ = kept_codes(logits_BlV / heat, most, mass)
        kept = torch.arange(indices.shape[-1], device=indices.device) <= last
        masks.append(torch.zeros_like(logits_BlV, dtype=torch.bool).scatter(-1, indices, kept))
    return torch.cat(masks, dim=1)


def code_logps(
    logits_BnV: torch.Tensor,
    codes_Bn: torch.Tensor,
    temperature_n: torch.Tensor,
    support_BnV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of codes under a softmax over the codebook, in `support_BnV` alone where given.

    Returns:
        (B, n) log-probabilities, and (B, n) entropies without gradient.
    """
    logits_BnV = logits_BnV.float() / temperature_n[:, None]
    if support_BnV is not None:
        logits_BnV = logits_BnV.masked_fill(~support_BnV, -torch.inf)
    logps_BnV = logits_BnV.log_softmax(dim=-1)
    with torch.no_grad():
        entropies = torch.special.entr(logps_BnV.exp()).sum(-1)
    return logps_BnV.gather(-1, codes_Bn[..., None]).squeeze(-1), entropies


def log_ratios(
    logps_Bn: torch.Tensor,
    old_logps_Bn: torch.Tensor,
    lengths: Sequence[int],
    level: str,
    counts_Bn: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, n) logarithms of r_t: of each code (`"token"`), or of its scale's geometric mean (`"scale"`), for scales of
    these lengths; over the codes that count alone, if not all do.

    Differs from eq. 3, whose ratio is the product over a scale: over 64 codes it leaves any clip range.
    """
    ratios = logps_Bn - old_logps_Bn
    if level == "token":
        return ratios
    counts_Bn = torch.ones_like(ratios, dtype=torch.bool) if counts_Bn is None else counts_Bn
    means = [
        ((part * counts).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(part)
        for part, counts in zip(*(each.split(list(lengths), dim=1) for each in (ratios, counts_Bn)))
    ]
    return torch.cat(means, dim=1)


def clipped_policy_loss(
    log_ratios_Bn: torch.Tensor, advantages_B: torch.Tensor, epsilon: float, epsilon_high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. 5: `-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)` of each code.

    Returns:
        (B, n) losses, and bool (B, n): where the lower and the upper bound took the gradient.
    """
    ratio_Bn, advantage_B1 = log_ratios_Bn.exp(), advantages_B[:, None]
    clipped_Bn = ratio_Bn.clamp(1 - epsilon, 1 + epsilon_high)
    losses = -torch.minimum(ratio_Bn * advantage_B1, clipped_Bn * advantage_B1)
    low = (ratio_Bn < 1 - epsilon) & (advantage_B1 < 0)
    high = (ratio_Bn > 1 + epsilon_high) & (advantage_B1 > 0)
    return losses, low, high


def kl_to_reference(
    logps_Bn: torch.Tensor, ref_logps_Bn: torch.Tensor, old_logps_Bn: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, n): Schulman's k3 estimate of KL(pi || ref), never negative.

    Its gradient over codes that pi drew is that of KL(ref || pi). With `old_logps_Bn`, of the policy that drew them,
    it is weighted by the ratio of each code, and both value and gradient are those of KL(pi || ref).
    """
    difference = ref_logps_Bn - logps_Bn
    k3 = difference.exp() - difference - 1
    return k3 if old_logps_Bn is None else k3 * (logps_Bn - old_logps_Bn).exp()
