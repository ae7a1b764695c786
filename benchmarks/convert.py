"""Peak memory of converting a Qwen2.5-VL of several gigabytes: `python -m benchmarks.convert --json`.

Writes a checkpoint in Qwen's layout, all zeros, converts it in a process of its own, and reports that process's
largest resident size, mapped files included, beside the largest shard.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.harness import machine, report
from tests.tiny_tokenizer import tiny_text_tokenizer
from transformers_nextflow import NextFlowVQConfig, NextFlowVQModel
from transformers_nextflow.conversion.checkpoints import write_shards
from transformers_nextflow.conversion.decoder import hub_key
from transformers_nextflow.conversion.language_model import convert

VQ = {
    "semantic_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "semantic_decoder_layers": 1,
    "codebook_size": 1024,
    "base_channels": 8,
    "decoder_blocks": 1,
}


def write_sources(folder: Path, layers: int, hidden_size: int, shard_size: str) -> None:
    """A Qwen2.5-VL of bfloat16 zeros in the Hub's key layout, and a small vision tokenizer."""
    tokenizer = tiny_text_tokenizer()
    text = {
        "vocab_size": 152064,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 128,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1}, tie_word_embeddings=False)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    plan = {hub_key(name) or name.removeprefix("model."): tensor for name, tensor in state.items()}
    qwen = folder / "qwen"
    qwen.mkdir()
    write_shards(qwen, plan, lambda name: torch.zeros_like(plan[name], device="cpu"), shard_size)
    config.save_pretrained(qwen)
    tokenizer.save_pretrained(qwen)
    NextFlowVQModel(NextFlowVQConfig(**VQ)).save_pretrained(folder / "vq")


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def convert_here(folder: str) -> None:
    """The measured process: memory after the imports, and the peak of the whole."""
    before, start = peak_bytes(), time.perf_counter()
    convert(f"{folder}/qwen", f"{folder}/vq", f"{folder}/out")
    figures = {"imports_bytes": before, "peak_bytes": peak_bytes(), "seconds": time.perf_counter() - start}
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=18, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--shard-size", default="1500MB", help="default: %(default)s")
    parser.add_argument("--folder", metavar="DIR", help="for the files, which are deleted (default: the system's)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to a file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_sources(folder, arguments.layers, arguments.hidden_size, arguments.shard_size)
        script = f"from benchmarks.convert import convert_here; convert_here({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
        shards = [path.stat().st_size for path in (folder / "qwen").glob("*.safetensors")]
        figures = {
            "checkpoint_bytes": sum(shards),
            "shards": len(shards),
            "largest_shard_bytes": max(shards),
            **json.loads(done.stdout.splitlines()[-1]),
        }
        figures["peak_over_largest_shard"] = figures["peak_bytes"] / figures["largest_shard_bytes"]
    finally:
        shutil.rmtree(folder)
    report(figures | machine(torch.device("cpu")), arguments.json, arguments.output)


if __name__ == "__main__":
    main()
