"""TRL's way to ask for log-probabilities, over text and codes: [`add_joint_head`]."""

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..lora import below_adapters
from ..losses import in_chunks
from ..modeling_nextflow import NextFlowForConditionalGeneration


@dataclass
class JointHeadOutput(ModelOutput):
    """What TRL's trainers read of a forward with `fused_lm_head=True`; all (B, L), aligned with the outputs, and 0
    where nothing counts.

    Attributes:
        log_probs: of the targets times their weights, the only one with a gradient.
        entropy, mean_logits, log_sum_sq_probs: of the distributions.
        is_top1: whether the target is the most likely row.
        label_mask: which positions count, those of weights that are not 0.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def add_joint_head(model: nn.Module, accelerator: Accelerator) -> None:
    """Let `model(..., shift_labels=..., fused_lm_head=True)` score text and pictures under the model's joint softmax,
    weighed by `loss_weights` (B, L), or else as eq. 2 says.

    TRL's trainers add a head of their own to a model, which knows text rows alone; this one goes over it, and for
    calls without `fused_lm_head` leaves the model as it was.

    Args:
        model: as a TRL trainer has prepared it, in wrappers of devices and adapters or not.
        accelerator: of the trainer, whose precision its forwards have.
    """
    model = below_adapters(accelerator.unwrap_model(model))
    before = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self, *args, fused_lm_head: bool = False, **inputs):
        if not fused_lm_head:
            return before(*args, **inputs)
        with accelerator.autocast():
            return _score(self, *args, **inputs)

    model.forward = types.MethodType(forward, model)


def _score(
    model: NextFlowForConditionalGeneration,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    shift_labels: torch.Tensor,
    image_grid_hw: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    **inputs,
) -> JointHeadOutput:
    inputs.pop("labels", None)  # TRL's own, of text
    inputs.pop("num_items_in_batch", None)
    layout, codes = model.model.lay_out(
        input_ids, image_grid_hw, pixel_values, attention_mask=attention_mask, shift_labels=shift_labels
    )
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "return_dict": True}
    outputs = model.model(image_codes=codes, layout=layout, **inputs)
    hidden_ND = outputs.last_hidden_state.flatten(0, 1)[layout.supervised]
    heads = (model.lm_head, model.code_head)
    num_rows = model.config.text_vocab_size + model.config.vq_config.codebook_size
    scored = [
        checkpoint(_score_chunk, heads, *chunk, use_reentrant=False)
        for chunk in in_chunks(heads, num_rows, hidden_ND, model.targets_of(layout, codes))
    ]
    weights_N = layout.weights if loss_weights is None else loss_weights.flatten()[layout.supervised]
    counts_N = weights_N != 0
    log_probs_N, *values = (torch.cat(each) for each in zip(*scored))
    values = [log_probs_N * weights_N, *(value * counts_N for value in values), counts_N]
    whole = [value.new_zeros(input_ids.numel()).index_copy(0, layout.supervised, value) for value in values]
    return JointHeadOutput(*(value.view(input_ids.shape) for value in whole))


def _score_chunk(heads: Sequence[nn.Module], hidden_nD: torch.Tensor, targets_n: torch.Tensor) -> tuple:
    logits_nV = torch.cat([head(hidden_nD) for head in heads], dim=-1).float()
    logps_nV = logits_nV.log_softmax(dim=-1)
    log_probs_n = logps_nV.gather(1, targets_n[:, None])[:, 0]
    with torch.no_grad():
        entropies_n = -(logps_nV.exp() * logps_nV).sum(dim=-1)
        is_top1_n = logits_nV.argmax(dim=-1) == targets_n
        return log_probs_n, entropies_n, logits_nV.mean(dim=-1), (2 * logps_nV).logsumexp(dim=-1), is_top1_n
