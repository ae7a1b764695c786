"""`transformers-nextflow convert`."""

from typing import Annotated

import torch
from typer import Argument, Option, Typer

from ..utils.commands import Dtype, command
from . import language_model as text_decoders
from . import tokenflow as vision_tokenizers
from .text_tokenizer import ImageTokens

app = Typer(no_args_is_help=True)


@command(app)
def language_model(
    folders: Annotated[list[str], Argument(metavar="TEXT VQ OUT", help="With --back: NEXTFLOW OUT.")],
    back: Annotated[bool, Option("--back", help="The text decoder of a NextFlow as a Qwen2 instead.")] = False,
    boi: Annotated[str | None, Option(metavar="TOKEN", help="Begins a picture; default: Qwen's.")] = None,
    eoi: Annotated[str | None, Option(metavar="TOKEN", help="Ends it.")] = None,
    image: Annotated[str | None, Option(metavar="TOKEN", help="Stands for its codes.")] = None,
    dtype: Dtype = None,
    max_shard_size: Annotated[str, Option(metavar="SIZE", help="Of a file; without a unit: bytes.")] = "5GB",
) -> None:
    """A text model and a vision tokenizer as a NextFlow to be trained, or its text decoder out again."""
    tokens = [token for token in (boi, eoi, image) if token is not None]
    if len(folders) != (2 if back else 3):
        raise ValueError("give TEXT VQ OUT, or --back NEXTFLOW OUT")
    if back and (dtype or tokens):
        raise ValueError("--back keeps every tensor as it is: no --dtype, --boi, --eoi or --image")
    if len(tokens) in (1, 2):
        raise ValueError("name all of --boi, --eoi and --image, or none")
    size = int(max_shard_size) if max_shard_size.isdecimal() else max_shard_size
    if back:
        text_decoders.convert_back(*folders, max_shard_size=size)
    else:
        text, vq, output = folders
        image_tokens = ImageTokens(*tokens) if tokens else None
        text_decoders.convert(text, vq, output, image_tokens, dtype and getattr(torch, dtype), size)
    print(folders[-1])


@command(app)
def tokenflow(
    files: Annotated[list[str], Argument(metavar="CHECKPOINT.pt OUT", help="With --from-siglip2: OUT.")],
    from_siglip2: Annotated[
        str | None, Option(metavar="DIR", help="A new tokenizer around this SigLIP2-naflex folder instead.")
    ] = None,
    encoder_heads: Annotated[
        int | None, Option(metavar="N", help="Of the semantic encoder, if not the released.")
    ] = None,
    decoder_heads: Annotated[
        int | None, Option(metavar="N", help="Of the semantic decoder, if not the released.")
    ] = None,
) -> None:
    """TokenFlow's vision tokenizers, or a new one around a SigLIP2."""
    *checkpoint, output = files
    if len(checkpoint) != (1 if from_siglip2 is None else 0):
        raise ValueError("give CHECKPOINT.pt OUT, or --from-siglip2 DIR OUT")
    if from_siglip2 is None:
        model = vision_tokenizers.convert(checkpoint[0], encoder_heads, decoder_heads)
    else:
        model = vision_tokenizers.from_siglip2(from_siglip2)
    vision_tokenizers.save(model, output)
    print(f"{output}  {model.num_parameters():,} parameters")
