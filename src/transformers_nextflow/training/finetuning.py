"""Own pictures and their captions to a model that draws them: `transformers-nextflow finetune`.

Nothing here is new: pictures are coded and packed as of `data`, trained on by [`NextFlowTrainer`], and drawn along the
way by [`SamplesCallback`]. A stopped run goes on where it was by the same call.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..data import BatchPadding, CostModel, Document, DocumentReader, ExtractionSettings, PackedDataset, Source
from ..data import extract as extract_documents
from ..data import pack as pack_documents
from ..data.documents import Skipped, draw, open_image
from ..data.extraction import check_plan
from ..data.inspection import draw_sheet
from ..data.shards import write_json
from ..data.sources import content_hash, find_columns
from ..image_processing_nextflow import DAMAGED, NextFlowImageProcessor
from ..lora import lora_config
from ..processing_nextflow import NextFlowProcessor
from ..quantizer import SelfCorrection
from ..utils.files import read_json, save_png, write_atomically
from ..utils.loading import load_config, load_merged, load_model, load_processor
from .checkpoints import STATE, newest_checkpoint
from .finetune_settings import FinetuneSettings
from .loading import load_to_train
from .samples import SamplesCallback
from .trainer import NextFlowTrainer, NextFlowTrainingArguments

logger = logging.get_logger(__name__)

REPORT, BEFORE = "finetune.json", "before.json"
SPLITS = ("training", "held-out")
VARIANTS = 16  # self-corrected encodings of each picture, one of which an epoch shows
CORRECTION = SelfCorrection(temperature=0.1)  # mild: of few pictures, uniform draws are learned as noise
LONGEST = 1 << 20  # positions of a document: pictures are never too long
OF_TRAINING = (STATE, "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")
WRITTEN_LAST = ("adapter_config.json", "config.json")  # with them a folder is one of adapters, or a model


def finetune(
    source: Source,
    model: str,
    output: str | Path,
    settings: FinetuneSettings,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> dict:
    """Tune a model to pictures and their captions; the same call continues a stopped run.

    `output` becomes a folder of adapters, or with `settings.full` of a model, of the step with the lowest held-out
    loss. In it are `sheet.png`, drawings before and after; `samples`; `data`, the coded pictures; and `finetune.json`.

    Args:
        source: rows of a picture and its caption; what cannot be read is named and left out.
        model: folder or Hub id of a model, or of adapters, which are trained on.
        image_column, caption_column: by default the column of pictures, and `text`, `caption`, `prompt` or `txt`.

    Returns:
        Held-out `loss before` and `loss after`, `steps`, `best step`, and counts of pictures.

    Raises:
        ValueError: for fewer than two pictures with captions, columns that are not there or not plain, a prompt of
            the prior without a text, or an `output` that was begun otherwise.
    """
    output, table = Path(output), source.load()
    columns = find_columns(table, image_column, caption_column)
    reader = DocumentReader("text-to-image", columns, root=source.root)
    reader.check_columns(table.column_names)
    _check_enough(len(table))
    prior = _read_prior(settings.prior, output / "data" / "prior")
    begun = {"source": asdict(source) | {"content": content_hash(table)}, "model": model, "columns": columns}
    check_plan(output, begun | {"settings": asdict(settings)})
    if (output / REPORT).is_file():
        return read_json(output / REPORT)
    level = settings.level or load_config(model).image_generation["level"]
    _draw_prior(model, level, prior, settings)
    written = _write_documents(table, reader, load_processor(model).image_processor, prior, output / "data", settings)
    packs = {split: _code(output / "data", split, model, level, settings) for split in SPLITS}

    tuned, processor = _load(model, settings)
    training, held_out = (PackedDataset(packs[split], tuned, processor, settings.seed) for split in SPLITS)
    samples = SamplesCallback(processor, written["prompts"], settings.every, seed=settings.seed, level=level)
    trainer = NextFlowTrainer(
        tuned,
        _arguments(output, settings),
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=[EarlyStoppingCallback(settings.patience), samples, _Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    before = output / "samples" / "step-0"
    if not (output / "data" / BEFORE).is_file():
        samples.write(before, samples.draw(trainer.model))
        write_json(output / "data" / BEFORE, {"loss": trainer.evaluate()["eval_loss"]})
    state = _newest_state(output)
    if state is None or not _has_ended(state, settings):
        trainer.train(resume_from_checkpoint=state is not None)
        state = trainer.state
    _publish(output / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}", output)
    _write_sheet(output, written["prompts"], before, samples.draw(load_model(str(output))[0]))
    report = {
        "pictures": written["pictures"],
        "held out": written["held-out"],
        "left out": written["left out"],
        "loss before": read_json(output / "data" / BEFORE)["loss"],
        "loss after": state.best_metric,
        "steps": state.global_step,
        "best step": state.best_global_step,
    }
    write_json(output / REPORT, report)
    return report


def _write_documents(
    table: datasets.Dataset,
    reader: DocumentReader,
    image_processor: NextFlowImageProcessor,
    prior: list[Document],
    folder: Path,
    settings: FinetuneSettings,
) -> dict:
    """Write the documents of each split, and return their numbers and the prompts of samples."""
    report = folder / "pictures.json"
    if report.is_file():
        return read_json(report)
    documents, left_out = [], 0
    for index in tqdm(range(len(table)), desc="pictures", disable=None):
        row = table[index]
        try:
            (document,) = reader.read(row, index)
            with open_image(document.images[0]) as picture:
                image_processor(picture)  # as extraction does, which is to leave none out
        except (Skipped, *DAMAGED) as error:
            logger.warning(f"left out {reader.key_of(row, index)}: {error}")
            left_out += 1
            continue
        documents.append(document)
    _check_enough(len(documents))
    documents.sort(key=lambda document: draw(settings.seed, "held out", document.key))
    count = min(max(1, round(settings.held_out * len(documents))), len(documents) - 1)
    held_out, training = documents[:count], documents[count:]
    for split, members in zip(SPLITS, (_mixed(training, prior, settings.batch_size), held_out)):
        rows = datasets.Dataset.from_list([_embedded(document) for document in members])
        write_atomically(folder / f"{split}.parquet", rows.to_parquet)
    captions = dict.fromkeys(document.text for document in held_out + training)
    written: dict = {"pictures": len(documents), "held-out": count, "left out": left_out}
    written["prompts"] = list(captions)[: settings.samples]
    write_json(report, written)
    return written


def _check_enough(count: int) -> None:
    if count < 2:
        raise ValueError(f"tuning takes two pictures with captions or more, one is held out: got {count}")


def _repeated(documents: Sequence[Document], count: int) -> list[Document]:
    """So many documents: these, and as often as needed the same again under other keys."""
    rounds = [divmod(place, len(documents)) for place in range(count)]
    return [
        replace(documents[index], key=f"{documents[index].key}#{number}") if number else documents[index]
        for number, index in rounds
    ]


def _mixed(pictures: list[Document], prior: list[Document], multiple: int) -> list[Document]:
    """What is trained on: at least as many pictures as there are of the prior, and a whole number of steps of both."""
    count = max(len(pictures), len(prior)) + len(prior)
    return _repeated(pictures, -(-count // multiple) * multiple - len(prior)) + prior


def _read_prior(prompts: Sequence[str], folder: Path) -> list[Document]:
    """The documents of the prior, whose pictures are still to be drawn.

    Raises:
        ValueError: naming a prompt that is no text.
    """
    reader, documents = DocumentReader("text-to-image", root="/"), []
    for place, prompt in enumerate(prompts):
        path = folder.resolve() / f"{place:04}.png"
        try:
            documents += reader.read({"key": f"prior/{place}", "text": prompt, "image": str(path)}, place)
        except Skipped as skip:
            raise ValueError(f"prompt {place} of the prior, {prompt!r}, is nothing to draw: {skip}") from skip
    return documents


def _draw_prior(model: str, level: str, prior: list[Document], settings: FinetuneSettings) -> None:
    """The model's own pictures for the prompts of the prior, before it is tuned."""
    paths = [Path(document.images[0]) for document in prior]
    if missing := [place for place, path in enumerate(paths) if not path.is_file()]:
        drawing, processor = load_model(model)
        for start in tqdm(range(0, len(missing), settings.batch_size), desc="prior", disable=None):
            places = missing[start : start + settings.batch_size]
            prompts = [settings.prior[place] for place in places]
            seeds = [settings.seed + place for place in places]  # of a prompt that comes again other pictures
            samples = SamplesCallback(processor, prompts, seed=seeds, level=level)
            for place, picture in zip(places, samples.draw(drawing)):
                save_png(picture, paths[place])


def _embedded(document: Document) -> dict:
    """The row of a document with its pictures in it."""
    pictures = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in document.images]
    return replace(document, images=tuple(pictures)).to_row()


def _code(folder: Path, split: str, model: str, level: str, settings: FinetuneSettings) -> Path:
    """The packs of a split, one document each, so that every epoch mixes them anew."""
    is_training = split == SPLITS[0]
    extraction = ExtractionSettings(
        level=level,
        drop_text=settings.drop_captions if is_training else 0.0,
        self_correction=CORRECTION if is_training else None,
        variants=VARIANTS if is_training else 1,
        seed=settings.seed,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extract_documents(Source(str(folder / f"{split}.parquet")), model, folder / f"{split}-codes", extraction, [device])
    costs = CostModel.from_config(load_config(model))
    pack_documents([folder / f"{split}-codes"], folder / f"{split}-packs", BatchPadding(1, LONGEST), costs)
    return folder / f"{split}-packs"


def _load(model: str, settings: FinetuneSettings) -> tuple[torch.nn.Module, NextFlowProcessor]:
    """The model with what is trained of it, in float32."""
    if settings.full:
        whole = load_merged(model, torch.float32)
        whole.requires_grad_(True)
        whole.model.vq_model.requires_grad_(False)
        return whole, load_processor(model)
    tuned, processor = load_to_train(model)
    if not hasattr(tuned, "peft_config"):
        from peft import get_peft_model

        set_seed(settings.seed)
        adapters = lora_config(r=settings.lora_r, lora_alpha=2 * settings.lora_r, modules_to_save=None)
        tuned = get_peft_model(tuned, adapters)  # no head anew: the model draws already
    return tuned, processor


def _arguments(output: Path, settings: FinetuneSettings) -> NextFlowTrainingArguments:
    return NextFlowTrainingArguments(
        str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(20, settings.steps // 10),
        eval_strategy="steps",
        eval_steps=settings.every,
        save_steps=settings.every,
        save_total_limit=1,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # how long the held-out loss has not fallen
        metric_for_best_model="loss",
        logging_steps=settings.every,
        disable_tqdm=True,  # for a bar of its own
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
        report_to="none",
    )


class _Progress(TrainerCallback):
    """A bar of steps, and a line for each held-out loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(desc="training", total=state.max_steps, initial=state.global_step, disable=None)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        tqdm.write(f"step {state.global_step}: held-out loss {metrics['eval_loss']:.3f}", sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _newest_state(output: Path) -> TrainerState | None:
    """Of the newest whole checkpoint."""
    checkpoint = newest_checkpoint(output)
    return None if checkpoint is None else TrainerState.load_from_json(str(Path(checkpoint, STATE)))


def _has_ended(state: TrainerState, settings: FinetuneSettings) -> bool:
    """Whether no step follows that checkpoint; a Trainer that resumes from a last one would train beyond it."""
    since = sum(row["step"] > state.best_global_step for row in state.log_history if "eval_loss" in row)
    return state.global_step >= settings.steps or since >= settings.patience


def _publish(checkpoint: Path, output: Path) -> None:
    """Bring what is a model of a checkpoint to `output`, which is one when all of it is there."""
    files = [path for path in checkpoint.iterdir() if path.is_file() and path.name not in OF_TRAINING]
    for path in sorted(files, key=lambda path: path.name in WRITTEN_LAST):
        write_atomically(output / path.name, lambda partial, path=path: shutil.copyfile(path, partial))


def _write_sheet(output: Path, prompts: Sequence[str], before: Path, after: Sequence[Image.Image]) -> None:
    """Pictures before and after, above their captions."""
    entries = [
        (prompt, [Image.open(before / f"{place:02}.png"), picture])
        for place, (prompt, picture) in enumerate(zip(prompts, after))
    ]
    save_png(draw_sheet(entries), output / "sheet.png")
