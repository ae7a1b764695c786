"""Console commands by typer, with options that come in groups."""

import json
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Signature, signature
from typing import Annotated, Any, Literal, get_type_hints

from typer import Context, Exit, Option, Typer

from .lazy import needing_extra

Model = Annotated[str | None, Option(metavar="NAME", help="Local folder or Hub id; default: the repository's.")]
Level = Annotated[str | None, Option(help="Level of the scale schedules, e.g. 256, 512, 1024.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, Option(help="Of the weights; default: as they are stored.")
]
Json = Annotated[bool, Option("--json", help="Print JSON.")]


def command(app: Typer) -> Callable[[Callable], Callable]:
    """Makes a function a command of `app`.

    A parameter annotated by a dataclass stands for a group of options, one for each field, which is `Annotated` with
    typer's `Option`; the help shows them together under the first line of the dataclass's docstring.
    """

    def register(function: Callable) -> Callable:
        hints: dict[str, Any] = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        parameters = []
        for name, parameter in signature(function).parameters.items():
            parameters += _options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]

        @wraps(function)
        def run(**given):
            for name, group in groups.items():
                given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
            return function(**given)

        keywords = [each.replace(kind=each.KEYWORD_ONLY) for each in parameters]
        run.__signature__ = Signature(keywords)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command()(run)
        return function

    return register


def forward(app: Typer, name: str, about: str, load: Callable[[], Callable[[Sequence[str]], int | None]]) -> None:
    """Makes a program with a parser of its own a command of `app`.

    Args:
        about: a line of help.
        load: imports the program, a function of its words that returns an exit status or nothing.
    """
    words = {"allow_extra_args": True, "ignore_unknown_options": True}

    @app.command(name, help=about, add_help_option=False, context_settings=words)
    def run(context: Context) -> None:
        with needing_extra("train", name):
            program = load()
        raise Exit(program(context.args) or 0)


def _options(group: type) -> list:
    """The fields of an option group as parameters of a command."""
    parameters = []
    for name, hint in get_type_hints(group, include_extras=True).items():
        option = copy(hint.__metadata__[0])  # others may share it
        option.rich_help_panel = group.__doc__.splitlines()[0].rstrip(".")
        parameter = signature(group).parameters[name]
        parameters.append(parameter.replace(annotation=Annotated[hint.__origin__, option]))
    return parameters


def print_figures(figures: dict, as_json: bool, *lines: str) -> None:
    """Figures as JSON, where null is no finite number, or `lines` for reading, by default a line for each figure."""
    if as_json:
        strict = json.loads(json.dumps(figures), parse_constant=lambda _: None)
        print(json.dumps(strict, indent=2))
        return
    width = max(map(len, figures))
    values = {name: f"{value:,}" if isinstance(value, int) else value for name, value in figures.items()}
    print(*(lines or (f"{name:<{width}}  {value}" for name, value in values.items())), sep="\n")
