"""Train or fine-tune a NextFlow on packs or on raw documents, alone or as one of the paper's stages.

`python -m examples.build_shards` makes packs of the shapes world, `transformers-nextflow data extract | pack` of any
source. A few documents need none: `--documents chats.jsonl` codes their pictures in training. Then, on one device or
under `accelerate launch`:

    python -m examples.train_transformer --packs runs/shapes-packs/packs --output_dir runs/sft --stage sft \
        --max_steps 100 --logging_steps 10 --use_lora
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.cli import model_name
from transformers_nextflow.data import ExtractionSettings, PackedDataset, RawDocuments, Source
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments, load_stages


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


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, NextFlowTrainingArguments))
    given = parser.parse_known_args()[0]
    stages = load_stages(given.stages)
    if given.stage is not None:
        if given.stage not in stages:
            parser.error(f"--stage must be one of {', '.join(stages)}, got {given.stage}")
        stage = stages[given.stage]
        parser.set_defaults(learning_rate=stage.learning_rate, num_train_epochs=float(stage.epochs))
    script, arguments = parser.parse_args_into_dataclasses()
    if (script.packs is None) == (script.documents is None):
        parser.error("give either --packs or --documents")

    name = model_name(script.model)
    model, processor = NextFlowForConditionalGeneration.from_pretrained(name), NextFlowProcessor.from_pretrained(name)
    if script.stage is not None:
        stages[script.stage].prepare(model)
    if script.packs is not None:
        dataset = PackedDataset(script.packs, model, processor, seed=arguments.seed)
    else:
        dataset = RawDocuments(Source(script.documents), name, ExtractionSettings(seed=arguments.seed))
    if script.use_lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config())
    trainer = NextFlowTrainer(model, arguments, train_dataset=dataset, processing_class=processor)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
