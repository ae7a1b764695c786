"""Weighted cross-entropy over the joint softmax of text and code rows (NextFlow sec. 2.2, eq. 2).

Shape suffixes: N supervised positions, n those of one chunk, D hidden, V all rows (text, then codes).
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
CHUNKS = 16  # each adds to the whole of the weights' gradients
GATHERED_CHUNKS = 4  # each gathers the weights once more
LOGITS_AT_LEAST, LOGITS_AT_ONCE = 2**20, 2**25  # of one chunk: 4 to 128 MiB in float32


def joint_cross_entropy(
    hidden_ND: torch.Tensor,
    heads: Sequence[nn.Module],
    num_rows: int,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of weight x cross-entropy under one softmax over the rows of all heads; exact, without the logits of all
    positions at once.

    Heads are called, chunk by chunk of positions, so that adapters on them, offload, sharding and tensor parallelism
    take part. A sum is a scalar, so its gradient is known in the forward up to one factor: each chunk's is computed at
    once, and kept are sums as large as hidden states and weights. Where a head's weights are there only while it runs
    (offloaded, a unit of FSDP2 of its own, partitioned by DeepSpeed's ZeRO-3), where they have hooks on their
    gradients, and inside `torch.compile`, logits are computed again in the backward instead; `torch.func` keeps them.

    Args:
        hidden_ND: hidden states of supervised positions.
        heads: modules from (n, D) hidden states to (n, rows) logits, in the order of the targets' ids.
        num_rows: of all heads.
        targets_N: int64 over all rows.
        weights_N: of the targets, constants.
        z_loss: coefficient of the squared log-sum-exp of the logits, added to each target's cross-entropy before it is
            weighed; it holds the softmax's normaliser near 1. No part of the paper.

    Returns:
        The sum, a scalar to differentiate once, and the (N,) unweighted cross-entropies, detached. Both float32, or
        float64 for logits in it.
    """
    # `torch.func` takes neither gradients inside of a forward nor checkpoints
    is_transformed = torch._C._are_functorch_transforms_active()
    by_itself = not is_transformed and not any(map(_is_gathered, heads))
    chunks = in_chunks(heads, num_rows, hidden_ND, targets_N, weights_N)
    weights = [weight for weight in nn.ModuleList(heads).parameters() if weight.requires_grad]
    # Dynamo traces checkpoints, but no gradients that a forward computes
    by_itself &= not torch.compiler.is_compiling() and not any(weight._backward_hooks for weight in weights)
    if by_itself and torch.is_grad_enabled() and (hidden_ND.requires_grad or weights):
        return _with_gradients(hidden_ND, heads, weights, chunks, z_loss)

    def of_chunk(hidden_nD, targets_n, weights_n):
        return _weighted_cross_entropy([head(hidden_nD) for head in heads], targets_n, weights_n, z_loss)

    score = of_chunk if is_transformed else partial(checkpoint, of_chunk, use_reentrant=False)
    totals, losses = zip(*(score(*chunk) for chunk in chunks))
    return sum(totals), torch.cat(losses)


def in_chunks(
    heads: Sequence[nn.Module], num_rows: int, *tensors_N: torch.Tensor
) -> Iterable[tuple[torch.Tensor, ...]]:
    """Tensors of positions, some positions at a time: what the heads' logits of `num_rows` rows have room for."""
    if any(map(_is_gathered, heads)):
        # devices that gather weights together must do it as often, however many positions each has
        return zip(*(tensor.tensor_split(GATHERED_CHUNKS) for tensor in tensors_N))
    length = max(math.ceil(len(tensors_N[0]) / CHUNKS), LOGITS_AT_LEAST // num_rows)
    length = max(1, min(length, LOGITS_AT_ONCE // num_rows))
    return zip(*(tensor.split(length) for tensor in tensors_N))


def _is_gathered(head: nn.Module) -> bool:
    """Whether hooks bring weights for each call and take them away after it."""
    weights = list(head.parameters())
    if any(isinstance(module, FSDPModule) for module in head.modules()):
        return any(isinstance(weight, DTensor) for weight in weights)
    # ZeRO-3 may have left small ones in place, and takes them away before the backward ends
    return any(weight.is_meta or not weight.numel() or hasattr(weight, "ds_id") for weight in weights)


def _weighted_cross_entropy(
    parts: list[torch.Tensor], targets_n: torch.Tensor, weights_n: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head's (n, rows) logits -> the sum, and the (n,) cross-entropies, detached."""
    logits_nV = torch.cat([part.to(targets_n.device) for part in parts], dim=-1)
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    losses_n = F.cross_entropy(logits_nV, targets_n, reduction="none")
    penalties_n = z_loss * logits_nV.logsumexp(dim=-1) ** 2 if z_loss else 0.0
    return ((losses_n + penalties_n) * weights_n).sum(), losses_n.detach()


def _with_gradients(
    hidden_ND: torch.Tensor, heads: Sequence[nn.Module], weights: list[nn.Parameter], chunks: Iterable, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, whose backward has nothing left to compute, and the (N,) cross-entropies."""
    sums = {weight: torch.zeros_like(weight, dtype=_fine(weight)) for weight in weights}
    totals, losses, hidden_sums = [], [], []
    for hidden_nD, targets_n, weights_n in chunks:
        hidden_nD = hidden_nD.detach().requires_grad_(hidden_ND.requires_grad)
        hidden_sums.append(torch.zeros_like(hidden_nD, dtype=_fine(hidden_nD)))
        parts = [head(hidden_nD) for head in heads]
        edges = [get_gradient_edge(part) for part in parts if part.requires_grad]
        total, losses_n = _weighted_cross_entropy(parts, targets_n, weights_n, z_loss)
        del parts
        of_logits = torch.autograd.grad(total, edges) if edges else ()  # none where adapters are switched off
        _add_gradients({hidden_nD: hidden_sums[-1]} | sums, hidden_nD, edges, of_logits)
        totals.append(total.detach())
        losses.append(losses_n)
    gradients = [torch.cat(hidden_sums), *sums.values()]
    del sums
    return _Differentiated.apply(sum(totals), gradients, hidden_ND, *weights), torch.cat(losses)


def _add_gradients(
    sums: dict[torch.Tensor, torch.Tensor],
    hidden_nD: torch.Tensor,
    edges: list[GradientEdge],
    gradients: tuple[torch.Tensor, ...],
) -> None:
    """Add to the sums what the gradients of the heads' logits, at `edges`, give to each leaf of their graphs."""
    leaves = [leaf for leaf in sums if leaf.requires_grad]
    for edge, gradient in zip(edges, gradients):
        weight = _factor_of(edge.node, hidden_nD)
        if weight in sums:  # its gradient alone would be as large as the sum, and cost more than the product
            if hidden_nD.requires_grad:
                _add_product(sums[hidden_nD], gradient, weight.detach())
            _add_product(sums[weight], gradient.T, hidden_nD.detach())
            continue
        for leaf, added in zip(leaves, torch.autograd.grad(edge, leaves, gradient, allow_unused=True)):
            if added is not None:
                sums[leaf] += added


def _factor_of(node: torch.autograd.graph.Node, hidden_nD: torch.Tensor) -> torch.Tensor | None:
    """The leaf W, where all that happened to the hidden states is `hidden_nD @ W.T`."""
    if node.name() != "MmBackward0" or node._saved_self is not hidden_nD:
        return None
    transposed = node.next_functions[1][0]
    if transposed is None or transposed.name() != "TBackward0":
        return None
    return getattr(transposed.next_functions[0][0], "variable", None)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _fine(tensor: torch.Tensor) -> torch.dtype:
    """What sums of its gradients are in."""
    return torch.promote_types(tensor.dtype, torch.float32)


class _Differentiated(torch.autograd.Function):
    """A scalar whose gradients are known. The backward hands them over, since they may be the largest tensors there
    are, and so it runs once."""

    @staticmethod
    def forward(ctx, total, gradients, *inputs):
        ctx.gradients, ctx.dtypes = gradients, [tensor.dtype for tensor in inputs]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        if ctx.gradients is None:
            raise RuntimeError("the loss was differentiated before and has given its gradients away: compute it again")
        gradients, ctx.gradients = ctx.gradients[::-1], None
        scaled = []
        for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[2:]):
            gradient = gradients.pop()
            scaled.append(gradient.mul_(factor.to(gradient.device)).to(dtype) if needed else None)
            del gradient
        return None, None, *scaled
