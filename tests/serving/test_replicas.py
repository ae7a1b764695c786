"""The command `serve --ray`: two replicas on Ray Serve answer as the model itself does."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.serving.servers import client, draw, pictures_of, until

ray = pytest.importorskip("ray", reason="ray[serve] is not installed")
pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
from transformers_nextflow.serving.replicas import read_replicas  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture
def address(tiny_checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers_nextflow", "serve", "--model", str(tiny_checkpoint)]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen([*command, "--ray", "2", "--port", str(port)], env=environment)

    def answers() -> bool:
        assert process.poll() is None, "the server ended"
        try:
            return urlopen(f"http://127.0.0.1:{port}/health").status == 200
        except URLError:
            return False

    try:
        until(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def test_two_replicas_answer_the_same(address, tiny_model, tiny_processor):
    ray.init("auto")

    def states() -> dict:
        (deployed,) = ray.serve.status().applications["default"].deployments.values()
        return deployed.replica_states

    until(lambda: states() == {"RUNNING": 2})  # it answers from the first one on
    ray.shutdown()

    def ask(seed: int) -> list[bytes]:
        return pictures_of(client(address).images.generate(prompt="a star", extra_body={"seed": seed % 4}))

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, range(24)))
    expected = [draw(tiny_model, tiny_processor, "a star", seed=seed) for seed in range(4)]
    assert answers == [expected[number % 4] for number in range(24)]


def test_numbers_of_replicas():
    assert read_replicas("2") == (2, 2) and read_replicas("1-4") == (1, 4)
    for odd in ("0", "4-1", "-2", "two", "1-", ""):
        with pytest.raises(ValueError, match="--ray must be"):
            read_replicas(odd)
