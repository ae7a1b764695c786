"""Hub datasets, Parquet, JSON lines, image folders and webdataset tars as one indexable table."""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import datasets
from PIL import Image
from transformers.utils import logging

from .documents import DocumentReader, PictureSource, Skipped

logger = logging.get_logger(__name__)

BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".tar": "webdataset",
}
NO_ROWS = ("manifest.json", "dataset_info.json", "dataset_dict.json", "state.json")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of image folders
CAPTIONS = ("text", "caption", "prompt", "txt")  # columns that are captions where none is named
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What `datasets` takes for a split in the names of files and folders."""


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Args:
        name: a Parquet, Arrow, JSON lines or tar file, a folder of such files or of images (captions in
            `metadata.jsonl` or `metadata.csv`, as `datasets`' image folder has it), or the id of a dataset on the Hub,
            which is downloaded.
        split: of the dataset, or parts of splits as `datasets` has them, `train[:90%]`. Files and folders belong to
            the split that their names say, such as `test-00000.parquet` or `val2017/`; names of pictures say none.
            Where no name says any, all is `train`.
        config: name of a dataset's configuration on the Hub.
    """

    name: str
    split: str = "train"
    config: str | None = None

    @property
    def root(self) -> str | None:
        """The folder that relative image paths start from; datasets of the Hub have none."""
        path = Path(self.name)
        if not path.exists():
            return None
        return str((path if path.is_dir() else path.parent).resolve())

    def load(self, decode: bool = False) -> datasets.Dataset:
        """The rows; images as encoded bytes and paths, so that one broken picture breaks no row, or `decode`d.

        Raises:
            FileNotFoundError: if the name is neither a file, a folder nor a dataset's id.
            ValueError: if a folder holds none of the known formats, or several, or files that belong to no split
                beside some that do; if there is no such split or it has no rows, or a file is damaged.
        """
        path = Path(self.name)
        if path.exists():
            if self.config is not None:
                raise ValueError(f"config names a part of a dataset on the Hub, {path} is here: got {self.config!r}")
            builder, files = self.local_files()
        elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.name):
            raise FileNotFoundError(f"{self.name} is neither a file, a folder nor the id of a dataset on the Hub")
        try:
            if not path.exists():
                table = datasets.load_dataset(self.name, self.config, split=self.split)
            elif builder == "webdataset":
                table = _of_tars(files, self.split)
            else:
                options = {"drop_labels": True} if builder == "imagefolder" else {}
                patterns = {split: [escape(str(each)) for each in members] for split, members in files.items()}
                table = datasets.load_dataset(builder, data_files=patterns, split=self.split, **options)
                if builder == "imagefolder":
                    self._count_left_out(files, len(table))
        except OSError:
            raise
        except Exception as error:  # of `datasets`, its readers and their libraries, each with its own
            cause = error.__cause__ or error
            message = f"{self.name} cannot be read as a dataset: {str(cause) or 'it has no rows'}"
            raise ValueError(message) from error
        if not len(table):
            raise ValueError(f"{self.name} has no rows of the split {self.split}")
        return _with_images(table, decode)

    def _count_left_out(self, files: dict[str, list[Path]], num_rows: int) -> None:
        pictures = sum(file.name not in METADATA for members in files.values() for file in members)
        if num_rows < pictures and self.split in files:  # not a part of a split
            logger.warning(f"{pictures - num_rows} of {pictures} pictures of {self.name} are not in its metadata")

    def local_files(self) -> tuple[str, dict[str, list[Path]]]:
        """The format of a file or folder, and its files of each split that is asked for."""
        path = Path(self.name)
        by_split: dict[str | None, list[Path]] = {}
        if path.is_file():
            if path.suffix not in BUILDERS:
                raise ValueError(f"{path} must end in one of {', '.join(BUILDERS)}")
            builder = BUILDERS[path.suffix]
            by_split = {"train": [path], _split_of(Path(path.name), builder): [path]}
        else:
            builder, files = _format_of(path)
            saved = (path / "dataset_dict.json").is_file()  # by `DatasetDict.save_to_disk`
            for file in files:
                inside = file.relative_to(path)
                by_split.setdefault(inside.parts[0] if saved else _split_of(inside, builder), []).append(file)
            if not any(by_split):
                by_split = {"train": files}
        known = ", ".join(split for split in by_split if split)
        if path.is_dir() and None in by_split:
            raise ValueError(f"{path} has files of the splits {known}, and of none, such as {by_split[None][0]}")
        asked = {}
        for name in filter(None, re.split(r"\[[^]]*\]|\+", self.split)):
            split = name if name in by_split else SPLIT_WORDS.get(name)
            if split not in by_split:
                raise ValueError(f"{path} has no split {name}, but {known}")
            asked[name] = by_split[split]
        return builder, asked


def as_source(source: "Source | str | Path | datasets.Dataset") -> "Source | LoadedSource":
    """A source by its name, or of rows that are there already."""
    if isinstance(source, datasets.Dataset):
        return LoadedSource(source)
    if isinstance(source, (dict, datasets.IterableDataset)):
        kind = type(source).__name__
        raise ValueError(f"rows must be a datasets.Dataset, got a {kind}: choose a split, and stream none of it")
    return Source(str(source)) if isinstance(source, (str, Path)) else source


@dataclass(frozen=True)
class LoadedSource:
    """Rows that are there already; their pictures are in them."""

    table: datasets.Dataset
    root: None = None

    def load(self) -> datasets.Dataset:
        """See [`Source.load`]; Python's own types whatever format is set, unless it is a transform of rows."""
        is_transform = self.table.format["type"] == "custom"
        return _with_images(self.table if is_transform else self.table.with_format(None), decode=False)


def task_of(table: datasets.Dataset) -> tuple[str, dict[str, str]]:
    """The task and columns of [`DocumentReader`] that rows are for: chats, or pictures and their captions."""
    return ("chat", {}) if "messages" in table.column_names else ("text-to-image", find_columns(table))


def find_columns(table: datasets.Dataset, image: str | None = None, caption: str | None = None) -> dict[str, str]:
    """The columns of pictures and of captions, as [`DocumentReader`] takes them.

    Raises:
        ValueError: naming the columns that there are, where they are not plain.
    """
    names = ", ".join(table.column_names)
    if image is None:
        image = _picture_column(table)
    if caption is None:
        captions = [name for name in CAPTIONS if name in table.column_names]
        if not captions:
            raise ValueError(
                f"name the column of captions, one of {names}; in a folder of pictures, metadata.jsonl has them: "
                '{"file_name": "cat.png", "text": "a cat"}'
            )
        caption = captions[0]
    return {"image": image, "text": caption}


def _picture_column(table: datasets.Dataset) -> str:
    images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise ValueError(f"name the column of pictures, one of {', '.join(table.column_names)}")
    return images[0]


def _format_of(folder: Path) -> tuple[str, list[Path]]:
    """What a folder holds, and its files."""
    files, seen = [], {folder.resolve()}
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = {name: Path(place, name).resolve() for name in folders if not name.startswith(".")}
        folders[:] = [name for name, target in inner.items() if target not in seen]  # links may go round in a circle
        seen.update(inner.values())
        files += [Path(place, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in files if file.is_file())
    pictures = _picture_extensions()
    if any(entry.suffix.lower() in pictures for entry in files):
        return "imagefolder", [e for e in files if e.suffix.lower() in pictures or e.name in METADATA]
    found: dict[str, list[Path]] = {}
    for entry in files:
        if entry.suffix in BUILDERS and entry.name not in NO_ROWS:
            found.setdefault(BUILDERS[entry.suffix], []).append(entry)
    if len(found) != 1:
        kinds = ", ".join(sorted(found)) or "none"
        raise ValueError(f"{folder} must hold images, or files of one of {', '.join(BUILDERS)}; found: {kinds}")
    return next(iter(found.items()))


def _split_of(path: Path, builder: str) -> str | None:
    """The split that the name of a folder says, or a word in that of a file of rows."""
    for folder in path.parts[:-1]:
        if split := SPLIT_WORDS.get(folder.rstrip("-._ 0123456789")):
            return split
    words = [] if builder == "imagefolder" else re.split("[-._ 0-9]+", path.name)
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _of_tars(files: dict[str, list[Path]], split: str) -> datasets.Dataset:
    """Webdataset tars: a row for each key, its members by their extensions, `None` where there is no such member.

    Pictures of several formats, of which no key has two, are one column, named as webdataset's: `jpg;png`.
    The reader of `datasets` refuses tars whose keys have different members, as one without its caption.
    """
    kinds: set[frozenset[str]] = set()  # of keys
    for path in dict.fromkeys(path for paths in files.values() for path in paths):
        with tarfile.open(path) as tar:
            kinds.update(map(frozenset, _members(tar).values()))
    column_of = {field: field for kind in kinds for field in kind}
    extensions = _picture_extensions()
    formats: dict[str, set[str]] = {}  # of pictures, by what precedes them
    for field in column_of:
        role, _, extension = field.rpartition(".")
        if f".{extension}" in extensions:
            formats.setdefault(role, set()).add(field)
    for fields in formats.values():
        if all(len(fields & kind) < 2 for kind in kinds):
            column_of |= dict.fromkeys(fields, ";".join(sorted(fields)))
    columns = sorted(set(column_of.values()))
    pictures = {column_of[field] for fields in formats.values() for field in fields}
    features = {name: datasets.Value("string") for name in ("__key__", "__url__")}
    features |= {
        name: datasets.Image(decode=False) if name in pictures else datasets.Value("binary") for name in columns
    }

    def rows(paths: list[str]) -> Iterator[dict]:
        for path in paths:
            with tarfile.open(path) as tar:
                for key, members in _members(tar).items():
                    read = {column_of[field]: tar.extractfile(member).read() for field, member in members.items()}
                    read |= {name: {"bytes": read[name], "path": None} for name in pictures & read.keys()}
                    yield {"__key__": key, "__url__": path, **dict.fromkeys(columns), **read}

    tables = {}
    for name, paths in files.items():
        state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        tables[name] = datasets.Dataset.from_generator(
            rows,
            datasets.Features(features),
            gen_kwargs={"paths": [str(path) for path in paths]},
            fingerprint=hashlib.sha256(repr((state, features)).encode()).hexdigest(),
        )
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(table) for name, table in tables.items()})
    return datasets.concatenate_datasets([tables[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _members(tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """The files of each key of a webdataset tar by their extensions: all that follows the first dot of a name."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        if member.isfile() and (match := re.fullmatch(r"((?:.*/|)[^./]+)\.([^/]+)", member.name)):
            samples.setdefault(match[1], {})[match[2].lower()] = member
    return samples


def _picture_extensions() -> set[str]:
    return {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}


def _with_images(table: datasets.Dataset, decode: bool) -> datasets.Dataset:
    """The table with its images, however deep in a column, decoded or not."""

    def changed(feature):
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=decode)
        if isinstance(feature, datasets.List):
            return datasets.List(changed(feature.feature), feature.length)
        if isinstance(feature, datasets.LargeList):
            return datasets.LargeList(changed(feature.feature))
        if isinstance(feature, dict):
            return {name: changed(each) for name, each in feature.items()}
        return feature

    for name, feature in table.features.items():
        if (other := changed(feature)) != feature:
            table = table.cast_column(name, other)
    return table


class Pictures(Sequence):
    """The pictures of a source alone, encoded or by their paths; of a folder of pictures without reading any.

    Raises:
        ValueError: where it is not plain which column holds them; see also [`Source.load`].
    """

    def __init__(self, source: Source):
        self._paths: list[str] | None = None
        if Path(source.name).is_dir():
            builder, files = source.local_files()
            if builder == "imagefolder":
                found = [file for members in files.values() for file in members if file.name not in METADATA]
                self._paths = list(map(str, found))
                return
        self._table = source.load()
        self._column, self._reader = _picture_column(self._table), DocumentReader("text-to-image", root=source.root)

    def __len__(self) -> int:
        return len(self._table if self._paths is None else self._paths)

    def __getitem__(self, index: int) -> PictureSource:  # type: ignore[override]  # no slices
        """
        Raises:
            ValueError: where there is no picture.
        """
        if self._paths is not None:
            return self._paths[index]
        try:
            return self._reader.image(self._table[index][self._column])
        except Skipped as skip:
            raise ValueError(str(skip)) from skip


def content_hash(table: datasets.Dataset, rows: int = 64) -> str:
    """A hash of columns, number of rows and evenly spaced rows: whether a resumed run reads the same source."""
    digest = hashlib.sha256(json.dumps([table.column_names, len(table)]).encode())
    step = max(len(table) // rows, 1)
    for index in range(0, len(table), step):
        digest.update(repr(table[index]).encode())
    return digest.hexdigest()
