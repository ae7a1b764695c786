"""Attention over one 1024-level picture, forward and backward: `python -m benchmarks.attention --json`.

The sequence is a prompt, `<boi>`, the blocks of table 14's schedule and `<eoi>`; queries, keys and values are random.
`sdpa` gets the whole mask, `blocks` one call per scale block and run of text, and on a GPU `flex_attention` one
BlockMask. Masks are made beforehand, as a model makes them once for all layers.
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen2_5_VLTextConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

from transformers_nextflow import NextFlowConfig
from transformers_nextflow.attention import sequence_mask
from transformers_nextflow.layout import build_layout, num_image_slots

from .harness import interleaved_seconds, machine, median, report

BOI, EOI, IMAGE = 1, 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="1024", help="default: %(default)s")
    parser.add_argument("--aspect-ratio", default="1:1", help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="of queries (default: %(default)s)")
    parser.add_argument("--key-value-heads", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--head-size", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)

    config = NextFlowConfig(boi_token_id=BOI, eoi_token_id=EOI, image_token_id=IMAGE)
    schedule = config.vq_config.schedule_table().by_aspect_ratio(arguments.aspect_ratio, arguments.level)
    prompt = [10] * arguments.prompt_tokens
    ids = torch.tensor([[*prompt, BOI, *[IMAGE] * num_image_slots(schedule), EOI]], device=device)
    block_ids = build_layout(config, ids, [schedule.final_grid]).block_ids
    width = arguments.heads * arguments.head_size
    text_config = Qwen2_5_VLTextConfig(
        hidden_size=width,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_value_heads,
        num_hidden_layers=1,
    )
    module = Qwen2_5_VLAttention(text_config, layer_idx=0)
    generator = torch.Generator(device).manual_seed(0)
    embeddings = torch.empty(1, ids.shape[1], width, device=device, dtype=dtype)
    query, key, value, upstream = (
        torch.randn(1, heads, ids.shape[1], arguments.head_size, device=device, dtype=dtype, generator=generator)
        for heads in (arguments.heads, arguments.key_value_heads, arguments.key_value_heads, arguments.heads)
    )
    states = [tensor.requires_grad_() for tensor in (query, key, value)]

    names = ["sdpa", "blocks"] + ["flex_attention"] * (device.type == "cuda")
    masks = {}
    for name in names:
        text_config._attn_implementation = name
        masks[name] = sequence_mask(text_config, embeddings, None, block_ids, None, None)["full_attention"]

    def attend(name: str) -> torch.Tensor:
        output, _ = ALL_ATTENTION_FUNCTIONS[name](module, *states, masks[name], scaling=module.scaling)
        return output

    def train(name: str) -> list[torch.Tensor]:
        output = attend(name)
        return [output.detach(), *torch.autograd.grad(output, states, upstream.transpose(1, 2))]

    @torch.no_grad()
    def read(name: str) -> torch.Tensor:
        return attend(name)

    differences = {
        name: max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(train(name), train("sdpa")))
        for name in names[1:]
    }
    jobs = {"forward": read, "forward_and_backward": train}
    medians = {}
    for job, function in jobs.items():
        calls = {name: lambda name=name, function=function: function(name) for name in names}
        seconds = interleaved_seconds(calls, arguments.repeats, device)
        medians[job] = {name: median(values) for name, values in seconds.items()}
    result = {
        "level": arguments.level,
        "positions": ids.shape[1],
        "heads": [arguments.heads, arguments.key_value_heads, arguments.head_size],
        "dtype": arguments.dtype,
        "seconds": medians,
        "sdpa_over": {
            job: {name: round(times["sdpa"] / times[name], 4) for name in names[1:]} for job, times in medians.items()
        },
        "relative_differences": differences,
        "machine": machine(device),
        "seed": 0,
    }
    report(result, arguments.json, arguments.output)


if __name__ == "__main__":
    main()
