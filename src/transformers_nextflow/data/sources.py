"""Hub datasets, Parquet, JSON lines, image folders and webdataset tars as one indexable table."""

import hashlib
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.exceptions import DatasetBuildError
from PIL import Image
from pyarrow.lib import ArrowException

BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".tar": "webdataset",
}
CAPTIONS = ("text", "caption", "prompt", "txt")  # columns that are captions where none is named


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Args:
        name: a Parquet, Arrow, JSON lines or tar file, a folder of such files or of images (captions in
            `metadata.jsonl` or `metadata.csv`, as `datasets`' image folder has it), or the id of a dataset on the Hub,
            which is downloaded.
        split: of the dataset.
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

    def load(self) -> datasets.Dataset:
        """The rows, images as encoded bytes and paths.

        Raises:
            FileNotFoundError: if the name is neither a file, a folder nor a dataset's id.
            ValueError: if a folder holds none of the known formats, or several, or a file is damaged.
        """
        path = Path(self.name)
        if path.exists():
            builder, files = _local_format(path)
            options: dict = {"data_files": {self.split: files}}
            if builder == "imagefolder":
                options = {"data_dir": str(path), "drop_labels": True}
            arguments: tuple = (builder,)
        elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.name):
            arguments, options = (self.name, self.config), {}
        else:
            raise FileNotFoundError(f"{self.name} is neither a file, a folder nor the id of a dataset on the Hub")
        try:
            return _undecoded(datasets.load_dataset(*arguments, split=self.split, **options))
        except (DatasetBuildError, ArrowException, tarfile.TarError) as error:
            raise ValueError(f"{self.name} cannot be read as a dataset: {error.__cause__ or error}") from error


def as_source(source: "Source | str | Path | datasets.Dataset") -> "Source | LoadedSource":
    """A source by its name, or of rows that are there already."""
    if isinstance(source, datasets.Dataset):
        return LoadedSource(source)
    return Source(str(source)) if isinstance(source, (str, Path)) else source


@dataclass(frozen=True)
class LoadedSource:
    """Rows that are there already; their pictures are in them."""

    table: datasets.Dataset
    root: None = None

    def load(self) -> datasets.Dataset:
        """See [`Source.load`]."""
        return _undecoded(self.table)


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
        images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        if len(images) != 1:
            raise ValueError(f"name the column of pictures, one of {names}")
        (image,) = images
    if caption is None:
        captions = [name for name in CAPTIONS if name in table.column_names]
        if not captions:
            raise ValueError(
                f"name the column of captions, one of {names}; in a folder of pictures, metadata.jsonl has them: "
                '{"file_name": "cat.png", "text": "a cat"}'
            )
        caption = captions[0]
    return {"image": image, "text": caption}


def _local_format(path: Path) -> tuple[str, list[str]]:
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"{path} must end in one of {', '.join(BUILDERS)}")
        return BUILDERS[path.suffix], [str(path)]
    files = sorted(entry for entry in path.rglob("*") if entry.is_file() and not entry.name.startswith("."))
    pictures = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    if any(entry.suffix.lower() in pictures for entry in files):
        return "imagefolder", []
    found: dict[str, list[str]] = {}
    for entry in files:
        if entry.suffix in BUILDERS and entry.name not in ("manifest.json", "dataset_info.json", "state.json"):
            found.setdefault(BUILDERS[entry.suffix], []).append(str(entry))
    if len(found) != 1:
        kinds = ", ".join(sorted(found)) or "none"
        raise ValueError(f"{path} must hold images, or files of one of {', '.join(BUILDERS)}; found: {kinds}")
    return next(iter(found.items()))


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """Image columns as encoded bytes and paths, so that one broken picture breaks no row."""
    for name, feature in table.features.items():
        if (encoded := _encoded(feature)) != feature:
            table = table.cast_column(name, encoded)
    return table


def _encoded(feature):
    """A feature of `datasets` whose images, however deep, are not decoded."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_encoded(feature.feature), feature.length)
    if isinstance(feature, dict):
        return {name: _encoded(each) for name, each in feature.items()}
    return feature


def content_hash(table: datasets.Dataset, rows: int = 64) -> str:
    """A hash of columns, number of rows and evenly spaced rows: whether a resumed run reads the same source."""
    digest = hashlib.sha256(json.dumps([table.column_names, len(table)]).encode())
    step = max(len(table) // rows, 1)
    for index in range(0, len(table), step):
        digest.update(repr(table[index]).encode())
    return digest.hexdigest()
