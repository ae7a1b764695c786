"""What a text tokenizer needs to speak of pictures: three tokens of its own, and a place in its chat template."""

from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from ..processing_nextflow import QWEN_TOKENS
from ..utils.loading import naming

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

# Around a model's own template: pictures in contents become their tokens, and a picture is opened where it is asked
# for. Nothing around it changes the whitespace of its texts.
PICTURES = """\
{%- set chat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if content is defined and content is not none and content is not string -%}
{%- set body -%}
{%- for item in content -%}
{%- if item['type'] == 'text' -%}
{{- item['text'] -}}
{%- elif item['type'] == 'image' -%}
{{- '<boi><image><eoi>' -}}
{%- else -%}
{{- raise_exception('content items are of type text or image, got ' + item['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endset -%}
{%- set message = dict(message, content=body) -%}
{%- endif -%}
{%- set chat.messages = chat.messages + [message] -%}
{%- endfor -%}
{%- set messages = chat.messages %}
"""
OPENING = "{{ '<boi>' if add_generation_prompt and generation_mode == 'image' else '' }}"


class ImageTokens(NamedTuple):
    """The text tokens that stand around and for pictures."""

    boi: str
    eoi: str
    image: str


def load_text_tokenizer(folder: str | Path, chosen: ImageTokens | None = None) -> tuple:
    """A folder's text tokenizer with tokens of pictures, its [`ImageTokens`], and the ids of those it did not have.

    Args:
        chosen: special tokens of the tokenizer. Without: those that it names itself, or Qwen's, which are added if it
            has none of them.

    Raises:
        ValueError: if a chosen token is no special token, or one that texts need, or some of Qwen's are there and some
            are not.
    """
    with naming(f"the text tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    named = {name: getattr(tokenizer, f"{name}_token", None) or default for name, default in QWEN_TOKENS.items()}
    tokens = chosen or ImageTokens(**named)
    known = tokenizer.get_added_vocab()
    absent = [token for token in tokens if token not in known]
    if len(set(tokens)) < 3:
        raise ValueError(f"<boi>, <eoi> and <image> must be three tokens, got {', '.join(tokens)}")
    taken = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, *CHATML_TOKENS}
    if used := [token for token in tokens if token in taken]:
        raise ValueError(f"texts need {', '.join(used)}, choose other tokens for pictures")
    if chosen and absent:
        raise ValueError(
            f"{', '.join(absent)} must be special tokens of the text tokenizer, which has {', '.join(known) or 'none'}"
        )
    if absent and len(absent) < 3:
        raise ValueError(f"the text tokenizer lacks {', '.join(absent)}: choose its tokens for pictures")
    if chosen or absent:
        names = {f"{name}_token": token for name, token in tokens._asdict().items()}
        tokenizer = AutoTokenizer.from_pretrained(folder, model_specific_special_tokens=names)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, whatever it is
    return tokenizer, tokens, [tokenizer.convert_tokens_to_ids(token) for token in absent]


def chat_template_of(tokenizer, tokens: ImageTokens) -> str | None:
    """The tokenizer's own chat template with pictures in it, which it has already where it comes out of a NextFlow;
    `None`, the processor's ChatML, for a tokenizer without one that has ChatML's tokens.

    Raises:
        ValueError: if it has neither, or its pictures are of other tokens.
    """
    if tokenizer.chat_template is None:
        if set(CHATML_TOKENS) <= tokenizer.get_added_vocab().keys():
            return None
        raise ValueError(
            f"the text tokenizer has neither a chat template nor the tokens {' and '.join(CHATML_TOKENS)} of the "
            f"default one: put a chat_template.jinja beside it"
        )
    template = tokenizer.get_chat_template().removesuffix("\n")
    if "generation_mode" in template:
        if others := [token for token in tokens if token not in template]:
            raise ValueError(f"the chat template has tokens of pictures, {', '.join(others)} not among them")
        return template
    before, after = PICTURES, OPENING
    for name, token in tokens._asdict().items():
        before, after = (part.replace(f"<{name}>", token) for part in (before, after))
    return before + template + after
