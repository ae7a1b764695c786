"""Prompts in the order of training, as conversations with their pictures, and the seeds of what answers them."""

import hashlib
from collections.abc import Iterator
from itertools import groupby

import datasets
import torch
from torch.utils.data import Dataset, Sampler

from ..chats import with_images

PROMPT_COLUMNS = ("prompt", "images", "image")
OF_REWARDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def seed_of(*parts: int) -> int:
    """A seed of 32 bits from numbers."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:4], "big")


def check_prompts(name: str, dataset) -> None:
    """Raise a `ValueError` for what is no dataset of prompts."""
    if isinstance(dataset, dict) or not hasattr(dataset, "__len__"):
        raise ValueError(f"{name} must be one dataset with a length and rows by number, got {type(dataset).__name__}")
    if not len(dataset):
        return
    if "prompt" not in dataset[0]:
        raise ValueError(f"rows of {name} must have a prompt, got {', '.join(dataset[0])}")
    if taken := sorted(set(dataset[0]) & set(OF_REWARDS)):
        raise ValueError(f"{name} must not have the columns {', '.join(taken)}, which reward functions get otherwise")
    if isinstance(dataset, datasets.Dataset):  # whose columns are read alone
        for place, prompt in enumerate(dataset["prompt"]):
            check_prompt(prompt, f"prompt {place} of {name}")


def check_prompt(prompt, where: str) -> None:
    """Raise a `ValueError` for what is nothing to answer."""
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt):
        raise ValueError(f"{where} must be a text or messages, got {prompt!r}")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise ValueError(f"{where} must end with what is to be answered, its last message is the assistant's")


class PromptOrder(Sampler[int]):
    """Prompts in TRL's order: each `num_generations` times in a row, the prompts of a generation again for every step
    that trains on it. A permutation by seed and epoch; prompts that fill no generation wait for another epoch."""

    def __init__(self, num_prompts: int, prompts_at_once: int, num_generations: int, repeats: int, seed: int | None):
        self.num_prompts, self.prompts_at_once = num_prompts, prompts_at_once
        self.num_generations, self.repeats, self.seed, self.epoch = num_generations, repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_prompts // self.prompts_at_once * self.prompts_at_once * self.num_generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.num_prompts)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
            order = torch.randperm(self.num_prompts, generator=generator)
        for batch in order.split(self.prompts_at_once):
            if len(batch) == self.prompts_at_once:
                yield from batch.repeat_interleave(self.num_generations).repeat(self.repeats).tolist()


class Numbered(Dataset):
    """Rows of a dataset with their numbers."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, dict]:
        return index, self.dataset[index]


Rows = list[tuple[int, dict]]


def columns(rows: Rows) -> dict[str, list]:
    """The dataset's columns for reward functions."""
    names = [name for name in rows[0][1] if name not in PROMPT_COLUMNS]
    return {name: [row[name] for _, row in rows] for name in names}


def conversations(rows: Rows) -> tuple[list[list[dict]], int]:
    """What is read: a conversation for each run of equal rows and their number, or for each row where runs differ."""
    runs = [list(run) for _, run in groupby(rows, key=lambda row: row[0])]
    lengths = {len(run) for run in runs}
    repeats = lengths.pop() if len(lengths) == 1 else 1
    chats = []
    for run in runs:
        index, row = run[0]
        check_prompt(row["prompt"], f"prompt {index}")
        chat = with_images(row["prompt"], row.get("images", row.get("image")), f"prompt {index}")
        chats += [chat] * (len(run) // repeats)
    return chats, repeats
