"""Who waits, and who is drawn together.

There is no time to wait for company: whoever comes while batches are drawn waits, and the next batch is the longest
waiting and all that fit to it.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from .errors import RequestError
from .jobs import Answer, Job
from .limits import Limits
from .metrics import Metrics


@dataclass(frozen=True, eq=False)
class Ticket:
    """A place in the queue."""

    job: Job
    answer: "asyncio.Future[Answer]"


class Batcher:
    """A queue before a model. All but `run` is of one event loop.

    Args:
        run: gives the answers of jobs that fit together.
        limits: tickets that wait; pictures of a batch, unless one job has more.
        metrics: are told of each batch that begins, and see who waits.

    Attributes:
        waiting, running: the tickets, the oldest first.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], list[Answer]],
        limits: Limits,
        metrics: Metrics,
    ):
        self.run, self.limits, self.metrics = run, limits, metrics
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self._some = asyncio.Event()
        metrics.waiting.set_function(lambda: len(self.waiting))
        metrics.running.set_function(lambda: len(self.running))

    async def answer(self, job: Job) -> Answer:
        """A job's answer; who is cancelled before it leaves the queue, or no longer keeps its batch running. Raises a
        [`RequestError`] of status 429 if the queue is full."""
        if len(self.waiting) >= (most := self.limits.max_queue):
            raise RequestError(f"{most} requests wait already: try again later", None, 429, "queue_full")
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        ticket = Ticket(replace(job, is_awaited=lambda: not answer.done()), answer)
        self.waiting.append(ticket)
        self._some.set()
        try:
            return await answer
        finally:
            if ticket in self.waiting:
                self.waiting.remove(ticket)

    async def work(self) -> None:
        """Draw batch after batch in a thread, until this is cancelled. Several of these draw as many at a time."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as model:
            while True:
                while not self.waiting:
                    self._some.clear()
                    await self._some.wait()
                batch = self._next_batch()
                self.running += batch
                jobs = [ticket.job for ticket in batch]
                self.metrics.batches.observe(len(jobs))
                self.metrics.pictures.observe(sum(job.num_pictures for job in jobs))
                outcomes = await loop.run_in_executor(model, self._outcomes, jobs)
                for ticket, outcome in zip(batch, outcomes):
                    answer, failed = ticket.answer, isinstance(outcome, Exception)
                    settle: Callable[[Any], None] = answer.set_exception if failed else answer.set_result
                    if not answer.done():  # its client may be gone
                        settle(outcome)
                self.running = [ticket for ticket in self.running if ticket not in batch]

    def _next_batch(self) -> list[Ticket]:
        batch, room = [], self.limits.max_batch
        for ticket in self.waiting:
            if not batch or (ticket.job.num_pictures <= room and ticket.job.fits(batch[0].job)):
                batch.append(ticket)
                room -= ticket.job.num_pictures
        self.waiting = [ticket for ticket in self.waiting if ticket not in batch]
        return batch

    def _outcomes(self, jobs: Sequence[Job]) -> Sequence[Answer | Exception]:
        """The answers, or the errors; a batch that fails is run one by one, so that none suffers for another."""
        try:
            return self.run(jobs)
        except InterruptedError as error:  # none of them is awaited
            return [error] * len(jobs)
        except Exception as error:
            return [error] if len(jobs) == 1 else [outcome for job in jobs for outcome in self._outcomes([job])]
