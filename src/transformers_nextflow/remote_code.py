"""What saved folders bring for those who have not imported the package.

`auto_map` in the JSON files, and beside them one small file for each module it names, which imports the classes of the
installed package: so `trust_remote_code=True` works, from a folder and from the Hub, whoever saved it.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from .utils.files import write_atomically

CODE = '"""Loads the class of the installed package `transformers-nextflow`."""\n\nfrom {} import {}\n'


def write_code(folder: str | Path, auto_map: Mapping[str, str]) -> None:
    """Write the files that `auto_map`, of names of Auto classes to `"module.class"`, names."""
    for module, references in groupby(sorted(set(auto_map.values())), lambda reference: reference.split(".")[0]):
        text = CODE.format(__package__, ", ".join(reference.split(".")[1] for reference in references))
        write_atomically(Path(folder, f"{module}.py"), lambda partial, text=text: partial.write_text(text))


class HasCode:
    """A class whose code is the installed package's, wherever a name of it was loaded from."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str | None = None) -> None:
        """Nothing: with this, loading by `trust_remote_code` lets a later save copy the package's own files."""


class LibraryModel(HasCode, PreTrainedModel):
    """What transformers is to know of this package's models."""

    def post_init(self):
        super().post_init()
        # parts bring names of classes that stand elsewhere in their library; wrapping policies look each one up
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @classmethod
    def is_custom_code(cls) -> bool:
        # for custom code that writes parameters in place, loading leaves out `_init_weights` of modules without
        # parameters of their own, such as SigLIP2's attention; here all goes through `transformers.initialization`
        return False


class BringsCode(HasCode):
    """Of what is saved by itself: the files of its `auto_map` go into the folder."""

    auto_map: ClassVar[dict[str, str]]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        """As of the library's classes."""
        saved = super().save_pretrained(save_directory)
        write_code(save_directory, self.auto_map)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved


class ConfigBringsCode(BringsCode):
    """Of a configuration, in whose file `auto_map` stands; one that is part of another's does not repeat it."""

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)  # of the file it came from, which the Hub's loader makes name its repository
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict:
        return super().to_diff_dict() | {"auto_map": self.auto_map}


class ProcessorBringsCode(BringsCode):
    """Of a processor, in whose file `auto_map` stands."""

    def to_dict(self) -> dict:
        return super().to_dict() | {"auto_map": self.auto_map}
