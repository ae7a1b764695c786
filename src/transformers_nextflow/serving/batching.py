"""Who waits, and who is drawn together.

There is no time to wait for company: whoever comes while a batch is drawn waits, and the next batch is the longest
waiting and all that fit to it.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .errors import RequestError
from .jobs import Answer, Job


@dataclass(frozen=True, eq=False)
class Ticket:
    """A place in the queue."""

    job: Job
    answer: "asyncio.Future[Answer]"


class Batcher:
    """A queue before a model that does one thing at a time. All but `run` is of one event loop.

    Args:
        run: gives the answers of jobs that fit together.
        max_queue: tickets that wait.
        max_batch: pictures that are drawn at once, unless one job has more.
        on_batch: is told of each batch that begins.

    Attributes:
        waiting, running: the tickets, the oldest first.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], list[Answer]],
        max_queue: int,
        max_batch: int,
        on_batch: Callable[[Sequence[Job]], None] = lambda jobs: None,
    ):
        self.run, self.max_queue, self.max_batch, self.on_batch = run, max_queue, max_batch, on_batch
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self._some = asyncio.Event()

    def submit(self, job: Job) -> Ticket:
        """A place for a job; raises a [`RequestError`] of status 429 if there is none."""
        if len(self.waiting) >= self.max_queue:
            raise RequestError(f"{self.max_queue} requests wait already: try again later", None, 429, "queue_full")
        ticket = Ticket(job, asyncio.get_running_loop().create_future())
        self.waiting.append(ticket)
        self._some.set()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Nobody waits for the answer any more: the place is free."""
        ticket.answer.cancel()
        if ticket in self.waiting:
            self.waiting.remove(ticket)

    async def work(self) -> None:
        """Draw batch after batch, until this is cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as model:
            while True:
                while not self.waiting:
                    self._some.clear()
                    await self._some.wait()
                self.running = self._next_batch()
                jobs = [ticket.job for ticket in self.running]
                self.on_batch(jobs)
                outcomes = await loop.run_in_executor(model, self._outcomes, jobs)
                for ticket, outcome in zip(self.running, outcomes):
                    if ticket.answer.done():  # its client is gone
                        continue
                    if isinstance(outcome, Exception):
                        ticket.answer.set_exception(outcome)
                    else:
                        ticket.answer.set_result(outcome)
                self.running = []

    def _next_batch(self) -> list[Ticket]:
        batch, room = [], self.max_batch
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
        except Exception as error:
            return [error] if len(jobs) == 1 else [outcome for job in jobs for outcome in self._outcomes([job])]
