"""The text decoders of Llama, Qwen2, Qwen2.5 and Qwen2.5-VL as the one of Qwen2.5-VL that NextFlow stands on.

All four are one arithmetic: Llama has no biases of queries, keys and values, which are zeros here. What
Qwen2.5-VL's decoder cannot express is refused by name, so that logits are equal to the source's.
"""

import re
from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from .. import NextFlowConfig, NextFlowForConditionalGeneration
from ..utils.safetensors_folder import SafetensorsFolder, listing
from .checkpoints import check_keys

# The Hub's names, and those of transformers 5's Qwen2.5-VL and of NextFlow.
TEXT_KEYS = {
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
VIT_KEYS = ("visual.", "model.visual.")
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"

# Bases of rotary frequencies that are constants of the model; "dynamic" and "longrope" depend on the text's length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SAME_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)
NEW_ROW_NOISE = 0.1


def text_config_of(config: PreTrainedConfig) -> dict:
    """Fields of a `Qwen2_5_VLTextConfig`; the rotary channels' sections are left to [`NextFlowConfig`].

    Raises:
        ValueError: if the model is none of the four, or has what their common decoder lacks.
    """
    if config.model_type not in ("llama", "qwen2", "qwen2_5_vl"):
        raise ValueError(f"the text model must be a llama, qwen2 or qwen2_5_vl, got the type {config.model_type!r}")
    text = _text_part(config)
    if text.hidden_act != "silu":
        raise ValueError(f"the text model's hidden_act must be 'silu', got {text.hidden_act!r}")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim * text.num_attention_heads != text.hidden_size:
        raise ValueError(
            f"the text model's head_dim must be hidden_size / num_attention_heads, "
            f"{text.hidden_size} / {text.num_attention_heads}, got {head_dim}"
        )
    if others := set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        raise ValueError(f"the text model's layers must have full attention, got {', '.join(sorted(others))}")
    rope = {name: value for name, value in text.rope_parameters.items() if name != "mrope_section"}
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"the text model's rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope['rope_type']!r}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"the text model must rotate whole heads, got {rope['partial_rotary_factor']} of them")
    return {name: getattr(text, name) for name in SAME_FIELDS} | {"rope_parameters": rope}


class TextDecoder:
    """A folder's text decoder under NextFlow's names, checked to be complete and of the right shapes.

    Args:
        source: the folder's tensors.
        source_config: of the whole model there.
        config: of the NextFlow to be.
        new_ids: text rows that are to be made anew; those from the source's last row on are added.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape, or tied heads differ.

    Attributes:
        shapes, dtypes: of every tensor, by NextFlow's names, in the order in which [`tensors`] yields them.
    """

    def __init__(
        self,
        source: SafetensorsFolder,
        source_config: PreTrainedConfig,
        config: NextFlowConfig,
        new_ids: Sequence[int] = (),
    ):
        self.source, self.new_ids = source, list(new_ids)
        self.names = self._names(source_config)
        layers = {
            int(found[1]) for own in self.names if (found := re.match(r"model\.language_model\.layers\.(\d+)\.", own))
        }
        declared = config.text_config.num_hidden_layers
        if len(layers) != declared:  # before a model of any declared size is built
            raise ValueError(f"{source.folder} holds {len(layers)} layers, its config.json says {declared}")
        with torch.device("meta"):
            model = NextFlowForConditionalGeneration(config)
        own_shapes = {own: tuple(tensor.shape) for own, tensor in model.state_dict().items() if hub_key(own)}
        zeros, extra = self._biases(source_config, own_shapes)
        self._check(source_config, {own: shape for own, shape in own_shapes.items() if own not in zeros} | extra)
        self._leave_out_zeros(extra)
        if config.tie_word_embeddings and HEAD in self.names:
            self._leave_out_tied_head()
        self.zeros = {own: (own_shapes[own], self._dtype(own.replace(".bias", ".weight"))) for own in zeros}
        self.shapes = {own: own_shapes[own] for own in (*self.names, *self.zeros)}
        self.dtypes = {own: self._dtype(own) for own in self.names}
        self.dtypes |= {own: dtype for own, (_, dtype) in self.zeros.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """NextFlow's names and the tensors, one at a time."""
        own_names = {name: own for own, name in self.names.items()}
        for name, tensor in self.source.tensors(own_names):
            own = own_names[name]
            yield own, with_new_rows(tensor, self.new_ids) if own in (EMBEDDING, HEAD) else tensor
        for own, (shape, dtype) in self.zeros.items():
            yield own, torch.zeros(shape, dtype=dtype)

    def _dtype(self, own: str) -> torch.dtype:
        return self.source.dtypes[self.names[own]]

    def _names(self, source_config: PreTrainedConfig) -> dict[str, str]:
        """NextFlow's name of each text tensor to the one it comes from."""
        names: dict[str, str] = {}
        for name in self.source:
            if source_config.model_type == "qwen2_5_vl" and name.startswith(VIT_KEYS):
                continue
            if name.endswith(".rotary_emb.inv_freq"):  # older Llamas store what their configuration says
                continue
            own = nextflow_key(name)
            if own is None:
                raise ValueError(f"{self.source.folder} holds the unknown {name}")
            if own in names:
                raise ValueError(f"{self.source.folder} holds both {names[own]} and {name}")
            names[own] = name
        return names

    def _biases(
        self, source_config: PreTrainedConfig, own_shapes: dict[str, tuple[int, ...]]
    ) -> tuple[list[str], dict[str, tuple[int, ...]]]:
        """Biases of NextFlow that the source lacks, and the shapes of those that it has and NextFlow lacks."""
        if source_config.model_type != "llama":
            return [], {}
        zeros = [] if source_config.attention_bias else [own for own in own_shapes if own.endswith("_proj.bias")]
        suffixes = ["o_proj.weight"] if source_config.attention_bias else []
        suffixes += ["gate_proj.weight", "up_proj.weight", "down_proj.weight"] if source_config.mlp_bias else []
        extra = {
            own.removesuffix("weight") + "bias": shape[:1]
            for own, shape in own_shapes.items()
            if own.endswith(tuple(suffixes))
        }
        return zeros, extra

    def _check(self, source_config: PreTrainedConfig, expected: dict[str, tuple[int, ...]]) -> None:
        expected = dict(expected)
        if source_config.tie_word_embeddings and HEAD not in self.names:
            del expected[HEAD]
        for table in expected.keys() & {EMBEDDING, HEAD}:
            expected[table] = (_text_part(source_config).vocab_size, *expected[table][1:])
        check_keys(
            self.source.folder,
            {name: self.source.shapes[name] for name in self.names.values()},
            {self.names.get(own, hub_key(own)): shape for own, shape in expected.items()},
        )

    def _leave_out_zeros(self, extra: dict[str, tuple[int, ...]]) -> None:
        """Drop biases that Qwen2.5-VL has no place for, which must be zero."""
        names = [self.names.pop(own) for own in extra]
        if nonzero := [name for name, tensor in self.source.tensors(names) if tensor.any()]:
            raise ValueError(f"{self.source.folder} has biases that Qwen2.5-VL's decoder lacks: {listing(nonzero)}")

    def _leave_out_tied_head(self) -> None:
        embedding, head = self.names[EMBEDDING], self.names.pop(HEAD)
        (_, embeddings), (_, heads) = self.source.tensors([embedding, head])
        if not torch.equal(embeddings, heads):
            raise ValueError(f"config.json ties {head} to the embeddings, but their tensors differ")


def _text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.text_config if config.model_type == "qwen2_5_vl" else config


def nextflow_key(name: str) -> str | None:
    """Where a text tensor of one of the four stands in NextFlow; `None` if there is no such tensor."""
    for hub, own in TEXT_KEYS.items():
        for prefix in (own, hub):
            if name.startswith(prefix):
                return own + name[len(prefix) :]
    return None


def hub_key(name: str) -> str | None:
    """Where a tensor of NextFlow stands in the Hub's layout; `None` for what no text decoder has."""
    for hub, own in TEXT_KEYS.items():
        if name.startswith(own):
            return hub + name[len(own) :]
    return None


def with_new_rows(table: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """(V, D) embeddings or head -> at least as many rows, those of `ids` anew.

    A new row is the mean of all rows, whose logit is never the largest, so that text goes on as before; and noise of a
    fixed seed, far below the rows' own differences, by which the new ones differ from one another.
    """
    if not ids:
        return table
    mean = table.mean(dim=0, dtype=torch.float32)
    size = torch.linalg.vector_norm(table, dtype=torch.float32) / prod(table.shape) ** 0.5
    noise = torch.randn(len(ids), table.shape[1], generator=torch.Generator().manual_seed(0))
    table = F.pad(table, (0, 0, 0, max(0, max(ids) + 1 - len(table))))
    table[list(ids)] = (mean + NEW_ROW_NOISE * size * noise).to(table.dtype)
    return table
