"""Answers of text and pictures in turn: one row writes text while another waits at a picture.

Shape suffixes: R rows (prompts, then null prompts, then those without images), r rows of a step, D hidden, V text
vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .decoding import ImageControls, RowDecoder, draw_images
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
    decoder: RowDecoder,
    answers: Sequence[Answer],
    hidden_R1D: torch.Tensor,
    controls: ImageControls,
    generators: RowGenerators,
    do_sample: bool,
    max_new_tokens: int,
    max_new_images: int | None = None,
    streamer: BaseStreamer | None = None,
    output_logits: bool = False,
    on_scale_end: Callable[[int, int, torch.Tensor], None] | None = None,
) -> None:
    """Let the answers grow until all are done; see [`~NextFlowGenerationMixin.generate_interleaved`].

    Args:
        hidden_R1D: of the last tokens of all rows.
    """
    model = decoder.model
    config = model.config
    hidden = dict(enumerate(hidden_R1D))  # (1, D) each, of the last token of an answer's row
    num_prompt_ids = [len(answer.text_ids) for answer in answers]
    num_contexts = len(hidden) // len(answers)

    def write_text() -> None:
        rows = [row for row, answer in enumerate(answers) if not answer.is_open and not answer.is_done]
        logits_rV = model.lm_head(torch.cat([hidden[row] for row in rows])).to(decoder.device, torch.float32)
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
        rows = [row for row in rows if not answers[row].is_open and not answers[row].is_done]
        if rows:
            hidden.update(zip(rows, decoder.write_tokens(rows, [answers[row].token_ids[-1] for row in rows])))

    def draw() -> None:
        rows = [row for row, answer in enumerate(answers) if answer.is_open]
        contexts = [[row + context * len(answers) for row in rows] for context in range(num_contexts)]
        all_rows = [row for context in contexts for row in context]
        before = {row: decoder.position(row) for row in all_rows}
        codes_BL, logits = draw_images(
            decoder,
            contexts,
            decoder.write_tokens(all_rows, [config.boi_token_id] * len(all_rows), opens=controls.schedule),
            controls,
            generators.take(rows),
            output_logits=output_logits,
            on_scale_end=on_scale_end and (lambda picture, *scale: on_scale_end(rows[picture], *scale)),
        )
        for row in (row for context in contexts[2:] for row in context):
            decoder.rewind(row, before[row])  # these are without images
        all_rows = [row for context in contexts[:2] for row in context]
        schedule = controls.schedule
        if config.condition_last_scale:
            entries_BlC = model.model.code_embeddings(codes_BL[:, schedule.slice(len(schedule) - 1)])
            inputs_rlD = model.model.connector(entries_BlC).to(hidden_R1D).repeat(len(contexts[:2]), 1, 1)
            decoder.write_scale(all_rows, inputs_rlD, schedule, len(schedule))
        hidden.update(zip(all_rows, decoder.write_tokens(all_rows, [config.eoi_token_id] * len(all_rows))))
        slots = num_image_slots(schedule, config.condition_last_scale)
        for index, row in enumerate(rows):
            answer = answers[row]
            answer.token_ids += [config.image_token_id] * slots + [config.eoi_token_id]
            answer.image_codes.append(codes_BL[index])
            answer.logits += [logits_BlV[index] for logits_BlV in logits]
            answer.is_open = False
            if streamer is not None:
                streamer.put(torch.tensor([config.eoi_token_id]))

    while not all(answer.is_done and not answer.is_open for answer in answers):
        if any(not answer.is_open and not answer.is_done for answer in answers):
            write_text()
        else:
            draw()
    if streamer is not None:
        streamer.end()
