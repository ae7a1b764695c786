"""Answers of text and pictures in turn: one row writes text while another waits at a picture.

Shape suffixes: R rows (prompts, then null prompts, then those without images), r rows of a step, D hidden, V text
vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .contexts import Context, last_hidden
from .drawing import ImageControls, Sampler, draw_scales, read_scale
from .layout import num_image_slots
from .sampling import RowGenerators, sample


@dataclass
class Answer:
    """One row's answer as it grows.

    Attributes:
        text_ids: the prompt without padding and the sampled tokens: what processors and criteria see.
        processors, criteria: transformers', for this row.
        token_ids: the answer as the model reads it, with `<image>` slots and `<eoi>`.
        image_codes: each picture's (codes,) codes.
        logits: see [`NextFlowInterleavedOutput`].
        is_open: the last token is a `<boi>` whose picture is still to be drawn.
        is_done: no token follows.
    """

    text_ids: list[int]
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    token_ids: list[int] = field(default_factory=list)
    image_codes: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    is_open: bool = False
    is_done: bool = False


def interleave(
    contexts: Sequence[Context],
    answers: Sequence[Answer],
    controls: ImageControls,
    generators: RowGenerators,
    do_sample: bool,
    max_new_tokens: int,
    max_new_images: int | None = None,
    streamer: BaseStreamer | None = None,
    output_logits: bool = False,
    on_scale_end: Callable[[int, int, torch.Tensor], None] | None = None,
) -> list[Context]:
    """Let the answers grow until all are done; see [`~NextFlowGenerationMixin.generate`].

    Args:
        contexts: of all rows, which have read the prompts.

    Returns:
        The contexts as they are then.
    """
    model = contexts[0].model
    config, schedule = model.config, controls.schedule
    num_prompt_ids = [len(answer.text_ids) for answer in answers]
    num_roles = sum(len(context.rows) for context in contexts) // len(answers)

    def write_text(contexts: Sequence[Context]) -> list[Context]:
        rows = [row for row, answer in enumerate(answers) if not answer.is_open and not answer.is_done]
        writing, others = split(contexts, rows)
        logits_rV = model.lm_head(last_hidden(writing)[:, -1]).to(writing[0].rows.device, torch.float32)
        uniform_r1 = generators.take(rows).uniform(1, logits_rV.device) if do_sample else None
        for index, row in enumerate(rows):
            answer, logits_1V = answers[row], logits_rV[index : index + 1]
            if output_logits:
                answer.logits.append(logits_1V)
            unwritten = [config.image_token_id, config.eoi_token_id]
            if max_new_images is not None and len(answer.image_codes) >= max_new_images:
                unwritten.append(config.boi_token_id)
            scores_1V = logits_1V.clone()
            scores_1V[:, unwritten] = -torch.inf
            text_1L = torch.tensor([answer.text_ids], device=logits_rV.device)
            scores_1V = answer.processors(text_1L, scores_1V)
            if do_sample:
                token = sample(scores_1V[:, None], 1.0, 0, 1.0, uniform_r1[index : index + 1]).item()
            else:
                token = scores_1V.argmax(dim=-1).item()
            answer.text_ids.append(token)
            answer.token_ids.append(token)
            answer.is_open = token == config.boi_token_id
            text_1L = torch.tensor([answer.text_ids], device=logits_rV.device)
            answer.is_done = len(answer.text_ids) - num_prompt_ids[row] >= max_new_tokens or bool(
                answer.criteria(text_1L, scores_1V).all()
            )
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        going_on = [row for row in rows if not answers[row].is_open and not answers[row].is_done]
        writing, stopped = split(writing, going_on)
        for context in writing:
            context.read_tokens([answers[row].token_ids[-1] for row in context.rows.tolist()])
        return [*others, *stopped, *writing]

    def draw(contexts: Sequence[Context]) -> list[Context]:
        rows = [row for row, answer in enumerate(answers) if answer.is_open]
        with_images, without = (
            [row + role * len(answers) for role in roles for row in rows]
            for roles in (range(min(num_roles, 2)), range(2, num_roles))
        )
        drawing, others = split(contexts, [*with_images, *without])
        unchanged, _ = split(drawing, without)
        place = {row: index for index, row in enumerate([*with_images, *without])}
        of_pictures = []
        for context in drawing:
            context.read_tokens([config.boi_token_id] * len(context.rows), opens=schedule)
            numbers = [place[row] for row in context.rows.tolist()]
            of_pictures.append(replace(context, rows=torch.tensor(numbers, device=context.rows.device)))
        num_logits = len(schedule) if output_logits else 0
        sampler = Sampler(model, controls, generators.take(rows), num_logits=num_logits)

        def choose(contexts, codes_BL, scale):
            codes_Bl = sampler(contexts, codes_BL, scale)
            for row, so_far in zip(rows, torch.cat([codes_BL, codes_Bl], dim=1)):
                if on_scale_end is not None:
                    on_scale_end(row, scale, so_far)
            return codes_Bl

        codes_BL = torch.empty(len(rows), 0, dtype=torch.long, device=of_pictures[0].rows.device)
        scales = range(len(schedule))
        of_pictures, codes_BL = draw_scales(model, of_pictures, controls, choose, scales, codes_BL, keep_contexts=True)
        of_pictures, _ = split(of_pictures, range(len(with_images)))
        if config.condition_last_scale:
            read_scale(model, of_pictures, codes_BL, schedule, len(schedule))
        drawn = []
        for context in of_pictures:
            context.read_tokens([config.eoi_token_id] * len(context.rows))
            numbers = [with_images[row] for row in context.rows.tolist()]
            drawn.append(replace(context, rows=torch.tensor(numbers, device=context.rows.device)))
        slots = num_image_slots(schedule, config.condition_last_scale)
        for index, row in enumerate(rows):
            answer = answers[row]
            answer.token_ids += [config.image_token_id] * slots + [config.eoi_token_id]
            answer.image_codes.append(codes_BL[index])
            answer.logits += [logits_BlV[index] for logits_BlV in sampler.logits]
            answer.is_open = False
            if streamer is not None:
                streamer.put(torch.tensor([config.eoi_token_id]))
        return [*others, *unchanged, *drawn]

    while not all(answer.is_done and not answer.is_open for answer in answers):
        is_writing = any(not answer.is_open and not answer.is_done for answer in answers)
        contexts = write_text(contexts) if is_writing else draw(contexts)
    if streamer is not None:
        streamer.end()
    return contexts


def split(contexts: Sequence[Context], rows: Collection[int]) -> tuple[list[Context], list[Context]]:
    """The contexts of these rows, and those of the others."""
    inside, outside = [], []
    for context in contexts:
        held = context.rows.tolist()
        for parts, wanted in ((inside, True), (outside, False)):
            at = [index for index, row in enumerate(held) if (row in rows) == wanted]
            if at:
                parts.append(context.take(at))
    return inside, outside
