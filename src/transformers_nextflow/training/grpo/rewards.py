"""Reward functions in TRL's signature, called so that a bad one is named.

`f(prompts, completions, completion_ids, images, trainer_state, log_extra, log_metric, **columns)` returns a number or
`None` for each picture; it may be `async`. `completions` are conversations with the picture as a PIL image, after its
text where the policy writes one, whose tokens are `completion_ids`; `images` are the pictures alone, `columns` the
dataset's.
"""

import asyncio
import inspect
import queue
import threading
import time
from collections.abc import Callable, Sequence
from math import isfinite

import numpy as np
import torch

RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(RuntimeError):
    """A reward function raised, hung, or returned something else than rewards."""


def reward_name(function: RewardFunction) -> str:
    """The name under which a function's rewards are logged."""
    return getattr(function, "__name__", type(function).__name__)


def call_rewards(
    functions: Sequence[RewardFunction], num_pictures: int, timeout: float | None, **arguments
) -> torch.Tensor:
    """(pictures, functions) float32 rewards, NaN where a function returned `None`.

    All functions run at the same time, each in a thread of its own, an `async` one in an event loop.

    Raises:
        RewardError: naming the function that raised, took longer than `timeout` seconds, or returned something else
            than as many numbers as there are pictures, finite or `None`.
    """
    results: list[queue.Queue] = []
    deadline = None if timeout is None else time.monotonic() + timeout
    for function in functions:
        result: queue.Queue = queue.Queue()
        threading.Thread(target=_call, args=(function, arguments, result), daemon=True).start()
        results.append(result)
    columns = []
    for function, result in zip(functions, results):
        name = reward_name(function)
        try:
            rewards, error = result.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise RewardError(f"the reward function {name} has not returned after {timeout} seconds") from None
        if error is not None:
            raise RewardError(f"the reward function {name} raised {type(error).__name__}: {error}") from error
        columns.append(_check(name, rewards, num_pictures))
    return torch.tensor(columns, dtype=torch.float32).T


def _call(function: RewardFunction, arguments: dict, result: queue.Queue) -> None:
    try:
        rewards = function(**arguments)
        if inspect.isawaitable(rewards):
            rewards = asyncio.run(_wait(rewards))
        result.put((rewards, None))
    except BaseException as error:  # one that exits has not returned rewards either
        result.put((None, error))


async def _wait(rewards):
    return await rewards


def _check(name: str, rewards, num_pictures: int) -> list[float]:
    if isinstance(rewards, torch.Tensor | np.ndarray):
        rewards = rewards.tolist()
    if not isinstance(rewards, Sequence) or isinstance(rewards, str):
        raise RewardError(f"the reward function {name} must return a list of numbers, got {type(rewards).__name__}")
    if len(rewards) != num_pictures:
        raise RewardError(f"the reward function {name} returned {len(rewards)} rewards for {num_pictures} pictures")
    values = []
    for place, reward in enumerate(rewards):
        try:
            value = float("nan") if reward is None else float(reward)
        except (TypeError, ValueError):
            value = float("nan")
        if reward is not None and not isfinite(value):
            raise RewardError(
                f"the reward function {name} returned {reward!r} for picture {place}: a reward is a finite number, or "
                "None for no reward"
            )
        values.append(value)
    return values


def combine(rewards: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """(..., F) -> (...): weighted sums of the rewards that are there; NaN where no function spoke."""
    total = (rewards * weights_F).nansum(dim=-1)
    return total.masked_fill(rewards.isnan().all(dim=-1), float("nan"))
