"""`generate`: text by next token (transformers' own loop), images by next scale (NextFlow sec. 2.2), and both in turn.

What is asked is in `prompts.py` and `image_generation.py`; what runs, in `prefill.py`, `contexts.py` and `drawing.py`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.processing_utils import Unpack

from .drawing import Forced, NextFlowOutputWithPictures, Sampler, draw_pictures
from .image_codes import ImageCodesMixin
from .image_generation import ImageControls, ImageGenerationConfig, ImageGenerationKwargs
from .interleaved import NextFlowInterleavedOutput, answer
from .layout import final_grids
from .lora import check_no_learned_prompt, check_not_switched_on
from .prefill import read_prompts
from .prompts import Picture, Prompts, flat_images
from .sampling import RowGenerators
from .scales import Grid, ScaleSchedule, ScheduleTable
from .text_generation import TextGenerationMixin

IMAGE_KEYWORDS = ImageGenerationKwargs.__annotations__.keys()
OF_TEXTS_TOO = {"temperature", "top_k", "top_p"}
"""Which of these an interleaved call means for its text."""

OF_TRANSFORMERS = signature(GenerationMixin.generate)
AFTER_INPUTS = OF_TRANSFORMERS.replace(parameters=[*OF_TRANSFORMERS.parameters.values()][2:])
"""What of transformers' `generate` may be given by place."""

ABOUT_TEXT = {
    *vars(GenerationConfig()),
    *("generation_config", "logits_processor", "stopping_criteria", "tokenizer", "assistant_model"),
    *("assistant_tokenizer", "synced_gpus", "prefix_allowed_tokens_fn"),
} - {
    *("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("output_attentions", "output_hidden_states", "output_scores"),
}
"""Arguments of `generate` that pipelines pass whatever the mode, and that say nothing about pictures."""


@dataclass
class NextFlowImageOutput(NextFlowOutputWithPictures):
    """Generated pictures.

    Attributes:
        sequences: (B, codes) ids, text rows + code, scale by scale.
        image_grid_hw: (B, 2) final grids, which say the size that was drawn.
        logits: per scale, (B, l, V) float32, guided, before temperature and filters.
    """

    sequences: torch.LongTensor | None = None
    image_grid_hw: torch.LongTensor | None = None
    logits: tuple[torch.FloatTensor, ...] | None = None


class NextFlowGenerationMixin(ImageCodesMixin, TextGenerationMixin):
    """Adds images to transformers' generation."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        generation_mode: str = "text",
        image_generation: Mapping | ImageGenerationConfig | None = None,
        **kwargs: Unpack[ImageGenerationKwargs],
    ):
        """Generate text, pictures, or both in turn.

        Args:
            inputs: (B, L) prompt ids; also as `input_ids`. What follows by place is transformers', as a
                `generation_config`.
            generation_mode: `"text"`, with every argument of transformers' `generate`; `<boi>`, `<image>` and `<eoi>`
                are not sampled. `"image"`: pictures scale by scale, for prompts that may end in `<boi>` or not.
                `"interleaved"`: text until `<boi>` is sampled, then a picture, `<eoi>`, and text again.
            image_generation: how pictures are drawn, over `config.image_generation`: a dict says what it holds, an
                [`ImageGenerationConfig`] all its fields but those that are None, its defaults too.
            kwargs: the fields of [`ImageGenerationConfig`], over both; in interleaved mode `temperature`, `top_k` and
                `top_p` are the text's, as in transformers, and the pictures' go into `image_generation`. Without a
                size, a picture of a prompt with images has the size of its first one.

                Of both modes that draw: `attention_mask` (default: all but the padding around a prompt),
                `negative_input_ids` and `negative_attention_mask`, the null prompts (the template with the negative
                prompt or nothing, and the same images; the processor gives them, else see [`null_prompt`]);
                `pixel_values`, `image_codes`, `image_grid_hw` as in the model's forward; `seed`, `generator`, see
                [`RowGenerators.create`]; `on_scale_end`, called after each scale with (picture or row, scale from 0
                on, (n,) codes so far); `output_logits`.

                Of pictures alone: `return_dict_in_generate`; `forced_codes`, (B, n) codes of the first scales of each
                prompt's pictures, without the text rows, which are drawn as they are, while the rest gets the random
                numbers it would have got anyway; `forced_mask`, (B, n) or (n,) bool, which of them (default: all).
                `num_return_sequences` is `num_images_per_prompt`, `do_sample=False` a temperature of 0; arguments
                that are about text alone have no effect.

                Of interleaved answers: `contexts` of an earlier output, see [`next_turn`]; `max_new_images` of
                an answer, after which `<boi>` is not sampled (default: 16); `max_new_tokens`
                of text (default: 512), and other arguments of transformers' `generate` for the text. Processors and
                criteria see each row alone, (1, n) ids without padding, `<image>` slots and `<eoi>`. A `streamer`, of
                one prompt, or a list of one or None for each, gets `<boi>` and `<eoi>` of a picture.

        Returns:
            in text mode what transformers returns; in image mode (B * num_images_per_prompt, codes) ids, which
            [`decode_image_tokens`] takes, or [`NextFlowImageOutput`]; else [`NextFlowInterleavedOutput`].

        Raises:
            ValueError: for ids that are no text rows, prompts beyond the decoder's positions, and arguments that are
                unknown or out of range.
        """
        named = {} if inputs is None else {"input_ids": inputs}
        for name, value in (named | AFTER_INPUTS.bind(*args).arguments).items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is given twice")
            kwargs[name] = value
        if not isinstance(given := kwargs.get("generation_config"), GenerationConfig | None):
            raise ValueError(f"generation_config must be a GenerationConfig, got {given!r}")
        for name in ("token_type_ids", "mm_token_type_ids"):  # of processors; ids alone say what they are
            kwargs.pop(name, None)
        if generation_mode != "text" or kwargs.get("image_grid_hw") is not None:
            check_no_learned_prompt(self)
        if generation_mode == "text":
            return self.write_text(**kwargs)
        if generation_mode not in ("image", "interleaved"):
            raise ValueError(f'generation_mode must be "text", "image" or "interleaved", got {generation_mode!r}')
        check_not_switched_on(self)
        self.check_keeps_caches()
        names = Prompts.__dataclass_fields__.keys() & kwargs.keys()
        if kwargs.get("input_ids") is None:
            raise ValueError(f'generation_mode="{generation_mode}" reads prompts as input_ids, got none')
        pad_token_ids = [config.pad_token_id for config in self._configs(kwargs)] + [kwargs.get("pad_token_id")]
        pad_token_id = next((token for token in reversed(pad_token_ids) if token is not None), None)
        prompts = Prompts(**{name: kwargs.pop(name) for name in names}).checked(self.config, pad_token_id)
        settings, names_said = self.image_settings(generation_mode, image_generation, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _keywords(generation_mode)}
        count = settings.num_images_per_prompt
        if generation_mode == "interleaved" and "num_images_per_prompt" in names_said and count != 1:
            raise ValueError(f"num_images_per_prompt is of pictures alone, an answer draws its own, got {count}")
        if generation_mode == "image" and (asked := kwargs.pop("num_return_sequences", None)) not in (None, count):
            raise ValueError(f"num_return_sequences and num_images_per_prompt are the same, got {asked} and {count}")
        with torch.no_grad():
            pictures = prompts.pictures(self)
            firsts = [own[0][0] if own else None for own in pictures]
            controls = settings.controls(_schedule(settings, names_said, firsts, self.model.schedules))
            if generation_mode == "interleaved":
                return answer(self, prompts, pictures, controls, **kwargs)
            return self._draw(prompts, pictures, controls, count, **kwargs)

    def drawn_grid(self, image_grid_hw: torch.Tensor | None = None, **settings: Unpack[ImageGenerationKwargs]) -> Grid:
        """The final grid of the picture that [`~NextFlowGenerationMixin.generate`] draws for a prompt with these
        images and settings, which `decode_preview` asks for before the picture is done."""
        firsts = [] if image_grid_hw is None else final_grids(image_grid_hw)[:1]
        asked, names_said = self.image_settings(image_generation=settings)
        return _schedule(asked, names_said, firsts or [None], self.model.schedules).final_grid

    def image_settings(
        self,
        generation_mode: str = "image",
        image_generation: Mapping | ImageGenerationConfig | None = None,
        **kwargs,
    ) -> tuple[ImageGenerationConfig, set[str]]:
        """How a call of [`~NextFlowGenerationMixin.generate`] with these arguments draws pictures, and which of it is
        said beside the model's configuration."""
        layers = [(_of_config(each), getattr(each, "image_generation", None)) for each in self._configs(kwargs)]
        layers += [(_of_call(kwargs), image_generation)]
        if generation_mode == "interleaved":
            layers = [({}, controls) for _, controls in layers]
        layers += [({}, {name: kwargs[name] for name in _keywords(generation_mode) & kwargs.keys()})]
        elsewhere = set().union(*(by_text_names for by_text_names, _ in layers))
        given = [each for by_text_names, controls in layers for each in (by_text_names, _said(controls, elsewhere))]
        settings = ImageGenerationConfig(**self.config.image_generation)
        for said in given:
            settings = settings.updated(**said)
        return settings, set().union(*given)

    def _configs(self, kwargs: Mapping) -> list[GenerationConfig]:
        """As in transformers, one's own says what it says, and the model's the rest."""
        return [each for each in (self.generation_config, kwargs.get("generation_config")) if each is not None]

    def _draw(
        self,
        prompts: Prompts,
        pictures: list[list[Picture]],
        controls: ImageControls,
        num_images: int,
        /,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        forced_codes: torch.LongTensor | None = None,
        forced_mask: torch.BoolTensor | None = None,
        on_scale_end: Callable[[int, int, torch.Tensor], None] | None = None,
        output_logits: bool | int = False,
        return_dict_in_generate: bool = False,
        streamer: BaseStreamer | None = None,
        **of_text,
    ) -> torch.LongTensor | NextFlowImageOutput:
        asked = {name for name, value in of_text.items() if value is not None and value is not False}
        if unknown := sorted(asked - ABOUT_TEXT):
            raise ValueError(f"image generation does not know the arguments {', '.join(unknown)}")
        device, boi = prompts.input_ids.device, self.config.boi_token_id
        schedule, num_prompts = controls.schedule, len(pictures)
        rows, prompts = prompts.contexts(self.config, controls.roles_from(0))
        generators = RowGenerators.create(num_prompts, num_images, seed, generator)
        forced = None
        if forced_codes is not None:
            codebook_size = self.config.vq_config.codebook_size
            forced = Forced.of_call(forced_codes, forced_mask, num_prompts, schedule, codebook_size, device)
        elif forced_mask is not None:
            raise ValueError("forced_mask needs forced_codes")
        rows = [ids if ids[-1:] == [boi] else [*ids, boi] for ids in rows]
        contexts = read_prompts(self, rows, pictures, schedule, device)
        num_logits = len(schedule) if output_logits is True else int(output_logits)
        sampler = Sampler(self, controls, generators, forced, num_logits)
        codes, logits = draw_pictures(sampler, contexts, num_images, on_scale_end)
        if streamer is not None:  # of text, which whoever reads it need not wait for
            streamer.end()
        if not return_dict_in_generate:
            return codes + self.config.text_vocab_size + self.id_shift(schedule)
        grids = torch.tensor(schedule.final_grid, device=codes.device).expand(len(codes), 2)
        output = NextFlowImageOutput(codes + self.config.text_vocab_size, grids, tuple(logits) or None)
        output._decode = lambda: self.decode_images(codes.flatten(), grids)
        return output

    @torch.no_grad()
    def next_turn(self, output: NextFlowInterleavedOutput, input_ids: torch.LongTensor, **new: torch.Tensor) -> dict:
        """Inputs of the next interleaved call: an output, followed by new messages.

        Args:
            output: of the turn before.
            input_ids, new: the new messages alone, as [`~NextFlowProcessor.apply_next_turn`] gives them.

        Returns:
            `input_ids`, `attention_mask`, the null prompts, `image_grid_hw`, `image_codes` of both, and
            `contexts`, without which everything is run again with the same result.
        """
        added = Prompts(input_ids, **new).checked(self.config, self.generation_config.pad_token_id)
        if len(input_ids) != len(output.sequences):
            raise ValueError(f"the new messages must have {len(output.sequences)} rows, got {len(input_ids)}")
        old = Prompts(
            output.sequences,
            output.attention_mask,
            output.negative_sequences,
            output.negative_attention_mask,
            image_codes=output.image_codes,
            image_grid_hw=output.image_grid_hw,
        )
        inputs = {"contexts": output.contexts}
        for prefix in ("", "negative_") if old.negative_input_ids is not None else ("",):
            if getattr(added, prefix + "input_ids") is None:
                raise ValueError("the turn before was guided: the new messages need negative_input_ids")
            for name in (prefix + "input_ids", prefix + "attention_mask"):
                before, after = getattr(old, name), getattr(added, name)
                inputs[name] = torch.cat([before, after.to(before)], dim=1)
        both = [before + after for before, after in zip(old.pictures(self), added.pictures(self))]
        return inputs | flat_images(both, input_ids.device)


def _schedule(
    settings: ImageGenerationConfig, said: Collection[str], firsts: Sequence[Grid | None], table: ScheduleTable
) -> ScaleSchedule:
    """Of the pictures to draw: unless the call says a size, each prompt's first picture keeps its own."""
    keeps_size = not {"aspect_ratio", "height", "width"}.intersection(said)
    return settings.schedule(table, firsts if keeps_size else [None])


def _keywords(generation_mode: str) -> Collection[str]:
    """Fields of [`ImageGenerationConfig`] that are keywords of a call in this mode."""
    return IMAGE_KEYWORDS - OF_TEXTS_TOO if generation_mode == "interleaved" else IMAGE_KEYWORDS


def _said(controls: Mapping | ImageGenerationConfig | None, elsewhere: Collection[str] = ()) -> dict:
    """What controls of pictures say. `None` says nothing, and neither do an object's defaults of what is said
    elsewhere, as nobody may have said them."""
    if isinstance(controls, ImageGenerationConfig):
        defaults = ImageGenerationConfig().to_dict()
        controls = {
            name: value
            for name, value in controls.to_dict().items()
            if name not in elsewhere or value != defaults[name]
        }
    if not isinstance(controls, Mapping | None):
        raise ValueError(
            f"image_generation must be an ImageGenerationConfig or a dict of its fields, got {controls!r}"
        )
    return {name: value for name, value in (controls or {}).items() if value is not None}


# What transformers' own arguments say about pictures, under the names that these have for them.


def _of_config(config: GenerationConfig) -> dict:
    count = config.num_return_sequences if (config.num_return_sequences or 1) > 1 else None
    return _said({"num_images_per_prompt": count, "guidance_scale": config.guidance_scale})


def _of_call(arguments: dict) -> dict:
    temperature = 0.0 if arguments.get("do_sample") is False else None
    return _said({"num_images_per_prompt": arguments.get("num_return_sequences"), "temperature": temperature})
