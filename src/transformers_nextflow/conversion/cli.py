"""`transformers-nextflow convert`."""

from importlib import import_module

from typer import Typer

from ..utils.commands import forward

app = Typer(no_args_is_help=True)


def _main(module: str):
    return lambda: import_module(f".{module}", __package__).main


TEXT = "A text model and a vision tokenizer as a NextFlow to be trained, or its text decoder out again."
forward(app, "language-model", TEXT, _main("language_model"))
forward(app, "tokenflow", "TokenFlow's vision tokenizers, or a new one around a SigLIP2.", _main("tokenflow"))
