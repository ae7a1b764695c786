"""Train or fine-tune a NextFlow on packs or on raw documents, alone or as one of the paper's stages.

`transformers-nextflow data extract | pack` makes packs of any source. A few documents need none: `--documents
chats.jsonl` codes their pictures in training. Then, on one device or under `accelerate launch`:

    python -m examples.train_transformer --packs packs --output_dir runs/sft --stage sft \
        --max_steps 100 --logging_steps 10 --use_lora

`--use_liger_kernel` takes Liger's kernels, `--load_in_4bit` beside `--use_lora` is QLoRA.
"""

from dataclasses import dataclass, field

import torch
from transformers import BitsAndBytesConfig, HfArgumentParser

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data import ExtractionSettings, PackedDataset, RawDocuments, Source
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training import (
    EMACallback,
    NextFlowTrainer,
    NextFlowTrainingArguments,
    SamplesCallback,
    load_stages,
)
from transformers_nextflow.utils.loading import model_name


@dataclass
class ScriptArguments:
    packs: str | None = field(default=None, metadata={"help": "folder or Hub dataset of packs"})
    documents: str | None = field(
        default=None, metadata={"help": "instead of packs: Parquet or JSON lines of documents in the `chat` schema"}
    )
    model: str | None = field(
        default=None, metadata={"help": "folder or Hub id; default: the repository's checkpoint"}
    )
    stage: str | None = field(
        default=None,
        metadata={"help": "stage whose parameters, loss weights, and where not given learning rate and epochs, count"},
    )
    stages: str | None = field(default=None, metadata={"help": "YAML of stages; default: the paper's"})
    use_lora: bool = field(default=False, metadata={"help": "train adapters instead of the weights"})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "hold the decoder's linear layers in NF4 by bitsandbytes; with --use_lora"}
    )
    ema_decay: float | None = field(default=None, metadata={"help": "keep a moving average of the trained weights"})
    sample_prompts: list[str] = field(default_factory=list, metadata={"help": "draw pictures for them while training"})
    sample_every: int = field(default=500, metadata={"help": "steps from one drawing to the next"})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, NextFlowTrainingArguments))
    given = parser.parse_known_args()[0]
    stages = load_stages(given.stages)
    if given.stage is not None:
        if given.stage not in stages:
            parser.error(f"--stage must be one of {', '.join(stages)}, got {given.stage}")
        stage = stages[given.stage]
        parser.set_defaults(learning_rate=stage.learning_rate, num_train_epochs=float(stage.epochs))
    if given.load_in_4bit and not given.use_lora:
        parser.error("--load_in_4bit needs --use_lora: weights in 4 bits cannot be trained")
    script, arguments = parser.parse_args_into_dataclasses()
    if (script.packs is None) == (script.documents is None):
        parser.error("give either --packs or --documents")

    name = model_name(script.model)
    quantization = None
    if script.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = NextFlowForConditionalGeneration.from_pretrained(name, quantization_config=quantization)
    processor = NextFlowProcessor.from_pretrained(name)
    if script.stage is not None:
        stages[script.stage].prepare(model)
    if script.packs is not None:
        dataset = PackedDataset(script.packs, model, processor, seed=arguments.seed)
    else:
        dataset = RawDocuments(Source(script.documents), name, ExtractionSettings(seed=arguments.seed))
    if script.use_lora:
        from peft import get_peft_model, prepare_model_for_kbit_training

        if script.load_in_4bit:  # what is trained, in float32; checkpointing is the trainer's
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, lora_config())
    trainer = NextFlowTrainer(model, arguments, train_dataset=dataset, processing_class=processor)
    if script.ema_decay is not None:
        trainer.add_callback(EMACallback(script.ema_decay))
    if script.sample_prompts:
        trainer.add_callback(SamplesCallback(processor, script.sample_prompts, script.sample_every))
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
