"""Ranks of a distributed run as forks of one process, which has imported all that they need once."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

SETTINGS = Path(__file__).parents[1] / "examples" / "accelerate"


def on_ranks(work: Callable[[], object], number: int = 2) -> None:
    """Does `work` on each rank, as `torchrun` starts it.

    Raises:
        SystemExit: with status 1 if a rank raises, after its traceback on standard error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(number):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(number)}
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)  # now and then the library's threads abort a process that ends after Python has
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        sys.exit(1)


def launched(name: str, *options: str) -> tuple:
    """What `accelerate launch` makes of a committed file of settings, and of options: its arguments, and the
    environment of the processes."""
    command = ["--config_file", str(SETTINGS / f"{name}.yaml"), "--main_process_port", "0", *options, "train.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return arguments, prepare_deepspeed_cmd_env(arguments)[1]
    return arguments, prepare_multi_gpu_env(arguments)
