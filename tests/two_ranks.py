"""A model by one rank, and over two: python -m tests.two_ranks FOLDER.

FOLDER holds a folder for each of `MODES`, which holds a model, and gets 1.safetensors and 2.safetensors: its loss,
gradients and codes, as one rank would save them.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.ranks import on_ranks
from tests.tiny_models import BOI, CODES, EOS, PAD, SQUARE, TEXT_ROWS, WIDE, Picture, batch_of
from transformers_nextflow import NextFlowForConditionalGeneration, losses


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()


def with_labels(model, *rows) -> dict:
    batch = batch_of(model, *rows)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] == PAD, -100)}


ROWS = [[10, Picture(SQUARE, 1), 11, 12, EOS], [13, Picture(WIDE, 2), EOS]]


def tensor_parallel(folder: Path) -> dict[str, torch.Tensor]:
    """Loss, gradients and codes; every rank reads both rows."""
    plan = {"tp_plan": "auto"} if world() > 1 else {}
    model = NextFlowForConditionalGeneration.from_pretrained(folder, **plan).eval()
    if world() > 1:
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
    if world() > 1:
        rows = ROWS[torch.distributed.get_rank() :][:1]
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module)
        fully_shard(model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    seen = []
    inputs = with_labels(model, *rows)
    num_items = torch.tensor(5 + 14 + 3 + 11) / world()  # FSDP averages gradients over ranks
    for _ in range(4):
        loss = model(**inputs, num_items_in_batch=num_items, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach() / world()
        if world() > 1:
            torch.distributed.all_reduce(loss)
        seen.append(loss)
    return {"losses": torch.stack(seen)}


def sharded_heads(folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of a second step, where each head is a unit of its own; a row on each rank, of unequal lengths."""
    model = NextFlowForConditionalGeneration.from_pretrained(folder).train()
    rows = ROWS
    if world() > 1:
        rows = ROWS[torch.distributed.get_rank() :][:1]
        for head in (model.lm_head, model.code_head):
            fully_shard(head)
        fully_shard(model)
    inputs = with_labels(model, *rows)
    for _ in range(2):
        model.zero_grad()
        num_items = torch.tensor(33.0) / world()
        model(**inputs, num_items_in_batch=num_items, use_cache=False, logits_over="none").loss.backward()
    return {name: whole(weight.grad) for name, weight in model.named_parameters() if weight.grad is not None}


MODES = {"tensor_parallel": tensor_parallel, "sharded": sharded, "sharded_heads": sharded_heads}


def save(mode: str, folder: Path) -> None:
    if world() > 1:
        torch.distributed.init_process_group("gloo")
    results = MODES[mode](folder)
    if world() == 1 or torch.distributed.get_rank() == 0:
        save_file(results, folder / f"{world()}.safetensors")
    if world() > 1:
        torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    losses.LOGITS_AT_ONCE = 7 * (TEXT_ROWS + CODES)  # several chunks
    for mode in MODES:
        on_ranks(lambda mode=mode: save(mode, folder / mode))
    for mode in MODES:
        save(mode, folder / mode)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
