"""The web application: OpenAI's paths over a [`Studio`] and a [`Batcher`]."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from anyio import create_task_group
from fastapi import FastAPI, Form, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..processing_nextflow import NextFlowProcessor, user_message
from ..rewriting import Rewriting
from .batching import Batcher
from .chats import message_of, read_chat
from .errors import RequestError, add_error_handlers
from .gate import Gate
from .jobs import Answer, Job, Studio
from .limits import Limits
from .metrics import Metrics
from .pictures import check_pictures, read_picture, to_base64
from .schemas import ChatRequest, EditRequest, ImageRequest

CLIENT_IS_GONE = 499
"""nginx's status; nobody reads it but the metrics."""


def create_app(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
    rewriting: Rewriting | None = None,
) -> FastAPI:
    """A server of one model.

    Args:
        name: what clients call the model.
        limits: what it takes; see [`Limits`].
        api_key: what paths under `/v1` ask for; None lets everyone in.
        rewriting: of the prompts of `/v1/images/generations`.
    """
    limits, rewriting = limits or Limits(), rewriting or Rewriting()
    studio, metrics = Studio(model, processor, limits), Metrics()
    batcher = Batcher(studio.run, limits, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with create_task_group() as group:
            group.start_soon(batcher.work)
            yield  # ends after the last answer
            group.cancel_scope.cancel()

    app = FastAPI(title="transformers-nextflow", lifespan=lifespan)
    app.add_middleware(Gate, api_key=api_key, max_bytes=limits.max_body * 2**20, metrics=metrics)
    add_error_handlers(app)

    def check_model(asked: str | None) -> None:
        if asked not in (None, name):
            raise RequestError(f"this server has {name}, got {asked!r}", "model", 404, "model_not_found")

    async def drawn(request: Request, job: Job) -> dict:
        """OpenAI's response of pictures."""
        answer = await answer_of(request, batcher, job)
        width, height = answer.parts[0].size
        return {
            "created": int(time.time()),
            "data": await run_in_threadpool(
                lambda: [{"b64_json": to_base64(part)} for part in answer.parts if not isinstance(part, str)]
            ),
            "output_format": "png",
            "size": f"{width}x{height}",
            "seed": job.seed,
            "usage": {
                "input_tokens": answer.prompt_tokens,
                "output_tokens": answer.completion_tokens,
                "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            },
        }

    @app.post("/v1/images/generations")
    async def generate(request: Request, asked: ImageRequest) -> dict:
        """Pictures for a prompt."""
        check_model(asked.model)
        try:
            prompt = await run_in_threadpool(rewriting, asked.prompt)
        except ConnectionError as error:
            raise RequestError(str(error), "prompt", 502) from error
        response = await drawn(request, studio.picture_job(asked, [user_message(prompt)], "prompt"))
        if prompt != asked.prompt:
            response["data"] = [each | {"revised_prompt": prompt} for each in response["data"]]
        return response

    @app.post("/v1/images/edits")
    async def edit(request: Request, asked: Annotated[EditRequest, Form(media_type="multipart/form-data")]) -> dict:
        """Pictures made of others by an instruction."""
        check_model(asked.model)
        uploads = [*asked.image, *asked.images]
        if not uploads:
            raise RequestError("give at least one file", "image")
        check_pictures(len(uploads), limits, "image")
        files = [await upload.read() for upload in uploads]
        mask = None if asked.mask is None else await asked.mask.read()

        def read() -> Job:
            pictures = [read_picture(file, limits.max_pixels, "image") for file in files]
            over = None if mask is None else read_picture(mask, limits.max_pixels, "mask")
            return studio.picture_job(asked, [user_message(asked.prompt, pictures)], "prompt", over)

        return await drawn(request, await run_in_threadpool(read))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> dict:
        """An answer in text, a picture, or both in turn."""
        check_model(asked.model)
        if (idle := asked.without_effect()) is not None:
            raise RequestError(f"has no effect on answers of the modalities {asked.modalities}", idle)

        def read() -> Job:
            messages = read_chat(asked.messages, limits)
            if set(asked.modalities) == {"image"}:
                return studio.picture_job(asked, messages, "messages")
            return studio.answer_job(asked, messages)

        job = await run_in_threadpool(read)
        answer = await answer_of(request, batcher, job)
        choice = {"index": 0, "finish_reason": "stop" if answer.is_whole else "length", "logprobs": None}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "choices": [choice | {"message": await run_in_threadpool(message_of, answer)}],
            "seed": job.seed,
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            },
        }

    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict:
        own = {"id": name, "object": "model", "created": started, "owned_by": "transformers-nextflow"}
        return {"object": "list", "data": [own]}

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/metrics")
    async def tell_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def answer_of(request: Request, batcher: Batcher, job: Job) -> Answer:
    """Wait for a job's answer as long as its client does."""
    ticket = batcher.submit(job)
    gone = asyncio.create_task(client_is_gone(request))
    waited: list[asyncio.Future] = [ticket.answer, gone]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not ticket.answer.done():
        batcher.leave(ticket)
        raise RequestError("the client is gone", status=CLIENT_IS_GONE)
    return ticket.answer.result()


async def client_is_gone(request: Request) -> None:
    """Returns when nobody reads the answer any more."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
