"""Train or fine-tune a NextFlow on packs or on raw documents, alone or as one of the paper's stages.

`transformers-nextflow data extract | pack` makes packs of any source. A few documents need none: `--documents` of
chats, or of pictures and captions as `finetune` takes them, codes their pictures in training. Then, on one device or
under `accelerate launch -m`:

    transformers_nextflow train transformer --packs packs --output runs/sft --stage sft --max_steps 100 --use_lora

Weights are trained in float32 unless `--dtype` says otherwise; `--bf16` is for the arithmetic. Adapters as `--model`
are trained on. The vision tokenizer is not loaded: checkpoints refer to the model that has it, and the result has
it again. `--use_liger_kernel` takes Liger's kernels, `--load_in_4bit` beside `--use_lora` is QLoRA.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser, set_seed

from ...data import ExtractionSettings, PackedDataset, RawDocuments, Source
from ...data.sources import task_of
from ...lora import CODE_MODULES
from ...utils.loading import model_name
from ...utils.safetensors_folder import folder_of
from .. import EMACallback, NextFlowTrainer, NextFlowTrainingArguments, SamplesCallback, load_stages
from .options import ModelOptions


@dataclass
class TransformerOptions:
    packs: str | None = field(default=None, metadata={"help": "folder or Hub dataset of packs"})
    documents: str | None = field(
        default=None, metadata={"help": "instead of packs: chats, or pictures and captions; coded in training"}
    )
    eval_packs: str | None = field(default=None, metadata={"help": "packs for the held-out loss, see --eval_strategy"})
    stage: str | None = field(
        default=None,
        metadata={"help": "whose level, parameters, loss weights, and where not given rate and epochs, count"},
    )
    stages: str | None = field(default=None, metadata={"help": "YAML of stages; default: the paper's"})
    ema_decay: float | None = field(default=None, metadata={"help": "keep a moving average of the trained weights"})
    sample_prompts: list[str] = field(default_factory=list, metadata={"help": "draw pictures for them while training"})
    sample_every: int = field(default=500, metadata={"help": "steps from one drawing to the next"})


def main(argv: Sequence[str] | None = None) -> None:
    """Train by the options of a command line; without `argv` the process's own."""
    parser = HfArgumentParser(
        (TransformerOptions, ModelOptions, NextFlowTrainingArguments),
        prog="transformers-nextflow train transformer",
        description=__doc__.split("\n")[0],
    )
    given, stage = parser.parse_known_args(argv)[0], None
    if given.stages is not None and given.stage is None:
        parser.error("--stages lists stages: say by --stage which of them is trained")
    if given.stage is not None:
        stages = load_stages(given.stages)
        if given.stage not in stages:
            parser.error(f"--stage must be one of {', '.join(stages)}, got {given.stage}")
        stage = stages[given.stage]
        parser.set_defaults(learning_rate=stage.learning_rate, num_train_epochs=float(stage.epochs))
    options, of_model, arguments = parser.parse_args_into_dataclasses(argv)
    if (options.packs is None) == (options.documents is None):
        parser.error("give either --packs or --documents")

    model, processor, adapters = of_model.load(CODE_MODULES, vision_tokenizer=False)
    if options.packs is not None:
        dataset = PackedDataset(options.packs, model, processor, seed=arguments.seed)
    else:
        source = Source(options.documents)
        task, columns = task_of(source.load())
        settings = ExtractionSettings(task, columns, stage and stage.level, seed=arguments.seed)
        coding = folder_of(model_name(of_model.model_name_or_path), of_model.model_revision)
        dataset = RawDocuments(source, coding, settings)
    held_out = None if options.eval_packs is None else PackedDataset(options.eval_packs, model, processor)
    if adapters is not None:
        from peft import get_peft_model

        set_seed(arguments.seed)  # of what adapters begin with
        model = get_peft_model(model, adapters)
    if stage is not None:
        stage.prepare(model, dataset, *([] if held_out is None else [held_out]))
    trainer = NextFlowTrainer(
        model, arguments, train_dataset=dataset, eval_dataset=held_out, processing_class=processor
    )
    if options.ema_decay is not None:
        trainer.add_callback(EMACallback(options.ema_decay))
    if options.sample_prompts:
        trainer.add_callback(SamplesCallback(processor, options.sample_prompts, options.sample_every))
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
