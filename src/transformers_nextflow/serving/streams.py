"""Answers as they are written, in the chunks of OpenAI's server-sent events."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from starlette.concurrency import run_in_threadpool

from .batching import Batcher
from .chats import images_of, text_of
from .jobs import Answer, Job


async def deltas_of(batcher: Batcher, job: Job) -> AsyncGenerator[tuple[dict, Answer | None], None]:
    """What comes to the message of a job's answer: text as it is written; in the end its pictures, and the answer with
    them. Who closes this leaves the queue.

    Raises:
        RequestError: before anything came, if the queue is full or the model does not take the prompt.
    """
    loop, told = asyncio.get_running_loop(), asyncio.Queue()
    tell = lambda parts: loop.call_soon_threadsafe(told.put_nowait, parts)  # noqa: E731
    answer = asyncio.ensure_future(batcher.answer(replace(job, tell=tell)))
    answer.add_done_callback(told.put_nowait)
    sent = ""
    try:
        parts = await told.get()
        if parts is answer:
            answer.result()
        yield {"role": "assistant", "content": ""}, None
        while parts is not answer:
            if (text := text_of(parts)) != sent and text.startswith(sent):
                yield {"content": text[len(sent) :]}, None
                sent = text
            parts = await told.get()
        whole = answer.result()
        images = await run_in_threadpool(images_of, whole)
        yield {"content": text_of(whole.parts)[len(sent) :]} | images, whole
    finally:
        answer.cancel()
