"""Damage to a trained checkpoint or its shards, and the names by which the doctor may call it first."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.activations import ACT2FN

from transformers_nextflow.data.shards import Shard, decodable_codes, images_of, sequence_spec, sha256_of, write_shard


@dataclass(frozen=True)
class Damage:
    """What is done to a copy of the model, and to a copy of its shards where `packs` says so.

    Attributes:
        names: faults any of which names it rightly.
        where: what the finding has to name besides.
    """

    title: str
    names: tuple[str, ...]
    do: Callable[[nn.Module, Path], object]
    packs: bool = False
    where: str = ""


def damaged(damage: Damage, model: nn.Module, packs: Path, folder: Path) -> tuple[nn.Module, Path]:
    """Copies of model and shards with the damage done."""
    model = copy.deepcopy(model)
    if damage.packs:
        packs = Path(shutil.copytree(packs, folder / "damaged", dirs_exist_ok=True))
    with torch.no_grad():
        damage.do(model, packs)
    return model, packs


def layers(model: nn.Module) -> nn.ModuleList:
    return model.model.language_model.layers


def permute(weight: torch.Tensor) -> None:
    weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))].clone())


def exchange(model: nn.Module, a: int, b: int) -> None:
    stack = layers(model)
    stack[a], stack[b] = stack[b], stack[a]


def rewrite(packs: Path, change: Callable[[dict], None], keep: Callable[[list], list] = list) -> None:
    """Change every row of shards, and what the manifest says of the files."""
    manifest = json.loads((packs / "manifest.json").read_text())
    for number, entry in enumerate(manifest["shards"]):
        path = packs / "data" / entry["file"]
        shard = Shard(path)
        rows = [
            {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in shard.row(i).items()}
            for i in range(len(shard))
        ]
        for row in rows:
            change(row)
        schema = {field.name: field.type for field in shard.batch.schema}
        manifest["shards"][number] = write_shard(path, keep(rows), schema)
        assert manifest["shards"][number]["sha256"] == sha256_of(path)
    (packs / "manifest.json").write_text(json.dumps(manifest))


def disturb(row: dict) -> None:
    """Three of ten codes are any."""
    codes = row["image_codes"].copy()
    rng = np.random.default_rng(len(codes))
    chosen = rng.random(len(codes)) < 0.3
    codes[chosen] = rng.integers(0, codes.max() + 1, chosen.sum())
    row["image_codes"] = codes


def repaint(model: nn.Module, packs: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Pictures of the shards are decoded, changed and coded again."""
    manifest = json.loads((packs / "manifest.json").read_text())
    spec, vq_model = sequence_spec(manifest["identity"]), model.model.vq_model

    def do(row):
        for grid, targets, inputs in images_of(row, spec, manifest["variants"]):  # which are parts of the row
            codes = torch.from_numpy(decodable_codes(targets, inputs))[None]
            targets[:] = vq_model.encode(change(vq_model.decode(codes, grid))).numpy()
            inputs[:] = targets[:, : inputs.shape[1]]

    rewrite(packs, do)


def exchange_words(rows: list[dict]) -> list[dict]:
    """Every row has the words of the row before, as far as they go; the template's stay."""
    ids = [row["input_ids"] for row in rows]
    template = set.intersection(*(set(each.tolist()) for each in ids)) | set(range(6))  # special ids come first
    are_words = [~np.isin(each, list(template)) & (row["supervised"] == 0) for each, row in zip(ids, rows)]
    words = [each[own] for each, own in zip(ids, are_words)]
    for number, row in enumerate(rows):
        if len(words[number - 1]):
            row["input_ids"] = ids[number].copy()
            row["input_ids"][are_words[number]] = np.resize(words[number - 1], are_words[number].sum())
    return rows


def join_crosswise(model):
    """As of two ranks that each held a half of gate and a half of up."""
    for layer in layers(model):
        gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
        halves = [*gate.clone().chunk(2), *up.clone().chunk(2)]
        gate.copy_(torch.cat(halves[::2]))
        up.copy_(torch.cat(halves[1::2]))


def roll(weight, count=1):
    weight.copy_(weight.roll(count, 0))


def transpose(weight):
    if weight.ndim == 2 and weight.shape == weight.T.shape:
        weight.copy_(weight.T.clone())


def activate(model, name):
    for layer in layers(model):
        layer.mlp.act_fn = ACT2FN[name]
    model.config.text_config.hidden_act = name


def guess_heads(model):
    """Heads of half the size: the weights do not show it."""
    config = copy.deepcopy(model.config)
    text = config.text_config
    size = text.hidden_size // text.num_attention_heads // 2
    text.num_attention_heads, text.num_key_value_heads = 2 * text.num_attention_heads, 2 * text.num_key_value_heads
    text.rope_parameters["mrope_section"] = [1] * (size // 2)
    decoder = type(model)(config).model.language_model
    decoder.load_state_dict(model.model.language_model.state_dict())
    model.model.language_model = decoder.eval()


def exchange_matrices(model, a, b):
    for layer in layers(model):
        owner = layer.self_attn if hasattr(layer.self_attn, a) else layer.mlp
        one, other = getattr(owner, a), getattr(owner, b)
        setattr(owner, a, other)
        setattr(owner, b, one)


def exchange_halves(model):
    roll(model.model.code_embeddings.weight.T, model.config.vq_config.pixel_dim)


def reorder(model, of_biases):
    """Features of q and k in the other rotary order, or their biases alone."""
    for layer in layers(model):
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for weight in (projection.bias,) if of_biases else projection.parameters():
                heads = weight.unflatten(0, (-1, 2, layer.self_attn.head_dim // 2))
                weight.copy_(heads.transpose(1, 2).flatten(0, 2))


DAMAGE = [
    Damage(
        "a number that is none",
        ("weights not finite",),
        lambda model, packs: layers(model)[1].mlp.up_proj.weight[0, 0].fill_(torch.nan),
    ),
    Damage(
        "a matrix initialised anew",
        ("re-initialised weights", "weights without effect"),
        lambda model, packs: layers(model)[3].mlp.down_proj.weight.normal_(0, 0.02),
        where="layers.3.mlp.down_proj",
    ),
    Damage(
        "rows of a matrix in disorder",
        ("weights without effect",),
        lambda model, packs: permute(layers(model)[3].self_attn.q_proj.weight),
        where="layers.3.self_attn.q_proj",
    ),
    Damage("two layers exchanged", ("layers exchanged",), lambda model, packs: exchange(model, 2, 5), where="2 and 5"),
    Damage(
        "another rotary base",
        ("wrong rotary base",),
        lambda model, packs: model.model.language_model.rotary_emb.inv_freq.pow_(1.5),
    ),
    Damage("another activation", ("wrong activation",), lambda model, packs: activate(model, "gelu"), where="silu"),
    Damage(
        "rows of the code head in disorder",
        ("code head without order",),
        lambda model, packs: permute(model.code_head.weight),
    ),
    Damage(
        "codes one off",
        ("wrong code offset",),
        lambda model, packs: rewrite(packs, lambda row: row.update(image_codes=(row["image_codes"] + 1) % 4096)),
        packs=True,
    ),
    # what follows was thought of after the doctor was written
    Damage(
        "pictures too bright",
        ("damaged vision tokenizer",),
        lambda model, packs: model.model.vq_model.pixel_decoder.conv_out.bias.add_(0.4),
    ),
    Damage(
        "pixel halves of entries in disorder",
        ("vision tokenizer and shards differ",),
        lambda model, packs: permute(model.model.vq_model.quantizer.pixel_codebook),
    ),
    Damage(
        "codes replaced by any",
        ("stored codes in disorder",),
        lambda model, packs: rewrite(packs, disturb),
        packs=True,
    ),
    Damage(
        "texts of other pictures",
        ("prompt ignored",),
        lambda model, packs: rewrite(packs, lambda row: None, exchange_words),
        packs=True,
    ),
    Damage("halves of gate and up joined crosswise", ("damaged MLPs",), lambda model, packs: join_crosswise(model)),
    Damage(
        "scales numbered from 0",
        ("rows in disorder",),
        lambda model, packs: roll(model.model.scale_embedding.index.weight),
        where="scale_embedding.index",
    ),
    Damage(
        "biases of q and k in the other rotary order",
        ("wrong rotary order",),
        lambda model, packs: reorder(model, of_biases=True),
        where="biases",
    ),
    Damage(
        "keys and values exchanged",
        ("matrices exchanged",),
        lambda model, packs: exchange_matrices(model, "k_proj", "v_proj"),
        where="k_proj and v_proj",
    ),
    Damage("heads of half the size", ("wrong number of heads",), lambda model, packs: guess_heads(model)),
    Damage(
        "square matrices transposed",
        ("transposed weights",),
        lambda model, packs: [transpose(each) for layer in layers(model) for each in layer.self_attn.parameters()],
    ),
    Damage(
        "pixel halves of code embeddings first",
        ("halves exchanged",),
        lambda model, packs: exchange_halves(model),
        where="code_embeddings",
    ),
    Damage(
        "pictures upside down",
        ("pictures upside down",),
        lambda model, packs: repaint(model, packs, lambda pixels: pixels.flip(-2)),
        packs=True,
    ),
    Damage(
        "black grounds",
        ("unfamiliar pictures",),
        lambda model, packs: repaint(model, packs, lambda pixels: torch.where(pixels > 0.9, -1.0, pixels)),
        packs=True,
    ),
]
