"""Who is let in, who leaves, and what is still answered at the end."""

import asyncio
import gc
import http.client
import json
import os
import re
import signal
import socket
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch
from PIL import Image
from requests import PreparedRequest, Request

from tests import fresh
from tests.serving.servers import (
    accepted,
    client,
    data_url,
    draw,
    held,
    metric,
    openai,
    photo,
    pictures_of,
    png,
    running,
    until,
)
from transformers_nextflow.cli import Address
from transformers_nextflow.serving.batching import Batcher
from transformers_nextflow.serving.errors import RequestError
from transformers_nextflow.serving.jobs import Answer, Job
from transformers_nextflow.serving.limits import Limits
from transformers_nextflow.serving.metrics import Metrics


def test_who_waits_holds_pictures_in_the_size_that_the_model_reads(tiny_model, tiny_processor):
    files = {"image": png(photo(410, 405))}
    url = {"type": "image_url", "image_url": {"url": data_url(photo(410, 405))}}
    with (
        running(tiny_model, tiny_processor) as address,
        held(tiny_model.code_head) as (let_go, _),
        ThreadPoolExecutor(3) as threads,
    ):
        asked = client(address)
        drawn = [threads.submit(asked.images.generate, prompt="a star")]
        until(lambda: accepted(address) == 1)
        drawn.append(threads.submit(asked.images.edit, prompt="a star", **files))
        messages = [{"role": "user", "content": [url]}]
        drawn.append(threads.submit(asked.chat.completions.create, model="tiny", messages=messages, max_tokens=1))
        until(lambda: accepted(address) == 3)
        gc.collect()
        sizes = [each.size for each in gc.get_objects() if isinstance(each, Image.Image)]
        assert (410, 405) not in sizes and sizes.count((24, 24)) >= 2
        let_go.set()
        for each in drawn:
            each.result()


def test_who_waits_holds_no_files(tiny_model, tiny_processor):
    """Neither as they came, nor as base64."""
    picture = photo(500, 500)
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture)}}]}]
    images, chats = "http://x/v1/images", "http://x/v1/chat/completions"
    bodies = [
        Request("POST", f"{images}/generations", json={"prompt": "a star"}).prepare(),
        Request("POST", f"{images}/edits", data={"prompt": "a star"}, files={"image": png(picture)}).prepare(),
        Request("POST", chats, json={"model": "tiny", "messages": messages, "max_tokens": 1}).prepare(),
    ]

    def status_of(each: PreparedRequest) -> int:
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("POST", each.path_url, each.body, dict(each.headers))
        return connection.getresponse().status

    with (
        running(tiny_model, tiny_processor) as address,
        ThreadPoolExecutor(3) as threads,
        held(tiny_model.code_head) as (let_go, _),
    ):
        asked = [threads.submit(status_of, bodies[0])]
        until(lambda: accepted(address) == 1)
        tracemalloc.start()
        asked += [threads.submit(status_of, each) for each in bodies[1:]]
        until(lambda: accepted(address) == 3)
        gc.collect()
        in_memory, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert in_memory < len(png(picture)) < most
        let_go.set()
        assert [each.result() for each in asked] == [200, 200, 200]


def test_a_full_queue_refuses_and_a_client_that_leaves_frees_its_place(tiny_model, tiny_processor):
    def waiting() -> float:
        return metric(address, "nextflow_requests_waiting")

    with (
        running(tiny_model, tiny_processor, max_queue=1) as address,
        held(tiny_model.code_head) as (let_go, _),
        ThreadPoolExecutor(2) as threads,
    ):
        asked = client(address).images
        drawn = threads.submit(asked.generate, prompt="a star", extra_body={"seed": 1})
        until(lambda: metric(address, "nextflow_requests_running") == 1)
        leaving = http.client.HTTPConnection(address.removeprefix("http://"))
        body = json.dumps({"prompt": "a circle"})
        leaving.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        until(lambda: waiting() == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            asked.generate(prompt="a square")
        assert refused.value.code == "queue_full" and refused.value.response.headers["Retry-After"] == "1"
        leaving.close()
        until(lambda: waiting() == 0)
        late = threads.submit(asked.generate, prompt="a square", extra_body={"seed": 2})
        until(lambda: waiting() == 1)
        let_go.set()
        assert pictures_of(drawn.result()) == draw(tiny_model, tiny_processor, "a star", seed=1)
        assert pictures_of(late.result()) == draw(tiny_model, tiny_processor, "a square", seed=2)
        assert metric(address, "nextflow_batch_requests_sum") == 2
        for status, count in ((200, 2), (429, 1), (499, 1)):
            name = f'nextflow_requests_total{{path="/v1/images/generations",status="{status}"}}'
            until(lambda name=name, count=count: metric(address, name) == count)


def question(seed: int) -> dict:
    """A chat whose answer depends on its seed."""
    asked = [{"role": "user", "content": "what?"}]
    return {"model": "tiny", "messages": asked, "max_tokens": 5, "temperature": 1.0, "seed": seed}


PATHS = ["images/generations", "chat/completions"]


def asking(address: str, path: str, seed: int):
    """An answer's pictures or text."""
    if path == PATHS[0]:
        return pictures_of(client(address).images.generate(prompt="a star", extra_body={"seed": seed}))
    return client(address).chat.completions.create(**question(seed)).choices[0].message.content


@contextmanager
def visitor(address: str, path: str) -> Iterator[http.client.HTTPConnection]:
    """One who asks for a picture, or for a stream of text, and leaves when this ends."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    body = {"prompt": "a star", "seed": 0} if path == PATHS[0] else question(0) | {"stream": True}
    connection.request("POST", f"/v1/{path}", json.dumps(body), {"Content-Type": "application/json"})
    yield connection
    connection.close()


@pytest.mark.parametrize("path", PATHS)
def test_who_leaves_in_the_middle_of_a_batch_harms_nobody(tiny_model, tiny_processor, path):
    heads = dict(zip(PATHS, (tiny_model.code_head, tiny_model.lm_head)))
    (other,) = {*PATHS} - {path}
    with running(tiny_model, tiny_processor) as address, ThreadPoolExecutor(3) as threads:
        alone = [asking(address, path, seed) for seed in (1, 2)]
        with held(heads[other]) as (start, _), held(heads[path], after=1) as (let_go, calls):
            before = threads.submit(asking, address, other, 5)
            until(lambda: metric(address, "nextflow_requests_running") == 1)
            with visitor(address, path) as leaving:
                until(lambda: metric(address, "nextflow_requests_waiting") == 1)
                staying = [threads.submit(asking, address, path, seed) for seed in (1, 2)]
                until(lambda: metric(address, "nextflow_requests_waiting") == 3)
                start.set()
                until(lambda: len(calls) == 2)
                assert before.result() and metric(address, "nextflow_requests_running") == 3
                if path != PATHS[0]:
                    assert leaving.getresponse().readline().startswith(b"data: ")
            until(lambda: metric(address, f'nextflow_request_seconds_count{{path="/v1/{path}"}}') == 3)
            let_go.set()
            assert [each.result() for each in staying] == alone


@pytest.mark.parametrize("path", PATHS)
def test_nothing_goes_on_for_nobody(tiny_model, tiny_processor, path):
    """Whoever leaves alone ends what is drawn or written; the next one finds the place free."""
    head = {PATHS[0]: tiny_model.code_head, PATHS[1]: tiny_model.lm_head}[path]
    with running(tiny_model, tiny_processor) as address:
        with held(head, after=1) as (let_go, calls):
            with visitor(address, path):
                until(lambda: len(calls) == 2)
            until(lambda: metric(address, f'nextflow_request_seconds_count{{path="/v1/{path}"}}') == 1)
            let_go.set()
            until(lambda: metric(address, "nextflow_requests_running") == 0)
            assert len(calls) == 2 and asking(address, path, 1) and len(calls) > 2


def test_a_batch_that_failed_takes_no_memory_from_those_after_it():
    """Nor does a request alone, which memory may have failed for."""
    held, alive = [], []

    def run(jobs) -> list[Answer]:
        alive.append([memory() is not None for memory in held])
        memory = torch.zeros(8)  # of all that is drawn
        held.append(weakref.ref(memory))
        try:
            if len(jobs) > 1 or jobs[0].seed == 0:
                raise ValueError("out of memory")
        except ValueError as error:
            raise RequestError(str(error)) from error
        return [Answer([], True, 0, len(memory))]

    async def ask() -> None:
        batcher = Batcher(run, Limits(), Metrics())
        jobs = [Job([], "image", {}, seed, "", 1, "prompt") for seed in range(3)]
        asked = [asyncio.ensure_future(batcher.answer(job)) for job in jobs]
        await asyncio.sleep(0)  # all wait
        work = asyncio.ensure_future(batcher.work())
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(outcome, RequestError) for outcome in outcomes] == [True, False, False]
        await batcher.answer(jobs[1])
        work.cancel()

    asyncio.run(ask())
    assert alive == [[False] * len(each) for each in alive] and len(alive) == 5


HELD = """
import sys, time
from pathlib import Path
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers_nextflow.cli import main
from transformers_nextflow.modeling_nextflow import NextFlowTextModel

def wait(module, args):
    while isinstance(module, NextFlowTextModel) and not Path("let go").exists():
        time.sleep(0.01)

register_module_forward_pre_hook(wait)
sys.exit(main(sys.argv[1:]))
"""


def test_what_was_accepted_is_answered_after_sigterm(tiny_checkpoint, tiny_model, tiny_processor, tmp_path):
    command = ["-c", HELD, "serve", "--model", tiny_checkpoint, "--port", 0, "--max-batch", 4]
    server, seeds = fresh.start(*command, folder=tmp_path, outputs=tmp_path), range(6)
    with ThreadPoolExecutor(len(seeds)) as threads, ExitStack() as after_a_failure:
        after_a_failure.callback(os.kill, server.pid, signal.SIGKILL)
        until(lambda: "http://" in server.error.read_text())
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", server.error.read_text())[1])
        address = f"http://127.0.0.1:{port}"
        asked = [
            threads.submit(client(address).images.generate, prompt="a star", extra_body={"seed": seed})
            for seed in seeds
        ]
        until(lambda: accepted(address) == len(seeds))
        kept = http.client.HTTPConnection("127.0.0.1", port)
        assert "connection" not in health(kept)
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.3)  # the signal is seen
        assert health(kept)["connection"] == "close"  # one connection is still answered, for the last time
        assert health(http.client.HTTPConnection("127.0.0.1", port))["connection"] == "close"  # and who comes anew
        until(lambda: not is_open(port))
        (tmp_path / "let go").touch()
        for seed, future in zip(seeds, asked):
            assert pictures_of(future.result()) == draw(tiny_model, tiny_processor, "a star", seed=seed)
        assert server.wait() in (0, -signal.SIGTERM)
        after_a_failure.pop_all()


def health(connection: http.client.HTTPConnection) -> dict[str, str]:
    """The headers of an answer."""
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert response.status == 200 and response.read()
    return dict(response.getheaders())


def is_open(port: int) -> bool:
    with socket.socket() as visitor:
        return visitor.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "option, value",
    [("--port", 65536), ("--port", -1), ("--max-queue", 0), ("--max-body", -1), ("--api-key", "a b")],
)
def test_odd_command_lines(console, option, value):
    status, _, err = console("serve", option, value)
    assert status == 2 and option in err


def test_the_last_port_and_any_visible_key_may_be_named():
    assert Address(port=65535, api_key="!k~").port == 65535
