"""Processes that know nothing of this package, as forks of one that has imported the libraries once: to import them is
nearly all of what a process does before its work."""

import atexit
import functools
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 1800
IMPORTED = (
    *("torch", "torch._dynamo", "torch._inductor.config", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("torch.distributed.tensor", "torch.utils.data", "numpy", "scipy.stats", "sklearn.metrics", "pandas", "pyarrow"),
    *("PIL.Image", "safetensors.torch", "tokenizers", "httpx", "requests", "regex", "yaml", "typer", "rich.console"),
    *("huggingface_hub.hf_api", "accelerate.commands.launch", "datasets", "peft", "transformers.modeling_utils"),
    *("transformers.generation", "transformers.image_processing_utils", "transformers.processing_utils"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto", "transformers.trainer"),
    *("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.models.siglip.modeling_siglip"),
    *("transformers.models.vit.modeling_vit", "diffusers.pipelines.auto_pipeline", "trl.trainer.grpo_trainer"),
    *("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"),
)


class Process(NamedTuple):
    """One that goes on by itself; what it prints."""

    pid: int
    out: Path
    error: Path
    server: subprocess.Popen

    def wait(self) -> int:
        """The status by which it ends."""
        return _ask(self.server, {"wait": self.pid})


def start(*arguments: object, folder: Path, outputs: Path, **environment: str) -> Process:
    """`python ARGUMENTS` in `folder`; imports are of the package and of this repository.

    Its Hub is the stand-in, unless it is told another.
    """
    from tests.hub_stand_in import running  # not where this file is the server

    environment = running().environment | environment
    hub = {name: value for name, value in environment.items() - os.environ.items() if name.startswith("HF_")}
    environment = os.environ | {"PYTHONPATH": f"{packages()}{os.pathsep}{ROOT}"} | environment
    server, out, error = _server(frozenset(hub.items())), outputs / "out", outputs / "error"
    for file in (out, error):
        file.touch()
    request = {"arguments": list(map(str, arguments)), "folder": str(folder), "outputs": [str(out), str(error)]}
    return Process(_ask(server, request | {"environment": environment}), out, error, server)


def run(*arguments: object, folder: Path = ROOT, status: int = 0, **environment: str) -> str:
    """What a process prints that `start` begins.

    Raises:
        AssertionError: it ends by another status than `status`: with its standard error.
    """
    with tempfile.TemporaryDirectory() as outputs:
        process = start(*arguments, folder=folder, outputs=Path(outputs), **environment)
        ended = process.wait()
        assert ended == status, f"{ended}, not {status}\n{process.error.read_text()}"
        return process.out.read_text()


def run_fresh(script: str, folder: Path, **environment: str) -> str:
    """What a script prints, in `folder`, by someone who has the package installed."""
    return run("-c", script, folder=folder, **{"PYTHONPATH": packages()} | environment)


def packages() -> str:
    """The folder that the package is imported from: of this repository, or of an environment."""
    return str(Path(importlib.util.find_spec("transformers_nextflow").origin).parents[1])


@functools.cache
def _server(hub: frozenset[tuple[str, str]]) -> subprocess.Popen:
    """Ends where its standard input does, with this process. Libraries read as they are imported where the Hub is, and
    where its files are kept, so each Hub has its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "COVERAGE_"))}
    return subprocess.Popen(
        [sys.executable, __file__, *IMPORTED],
        env=inherited | {"OMP_NUM_THREADS": "1"} | dict(hub),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(server: subprocess.Popen, request: dict) -> int:
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _serve() -> dict:
    """Returns in a fork for each request, which it is."""
    for request in map(json.loads, sys.stdin):
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            return request
    sys.exit()


def _become(arguments: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    """Go on as `python ARGUMENTS`."""
    for number, path in enumerate((os.devnull, *outputs)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.alarm(SECONDS)
    if "COVERAGE_PROCESS_CONFIG" in environment:  # of `benchmarks.reached`: begins where a process does
        measuring = importlib.import_module("coverage").process_startup()
        measuring.switch_context(environment["PYTEST_CURRENT_TEST"])
    kind, *words = arguments
    first = {"-c": "", "-m": folder}.get(kind, str(Path(kind).parent))
    paths = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [first, *map(os.path.abspath, paths)]
    if kind == "-c":
        sys.argv = [kind, *words[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif kind == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def _main() -> None:
    status = 1

    @atexit.register  # the first one, so it runs last, before all modules are taken apart, which takes a second
    def end():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    for name in sys.argv[1:]:
        with suppress(ImportError):  # of an extra
            importlib.import_module(name)
    gc.freeze()  # a collection would copy all of its pages
    try:
        _become(**_serve())
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


if __name__ == "__main__":
    _main()
