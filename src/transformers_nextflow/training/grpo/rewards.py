"""Reward functions in TRL's signature, called as TRL calls them, and so that a bad one is named.

`f(prompts, completions, completion_ids, images, trainer_state, log_extra, log_metric, **columns)` returns a number or
`None` for each picture; it may be `async`. `completions` are conversations with the picture as a PIL image, after its
text where the policy writes one, whose tokens are `completion_ids`; `images` are the pictures alone, `columns` the
dataset's.
"""

import asyncio
import concurrent.futures
import inspect
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from math import isfinite

import numpy as np
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

LARGEST = 1e18  # of a reward, whose square is to be finite in float32

RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(RuntimeError):
    """A reward function raised, hung, or returned something else than rewards."""


class _Expired(BaseException):
    """A reward's time is over; nothing that it catches itself."""


def reward_name(function: RewardFunction) -> str:
    """The name under which a function's rewards are logged."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


class Rewards:
    """Reward functions with their weights.

    They are called one after another by the thread that asks. What `async` ones return is awaited together, in one
    event loop for as long as this lives, so that their clients stay connected.

    Args:
        functions: one or more.
        weights: of each; default 1.
        timeout: seconds that each may take.

    Raises:
        ValueError: for no functions, something else than functions, or another number of weights, or no finite ones.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
    ):
        is_list = isinstance(functions, Sequence) and not isinstance(functions, str)
        self.functions: list = [*functions] if is_list else [functions]
        if not self.functions:
            raise ValueError("reward_funcs must hold at least one function, got []")
        for function in self.functions:
            if not callable(function) or isinstance(function, torch.nn.Module):
                raise ValueError(f"reward_funcs must be functions of pictures, see ClipScore; got {function!r}")
        weights = [1.0] * len(self.functions) if weights is None else weights
        if len(weights) != len(self.functions):
            raise ValueError(f"reward_weights must have {len(self.functions)} entries, got {len(weights)}")
        if not all(map(isfinite, weights)):
            raise ValueError(f"reward_weights must be finite numbers, got {list(weights)}")
        self.weights, self.timeout = torch.tensor(weights), timeout

    @property
    def names(self) -> list[str]:
        """Of each function; one that has another's name, as two CLIP scores have, gets its number after it."""
        names = [reward_name(function) for function in self.functions]
        return [f"{name}_{place}" if name in names[:place] else name for place, name in enumerate(names)]

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=[loop], name="rewards", daemon=True).start()
        weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)
        return loop

    def __call__(self, num_pictures: int, **arguments) -> torch.Tensor:
        """(pictures, functions) float32 rewards, NaN where a function returned `None`; warns of pictures where all
        did.

        Raises:
            RewardError: naming the function that raised, took longer than `timeout` seconds, or returned something
                else than as many numbers as there are pictures, finite or `None`.
        """
        results = []
        for name, function in zip(self.names, self.functions):
            with self._naming(name), time_limit(self.timeout):
                result = function(**arguments)
            if inspect.isawaitable(result):
                result = asyncio.run_coroutine_threadsafe(_outcome(result), self._loop)
            results.append(result)
        columns = []
        for name, result in zip(self.names, results):
            if isinstance(result, concurrent.futures.Future):
                with self._naming(name):
                    try:
                        result, error = result.result(self.timeout)
                    except concurrent.futures.TimeoutError:
                        result.cancel()
                        raise _Expired from None
                    if error is not None:
                        raise error
            columns.append(_checked(name, result, num_pictures))
        rewards = torch.tensor(columns, dtype=torch.float32).T
        silent = rewards.isnan().all(dim=1).nonzero().flatten().tolist()
        if silent:
            own = {name: values[silent[0]] for name, values in arguments.items() if isinstance(values, list)}
            logger.warning(
                f"{len(silent)} of {num_pictures} pictures have no reward of any function: the first is {own}"
            )
        return rewards

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except _Expired:
            raise RewardError(f"the reward function {name} has not returned after {self.timeout} seconds") from None
        except (Exception, SystemExit) as error:  # one that exits has not returned rewards either
            raise RewardError(f"the reward function {name} raised {type(error).__name__}: {error}") from error


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt what runs longer by [`_Expired`]; in the main thread alone."""
    if seconds is None:
        yield
        return

    def expire(signum, frame):
        raise _Expired

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Until it is stopped."""
    loop.run_forever()
    loop.close()


async def _outcome(awaitable):
    """What it returns and what it raises; even an exit, which would end the loop."""
    try:
        return await awaitable, None
    except BaseException as error:
        return None, error


def _checked(name: str, rewards, num_pictures: int) -> list[float]:
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
        except (TypeError, ValueError, OverflowError):
            value = float("nan")
        if reward is not None and not abs(value) <= LARGEST:
            raise RewardError(
                f"the reward function {name} returned {reward!r} for picture {place}: a reward is a finite number, or "
                "None for no reward"
            )
        values.append(value)
    return values
