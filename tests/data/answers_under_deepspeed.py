"""A training of answers ("supervised") or of preferences on pictures, run by the launcher of `test_deepspeed.py`:
`answers_under_deepspeed.py KIND MODEL OUTPUT`."""

import sys

from datasets import Dataset
from test_chats import CHATS, PAIRS
from trl import DPOConfig, SFTConfig

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.training import NextFlowDPOTrainer, NextFlowSFTTrainer

kind, folder, output = sys.argv[1:]
if kind == "supervised":
    trainer_class, config, rows = NextFlowSFTTrainer, SFTConfig, CHATS
else:
    trainer_class, config, rows = NextFlowDPOTrainer, DPOConfig, PAIRS
arguments = {"max_steps": 4, "logging_steps": 1, "save_steps": 4, "per_device_train_batch_size": 2, "bf16": True}
arguments |= {"learning_rate": 1e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_length": None}
trainer_class(
    NextFlowForConditionalGeneration.from_pretrained(folder),
    args=config(output, **arguments),
    train_dataset=Dataset.from_list(rows * 4),
    processing_class=NextFlowProcessor.from_pretrained(folder),
).train()
