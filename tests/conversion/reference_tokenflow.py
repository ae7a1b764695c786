"""What TokenFlow computes, written plainly on the names of its checkpoints: the oracle of the conversion."""

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def linear(state: State, name: str, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def conv(state: State, name: str, x, **kwargs):
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **kwargs)


def norm_silu(state: State, name: str, x):
    return F.silu(F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6))


def layer_norm(state: State, name: str, x, eps: float):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def residual(state: State, name: str, x):
    update = conv(state, f"{name}.conv1", norm_silu(state, f"{name}.norm1", x), padding=1)
    update = conv(state, f"{name}.conv2", norm_silu(state, f"{name}.norm2", update), padding=1)
    return update + (conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def attention(state: State, name: str, x):
    normed = F.group_norm(x, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"], eps=1e-6)
    q, k, v = (conv(state, f"{name}.{part}", normed).flatten(2) for part in "qkv")
    weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
    return x + conv(state, f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))


def middle(state: State, part: str, x):
    return residual(state, f"{part}.mid.2", attention(state, f"{part}.mid.1", residual(state, f"{part}.mid.0", x)))


def blocks(state: State, name: str, x):
    index = 0
    while f"{name}.res.{index}.conv1.weight" in state:
        x = residual(state, f"{name}.res.{index}", x)
        if f"{name}.attn.{index}.q.weight" in state:
            x = attention(state, f"{name}.attn.{index}", x)
        index += 1
    return x


def pixel_encoder(state: State, x):
    x, level = conv(state, "encoder.conv_in", x, padding=1), 0
    while f"encoder.conv_blocks.{level}.res.0.conv1.weight" in state:
        x = blocks(state, f"encoder.conv_blocks.{level}", x)
        if f"encoder.conv_blocks.{level}.downsample.conv.weight" in state:
            x = conv(state, f"encoder.conv_blocks.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        level += 1
    x = norm_silu(state, "encoder.norm_out", middle(state, "encoder", x))
    return conv(state, "quant_conv", conv(state, "encoder.conv_out", x, padding=1))


def pixel_decoder(state: State, x):
    x = middle(state, "decoder", conv(state, "decoder.conv_in", conv(state, "post_quant_conv", x), padding=1))
    level = 0
    while f"decoder.conv_blocks.{level}.res.0.conv1.weight" in state:
        x = blocks(state, f"decoder.conv_blocks.{level}", x)
        if f"decoder.conv_blocks.{level}.upsample.conv.weight" in state:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = conv(state, f"decoder.conv_blocks.{level}.upsample.conv", x, padding=1)
        level += 1
    return conv(state, "decoder.conv_out", norm_silu(state, "decoder.norm_out", x), padding=1)


def positions(table, edge: int):
    """(1 + n*n, D) to (1 + edge*edge, D)."""
    own = round((len(table) - 1) ** 0.5)
    if own == edge:
        return table
    grid = table[1:].T.reshape(1, -1, own, own)
    stretched = F.interpolate(grid, scale_factor=(edge + 0.1) / own, mode="bicubic")
    return torch.cat([table[:1], stretched.flatten(2)[0].T])


def heads_attend(qkv, heads: int):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def clip_features(state: State, x, heads: int):
    name = "encoder_vqkd"
    cells = conv(state, f"{name}.conv1", x, stride=state[f"{name}.conv1.weight"].shape[-1])
    edge = cells.shape[-1]
    start = state[f"{name}.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([start, cells.flatten(2).transpose(1, 2)], dim=1)
    x = layer_norm(state, f"{name}.ln_pre", x + positions(state[f"{name}.positional_embedding"], edge), 1e-5)
    index = 0
    while f"{name}.transformer.resblocks.{index}.ln_1.weight" in state:
        block = f"{name}.transformer.resblocks.{index}"
        normed = layer_norm(state, f"{block}.ln_1", x, 1e-5)
        qkv = F.linear(normed, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        x = x + linear(state, f"{block}.attn.out_proj", heads_attend(qkv, heads))
        inner = linear(state, f"{block}.mlp.c_fc", layer_norm(state, f"{block}.ln_2", x, 1e-5))
        x = x + linear(state, f"{block}.mlp.c_proj", inner * torch.sigmoid(1.702 * inner))
        index += 1
    return layer_norm(state, f"{name}.ln_post", x, 1e-5)[:, 1:]


def semantic_decoder(state: State, cells, heads: int):
    name = "decoder_vqkd"
    edge = cells.shape[-1]
    x = conv(state, f"{name}.patch_embed.proj", cells).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{name}.cls_token"].expand(len(x), 1, -1), x], 1)
    x = x + positions(state[f"{name}.pos_embed"][0], edge)
    index = 0
    while f"{name}.blocks.{index}.norm1.weight" in state:
        block = f"{name}.blocks.{index}"
        q_bias, v_bias = state[f"{block}.attn.q_bias"], state[f"{block}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(v_bias), v_bias])
        qkv = F.linear(layer_norm(state, f"{block}.norm1", x, 1e-6), state[f"{block}.attn.qkv.weight"], bias)
        x = x + linear(state, f"{block}.attn.proj", heads_attend(qkv, heads))
        inner = F.gelu(linear(state, f"{block}.mlp.fc1", layer_norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", inner)
        index += 1
    return task_layer(state, "decode_task_layer", layer_norm(state, f"{name}.fc_norm", x, 1e-6)[:, 1:])


def task_layer(state: State, name: str, x):
    return linear(state, f"{name}.2", torch.tanh(linear(state, f"{name}.0", x)))


def quantize(state: State, features, edges):
    """Codes, scale by scale, and the sum of their entries."""
    tables = [F.normalize(state[f"quantize.embedding_{name}.weight"], dim=-1) for name in ("vqkd", "vqgan")]
    widths, final = [table.shape[1] for table in tables], features.shape[-2:]
    total, codes = torch.zeros_like(features), []
    for edge in edges:
        pooled = F.interpolate(features - total, size=(edge, edge), mode="area").flatten(2).transpose(1, 2)
        halves = [F.normalize(half, dim=-1) for half in pooled.split(widths, dim=-1)]
        codes.append(sum(torch.cdist(half, table) ** 2 for half, table in zip(halves, tables)).argmin(-1))
        entries = torch.cat([table[codes[-1]] for table in tables], dim=-1).transpose(1, 2).unflatten(2, (edge, edge))
        total = total + F.interpolate(entries, size=final, mode="bicubic")
    return torch.cat(codes, 1), total


def tokenflow_clip(state: State, pixel_values, edges, heads: int = 4):
    """Codes, quantised features, semantic features and reconstruction of TokenFlow's CLIP variant."""
    edge = edges[-1]
    semantic = task_layer(state, "encode_task_layer", clip_features(state, pixel_values, heads))
    semantic = semantic.transpose(1, 2).unflatten(2, (edge, edge))
    codes, quantized = quantize(state, torch.cat([semantic, pixel_encoder(state, pixel_values)], 1), edges)
    width = semantic.shape[1]
    return (
        codes,
        quantized,
        semantic_decoder(state, quantized[:, :width], heads),
        pixel_decoder(state, quantized[:, width:]),
    )
