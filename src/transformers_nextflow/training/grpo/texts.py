"""The text that an answer writes before its picture, for policies that reason first.

Sampled are tokens up to `<boi>`, which is one of them. End of text and the marks inside pictures have no probability:
every answer comes to a picture. After `max_completion_length` tokens `<boi>` is put there, which counts for nothing.

Shape suffixes: B rows, T the most tokens of a text, V text rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ...configuration_nextflow import NextFlowConfig
from ...generation_nextflow import NextFlowGenerationMixin
from ...sampling import RowGenerators, sample
from .config import NextFlowGRPOConfig
from .objective import code_logps, sampling_support


@dataclass
class Texts:
    """Prompts with the texts that follow them.

    Attributes:
        input_ids, attention_mask: (B, L) prompt, text, `<boi>`, padded on the left.
        sampled: (B, T) bool, which of the last T tokens were sampled.
        logps: (B, T) under the distribution that was sampled from, 0 where none was.
        support: (B, T, V) bool, tokens that could be drawn, where filters leave some out.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    sampled: torch.Tensor
    logps: torch.Tensor
    support: torch.Tensor | None


def text_logps(
    logits_BTV: torch.Tensor,
    token_ids_BT: torch.Tensor,
    temperature: float,
    config: NextFlowConfig,
    support_BTV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) log-probabilities of tokens of a text and their entropies, see [`code_logps`]."""
    temperature_T = torch.full((token_ids_BT.shape[1],), temperature, device=logits_BTV.device)
    return code_logps(_written(logits_BTV, config), token_ids_BT, temperature_T, support_BTV)


def _written(logits: torch.Tensor, config: NextFlowConfig) -> torch.Tensor:
    """Logits without the tokens that no text holds."""
    ends = config.text_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    unwritten = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    unwritten[[config.eoi_token_id, config.image_token_id, *(end for end in ends if end is not None)]] = True
    return logits.float().masked_fill(unwritten, -torch.inf)


class _Draw(LogitsProcessor):
    """Draws every row's next token from a random stream of its own and leaves no other; notes what training needs."""

    def __init__(self, config: NextFlowConfig, args: NextFlowGRPOConfig, seeds: Sequence[int]):
        self.config, self.args = config, args
        self.generators = RowGenerators.create(len(seeds), 1, seed=list(seeds))
        self.logps, self.supports = [], []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        heat, most, mass = self.args.text_temperature, self.args.text_top_k, self.args.text_top_p
        logits_B1V = _written(scores[:, None], self.config)
        tokens_B1 = sample(logits_B1V, heat, most, mass, self.generators.uniform(1, scores.device))
        support_B1V = None
        if most or mass < 1.0:
            support_B1V = sampling_support([logits_B1V], [heat], [most], [mass])
            self.supports.append(support_B1V)
        temperature_1 = torch.tensor([heat], device=scores.device)
        self.logps.append(code_logps(logits_B1V, tokens_B1, temperature_1, support_B1V)[0])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens_B1, 0.0)


def write_texts(
    model: NextFlowGenerationMixin,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    images: dict[str, torch.Tensor],
    seeds: Sequence[int],
    args: NextFlowGRPOConfig,
) -> Texts:
    """Sample a text for every row.

    Args:
        input_ids, attention_mask: (B, L) prompts that end in `<boi>`, before which the text goes.
        images: `image_codes` and `image_grid_hw` of the prompts' images, if there are any.
        seeds: of each row.
    """
    config, boi = model.config, model.config.boi_token_id
    ids, mask = input_ids[:, :-1], attention_mask[:, :-1]
    draw = _Draw(config, args, seeds)
    settings = GenerationConfig(
        do_sample=False,  # the processor draws
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=args.max_completion_length,
        eos_token_id=boi,
        pad_token_id=boi,
    )
    sequences = model.generate(
        ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList([draw]), **images
    )
    logps_BT = torch.cat(draw.logps, dim=1)
    support_BTV = torch.cat(draw.supports, dim=1) if draw.supports else None
    rows, sampled, logps, support = [], [], [], []
    for row, new in enumerate(sequences[:, ids.shape[1] :]):
        length = int((new != boi).long().cumprod(0).sum())
        count = min(length + 1, len(new))  # with the `<boi>`, if it was sampled
        put = length + 1 - count
        rows.append(torch.cat([ids[row][mask[row].bool()], new[:length], new.new_tensor([boi])]))
        sampled.append(torch.arange(length + 1, device=ids.device) < count)
        logps.append(F.pad(logps_BT[row, :count], (0, put)))
        if support_BTV is not None:
            support.append(F.pad(support_BTV[row, :count], (0, 0, 0, put), value=True))
    left = lambda parts, value: pad_sequence(parts, True, value, padding_side="left")  # noqa: E731
    return Texts(
        input_ids=left(rows, config.eoi_token_id),
        attention_mask=left([torch.ones_like(row) for row in rows], 0),
        sampled=left(sampled, False),
        logps=left(logps, 0.0),
        support=left(support, True) if support else None,
    )
