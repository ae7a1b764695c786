"""A model by one rank, and over two: python -m tests.two_ranks FOLDER.

FOLDER holds a folder for each of `MODES`, which holds a model, and gets 1.safetensors and 2.safetensors: its loss,
gradients and codes, as one rank would save them.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import ParallelismConfig
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.ranks import on_ranks
from tests.tiny_models import BOI, CODES, EOS, PAD, SQUARE, TEXT_ROWS, WIDE, Picture, batch_of
from transformers_nextflow import NextFlowForConditionalGeneration, losses
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments


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


def tensor_parallel_training(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and logs of a training, and losses of an evaluation; every rank reads all batches."""
    plan = {"tp_plan": "auto"} if world() > 1 else {}
    model = NextFlowForConditionalGeneration.from_pretrained(folder, **plan)
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # which wants an accelerator
    items = [ROWS[0], ROWS[1], ROWS[0][:3], ROWS[1][1:]]
    arguments = {
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    arguments |= {
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = NextFlowTrainingArguments(str(folder / "output"), **arguments)

    def collate(rows: list) -> dict:
        batch = with_labels(model, *rows)
        labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
        return batch | {"shift_labels": labels, "document_ids": batch["attention_mask"] - 1}

    trainer = NextFlowTrainer(model, arguments, collate, items, eval_dataset=items[:3])
    trainer.train()
    logs = [[row[name] for name in LOGGED] for row in trainer.state.log_history if "loss" in row]
    held_out = torch.tensor([value for name, value in trainer.evaluate().items() if name.startswith("eval_loss")])
    weights = {name: whole(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    return weights | {"logs": torch.tensor(logs), "held_out": held_out}


LOGGED = ("loss", "loss_text", "loss_vision", "max_attention_logit")


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


MODES = {
    "tensor_parallel": tensor_parallel,
    "tensor_parallel_training": tensor_parallel_training,
    "sharded": sharded,
    "sharded_heads": sharded_heads,
}


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
