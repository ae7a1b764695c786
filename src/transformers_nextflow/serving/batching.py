"""Who waits, and who is drawn together.

There is no time to wait for company: whoever comes while batches are drawn waits, and the next batch is the longest
waiting and all that fit to it.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from traceback import clear_frames
from typing import Any

from .errors import RequestError
from .jobs import Answer, Job
from .limits import Limits
from .metrics import Metrics


class Batcher:
    """A queue before a model. All but `run` is of one event loop.

    Args:
        run: gives the answers of jobs that fit together.
        limits: jobs that wait; pictures of a batch, unless one job has more.
        metrics: are told of each batch that begins and ends, and see who waits.

    Attributes:
        waiting: jobs and their answers to be, the oldest first.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], list[Answer]],
        limits: Limits,
        metrics: Metrics,
    ):
        self.run, self.limits, self.metrics = run, limits, metrics
        self.waiting: dict[Job, asyncio.Future[Answer]] = {}
        self._some = asyncio.Event()
        metrics.waiting.set_function(lambda: len(self.waiting))

    async def answer(self, job: Job) -> Answer:
        """A job's answer; who is cancelled before it leaves the queue, or no longer keeps its batch running. Raises a
        [`RequestError`] of status 429 if the queue is full."""
        if len(self.waiting) >= (most := self.limits.max_queue):
            raise RequestError(f"{most} requests wait already: try again later", None, 429, "queue_full")
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        job = replace(job, is_awaited=lambda: not answer.done())
        self.waiting[job] = answer
        self._some.set()
        try:
            return await answer
        finally:
            self.waiting.pop(job, None)

    async def work(self) -> None:
        """Draw batch after batch in a thread, until this is cancelled. Several of these draw as many at a time."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as model:
            while True:
                while not self.waiting:
                    self._some.clear()
                    await self._some.wait()
                batch = self._next_batch()
                self.metrics.running.inc(len(batch))
                self.metrics.batches.observe(len(batch))
                self.metrics.pictures.observe(sum(job.num_pictures for job in batch))
                outcomes = await loop.run_in_executor(model, self._outcomes, list(batch))
                for answer, outcome in zip(batch.values(), outcomes):
                    failed = isinstance(outcome, Exception)
                    settle: Callable[[Any], None] = answer.set_exception if failed else answer.set_result
                    if not answer.done():  # its client may be gone
                        settle(outcome)
                self.metrics.running.dec(len(batch))

    def _next_batch(self) -> "dict[Job, asyncio.Future[Answer]]":
        first, batch, room = next(iter(self.waiting)), {}, self.limits.max_batch
        for job in list(self.waiting):
            if job is first or (job.num_pictures <= room and job.fits(first)):
                batch[job] = self.waiting.pop(job)
                room -= job.num_pictures
        return batch

    def _outcomes(self, jobs: Sequence[Job]) -> Sequence[Answer | Exception]:
        """The answers, or the errors; a batch that fails is run one by one, so that none suffers for another."""
        try:
            return self.run(jobs)
        except InterruptedError as error:  # none of them is awaited
            return [error] * len(jobs)
        except Exception as error:
            let_go(error)
            return [error] if len(jobs) == 1 else [outcome for job in jobs for outcome in self._outcomes([job])]


def let_go(error: BaseException | None) -> None:
    """Free what the calls that an error has ended had in memory: all of a batch, for as long as somebody knows it."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__context__
