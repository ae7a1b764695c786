"""Which checkpoint a training goes on from, also after it was killed while it wrote one."""

import re
from dataclasses import field
from pathlib import Path

from ..utils.files import read_json

STATE = "trainer_state.json"  # the Trainer writes it last


def output_field():
    """The field `output_dir` of training arguments, which all commands call `--output`."""
    return field(default=None, metadata={"help": "folder of checkpoints and of the result", "aliases": ["--output"]})


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """What to hand to `Trainer.train`, which would take a checkpoint in parts for a whole one.

    Args:
        resume_from_checkpoint: as of `Trainer.train`: a folder, or `True` for the newest whole one in `output_dir`; a
            command line says "True".

    Returns:
        The folder; `None` to begin anew.

    Raises:
        ValueError: if that folder is no whole checkpoint, or there is none.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint not in (True, "True"):
        _check_whole(Path(resume_from_checkpoint))
        return str(resume_from_checkpoint)
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True):
        try:
            _check_whole(path)
        except ValueError:
            continue
        return str(path)
    raise ValueError(f"there is no whole checkpoint in {output_dir}: start without resume_from_checkpoint")


def _check_whole(checkpoint: Path) -> None:
    """Raise a `ValueError` for anything but a checkpoint that was written to its end."""
    if not (checkpoint / STATE).is_file():
        raise ValueError(f"{checkpoint} is no whole checkpoint: it has no {STATE}")
    read_json(checkpoint / STATE)
