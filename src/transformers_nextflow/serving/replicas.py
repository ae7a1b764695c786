"""The same application over several GPUs or machines, on Ray Serve: `serve --ray`. Needs `ray[serve]`."""

import re
import signal
from collections.abc import Callable

import torch
from fastapi import FastAPI
from ray import serve

from .limits import Limits


def read_replicas(text: str) -> tuple[int, int]:
    """`"2"`, or `"1-4"` for as many as are busy, to the least and the most.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if least > most:
        raise ValueError(f"--ray must be a number of replicas such as 2, or 1-4, got {text!r}")
    return least, most


def run_replicas(build: Callable[[], FastAPI], replicas: str, limits: Limits, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        build: loads a model and gives its application, in every replica.
        replicas: see [`read_replicas`]; each takes a GPU where there is one.
        limits: of one replica, whose own queue answers 429 before Ray's holds anybody back.
    """
    least, most = read_replicas(replicas)
    scaling = {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": limits.max_batch * limits.max_batches,
    }
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="transformers-nextflow",
        max_ongoing_requests=2 * (limits.max_queue + limits.max_batch * limits.max_batches),
        ray_actor_options={"num_gpus": int(torch.cuda.is_available())},
        autoscaling_config=scaling,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which Ray Serve ends on in good order
    serve.start(http_options={"host": host, "port": port})
    serve.run(deployment.bind(), blocking=True)
