"""95% intervals of shares and of their differences."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # the normal distribution's 97.5th percentile
RESAMPLES = 2_000


def proportion(right: Sequence[bool]) -> dict:
    """A share with Wilson's interval: `{"score", "low", "high", "n"}`."""
    n, score = len(right), _mean(right)
    low, high = wilson(score, n)
    return {"score": round(score, 4), "low": round(low, 4), "high": round(high, 4), "n": n}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share of `n`."""
    centre = share + Z**2 / (2 * n)
    spread = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = ((centre + sign * spread) / (1 + Z**2 / n) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def difference(right: Sequence[bool], other: Sequence[bool]) -> dict:
    """The first share minus the second, of different prompts, with Newcombe's interval of two Wilson intervals."""
    share, other_share = _mean(right), _mean(other)
    low, high = wilson(share, len(right))
    other_low, other_high = wilson(other_share, len(other))
    score = share - other_share
    below, above = math.hypot(share - low, other_high - other_share), math.hypot(high - share, other_share - other_low)
    return {"score": round(score, 4), "low": round(score - below, 4), "high": round(score + above, 4)}


def paired_difference(values: Sequence[float], others: Sequence[float], seed: int = 0) -> dict:
    """The first mean minus the second, of the same prompts in the same order, with the bootstrap's percentiles over
    prompts. For verdicts and for errors alike."""
    if len(values) != len(others):
        raise ValueError(f"paired values must be as many on both sides, got {len(values)} and {len(others)}")
    differences = np.asarray(values, float) - np.asarray(others, float)
    score, generator = _mean(differences), np.random.default_rng(seed)
    drawn = generator.integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), [2.5, 97.5])
    return {"score": round(score, 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": len(values)}


def _mean(values: Sequence[float]) -> float:
    if not len(values):
        raise ValueError("no values to take the mean of")
    return float(np.mean(values))
