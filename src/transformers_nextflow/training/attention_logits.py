"""The largest attention logit: it runs away before a training does, long before the loss shows it."""

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from ..attention import visible_keys
from ..layout import build_layout
from ..losses import LOGITS_AT_ONCE
from ..modeling_nextflow import NextFlowModel


class LargestAttentionLogit:
    """Context manager that watches the forwards of packed rows with targets inside it.

    Exact: the products of all queries and the keys they see, of every layer and head, by chunks, in the attention's
    own dtype, whatever `attn_implementation` is. The forward's results are what they are without it; what it adds is
    about half of the attention's forward. What is compiled runs uncompiled meanwhile.

    Args:
        model: the decoder.

    Attributes:
        value: a float32 scalar, the largest query x key x scaling; `None` before a forward.
    """

    def __init__(self, model: NextFlowModel):
        self.model, self.value = model, None
        self._projected: list[torch.Tensor] = []  # query and key of a layer, as it runs

    def __enter__(self) -> "LargestAttentionLogit":
        self._hooks = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for layer in self.model.language_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                self._hooks.append(projection.register_forward_hook(self._keep))
            self._hooks.append(layer.self_attn.register_forward_hook(self._look, with_kwargs=True))
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._eager.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model, args, kwargs) -> None:
        """Cut the rows into chunks of queries, each with the keys that some of them see."""
        layout = kwargs.get("layout")
        if layout is None:  # as of chats; the forward makes its own
            layout = build_layout(model.config, kwargs["input_ids"], kwargs.get("image_grid_hw"))
        starts, ends = self._range = visible_keys(layout.block_ids, kwargs["document_ids"])
        starts, ends = starts.cpu(), ends.cpu()
        rows, length = starts.shape
        step = max(1, LOGITS_AT_ONCE // (model.config.text_config.num_attention_heads * length))
        self._chunks = []
        for row in range(rows):
            for begin in range(0, length, step):
                queries = slice(begin, begin + step)
                keys = slice(int(starts[row, queries].min()), int(ends[row, queries].max()))
                self._chunks.append((row, queries, keys))

    def _keep(self, projection, args, output: torch.Tensor) -> None:
        self._projected.append(output.detach())

    def _look(self, attention, args, kwargs, output) -> None:
        query, key = (each.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for each in self._projected)
        self._projected.clear()
        self._see(*apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"]), attention.scaling)

    @torch.no_grad()
    def _see(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """(B, heads, L, head size) and (B, key-value heads, L, head size)."""
        largest = query.new_tensor(-torch.inf) if self.value is None else self.value
        starts, ends = self._range
        places = torch.arange(key.shape[2], device=key.device)
        for row, queries, keys in self._chunks:
            sees = (places[keys] >= starts[row, queries, None]) & (places[keys] < ends[row, queries, None])
            if sees.numel():
                grouped = query[row, :, queries].unflatten(0, (key.shape[1], -1))
                logits = grouped @ key[row, :, None, keys].mT
                largest = torch.maximum(largest, logits.masked_fill_(~sees, -torch.inf).amax() * scaling)
        self.value = largest.float()
