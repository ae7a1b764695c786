"""Inference cost: the paper's own estimate (NextFlow appendix A.2), and beside it the count of a real configuration,
and the memory that its cache takes.

Both counts walk the same list of forward passes. The convention under which the paper's figures come out to the last
digit:

- the prompt is prefilled in one pass, s_q = s_kv = its length (the whole square, causal or not);
- then one pass per scale, s_q = the scale's codes, the first scale being the single `<boi>` position, which is not
  part of the prompt;
- with a KV cache, s_kv = the prompt and every code up to and including the pass's own scale;
- guidance, output heads, connector and vision tokenizer are not counted.

Guidance runs the null prompt beside the prompt, through the last scale that is guided: [`null_passes`].
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from .scales import ScaleSchedule

PAPER_WIDTHS = (2048, 4096)
"""Hidden sizes at which the MMDiT's cost is 5.96 and 6.38 times NextFlow's (1:1, 1024-level, 100 prompt tokens)."""


@dataclass(frozen=True)
class Pass:
    """One forward pass through every layer.

    Attributes:
        queries: s_q, positions computed.
        keys: s_kv, positions attended to, the cached ones and the pass's own.
        text_logits, code_logits: positions whose text rows, or code rows, of the output head are computed.
    """

    queries: int
    keys: int
    text_logits: int = 0
    code_logits: int = 0


def image_passes(schedule: ScaleSchedule, prompt_tokens: int) -> list[Pass]:
    """Prefill of the prompt (without `<boi>`; none for an empty prompt), then one pass per scale; only code rows are
    computed."""
    if prompt_tokens < 0:
        raise ValueError(f"prompt_tokens must not be negative, got {prompt_tokens}")
    prefill = [Pass(prompt_tokens, prompt_tokens)] if prompt_tokens else []
    ends = zip(schedule.lengths, accumulate(schedule.lengths))
    return prefill + [Pass(length, prompt_tokens + end, code_logits=length) for length, end in ends]


def null_passes(schedule: ScaleSchedule, prompt_tokens: int, guided_scales: int) -> list[Pass]:
    """What the null prompt of `prompt_tokens` runs where the first `guided_scales` are guided, or some of them and the
    last of them; none without guidance."""
    if not 0 <= guided_scales <= len(schedule):
        raise ValueError(f"guided_scales must lie in [0, {len(schedule)}], the scales, got {guided_scales}")
    return image_passes(schedule.prefix(guided_scales), prompt_tokens) if guided_scales else []


def mmdit_passes(schedule: ScaleSchedule, num_steps: int = 18) -> list[Pass]:
    """Denoising steps of the diffusion transformer that the paper compares with: every step computes all cells of the
    final grid (4,096 at 1:1 and 1024 pixels), s_q = s_kv, with no text tokens and no cache.

    The paper's 884,736 = 12 * 18 * 4096 and 1,207,959,552 = 4 * 18 * 4096^2: 18 steps, as many as NextFlow has scales.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be positive, got {num_steps}")
    cells = schedule.lengths[-1]
    return [Pass(cells, cells)] * num_steps


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one layer as a polynomial of the hidden size: `quadratic * h^2 + linear * h`."""

    quadratic: int
    linear: int

    def flops(self, hidden_size: int) -> int:
        return self.quadratic * hidden_size**2 + self.linear * hidden_size


def paper_layer_cost(passes: Sequence[Pass]) -> LayerCost:
    """NextFlow appendix A.2: `12 * s_q * h^2 + 4 * s_q * s_kv * h` per layer, summed over the passes.

    12 h^2 are the weights of a layer with square projections and a 4x MLP, each counted once; attention counts
    multiplication and addition apart. [`model_cost`] counts both apart throughout.
    """
    return LayerCost(
        quadratic=12 * sum(step.queries for step in passes),
        linear=4 * sum(step.queries * step.keys for step in passes),
    )


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of all layers and both output heads, by part.

    Attributes:
        projections: query, key, value and output projections.
        attention: scores and weighted values.
        mlp: the three matrices of SwiGLU.
        text_head, code_head: rows of the output head.
    """

    projections: int
    attention: int
    mlp: int
    text_head: int
    code_head: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def model_cost(config: Qwen2_5_VLTextConfig, codebook_size: int, passes: Sequence[Pass]) -> ModelCost:
    """FLOPs of a real configuration, two for every multiply-add of a matrix product.

    Differs from appendix A.2: key and value projections have the width of the grouped key-value heads, the MLP is
    SwiGLU with its own intermediate size, and a pass computes only the head rows it needs: text rows
    (`config.vocab_size`) or code rows (`codebook_size`). As there, attention is the whole s_q x s_kv product. Not
    counted: norms, rotary embedding, softmax, connector, vision tokenizer.

    Args:
        passes: e.g. from [`image_passes`], with those of [`null_passes`] after them.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    key_width = hidden // config.num_attention_heads * config.num_key_value_heads
    queries = sum(step.queries for step in passes)
    scores = sum(step.queries * step.keys for step in passes)
    return ModelCost(
        projections=layers * 2 * queries * hidden * (2 * hidden + 2 * key_width),
        attention=layers * 4 * scores * hidden,
        mlp=layers * 6 * queries * hidden * config.intermediate_size,
        text_head=2 * sum(step.text_logits for step in passes) * hidden * config.vocab_size,
        code_head=2 * sum(step.code_logits for step in passes) * hidden * codebook_size,
    )


def cache_size(config: Qwen2_5_VLTextConfig, schedule: ScaleSchedule, prompt_tokens: int, guided_scales: int) -> int:
    """The most numbers that the keys and values of one picture are: at its last scale, whose own are not kept, or at
    the last guided one, after which the null prompt's are let go."""
    key_width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    kept = schedule.lengths[:-1]
    positions = prompt_tokens + sum(kept)
    if guided_scales:
        positions = max(positions, 2 * (prompt_tokens + sum(kept[:guided_scales])))
    return 2 * config.num_hidden_layers * key_width * positions
