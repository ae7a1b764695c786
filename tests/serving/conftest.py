"""Real servers on free ports, asked by OpenAI's client."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.request import urlopen

import pytest

for needed in ("fastapi", "openai", "prometheus_client", "python_multipart", "uvicorn"):
    pytest.importorskip(needed, reason=f"the extra [serve] is not installed: {needed}")

import uvicorn  # noqa: E402

from transformers_nextflow.serving.app import create_app  # noqa: E402
from transformers_nextflow.serving.limits import Limits  # noqa: E402


@contextmanager
def running(model, processor, api_key: str | None = None, **limits: int) -> Iterator[str]:
    """A server, by its address."""
    app = create_app(model, processor, "tiny", Limits(**limits), api_key)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    socket = config.bind_socket()
    socket.listen(100)  # so that clients may come before it has started
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield "http://127.0.0.1:{}".format(socket.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def held(model) -> Iterator[threading.Event]:
    """A model that stands still before the next codes until the event is set."""
    let_go = threading.Event()

    def wait(module, args) -> None:
        let_go.wait()

    handle = model.code_head.register_forward_pre_hook(wait)
    try:
        yield let_go
    finally:
        let_go.set()
        handle.remove()


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


def metric(address: str, name: str) -> float:
    """A number of `/metrics`."""
    lines = urlopen(f"{address}/metrics").read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def accepted(address: str) -> int:
    """Requests that are drawn or wait."""
    return int(metric(address, "nextflow_requests_running") + metric(address, "nextflow_requests_waiting"))


@pytest.fixture(scope="package")
def address(tiny_model, tiny_processor) -> Iterator[str]:
    with running(tiny_model, tiny_processor, max_body=1, max_pixels=40_000, max_images=4) as address:
        yield address
