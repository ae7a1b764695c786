"""Files and folders that are written whole or not at all, PNG among them; JSON files that are read whole or named."""

import json
import os
import shutil
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from io import BytesIO
from pathlib import Path
from uuid import uuid4

from PIL import Image

try:
    import fcntl
except ImportError:  # of systems without these locks
    fcntl = None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The descriptor of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _lock(descriptor: int) -> None:
    """Until it is closed; raises `OSError` where others hold it, or there are no locks."""
    if fcntl is None:
        raise OSError("there are no locks")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _neighbour(path: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """A hidden file or folder beside `path`, which nobody else writes and which is gone in the end; those that killed
    runs left go now.

    Whoever writes one holds a lock on it, which ends with the process; where there are no locks, what is left stays.
    """
    for left in path.parent.glob(f".{escape(path.name)}.*.partial"):
        with suppress(OSError), _opened(left) as descriptor:
            _lock(descriptor)
            _remove(left)
    unlocked = path.with_name(f".{path.name}.{uuid4().hex}")
    partial = unlocked.with_name(f"{unlocked.name}.partial")
    create(unlocked)
    with _opened(unlocked) as descriptor:
        with suppress(OSError):
            _lock(descriptor)
        unlocked.rename(partial)
        try:
            yield partial
        finally:
            _remove(partial)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a neighbouring file, which nobody else writes, bring it to disk, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _neighbour(path, Path.touch) as partial:
        write(partial)
        with _opened(partial) as written:
            os.fsync(written)
        os.replace(partial, path)
    with _opened(path.parent) as folder:
        os.fsync(folder)


def save_png(picture: Image.Image, path: Path) -> None:
    write_atomically(path, lambda partial: picture.save(partial, format="PNG"))


def png_base64(picture: Image.Image) -> str:
    """A PNG file in base64."""
    picture.save(file := BytesIO(), format="PNG")
    return b64encode(file.getvalue()).decode()


def read_text(path: Path) -> str:
    """A text in UTF-8; raises `ValueError` with the file's name for anything else."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def read_json(path: Path) -> dict:
    """A JSON object; raises `ValueError` with the file's name for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder beside `path`, which becomes `path` when everything in it is written.

    Raises:
        FileExistsError: if there is something at `path` already, or a file system.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; name a new folder")
    if path.is_mount():  # as volumes of containers are, which nothing can take the place of
        raise FileExistsError(f"{path} is the root of a file system; name a new folder in it")
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    with _neighbour(path, Path.mkdir) as partial:
        yield partial
        partial.rename(path)  # also onto an empty folder
