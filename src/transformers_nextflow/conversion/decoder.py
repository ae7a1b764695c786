"""The text decoders of Llama, Qwen2, Qwen2.5 and Qwen2.5-VL as the one of Qwen2.5-VL that NextFlow stands on.

All four are one arithmetic: Llama has no biases of queries, keys and values, which are zeros here. What
Qwen2.5-VL's decoder cannot express is refused by name, so that logits are equal to the source's.
"""

import re
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config

from .. import NextFlowConfig, NextFlowForConditionalGeneration
from ..utils.loading import naming
from ..utils.safetensors_folder import SafetensorsFolder, listing
from .checkpoints import check_keys

TEXT_PARTS = ("embed_tokens.", "layers.", "norm.")
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


def shared_fields(text: PreTrainedConfig) -> dict:
    """What the configurations of Qwen2 and of Qwen2.5-VL's text decoder have in common; the rotary channels' sections
    are left to [`NextFlowConfig`]."""
    rope = {name: value for name, value in text.rope_parameters.items() if name != "mrope_section"}
    return {name: getattr(text, name) for name in SAME_FIELDS} | {"rope_parameters": rope}


def text_config_of(config: PreTrainedConfig) -> dict:
    """Fields of a `Qwen2_5_VLTextConfig`; see [`shared_fields`].

    Raises:
        ValueError: if the model is none of the four, or has what their common decoder lacks.
    """
    if config.model_type not in ("llama", "qwen2", "qwen2_5_vl"):
        raise ValueError(f"the text model must be a llama, qwen2 or qwen2_5_vl, got the type {config.model_type!r}")
    text = config.get_text_config()
    fields, heads = shared_fields(text), text.num_attention_heads
    rope = fields["rope_parameters"]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    rope_type, turned = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
    expected_head_dim = f"hidden_size / num_attention_heads, {text.hidden_size} / {heads}"
    for holds, must, got in (
        (text.hidden_act == "silu", "hidden_act must be 'silu'", repr(text.hidden_act)),
        (head_dim * heads == text.hidden_size, f"head_dim must be {expected_head_dim}", head_dim),
        (not others, "layers must have full attention", ", ".join(sorted(others))),
        (rope_type in ROPE_TYPES, f"rope_type must be one of {', '.join(ROPE_TYPES)}", repr(rope_type)),
        (turned == 1.0, "attention must rotate whole heads", f"{turned} of them"),
    ):
        if not holds:
            raise ValueError(f"the text model's {must}, got {got}")
    return fields


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
        plan: meta tensors by NextFlow's names, of the shapes and dtypes that [`tensor`] gives.
    """

    def __init__(
        self,
        source: SafetensorsFolder,
        source_config: PreTrainedConfig,
        config: NextFlowConfig,
        new_ids: Sequence[int] = (),
    ):
        self.source, self.new_ids = source, list(new_ids)
        self.names = self._names(source_config.model_type == "qwen2_5_vl")
        layers = len({own.split(".")[3] for own in self.names if ".layers." in own})
        declared = config.text_config.num_hidden_layers
        if layers != declared:  # before a model of any declared size is built
            raise ValueError(f"{source.folder} holds {layers} layers, its config.json says {declared}")
        is_llama = source_config.model_type == "llama"
        theirs = source_config if is_llama else Qwen2Config(**shared_fields(source_config.get_text_config()))
        with naming(f"the config.json of {source.folder}"), torch.device("meta"):
            expected = _text_shapes(AutoModelForCausalLM.from_config(theirs))
            shapes = _text_shapes(NextFlowForConditionalGeneration(config))
        if source_config.tie_word_embeddings and HEAD not in self.names:
            del expected[HEAD], shapes[HEAD]
        check_keys(
            source.folder,
            {name: source.shapes[name] for name in self.names.values()},
            {self.names.get(own, hub_key(own)): shape for own, shape in expected.items()},
        )
        # a Llama's biases that Qwen2.5-VL has no place for
        biases = [self.names.pop(own) for own in expected.keys() - shapes.keys()]
        if nonzero := [name for name in biases if source.tensor(name).any()]:
            raise ValueError(f"{source.folder} has biases that Qwen2.5-VL's decoder lacks: {listing(nonzero)}")
        if config.tie_word_embeddings and HEAD in self.names:
            embedding, head = self.names[EMBEDDING], self.names.pop(HEAD)
            if not torch.equal(source.tensor(embedding), source.tensor(head)):
                raise ValueError(f"config.json ties {head} to the embeddings, but their tensors differ")
            del shapes[HEAD]
        self.plan = {own: torch.empty(shape, dtype=self._dtype(own), device="meta") for own, shape in shapes.items()}

    def tensor(self, own: str) -> torch.Tensor:
        """By NextFlow's name."""
        if own not in self.names:
            return torch.zeros_like(self.plan[own], device="cpu")
        tensor = self.source.tensor(self.names[own])
        return with_new_rows(tensor, self.new_ids) if own in (EMBEDDING, HEAD) else tensor

    def _dtype(self, own: str) -> torch.dtype:
        """That of the tensor, or of the weight beside a bias that the source lacks."""
        return self.source.dtypes[self.names.get(own) or self.names[own.replace(".bias", ".weight")]]

    def _names(self, has_vit: bool) -> dict[str, str]:
        """NextFlow's name of each text tensor to the one it comes from."""
        names: dict[str, str] = {}
        for name in self.source:
            # older Llamas store the rotary frequencies that their configuration says
            if (has_vit and name.startswith(VIT_KEYS)) or name.endswith(".rotary_emb.inv_freq"):
                continue
            own = nextflow_key(name)
            if own is None:
                raise ValueError(f"{self.source.folder} holds the unknown {name}")
            if own in names:
                raise ValueError(f"{self.source.folder} holds both {names[own]} and {name}")
            names[own] = name
        return names


def _text_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the text decoder's tensors, by NextFlow's names."""
    state = {nextflow_key(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {own: shape for own, shape in state.items() if own is not None}


def hub_key(name: str) -> str | None:
    """The name in the Hub's layout of a text tensor of one of the four, in any layout, or of NextFlow; `None` for
    what no text decoder has."""
    part = name.removeprefix("model.").removeprefix("language_model.")
    if name.startswith("model.") and part.startswith(TEXT_PARTS):
        return f"model.{part}"
    return name if name.startswith("lm_head.") else None


def nextflow_key(name: str) -> str | None:
    """Where a text tensor of one of the four stands in NextFlow; `None` if there is no such tensor."""
    hub = hub_key(name)
    return hub and re.sub(r"^model\.", "model.language_model.", hub)


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
