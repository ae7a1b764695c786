"""The console command `transformers-nextflow`: each subcommand is one function, its options are the parameters."""

import random
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points, version
from itertools import count, takewhile
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from PIL import Image
from rich.console import Console
from tqdm import tqdm
from typer import Argument, Exit, Option, Typer
from typer.main import get_command

from .configuration_nextflow import NextFlowConfig
from .conversion.cli import app as conversion_app
from .data.cli import app as data_app
from .evaluate import app as evaluate_app
from .evaluate import reconstructions, scores
from .flops import PAPER_WIDTHS, cache_size, image_passes, mmdit_passes, model_cost, null_passes, paper_layer_cost
from .image_processing_nextflow import open_picture
from .interleaved import AnswerStreamer
from .modeling_nextflow import NextFlowForConditionalGeneration
from .modeling_nextflow_vq import NextFlowVQModel
from .processing_nextflow import NextFlowProcessor, user_message
from .rewriting import Rewriting
from .sampling import RowGenerators, check_seed, integer
from .serving.limits import Limits
from .text_generation import text_sampling
from .training.cli import app as training_app
from .training.cli import train
from .utils import export as exporting
from .utils.commands import Json, Level, Model, command, print_figures
from .utils.files import save_png, write_atomically
from .utils.lazy import needing_extra
from .utils.loading import load_config, load_model, load_vision_tokenizer, model_name, same_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DECODER_GROUP = "transformers_nextflow.decoders"  # of entry points: each loads decoders of its name from a folder

app = Typer(add_completion=False)
app.add_typer(data_app, name="data", help="Documents to packed training shards, and back.")
app.add_typer(train, name="train", help="Transformer, vision tokenizer, diffusion decoder; by GRPO.")
app.add_typer(conversion_app, name="convert", help="Released weights to a NextFlow to be trained, and back.")
app.add_typer(evaluate_app, name="evaluate", help="The loss of packs; a vision tokenizer's PSNR, SSIM and rFID.")
app.add_typer(training_app)

Png = Annotated[str, Option(metavar="PNG", help="Picture to write.")]
Seed = Annotated[int | None, Option(metavar="N", help="Default: a new one, which is printed.")]
FixedSeed = Annotated[int, Option(metavar="N", help="Of everything drawn.")]
MaxNewTokens = Annotated[int, Option(metavar="N", help="Of text.")]
ImageFile = Annotated[str, Argument(metavar="IMAGE")]


@dataclass
class Size:
    """Size."""

    aspect_ratio: Annotated[
        str | None, Option(metavar="W:H", help="Width:height; default: the first image's, else the model's.")
    ] = None
    level: Level = None
    height: Annotated[int | None, Option(metavar="PIXELS", help="With --width, instead of ratio and level.")] = None
    width: Annotated[int | None, Option(metavar="PIXELS")] = None


@dataclass
class Guidance:
    """Guidance; the defaults are the model's."""

    guidance_scale: Annotated[float | None, Option(metavar="S", help="1 is off.")] = None
    negative_prompt: Annotated[str | None, Option(metavar="TEXT", help="What guidance leads away from.")] = None


@dataclass
class Sampling:
    """Sampling; of text, the default is the most likely."""

    temperature: Annotated[float | None, Option(metavar="T", help="0 takes the most likely.")] = None
    top_k: Annotated[int | None, Option(metavar="K", help="Draw from the K most likely; 0 = all.")] = None
    top_p: Annotated[
        float | None, Option(metavar="P", help="Draw from the most likely of this probability together.")
    ] = None


@dataclass
class Decoder:
    """What draws the pixels."""

    decoder: Annotated[Literal["vq", "diffusion"], Option(help="The vision tokenizer, or a diffusion model.")] = "vq"
    decoder_model: Annotated[
        str | None, Option(metavar="NAME", help="Local folder or Hub id; default: of the default model, its own.")
    ] = None
    decoder_steps: Annotated[int | None, Option(metavar="N", help="Of denoising; default: the pipeline's.")] = None


@dataclass
class Drawing:
    """Pictures."""

    model: Model = None
    output: Png = "picture.png"
    seed: Seed = None
    num_images: Annotated[int, Option(metavar="N", help="Files get -0, -1, ... from 2 on.")] = 1
    json: Json = False


@command(app)
def generate(
    prompt: Annotated[str, Argument(metavar="PROMPT")],
    drawing: Drawing,
    size: Size,
    guidance: Guidance,
    sampling: Sampling,
    decoder: Decoder,
    rewriting: Rewriting,
) -> None:
    """A picture for a prompt."""
    text = rewriting(prompt)
    if text != prompt:
        print(text, file=sys.stderr)
    make_pictures([], text, drawing, size, guidance, sampling, decoder)


@command(app)
def edit(
    images: Annotated[list[str], Argument(metavar="IMAGE...")],
    instruction: Annotated[str, Argument(metavar="INSTRUCTION")],
    drawing: Drawing,
    size: Size,
    guidance: Guidance,
    sampling: Sampling,
    decoder: Decoder,
) -> None:
    """A picture made of others by an instruction."""
    make_pictures([open_picture(path) for path in images], instruction, drawing, size, guidance, sampling, decoder)


def make_pictures(
    images: list[Image.Image],
    text: str,
    drawing: Drawing,
    size: Size,
    guidance: Guidance,
    sampling: Sampling,
    decoder: Decoder,
) -> None:
    """Generate from pictures and a text, write the files, say what was made."""
    paths = output_paths(drawing.output, drawing.num_images)
    model, processor = load_model(drawing.model)
    pipeline = load_decoder(decoder, model.model.vq_model)
    seed = new_seed(drawing.seed)
    inputs = chat_inputs(processor, images, text, generation_mode="image", negative_prompt=guidance.negative_prompt)
    start = time.perf_counter()
    output = model.generate(
        **inputs.to(model.device),
        **vars(size),
        **vars(sampling),
        generation_mode="image",
        seed=seed,
        num_images_per_prompt=drawing.num_images,
        guidance_scale=guidance.guidance_scale,
        return_dict_in_generate=True,
    )
    if pipeline is None:
        pictures = processor.post_process_image(model.decode_image_tokens(output.sequences, output.image_grid_hw))
    else:
        pictures = decode_by_diffusion(pipeline, model, output, text, seed, decoder.decoder_steps)
    seconds = time.perf_counter() - start
    for picture, path in zip(pictures, paths, strict=True):
        save_png(picture, path)
    width, height = pictures[0].size
    print_figures(
        {
            "paths": list(map(str, paths)),
            "prompt": text,
            "width": width,
            "height": height,
            "seed": seed,
            "seconds": seconds,
        },
        drawing.json,
        *(f"{path}  {width}x{height} pixels, seed {seed}" for path in paths),
        f"{seconds:.1f} s",
    )


def load_decoder(decoder: Decoder, vq_model: NextFlowVQModel) -> "DiffusionPipeline | None":
    """The diffusion decoder that the options name, or None for the vision tokenizer's.

    Raises:
        ValueError: if the options contradict each other, or it is no decoder, or one for other codes, or nothing
            installed loads it.
        ImportError: without the packages of diffusion decoders.
    """
    name, steps = decoder.decoder_model, decoder.decoder_steps
    if decoder.decoder == "vq":
        if name is not None or steps is not None:
            raise ValueError("--decoder-model and --decoder-steps belong to --decoder diffusion")
        return None
    if name is None:
        raise ValueError("--decoder diffusion needs --decoder-model, a folder or Hub id")
    if steps is not None:
        integer("--decoder-steps", steps, 1)
    found = entry_points(group=DECODER_GROUP, name="diffusion")
    if not found:
        raise ValueError(
            "no installed package loads decoders for --decoder diffusion: install transformers-nextflow anew"
        )
    with needing_extra("diffusers", "--decoder diffusion"):
        load = found["diffusion"].load()
    pipeline = load(model_name(name))
    if pipeline.vq_model is not None and not same_weights(vq_model.quantizer, pipeline.vq_model.quantizer):
        raise ValueError(f"{name} decodes another vision tokenizer's codes")
    pipeline.set_progress_bar_config(disable=None)
    return pipeline.to(vq_model.device)


def decode_by_diffusion(
    pipeline: "DiffusionPipeline",
    model: NextFlowForConditionalGeneration,
    output,
    text: str,
    seed: int,
    steps: int | None,
) -> list[Image.Image]:
    """Pictures of generated codes by a diffusion decoder, the text as their caption."""
    codes = output.sequences - model.config.text_vocab_size
    features = torch.cat(model.model.vq_model.condition_features(codes, output.image_grid_hw[0].tolist()), dim=1)
    generator = RowGenerators.create(1, len(codes), seed).generators
    given = {} if steps is None else {"num_inference_steps": steps}
    return pipeline([text] * len(codes), features=features, generator=generator, **given).images


@command(app)
def describe(
    image: ImageFile,
    sampling: Sampling,
    question: Annotated[str, Argument(metavar="QUESTION")] = "describe the picture",
    model: Model = None,
    output: Annotated[str | None, Option(metavar="FILE", help="Also write the text to a file.")] = None,
    seed: FixedSeed = 0,
    max_new_tokens: MaxNewTokens = 256,
    json: Json = False,
) -> None:
    """A picture in words, or the answer to a question about it."""
    check_seed(seed)
    if output and Path(output).is_dir():
        raise IsADirectoryError(f"--output must be a file, got the folder {output}")
    picture = open_picture(image)
    nextflow, processor = load_model(model)
    inputs = chat_inputs(processor, [picture], question).to(nextflow.device)
    torch.manual_seed(seed)
    start = time.perf_counter()
    ids = nextflow.generate(**inputs, **text_sampling(nextflow, processor, max_new_tokens, **vars(sampling)))
    seconds = time.perf_counter() - start
    text = processor.post_process_multimodal_output(ids[:, inputs["input_ids"].shape[1] :])[0].strip()
    if output:
        save_text(text, Path(output))
    print_figures({"text": text, "seconds": seconds}, json, text)


@command(app)
def interleave(
    prompt: Annotated[str, Argument(metavar="PROMPT")],
    size: Size,
    guidance: Guidance,
    sampling: Sampling,
    image: Annotated[list[str] | None, Option(metavar="IMAGE", help="One of the prompt; repeatable.")] = None,
    model: Model = None,
    output: Annotated[str, Option(metavar="FOLDER", help="Gets answer.md and its pictures.")] = "answer",
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 256,
    max_images: Annotated[int, Option(metavar="N", help="Of the answer.")] = 16,
    image_guidance_scale: Annotated[float | None, Option(metavar="S", help="Guidance by earlier pictures.")] = None,
    json: Json = False,
) -> None:
    """An answer of text and pictures in turn."""
    images, folder = [open_picture(path) for path in image or []], Path(output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output must be a folder, got the file {folder}")
    nextflow, processor = load_model(model)
    seed = new_seed(seed)
    mode: dict = {"generation_mode": "interleaved"}
    inputs = chat_inputs(processor, images, prompt, negative_prompt=guidance.negative_prompt, **mode)
    drawing = vars(size) | {"guidance_scale": guidance.guidance_scale, "image_guidance_scale": image_guidance_scale}
    start = time.perf_counter()
    with tqdm(desc="scales", unit="scale", disable=None, leave=False) as progress:
        answer = nextflow.generate(
            **inputs.to(nextflow.device),
            **text_sampling(nextflow, processor, max_new_tokens, **vars(sampling)),
            **mode,
            image_generation={name: value for name, value in drawing.items() if value is not None},
            max_new_images=max_images,
            seed=seed,
            streamer=None if json else AnswerStreamer(processor),
            on_scale_end=lambda *scale: progress.update(),
        )
    drawn = nextflow.decode_images(answer.image_codes, answer.image_grid_hw)
    (parts,) = processor.post_process_multimodal_output(answer, pictures=drawn, **mode)
    seconds = time.perf_counter() - start
    listed = save_answer(parts, folder)
    print_figures(
        {"parts": listed, "seed": seed, "seconds": seconds},
        json,
        *("{path}  {width}x{height} pixels".format(**entry) for entry in listed if "path" in entry),
        f"{folder / 'answer.md'}, seed {seed}, {seconds:.1f} s",
    )


def save_answer(parts: list[str | Image.Image], folder: Path) -> list[dict]:
    """Write answer.md and its pictures, in place of those of an earlier answer; returns what is in it."""
    listed: list[dict] = []
    answer = folder / "answer.md"
    earlier = answer.read_text(encoding="utf-8", errors="replace") if answer.is_file() else ""
    paths = (folder / f"picture-{number}.png" for number in count())
    for part in parts:
        if isinstance(part, str):
            listed.append({"text": part})
        else:
            save_png(part, path := next(paths))
            listed.append({"path": str(path), "width": part.width, "height": part.height})
    for stale in takewhile(lambda path: f"![]({path.name})" in earlier, paths):  # of a longer one
        stale.unlink(missing_ok=True)
    lines = (f"![]({Path(entry['path']).name})" if "path" in entry else entry["text"] for entry in listed)
    save_text("\n\n".join(lines), answer)
    return listed


@command(app)
def reconstruct(
    image: ImageFile, model: Model = None, output: Png = "reconstruction.png", level: Level = None, json: Json = False
) -> None:
    """A picture beside what its codes keep of it, and the PSNR."""
    picture = open_picture(image)
    (path,) = output_paths(output, 1)
    vq_model, image_processor = load_vision_tokenizer(model)
    start = time.perf_counter()
    ((originals, rebuilt),) = reconstructions(vq_model, image_processor, [picture], level)
    seconds = time.perf_counter() - start
    psnr = scores(originals, rebuilt)[0].item()
    pair = torch.cat([originals[0], rebuilt[0]], dim=2).permute(1, 2, 0)
    save_png(Image.fromarray(pair.cpu().numpy()), path)
    height, width = rebuilt.shape[-2:]
    shown = f"PSNR {psnr:.2f} dB" if isfinite(psnr) else "equal"
    print_figures(
        {"path": str(path), "width": width, "height": height, "psnr": psnr, "seconds": seconds},
        json,
        f"{path}  original and reconstruction, {width}x{height} pixels each, {shown}",
    )


@command(app)
def flops(
    aspect_ratio: Annotated[str, Option(metavar="W:H", help="Width:height.")] = "1:1",
    level: Level = None,
    prompt_tokens: Annotated[int, Option(metavar="N")] = 100,
    denoising_steps: Annotated[int, Option(metavar="N", help="Of the MMDiT compared.")] = 18,
    guided_scales: Annotated[
        int | None, Option(metavar="N", help="The first N scales are guided, 0 = none; default: all.")
    ] = None,
    num_images: Annotated[int, Option(metavar="N", help="Drawn at once, for the memory.")] = 1,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Option(help="Of weights and cache.")] = "bfloat16",
    model: Annotated[str | None, Option(metavar="NAME", help="Default: the paper's 7B configuration.")] = None,
    json: Json = False,
) -> None:
    """Cost of one image: the paper's estimate (appendix A.2), this model's own count, and its memory."""
    integer("--num-images", num_images, 1)
    config = NextFlowConfig() if model is None else load_config(model_name(model))
    table = config.vq_config.schedule_table()
    schedule = table.by_aspect_ratio(aspect_ratio, level, exact=False)
    passes = image_passes(schedule, prompt_tokens)
    nextflow = paper_layer_cost(passes)
    mmdit = paper_layer_cost(mmdit_passes(schedule, denoising_steps))
    guided_scales = len(schedule) if guided_scales is None else guided_scales
    passes += null_passes(schedule, prompt_tokens, guided_scales)
    cost = model_cost(config.text_config, config.vq_config.codebook_size, passes)
    kind = getattr(torch, dtype)
    config.vision_tokenizer = None  # it counts wherever it lies
    with torch.device("meta"):
        whole = NextFlowForConditionalGeneration(config).to(kind)  # but for what stays float32
    weights = sum(parameter.nbytes for parameter in whole.parameters())
    cache = num_images * cache_size(config.text_config, schedule, prompt_tokens, guided_scales)
    memory = {"weights": weights, "cache": cache * kind.itemsize}
    ratios = {str(h): mmdit.flops(h) / nextflow.flops(h) for h in PAPER_WIDTHS}
    parts = asdict(cost) | {"total": cost.total}
    height, width = table.image_size(schedule)
    figures = {
        "height": height,
        "width": width,
        "scales": len(schedule),
        "codes": schedule.num_codes,
        "prompt_tokens": prompt_tokens,
        "paper_per_layer": {
            "nextflow": asdict(nextflow),
            "mmdit": {**asdict(mmdit), "steps": denoising_steps},
            "ratio": ratios,
        },
        "model": {
            "hidden_size": config.text_config.hidden_size,
            "num_hidden_layers": config.text_config.num_hidden_layers,
            "guided_scales": guided_scales,
            **parts,
        },
        "memory_in_bytes": {"dtype": dtype, "images": num_images, **memory},
    }
    across, down = map(int, aspect_ratio.split(":"))
    nearest = "" if width * down == height * across else f", the nearest to {aspect_ratio}"
    layers = f"all {config.text_config.num_hidden_layers} layers and heads"
    print_figures(
        figures,
        json,
        f"{width}x{height} pixels (width x height){nearest}, {len(schedule)} scales,",
        f"{schedule.num_codes:,} codes, {prompt_tokens} prompt tokens\n",
        "The paper's estimate, FLOPs of one layer of hidden size h (appendix A.2)",
        *columns(
            ("NextFlow", f"{nextflow.quadratic:,} h^2 + {nextflow.linear:,} h"),
            (f"MMDiT, {denoising_steps} steps", f"{mmdit.quadratic:,} h^2 + {mmdit.linear:,} h"),
            *((f"ratio at h = {h}", f"{ratio:.2f}") for h, ratio in ratios.items()),
        ),
        f"\nThis model, FLOPs of {layers}, {guided_scales} of {len(schedule)} scales guided",
        *columns(*((name.replace("_", " "), f"{n:.4e}  {n / cost.total:6.1%}") for name, n in parts.items())),
        f"\nMemory in {dtype} of {num_images} such picture(s) at once, without what a step computes with",
        *columns(*((name, f"{size / 2**30:.3f} GiB") for name, size in memory.items())),
    )


def columns(*rows: tuple[str, str]) -> list[str]:
    """Lines of two columns, the first as wide as its longest entry."""
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


@command(app)
def doctor(
    checkpoint: Annotated[str, Argument(metavar="CHECKPOINT", help="Local folder or Hub id.")],
    data: Annotated[
        list[str] | None,
        Argument(
            metavar="DATA",
            help="Folder of training shards, or a Hub dataset of them, or a folder of pictures with name.txt beside "
            "name.png; default: drawn pictures.",
        ),
    ] = None,
    report: Annotated[str | None, Option(metavar="FOLDER", help="Gets report.html.")] = None,
    seed: FixedSeed = 0,
    json: Json = False,
) -> None:
    """What is wrong with a checkpoint or its training shards; exits with 1 on alarms."""
    with needing_extra("train", "doctor"):
        from .data import open_shards
        from .doctor import examine, read_pictures, tables, write_report

    if report is not None and Path(report).is_file():
        raise NotADirectoryError(f"--report must be a folder, got the file {report}")
    data = list(data or [])
    for number, name in enumerate(data):
        if not Path(name).is_dir():
            if name.count("/") != 1:
                raise NotADirectoryError(f"there is no folder {name}")
            data[number] = str(open_shards(name, hashes=False)[0])  # on the Hub
    packs = [folder for folder in data if (Path(folder) / "manifest.json").is_file()]
    pictures = [folder for folder in data if folder not in packs]
    if len(packs) > 1 or len(pictures) > 1:
        raise ValueError(f"give one folder of shards and one of pictures, got {' and '.join(data)}")
    model, processor = load_model(checkpoint)
    with tqdm(desc="checks", unit="check", disable=None, leave=False) as progress:
        diagnosis = examine(
            model,
            processor,
            packs=packs[0] if packs else None,
            pictures=read_pictures(pictures[0]) if pictures else None,
            seed=seed,
            on_check=lambda finding: progress.update(),
        )
    if report is not None:
        write_report(diagnosis, report, checkpoint)
    if json:
        print_figures(diagnosis.to_dict(), json)
    else:
        Console().print(tables(diagnosis), f"{diagnosis.seconds:.1f} s")
    if diagnosis.alarms:
        raise Exit(1)


@command(app)
def export(
    folder: Annotated[str, Argument(metavar="MODEL", help="Model folder, or id on the Hub.")],
    to: Annotated[str, Option(metavar="REPO_OR_FOLDER", help="New folder, or with --push owner/name.")],
    push: Annotated[bool, Option("--push", help="Create the repository on the Hub and upload.")] = False,
) -> None:
    """A checkpoint in the layout of the Hub, or on the Hub."""
    print(exporting.export(model_name(folder), to, push))


@command(app)
def replace_tokenizer(
    tokenizer: Annotated[
        str, Argument(metavar="TOKENIZER", help="Vision tokenizer, or a NextFlow whose own is taken.")
    ],
    output: Annotated[str, Option(metavar="FOLDER", help="New folder.")],
    model: Model = None,
    json: Json = False,
) -> None:
    """A trained vision tokenizer into a trained model; says what must be trained again."""
    with needing_extra("train", "replace-tokenizer"):
        from .replace_tokenizer import replace_vision_tokenizer

    report = replace_vision_tokenizer(model_name(model), model_name(tokenizer), output)
    new, again = report["new"], report["train_again"]
    print_figures(
        report,
        json,
        f"{output} has the vision tokenizer of {tokenizer}",
        *(f"begins anew: {name}" for name in new),
        *(f"to train again: {name}" for name in again),
        *([] if again else ["nothing has to be trained again"]),
    )


@dataclass
class Address:
    """Where it is served."""

    host: Annotated[str, Option(metavar="HOST", help="The default lets in this machine alone.")] = "127.0.0.1"
    port: Annotated[int, Option(metavar="N")] = 8000
    api_key: Annotated[
        str | None,
        Option(metavar="KEY", envvar="TRANSFORMERS_NEXTFLOW_API_KEY", help="What clients must give."),
    ] = None

    def __post_init__(self):
        integer("--port", self.port, 0, 65535)
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ValueError("--api-key must be of visible ASCII characters")


@command(app)
def serve(
    address: Address,
    limits: Limits,
    rewriting: Rewriting,
    model: Model = None,
    exact: Annotated[bool, Option("--exact", help="In float64: no request sees the rounding of its company.")] = False,
    ray: Annotated[
        str | None, Option(metavar="N", help="Replicas on Ray Serve: 2, or 1-4 for as many as are busy.")
    ] = None,
) -> None:
    """OpenAI's API over HTTP: pictures, edits, chats. Ends on SIGTERM, after what it has accepted."""
    with needing_extra("serve", "serve"):
        from .serving.app import create_app
        from .serving.ending import GracefulServer
        from .serving.jobs import make_exact

        if ray is not None:
            from .serving.replicas import run_replicas
    name = model_name(model)
    path = Path(name).resolve()
    served_name, name = (path.name, str(path)) if path.is_dir() else (name, name)  # replicas may run elsewhere

    def build():
        loaded, processor = load_model(name)
        if exact:
            make_exact(loaded)
        return create_app(loaded, processor, served_name, limits, address.api_key, rewriting)

    if ray is None:
        with suppress(KeyboardInterrupt):  # which uvicorn raises again after a good end
            GracefulServer(build(), address.host, address.port).run()
    else:
        run_replicas(build, ray, limits, address.host, address.port)


def new_seed(given: int | None) -> int:
    return random.randrange(2**31) if given is None else given


def output_paths(output: str, count: int) -> list[Path]:
    """Where `count` pictures go: `picture.png`, or `picture-0.png`, `picture-1.png`, ..."""
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {output}")
    paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{index}") for index in range(count)]
    if folders := list(filter(Path.is_dir, paths)):
        raise IsADirectoryError(f"--output must be a file, got the folder {folders[0]}")
    return paths


def save_text(text: str, path: Path) -> None:
    write_atomically(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))


def chat_inputs(processor: NextFlowProcessor, images: list[Image.Image], text: str, **kwargs):
    """Model inputs of a chat of one message; tokens with a meaning for the model are plain text in it."""
    return processor.apply_chat_template([user_message(text, images)], sanitize_control_tokens=True, **kwargs)


def print_version(asked: bool) -> None:
    if asked:
        print(f"transformers-nextflow {version('transformers-nextflow')}")
        raise Exit()


@app.callback(no_args_is_help=True)
def options(version: Annotated[bool, Option("--version", callback=print_version, is_eager=True)] = False) -> None:
    """Text and images from one next-token, next-scale model."""


program = get_command(app)  # typer makes it anew with every call of the app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status; a user's error (bad value, missing file or package) is one
    line on stderr and status 2."""
    try:
        return program(argv, prog_name="transformers-nextflow")  # whose own end is a SystemExit too
    except SystemExit as end:
        return int(end.code or 0)
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
