"""Text and pictures to the model's inputs, chats to prompts, and outputs back to text and pictures."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput

from .configuration_nextflow import NextFlowConfig
from .image_processing_nextflow import NextFlowImageProcessor
from .interleaved import NextFlowInterleavedOutput
from .layout import MARKS, num_image_slots
from .remote_code import ProcessorBringsCode

QWEN_TOKENS = {"boi": "<|vision_start|>", "image": "<|image_pad|>", "eoi": "<|vision_end|>"}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- set content = message['content'] if message['content'] is not string
    else [{'type': 'text', 'text': message['content']}] -%}
{%- set body -%}
{%- for item in content -%}
{%- if item['type'] == 'text' -%}
{{- item['text'] -}}
{%- elif item['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}
{{- raise_exception('content items are of type text or image, got ' + item['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endset -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- body + '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- body + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if generation_mode == 'image' -%}
{{- '<|vision_start|>' -}}
{%- endif -%}
{%- endif -%}"""


class NextFlowProcessor(ProcessorBringsCode, ProcessorMixin):
    r"""
    An image processor and a text tokenizer.

    In a text, `<|vision_start|><|image_pad|><|vision_end|>` (Qwen's own tokens), or the middle one by itself, stands
    for one picture; the processor repeats the middle one as often as the picture's scale schedule asks.

    Args:
        image_processor ([`NextFlowImageProcessor`]), tokenizer:
            The tokenizer may name other tokens by its attributes `boi_token`, `image_token` and `eoi_token`.
        chat_template (`str`, *optional*):
            Default: Qwen's ChatML, without a system prompt of its own.
        condition_last_scale (`bool`, defaults to `True`):
            As in [`NextFlowConfig`], and to be the same as the model's.
    """

    auto_map = {"AutoProcessor": "processing_nextflow.NextFlowProcessor"} | NextFlowImageProcessor.auto_map
    text_kwargs = {"padding": True, "return_token_type_ids": False}

    def __init__(self, image_processor, tokenizer, chat_template=None, condition_last_scale=True):
        tokens = [getattr(tokenizer, f"{name}_token", None) or default for name, default in QWEN_TOKENS.items()]
        vocabulary = tokenizer.get_vocab()
        if absent := [token for token in tokens if token not in vocabulary]:
            raise ValueError(f"the text tokenizer must have the token {absent[0]}")
        self.boi_token, self.image_token, self.eoi_token = tokens
        self.boi_token_id, self.image_token_id, self.eoi_token_id = (vocabulary[token] for token in tokens)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"model_max_length of the tokenizer must be a number, got {tokenizer.model_max_length!r}")
        if not isinstance(chat_template, str | dict | None):
            raise ValueError(f"chat_template must be a text, got {chat_template!r}")
        self.condition_last_scale = condition_last_scale
        tokenizer.padding_side = "left"  # what generation reads, whatever the text tokenizer was saved with
        if chat_template is None:
            chat_template = CHAT_TEMPLATE
            for default, token in zip(QWEN_TOKENS.values(), tokens):
                chat_template = chat_template.replace(default, token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As of the library's processors; texts are padded on the left unless the call says `padding_side`."""
        processor = super().from_pretrained(*args, **kwargs)
        processor.tokenizer.padding_side = kwargs.get("padding_side", "left")
        return processor

    def check_fits(self, config: NextFlowConfig) -> None:
        """Raise a `ValueError` if a model of this configuration reads what the processor writes as something else."""
        for name in ("boi_token_id", "eoi_token_id", "image_token_id", "condition_last_scale"):
            own, of_model = getattr(self, name), getattr(config, name)
            if own != of_model:
                raise ValueError(f"{name} must be the model's, {of_model}, got {own} of the processor")
        images = self.image_processor
        table, of_model = images.schedule_table(), config.vq_config.schedule_table()
        if table.patch_size != of_model.patch_size or table.levels != of_model.levels or [*table] != [*of_model]:
            raise ValueError("patch_size, scale_schedules and levels of the image processor must be the model's")
        factor = images.rescale_factor
        mean, std = (images.image_mean, images.image_std) if images.do_normalize else (0.0, 1.0)
        black, white = ((value - np.asarray(mean)) / std for value in (0, 255 * factor))
        if not (np.allclose(black, -1) and np.allclose(white, 1)):
            got = f"rescale_factor {factor}, image_mean {mean} and image_std {std}"
            raise ValueError(f"the image processor must bring pictures to [-1, 1], as the model reads them, got {got}")

    @property
    def image_placeholder(self) -> str:
        """What stands for one picture in a text."""
        return self.boi_token + self.image_token + self.eoi_token

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        negative_text: TextInput | Sequence[TextInput] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Texts with pictures to model inputs.

        Args:
            images: pictures in the order of their placeholders, flat or a list for each text.
            text: one text or several.
            negative_text: null prompts for guidance, one for each text or one for all, with the same pictures.
            kwargs: of the text tokenizer and the image processor (`level`, ...). Texts are padded on the left, unless
                `padding_side`, or that of the text tokenizer, says otherwise.

        Returns:
            `input_ids`, `attention_mask`; with pictures `pixel_values`, `image_grid_hw`; with `negative_text`
            `negative_input_ids`, `negative_attention_mask`.

        Raises:
            ValueError: if a text is none, or placeholders and pictures differ in number, over all or for one text.
        """
        for name, given in (("text", text), ("negative_text", negative_text)):
            if given is not None:
                _check_texts(name, given)
        for name in ("videos", "audio"):
            if kwargs.get(name) is not None:
                raise ValueError(f"the processor reads texts and pictures, got {name}")
        if images is not None and _is_empty(images):
            images = None
        inputs = super().__call__(images=images, text=text, **kwargs)
        if negative_text is not None:
            texts = [text] if isinstance(text, str) else text
            negatives = [negative_text] * len(texts) if isinstance(negative_text, str) else negative_text
            marks, of_negatives = ([each.count(self.image_token) for each in some] for some in (texts, negatives))
            # marked tokens are no placeholders, and chats match anyway
            if marks != of_negatives and not kwargs.get("sanitize_control_tokens"):
                expected = f"one entry for each of {len(texts)} texts with its images, {marks}"
                raise ValueError(f"negative_text must have {expected} {self.image_token}, got {of_negatives}")
            negative_inputs = self._tokenize_negatives(negatives, inputs, **kwargs)
            inputs |= {f"negative_{name}": negative_inputs[name] for name in ("input_ids", "attention_mask")}
        return inputs

    def _tokenize_negatives(self, negatives: Sequence[str], inputs: BatchFeature, **kwargs) -> BatchFeature:
        """Null prompts with the placeholders of the pictures in `inputs`, which are not processed once more."""
        _, negatives, *_ = self.prepare_inputs_layout(text=negatives, **kwargs)
        if not kwargs.get("sanitize_control_tokens"):  # marked tokens are no placeholders
            self._count_placeholders(negatives)
        pictures = range(len(inputs.get("image_grid_hw", ())))
        negatives, _ = self.get_text_with_replacements(
            negatives, [self.replace_image_token(inputs, picture) for picture in pictures]
        )
        text_kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)["text_kwargs"]
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):  # of the processor's own
            text_kwargs.pop(name, None)
        negative_inputs = self.tokenizer(negatives, **text_kwargs)
        self._check_special_mm_tokens(negatives, negative_inputs, modalities=["image"])
        return negative_inputs

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """As of the library; where `<image>` stands alone, as transformers' pipelines write it, the placeholder."""
        images, text, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if text is not None and not kwargs.get("sanitize_control_tokens"):  # marked tokens are no placeholders
            boi, image, eoi = map(re.escape, (self.boi_token, self.image_token, self.eoi_token))
            alone = re.compile(f"(?<!{boi}){image}(?!{eoi})")
            text = [alone.sub(lambda match: self.image_placeholder, sample) for sample in text]
        return images, text, *others

    def validate_inputs(self, images=None, text=None, **kwargs):
        super().validate_inputs(images=images, text=text, **kwargs)
        counts = self._count_placeholders(text or ())
        is_nested = isinstance(images, (list, tuple)) and all(isinstance(entry, (list, tuple)) for entry in images)
        if counts and is_nested and counts != (given := [len(entry) for entry in images]):
            raise ValueError(f"the texts hold {counts} placeholders {self.image_placeholder}, images {given}")

    def _count_placeholders(self, texts: Sequence[str]) -> list[int]:
        counts = [text.count(self.image_placeholder) for text in texts]
        for row, count in enumerate(counts):
            if texts[row].count(self.image_token) != count:
                raise ValueError(f"{self.image_token} stands outside {self.image_placeholder} in text {row}")
        return counts

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        grid = image_inputs["image_grid_hw"][image_idx].tolist()
        schedule = self.image_processor.schedule_table().by_grid(grid)
        return self.image_token * num_image_slots(schedule, self.condition_last_scale)

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        generation_mode: str = "text",
        negative_prompt: str | Sequence[str] | None = None,
        add_generation_prompt: bool | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        processor_kwargs: dict | None = None,
        **kwargs,
    ) -> BatchFeature | str | list[str]:
        """A chat, or a batch of chats, to the prompt of an answer in text or of a picture.

        Args:
            conversation: messages `{"role": ..., "content": ...}`; a content is a string or a list of
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (or `"path"`, `"url"`).
            generation_mode: `"text"`; `"image"`: the prompt ends in `<boi>`; or `"interleaved"`. With the last two
                come null prompts for guidance: the same chat without the user's texts, the last of which becomes
                `negative_prompt`.
            negative_prompt: one for all chats, or one for each.
            add_generation_prompt: by default only after chats whose last message is not the assistant's.
            processor_kwargs: passed to [`~NextFlowProcessor.__call__`], e.g. `{"level": "256"}`.
            kwargs: as in `ProcessorMixin.apply_chat_template`.

        Returns:
            What [`~NextFlowProcessor.__call__`] returns; without `return_dict` the ids; without `tokenize` the prompt.

        Raises:
            ValueError: if a message is none, the template cannot render it, or some chats of a batch end in an answer.
        """
        _check_chats(conversation)
        if add_generation_prompt is None:
            add_generation_prompt = not kwargs.get("continue_final_message") and _asks(conversation)
        if kwargs.get("continue_final_message"):
            chats, is_batched = self._normalize_conversations(conversation)  # new lists
            for *_, last in chats:
                parts = _items(last)
                if parts and parts[-1]["type"] == "image":  # the library cuts a chat behind its last text
                    last["content"].append({"type": "text", "text": ""})
            conversation = chats if is_batched else chats[0]
        for name in ("tools", "documents"):
            if kwargs.get(name) and name not in self._resolve_chat_template(chat_template):
                raise ValueError(f"the chat template shows no {name}: give one that does, or none of them")
        if generation_mode not in ("text", "image", "interleaved"):
            raise ValueError(f'generation_mode must be "text", "image" or "interleaved", got {generation_mode!r}')
        if generation_mode == "text" and negative_prompt is not None:
            raise ValueError('negative_prompt guides pictures: it needs generation_mode="image" or "interleaved"')
        render = {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt, **kwargs}
        processor_kwargs = {"add_special_tokens": False, **(processor_kwargs or {})}  # the template writes them
        if generation_mode == "image":
            if not add_generation_prompt:
                raise ValueError('generation_mode="image" needs add_generation_prompt=True')
            if "generation_mode" not in self._resolve_chat_template(chat_template):
                raise ValueError("the chat template must open a picture where generation_mode is 'image'")
            render["generation_mode"] = generation_mode
        try:
            if generation_mode != "text" and tokenize:
                processor_kwargs["negative_text"] = self._render_null_prompts(conversation, negative_prompt, **render)
            return super().apply_chat_template(
                conversation,
                tokenize=tokenize,
                return_dict=return_dict,
                return_tensors=return_tensors,
                processor_kwargs=processor_kwargs,
                **render,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template cannot render the chat: {error}") from error
        except ValueError as error:
            if self.image_token in str(error):
                raise ValueError(f"{error}; {MARKS}") from error
            raise

    def _normalize_conversations(self, conversation):
        """As of the library, which leaves out what is None in messages; here in their items too, where rows of
        `datasets` have every key."""
        conversations, is_batched = super()._normalize_conversations(conversation)
        for message in (message for chat in conversations for message in chat):
            if not isinstance(message.get("content"), str | None):
                items = [{key: value for key, value in item.items() if value is not None} for item in _items(message)]
                message["content"] = items
        return conversations, is_batched

    def apply_next_turn(
        self, output: NextFlowInterleavedOutput, conversation: list[dict] | list[list[dict]], **kwargs
    ) -> BatchFeature:
        """New messages after an interleaved answer, for [`~NextFlowForConditionalGeneration.next_turn`].

        Args:
            output: the turn before.
            conversation: the new messages alone, or a batch of them.
            kwargs: as in [`~NextFlowProcessor.apply_chat_template`].

        Returns:
            The inputs of the new messages, which begin by ending the answer where it was cut short.

        Raises:
            ValueError: if there is not one chat for each row, or no token of the chat template ends an answer.
        """
        _check_chats(conversation)
        chats, _ = self._normalize_conversations(conversation)
        if len(chats) != len(output.sequences):
            raise ValueError(f"the output has {len(output.sequences)} rows, got {len(chats)} chats")
        # after an answer, so that what the template begins a chat with does not come again
        answered = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        rendered = self.apply_chat_template(answered, chat_template=kwargs.get("chat_template"), tokenize=False)
        before, _, after = rendered.rpartition(".")
        before, after = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
        end = next((token for token in after if token in self.tokenizer.added_tokens_decoder), None)
        if end is None:
            raise ValueError("the chat template must end an answer by a token of its own")
        count, eos = before.count(end) + 1, self.tokenizer.eos_token_id
        inputs = self.apply_chat_template(
            [[*answered, *chat] for chat in chats], generation_mode="interleaved", **kwargs
        ).to(output.sequences.device)
        last = [int(ids[mask][-1]) for ids, mask in zip(output.sequences, output.attention_mask.bool())]
        is_cut = torch.tensor([[token not in (end, eos)] for token in last], device=output.sequences.device)
        # a null prompt lacks the answer's text, and so its end too
        for prefix, lacks_end in (("", is_cut), ("negative_", torch.ones_like(is_cut))):
            ids, mask = inputs[prefix + "input_ids"], inputs[prefix + "attention_mask"].bool()
            is_end = (ids == end) & mask
            place = is_end.cumsum(dim=1)
            mask &= (place >= count) & (lacks_end | ~is_end | (place > count))
            first = int(mask.any(dim=0).int().argmax())
            inputs[prefix + "input_ids"], inputs[prefix + "attention_mask"] = ids[:, first:], mask[:, first:].long()
        return inputs

    def _render_null_prompts(
        self, conversation, negative_prompt, chat_template=None, sanitize_control_tokens: bool = False, **kwargs
    ) -> list[str]:
        conversations, _ = self._normalize_conversations(conversation)
        if negative_prompt is None or isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt or ""] * len(conversations)
        _check_texts("negative_prompt", negative_prompt)
        if len(negative_prompt) != len(conversations):
            raise ValueError(
                f"negative_prompt must be one text, or one for each of {len(conversations)} chats, "
                f"got {len(negative_prompt)}"
            )
        nulls = [_without_user_texts(chat, prompt) for chat, prompt in zip(conversations, negative_prompt)]
        if sanitize_control_tokens:
            template = self._resolve_chat_template(chat_template)
            nulls, *_ = self.tokenizer._mark_chat_inputs(template, nulls, None, None, {}, True, False)
        return super().apply_chat_template(nulls, chat_template=chat_template, tokenize=False, **kwargs)

    def post_process_multimodal_output(
        self,
        generated_outputs,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        pictures: Sequence[torch.Tensor] = (),
        **kwargs,
    ) -> list:
        """Ids to texts; in image mode pixels, as `model.decode_image_tokens` gives them, to pictures; in interleaved
        mode an output, with `pictures=model.decode_images(output.image_codes, output.image_grid_hw)`, to each row's
        answer as a list of texts and pictures in order."""
        if generation_mode == "image":
            return self.post_process_image(generated_outputs)
        if generation_mode == "interleaved":
            return self._split_answers(generated_outputs, pictures, skip_special_tokens)
        return super().post_process_multimodal_output(
            generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode=generation_mode, **kwargs
        )

    def _split_answers(
        self, output: NextFlowInterleavedOutput, pictures: Sequence[torch.Tensor], skip_special_tokens: bool
    ) -> list[list[str | Image.Image]]:
        expected = int((output.sequences == self.boi_token_id).sum())
        if len(pictures) != expected:
            raise ValueError(f"the output holds {expected} pictures, got {len(pictures)}")
        unread, answers = iter(pictures), []
        for ids, mask in zip(output.sequences.tolist(), output.attention_mask.tolist()):
            start = output.prompt_length
            for _ in range(ids[:start].count(self.boi_token_id)):
                next(unread)
            kept = [token for token, is_kept in zip(ids[start:], mask[start:]) if is_kept]
            kept = [token for token in kept if token not in (self.image_token_id, self.eoi_token_id)]
            parts: list[str | Image.Image] = []
            for is_picture, run in groupby(kept, lambda token: token == self.boi_token_id):
                if is_picture:
                    parts += [self.post_process_image(next(unread)[None])[0] for _ in run]
                else:
                    parts.append(self.tokenizer.decode(list(run), skip_special_tokens=skip_special_tokens))
            answers.append([part for part in parts if part != ""])
        return answers

    def post_process_image(self, pixel_values: torch.Tensor | Sequence[torch.Tensor]) -> list[Image.Image]:
        """(B, 3, H, W) pixels in [-1, 1], or (3, H, W) ones of any sizes -> pictures."""
        return self.image_processor.postprocess(pixel_values)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Placeholders and patches of pictures of `(height, width)` pixels."""
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(**kwargs)["images_kwargs"]
        level = images_kwargs.get("level", self.image_processor.level)
        schedules = [self.image_processor.schedule_of(height, width, level) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[num_image_slots(schedule, self.condition_last_scale) for schedule in schedules],
            num_image_patches=[schedule.lengths[-1] for schedule in schedules],
        )


def user_message(text: str, images: Sequence[ImageInput] = ()) -> dict:
    """A message of a chat that asks: pictures, then a text."""
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def _check_texts(name: str, texts: str | Sequence[str]) -> None:
    """Raise a `ValueError` for anything but a text or some texts."""
    listed = [texts] if isinstance(texts, str) else texts
    if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"{name} must be a string or a list of strings, got {texts!r}")
    try:
        "".join(listed).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be Unicode text, got {texts!r}: {error}") from None


def _check_chats(conversation: list[dict] | list[list[dict]]) -> None:
    """Raise a `ValueError` for anything but messages of texts and pictures."""
    is_batch = isinstance(conversation, (list, tuple)) and isinstance(next(iter(conversation), None), (list, tuple))
    for chat in conversation if is_batch else [conversation]:
        if not isinstance(chat, (list, tuple)) or not chat:
            raise ValueError(f"a chat must be a list of messages, got {chat!r}")
        for message in chat:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"a message must have a role and a content, got {message!r}")
            if not isinstance(content := message.get("content"), str | list | tuple | None):  # tool calls have none
                raise ValueError(f"the content of a message must be a text or a list of items, got {content!r}")
            for item in _items(message):
                kind = item.get("type") if isinstance(item, Mapping) else None
                is_known = kind in ("text", "image", "image_url")
                if not is_known or (kind == "text" and not isinstance(item.get("text"), str)):
                    expected = '{"type": "text", "text": ...} or of the type "image"'
                    raise ValueError(f"content items are {expected}, got {item!r}")


def _asks(conversation: list[dict] | list[list[dict]]) -> bool:
    """Whether an answer is to follow, where the last message is not one."""
    chats = [conversation] if isinstance(conversation[0], Mapping) else conversation
    asks = {chat[-1]["role"] != "assistant" for chat in chats}
    if len(asks) > 1:
        raise ValueError("some chats end in a message of the assistant and some do not: say add_generation_prompt")
    return asks.pop()


def _items(message: dict) -> list[dict]:
    """A message's texts and pictures."""
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _is_empty(images) -> bool:
    return isinstance(images, (list, tuple)) and all(map(_is_empty, images))


def _without_user_texts(conversation: list[dict], negative_prompt: str) -> list[dict]:
    """The same chat and pictures, without the user's texts but for `negative_prompt` in the last message's place."""
    of_user = [index for index, message in enumerate(conversation) if message["role"] == "user"]
    if not of_user:
        raise ValueError("the prompt of a picture needs a message of the user")
    chat = list(conversation)
    for index in of_user:
        content, replacement = _items(chat[index]), negative_prompt if index == of_user[-1] else ""
        texts = [place for place, item in enumerate(content) if item["type"] == "text"]
        kept = [item for item in content if item["type"] != "text"]
        place = texts[-1] - len(texts) + 1 if texts else len(kept)
        kept.insert(place, {"type": "text", "text": replacement})
        chat[index] = chat[index] | {"content": kept}
    return chat
