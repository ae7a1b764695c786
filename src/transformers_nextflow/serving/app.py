"""The web application: OpenAI's paths over a [`Studio`] and a [`Batcher`]."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import Annotated

from anyio import CapacityLimiter, create_task_group, to_thread
from fastapi import FastAPI, Form, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from ..image_processing_nextflow import size_of
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..processing_nextflow import NextFlowProcessor, user_message
from ..rewriting import Rewriting
from ..utils.files import png_base64
from .batching import Batcher
from .bodies import Route
from .chats import message_of, read_chat
from .errors import RequestError, add_error_handlers, body_of
from .gate import Gate
from .jobs import Answer, Job, Studio
from .limits import Limits
from .metrics import Metrics
from .pictures import check_pictures, read_mask, read_picture
from .schemas import ChatRequest, EditRequest, ImageRequest
from .streams import deltas_of

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
    rewriters = CapacityLimiter(limits.max_queue)  # threads of their own: a chat model that hangs takes no others

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with create_task_group() as group:
            for _ in range(limits.max_batches):
                group.start_soon(batcher.work)
            yield  # ends after the last answer
            group.cancel_scope.cancel()

    app = FastAPI(title="transformers-nextflow", lifespan=lifespan, redirect_slashes=False)
    app.router.route_class = Route
    app.add_middleware(Gate, api_key=api_key, max_bytes=limits.max_body * 2**20, metrics=metrics)
    add_error_handlers(app)

    def check_model(asked: str | None) -> None:
        if asked not in (None, name):
            raise RequestError(f"this server has {name}, got {asked!r}", "model", 404, "model_not_found")

    async def drawn(job: Job, **of_each: str) -> Response:
        """OpenAI's response of pictures."""
        answer = await batcher.answer(job)
        width, height = answer.parts[0].size
        pictures = [part for part in answer.parts if not isinstance(part, str)]
        data = await run_in_threadpool(lambda: [{"b64_json": png_base64(each), **of_each} for each in pictures])
        response = {
            "created": int(time.time()),
            "data": data,
            "output_format": "png",
            "size": f"{width}x{height}",
            "seed": job.seed,
            "usage": usage_of(answer, "input_tokens", "output_tokens"),
        }
        return JSONResponse(response)

    @app.post("/v1/images/generations")
    async def generate(asked: ImageRequest) -> Response:
        """Pictures for a prompt."""
        check_model(asked.model)
        try:
            prompt = await to_thread.run_sync(rewriting, asked.prompt, limiter=rewriters)
        except ConnectionError as error:
            raise RequestError(str(error), "prompt", 502) from error
        revised = {} if prompt == asked.prompt else {"revised_prompt": prompt}
        return Later(drawn(studio.picture_job(asked, [user_message(prompt)], "prompt"), **revised))

    @app.post("/v1/images/edits")
    async def edit(asked: Annotated[EditRequest, Form(media_type="multipart/form-data")]) -> Response:
        """Pictures made of others by an instruction."""
        check_model(asked.model)
        uploads = [*asked.image, *asked.images]
        if not uploads:
            raise RequestError("give at least one file", "image")
        check_pictures(len(uploads), limits, "image")
        files = [await content_of(upload) for upload in uploads]
        mask = None if asked.mask is None else await content_of(asked.mask)

        def read() -> Job:
            first = read_picture(files[0], limits.max_pixels, "image")
            pictures = [studio.fit(first, "image"), *(studio.read_picture(file, "image") for file in files[1:])]
            kept = None
            if mask is not None:
                over = read_picture(mask, limits.max_pixels, "mask")
                kept = read_mask(over, first.size, size_of(pictures[0]))
            return studio.picture_job(asked, [user_message(asked.prompt, pictures)], "prompt", kept)

        return Later(drawn(await run_in_threadpool(read)))

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest) -> Response:
        """An answer in text, a picture, or both in turn; in one piece, or as server-sent events."""
        check_model(asked.model)
        if (idle := asked.without_effect()) is not None:
            raise RequestError(f"has no effect with modalities {asked.modalities} and stream {asked.stream}", idle)

        def read() -> Job:
            messages = read_chat(asked.messages, studio)
            if set(asked.modalities) == {"image"}:
                return studio.picture_job(asked, messages, "messages")
            return studio.answer_job(asked, messages)

        job = await run_in_threadpool(read)
        if not asked.stream:
            return Later(written(job))
        return Later(streamed(job, asked.stream_options is not None and asked.stream_options.include_usage))

    def head_of(job: Job, kind: str) -> dict:
        own = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        return own | {"model": name, "seed": job.seed}

    async def written(job: Job) -> Response:
        """An answer in one piece."""
        answer = await batcher.answer(job)
        message = await run_in_threadpool(message_of, answer)
        return JSONResponse(head_of(job, "chat.completion") | choices(answer, message=message) | chat_usage(answer))

    async def streamed(job: Job, tells_usage: bool) -> Response:
        """An answer as it is written."""
        head, deltas = head_of(job, "chat.completion.chunk"), deltas_of(batcher, job)
        opening, _ = await anext(deltas)  # what is refused has a status of its own

        async def events() -> AsyncIterator[str]:
            yield event(head | choices(None, delta=opening))
            try:
                async with aclosing(deltas):
                    async for delta, answer in deltas:
                        yield event(head | choices(answer, delta=delta))
            except Exception as error:
                yield event(body_of(error))
                raise
            if tells_usage:
                yield event(head | {"choices": []} | chat_usage(answer))
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

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


def event(chunk: dict) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def choices(answer: Answer | None, **said: dict) -> dict:
    """OpenAI's form of what a chat is answered, where `None` is not yet the end."""
    reason = None if answer is None else "stop" if answer.is_whole else "length"
    return {"choices": [{"index": 0, **said, "finish_reason": reason, "logprobs": None}]}


def chat_usage(answer: Answer) -> dict[str, dict]:
    return {"usage": usage_of(answer, "prompt_tokens", "completion_tokens")}


def usage_of(answer: Answer, prompt: str, written: str) -> dict[str, int]:
    """What an answer cost, by OpenAI's two pairs of names."""
    counts = {prompt: answer.prompt_tokens, written: answer.completion_tokens}
    return counts | {"total_tokens": sum(counts.values())}


async def content_of(upload: UploadFile) -> bytes:
    """A file of a form, which is then let go."""
    content = await upload.read()
    await upload.close()
    return content


class Later(Response):
    """A response that is waited for as long as its client waits; the request, and with it what its body held, is let
    go before."""

    def __init__(self, response: Awaitable[Response]):
        super().__init__()
        self.response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response, gone = asyncio.ensure_future(self.response), asyncio.create_task(client_is_gone(receive))
        await asyncio.wait([response, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not response.done():
            response.cancel()
            raise RequestError("the client is gone", status=CLIENT_IS_GONE)
        await response.result()(scope, receive, send)


async def client_is_gone(receive: Receive) -> None:
    """Returns when nobody reads the answer any more."""
    while (await receive())["type"] != "http.disconnect":
        pass
