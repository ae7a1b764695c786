"""Answers of text and pictures in turn: one row writes text while another waits at a picture.

Shape suffixes: R rows (prompts, then null prompts, then those without images), r rows of a step, D hidden, V text
vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, StoppingCriteriaList, TextStreamer
from transformers.generation import GenerationMixin, GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .configuration_nextflow import NextFlowConfig
from .contexts import Contexts
from .drawing import NextFlowOutputWithPictures, Sampler, draw_scales, telling
from .image_generation import ImageControls
from .layout import num_image_slots
from .lora import using_adapters
from .prefill import read_prompts
from .prompts import Picture, Prompts, flat_images
from .sampling import RowGenerators, integer, sample
from .scales import ScaleSchedule
from .text_generation import check_unguided

logger = logging.get_logger(__name__)

TOKEN_BY_TOKEN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
"""Modes of transformers' `generate` that write the same text one token after another, some of them faster."""


@dataclass
class NextFlowInterleavedOutput(NextFlowOutputWithPictures):
    """Prompts and answers of text and pictures; what [`~NextFlowGenerationMixin.next_turn`] goes on from.

    Attributes:
        sequences, attention_mask: (B, L) the prompts as they came, then the answers, padded on the right. A picture is
            `<boi>`, its `<image>` slots, `<eoi>`, as in the model's inputs.
        image_grid_hw: (N, 2) final grids of all pictures of prompts and answers, in row-major order of `<boi>`.
        image_codes: (sum of codes,) their codes, scale by scale.
        prompt_length: columns of the prompts.
        negative_sequences, negative_attention_mask: (B, L') the null prompts, then the answers' pictures; where
            guided.
        logits: of each row, in the order of its steps, (1, V) text logits before processors and (l, V) guided code
            logits of each scale, all float32; with `output_logits`.
        contexts: what all rows have read; a next call goes on from it.
    """

    sequences: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    image_grid_hw: torch.LongTensor | None = None
    image_codes: torch.LongTensor | None = None
    prompt_length: int | None = None
    negative_sequences: torch.LongTensor | None = None
    negative_attention_mask: torch.LongTensor | None = None
    logits: tuple[tuple[torch.FloatTensor, ...], ...] | None = None
    contexts: Contexts | None = None


@dataclass
class Answer:
    """One row's answer as it grows.

    Attributes:
        text_1L: the prompt without padding and the sampled tokens: what processors and criteria see.
        processors, criteria: transformers', for this row.
        streamer: gets its tokens, but for `<image>` slots.
        token_ids: the answer as the model reads it, with `<image>` slots and `<eoi>`.
        image_codes: each picture's (codes,) codes.
        logits: see [`NextFlowInterleavedOutput`].
        num_tokens: sampled so far.
        is_open: the last token is a `<boi>` whose picture is still to be drawn.
        is_done: no token follows.
    """

    text_1L: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None
    token_ids: list[int] = field(default_factory=list)
    image_codes: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    num_tokens: int = 0
    is_open: bool = False
    is_done: bool = False

    @property
    def writes(self) -> bool:
        return not self.is_open and not self.is_done

    def stream(self, token_id: int) -> None:
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token_id], device="cpu"))


@dataclass
class Interleaving:
    """Lets answers grow until all are done; see [`~NextFlowGenerationMixin.generate`].

    Attributes:
        contexts: of all rows, which have read the prompts, and then what the answers are so far.
    """

    contexts: Contexts
    answers: Sequence[Answer]
    controls: ImageControls
    generators: RowGenerators
    do_sample: bool
    max_new_tokens: int
    max_new_images: int
    output_logits: bool = False
    on_scale_end: Callable[[int, int, torch.Tensor], None] | None = None

    def __post_init__(self):
        self.model, self.schedule = self.contexts.model, self.controls.schedule
        self.config = self.model.config

    def __call__(self) -> Contexts:
        """The contexts at the end."""
        while not all(answer.is_done and not answer.is_open for answer in self.answers):
            if any(answer.writes for answer in self.answers):
                self._write_text()
            else:
                self._draw()
        for answer in self.answers:
            if answer.streamer is not None:
                answer.streamer.end()
        return self.contexts

    def _write_text(self) -> None:
        """A token of each row that is not at a picture."""
        rows = [row for row, answer in enumerate(self.answers) if answer.writes]
        writing = self.contexts.take(rows)
        with using_adapters(self.model, writing.adapters):
            logits_rV = self.model.lm_head(writing.hidden_RlD[:, -1]).to(writing.counters.device, torch.float32)
        uniform_r1 = self.generators.take(rows).uniform(1, logits_rV.device) if self.do_sample else logits_rV[:, :1]
        steps = zip(rows, writing.counters.tolist(), logits_rV.split(1), uniform_r1.split(1))
        for row, counter, logits_1V, uniform_11 in steps:
            self._write_token(self.answers[row], logits_1V, uniform_11, room=self.model.max_positions - counter)
        going_on = [row for row in rows if self.answers[row].writes]
        if going_on:
            writing = self.contexts.take(going_on)
            writing.read_tokens([self.answers[row].token_ids[-1] for row in going_on])
            self.contexts = self.contexts.put(going_on, writing)

    def _write_token(self, answer: Answer, logits_1V: torch.Tensor, uniform_11: torch.Tensor, room: float) -> None:
        """`room`: of how many positions more the decoder knows."""
        if self.output_logits:
            answer.logits.append(logits_1V)
        unwritten = [self.config.image_token_id, self.config.eoi_token_id]
        if len(answer.image_codes) >= self.max_new_images or room < len(self.schedule) + 2:
            unwritten.append(self.config.boi_token_id)
        scores_1V = logits_1V.clone()
        scores_1V[:, unwritten] = -torch.inf
        scores_1V = answer.processors(answer.text_1L, scores_1V)
        token_11 = sample(scores_1V[:, None], float(self.do_sample), 0, 1.0, uniform_11)
        answer.text_1L = torch.cat([answer.text_1L, token_11], dim=1)
        answer.token_ids.append(token := token_11.item())
        answer.num_tokens += 1
        answer.is_open = token == self.config.boi_token_id
        if room <= 1 and answer.num_tokens < self.max_new_tokens:
            logger.warning(
                f"an answer ends after {answer.num_tokens} tokens: the model has {self.model.max_positions} positions"
            )
        is_over = answer.num_tokens >= self.max_new_tokens or room <= 1
        answer.is_done = is_over or bool(answer.criteria(answer.text_1L, scores_1V).all())
        answer.stream(token)

    def _draw(self) -> None:
        """The pictures of all rows that are at one."""
        config, schedule = self.config, self.schedule
        rows = [row for row, answer in enumerate(self.answers) if answer.is_open]
        num_roles = len(self.contexts) // len(self.answers)
        with_images, without = (
            [row + role * len(self.answers) for role in roles for row in rows]
            for roles in (range(min(num_roles, 2)), range(2, num_roles))
        )
        drawing = self.contexts.take([*with_images, *without])
        drawing.read_tokens([config.boi_token_id] * len(drawing), opens=schedule)
        num_logits = len(schedule) if self.output_logits else 0
        sampler = Sampler(self.model, self.controls, self.generators.take(rows), num_logits=num_logits)
        tell, scales = telling(self.on_scale_end, [[row] for row in rows]), range(len(schedule))
        codes_BL = torch.empty(len(rows), 0, dtype=torch.long, device=drawing.counters.device)
        drawing, codes_BL = draw_scales(drawing, self.controls, sampler, scales, codes_BL, tell, keep_contexts=True)
        drawn = drawing.take(range(len(with_images)))
        if config.condition_last_scale:
            drawn.read_scale(codes_BL, schedule, len(schedule))
        drawn.read_tokens([config.eoi_token_id] * len(with_images))
        self.contexts = self.contexts.put(with_images, drawn)
        for index, answer in enumerate(self.answers[row] for row in rows):
            answer.token_ids += picture_ids(config, schedule)[1:]
            answer.image_codes.append(codes_BL[index])
            answer.logits += [logits_BlV[index] for logits_BlV in sampler.logits]
            answer.is_open = False
            answer.stream(config.eoi_token_id)


def answer(
    model,
    prompts: Prompts,
    pictures: list[list[Picture]],
    controls: ImageControls,
    /,
    contexts: Contexts | None = None,
    max_new_images: int = 16,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    streamer: BaseStreamer | Sequence[BaseStreamer | None] | None = None,
    on_scale_end: Callable[[int, int, torch.Tensor], None] | None = None,
    output_logits: bool = False,
    generation_config=None,
    **kwargs,
) -> NextFlowInterleavedOutput:
    """`generate(generation_mode="interleaved")`.

    Rows at a picture wait for the others' text, and then draw together; a row gives the same alone. A picture that
    was begun is finished. Under guidance a picture's null context is the null prompt and all earlier pictures of the
    row, without the answer's text, which describes what to draw; image guidance drops the pictures too.
    """
    processors = kwargs.pop("logits_processor", None) or LogitsProcessorList()
    criteria = kwargs.pop("stopping_criteria", None) or StoppingCriteriaList()
    tokenizer = kwargs.pop("tokenizer", None)
    if kwargs.pop("max_length", None) is not None:
        raise ValueError("interleaved answers are bounded by max_new_tokens and max_new_images, got max_length")
    generation_config, unknown = model._prepare_generation_config(generation_config, **kwargs)
    names = {name for name, value in unknown.items() if value is not None}
    names |= {name for name in ("output_scores", "token_healing") if getattr(generation_config, name)}
    if names:
        raise ValueError(f"interleaved generation does not know the arguments {', '.join(sorted(names))}")
    mode = generation_config.get_generation_mode()
    if mode not in TOKEN_BY_TOKEN or (generation_config.num_return_sequences or 1) > 1:
        raise ValueError(
            f"interleaved generation samples one answer for each prompt, got {mode.value}, num_return_sequences="
            f"{generation_config.num_return_sequences}"
        )
    ids = prompts.input_ids
    streamer = [None] * len(ids) if streamer is None else streamer
    streamers = streamer if isinstance(streamer, Sequence) else [streamer]
    if len(streamers) != len(ids):
        raise ValueError(f"a streamer follows one prompt, got {len(streamers)} for {len(ids)}")
    max_new_images = integer("max_new_images", max_new_images, 0)
    if generation_config.max_new_tokens is None:
        generation_config.max_new_tokens = 512
    check_unguided(generation_config)
    schedule, generators = controls.schedule, RowGenerators.create(len(ids), 1, seed, generator)
    rows, prompts = prompts.contexts(model.config, controls.roles_from(0))
    if any(row[-1:] == [model.config.boi_token_id] for row in rows):
        raise ValueError("prompts of interleaved generation, and their null prompts, must not end in <boi>")
    model._prepare_special_tokens(generation_config, True, device=ids.device, batch_size=len(ids))
    for own, prompt in zip(streamers, ids.cpu().split(1)):
        if own is not None:
            own.put(prompt)
    contexts = read_prompts(model, rows, pictures, schedule, ids.device, contexts)
    pad_id = model.config.eoi_token_id if generation_config.pad_token_id is None else generation_config.pad_token_id
    answers = []
    for text_ids, own in zip(rows, streamers):
        text_1L = torch.tensor([text_ids], device=ids.device)
        generation_config.max_length = len(text_ids) + generation_config.max_new_tokens
        of_row = GenerationMixin._get_logits_processor(
            model,
            generation_config,
            input_ids_seq_length=len(text_ids),
            encoder_input_ids=text_1L,
            logits_processor=processors,
            device=ids.device,
            model_kwargs={},
        )
        ends = model._get_stopping_criteria(generation_config, criteria, tokenizer=tokenizer)
        answers.append(Answer(text_1L, of_row, ends, own))
    grow = Interleaving(
        contexts,
        answers,
        controls,
        generators,
        do_sample=bool(generation_config.do_sample),
        max_new_tokens=generation_config.max_new_tokens,
        max_new_images=max_new_images,
        output_logits=output_logits,
        on_scale_end=on_scale_end,
    )
    return _output(model, prompts, pictures, answers, schedule, grow(), pad_id)


class AnswerStreamer(TextStreamer):
    """transformers', of the answer alone: a text is put to its end before the picture that follows it."""

    def __init__(self, processor):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.boi_token_id = processor.boi_token_id

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if value.tolist() == [self.boi_token_id]:
            self.end()  # the picture's `<eoi>` is skipped then as a prompt would be


def picture_ids(config: NextFlowConfig, schedule: ScaleSchedule) -> list[int]:
    """A picture in the model's inputs, from `<boi>` to `<eoi>`."""
    slots = [config.image_token_id] * num_image_slots(schedule, config.condition_last_scale)
    return [config.boi_token_id, *slots, config.eoi_token_id]


def _output(
    model, prompts: Prompts, pictures, answers: list[Answer], schedule: ScaleSchedule, contexts, pad_id: int
) -> NextFlowInterleavedOutput:
    def follow(ids, mask, new: list[list[int]]):
        new = [torch.tensor(row, dtype=ids.dtype, device=ids.device) for row in new]
        kept = [torch.ones_like(row) for row in new]
        mask = torch.cat([mask.to(ids), pad_sequence(kept, batch_first=True)], dim=1)
        return torch.cat([ids, pad_sequence(new, batch_first=True, padding_value=pad_id)], dim=1), mask

    sequences, attention_mask = follow(
        prompts.input_ids, prompts.attention_mask, [answer.token_ids for answer in answers]
    )
    negative = (None, None)
    if len(contexts) > len(answers):
        drawn = [picture_ids(model.config, schedule) * len(answer.image_codes) for answer in answers]
        negative = follow(prompts.negative_input_ids, prompts.negative_attention_mask, drawn)
    for row, answer in zip(pictures, answers):
        row += [(schedule.final_grid, codes) for codes in answer.image_codes]
    output = NextFlowInterleavedOutput(
        sequences=sequences,
        attention_mask=attention_mask,
        **flat_images(pictures, sequences.device),
        prompt_length=prompts.input_ids.shape[1],
        negative_sequences=negative[0],
        negative_attention_mask=negative[1],
        logits=tuple(tuple(answer.logits) for answer in answers) if answers[0].logits else None,
        contexts=contexts,
    )
    output._decode = lambda: model.decode_images(output.image_codes, output.image_grid_hw)
    return output
