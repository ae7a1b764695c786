"""A model over two ranks: torchrun --nproc-per-node 2 tests/two_ranks.py MODE FOLDER, or one rank without torchrun.

FOLDER holds a model, and gets MODE-RANKS.safetensors: its loss, gradients and codes, as one rank would save them.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.tiny_models import BOI, CODES, EOS, PAD, SQUARE, TEXT_ROWS, WIDE, Picture, batch_of
from transformers_nextflow import NextFlowForConditionalGeneration, losses

losses.LOGITS_AT_ONCE = 7 * (TEXT_ROWS + CODES)  # several chunks
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()


def with_labels(model, *rows) -> dict:
    batch = batch_of(model, *rows)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] == PAD, -100)}


ROWS = [[10, Picture(SQUARE, 1), 11, 12, EOS], [13, Picture(WIDE, 2), EOS]]


def tensor_parallel(folder: Path) -> dict[str, torch.Tensor]:
    """Loss, gradients and codes; every rank reads both rows."""
    plan = {"tp_plan": "auto"} if WORLD > 1 else {}
    model = NextFlowForConditionalGeneration.from_pretrained(folder, **plan).eval()
    if WORLD > 1:
        assert isinstance(model.lm_head.weight, DTensor) and isinstance(model.code_head.weight, DTensor)
    loss = model(**with_labels(model, *ROWS), z_loss=0.1, use_cache=False).loss
    loss.backward()
    results = {name: whole(weight.grad) for name, weight in model.named_parameters() if weight.grad is not None}
    prompt = batch_of(model, [10, 11, BOI])
    codes = model.generate(**prompt, generation_mode="image", guidance_scale=1.0, seed=0)
    return results | {"loss": loss.detach(), "codes": codes}


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Pure bfloat16, units as the model names them; the loss of every step of training, a row on each rank."""
    model = NextFlowForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).train()
    rows = ROWS
    if WORLD > 1:
        rows = ROWS[torch.distributed.get_rank() :][:1]
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module)
        fully_shard(model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    seen = []
    inputs = with_labels(model, *rows)
    num_items = torch.tensor(5 + 14 + 3 + 11) / WORLD  # FSDP averages gradients over ranks
    for _ in range(4):
        loss = model(**inputs, num_items_in_batch=num_items, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach() / WORLD
        if WORLD > 1:
            torch.distributed.all_reduce(loss)
        seen.append(loss)
    return {"losses": torch.stack(seen)}


def sharded_heads(folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of a second step, where each head is a unit of its own; a row on each rank, of unequal lengths."""
    model = NextFlowForConditionalGeneration.from_pretrained(folder).train()
    rows = ROWS
    if WORLD > 1:
        rows = ROWS[torch.distributed.get_rank() :][:1]
        for head in (model.lm_head, model.code_head):
            fully_shard(head)
        fully_shard(model)
    inputs = with_labels(model, *rows)
    for _ in range(2):
        model.zero_grad()
        num_items = torch.tensor(33.0) / WORLD
        model(**inputs, num_items_in_batch=num_items, use_cache=False, logits_over="none").loss.backward()
    return {name: whole(weight.grad) for name, weight in model.named_parameters() if weight.grad is not None}


if __name__ == "__main__":
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
    modes = {"tensor_parallel": tensor_parallel, "sharded": sharded, "sharded_heads": sharded_heads}
    results = modes[mode](folder)
    if WORLD == 1 or torch.distributed.get_rank() == 0:
        save_file(results, folder / f"{mode}-{WORLD}.safetensors")
    if WORLD > 1:
        torch.distributed.destroy_process_group()
        os._exit(0)  # all is done; now and then the library's threads abort a process that ends after Python has
