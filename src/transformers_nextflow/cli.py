"""The console command `transformers-nextflow`.

Each subcommand is one function of the parsed arguments and one that adds its parser; `SUBCOMMANDS` lists the latter.
Libraries are imported where a subcommand needs them.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_atomically

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from .configuration_nextflow import NextFlowConfig
    from .image_processing_nextflow import NextFlowImageProcessor
    from .modeling_nextflow import NextFlowForConditionalGeneration
    from .modeling_nextflow_vq import NextFlowVQModel
    from .processing_nextflow import NextFlowProcessor

DEFAULT_MODEL = Path(__file__).parents[2] / "checkpoints" / "nextflow-emoji"  # in a checkout of the repository
DEFAULT_DECODER = DEFAULT_MODEL.with_name("nextflow-emoji-decoder")

DECODERS = ("vq", "diffusion")
DECODER_GROUP = "transformers_nextflow.decoders"  # of entry points: each loads decoders of its name from a folder


def model_name(model: str | None) -> str:
    """A local model folder or an id on the Hub, by default the repository's own checkpoint.

    Raises:
        ValueError: if none is named and there is no such checkpoint, or the name is a URL.
        NotADirectoryError: if it can only be a folder, and there is none.
    """
    if model is None:
        if not (DEFAULT_MODEL / "config.json").is_file():
            raise ValueError(f"name a model with --model: the default, {DEFAULT_MODEL}, does not exist")
        return str(DEFAULT_MODEL)
    if "://" in model:
        raise ValueError(f"a model is a local folder or an id on the Hub, got {model}")
    if not Path(model).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise NotADirectoryError(f"there is no model directory {model}")
    return model


def load_model(model: str | None) -> "tuple[NextFlowForConditionalGeneration, NextFlowProcessor]":
    """A model, on the GPU where there is one, and its processor."""
    import torch

    from . import NextFlowForConditionalGeneration, NextFlowProcessor
    from .loading import check_model_type, load_weights, naming

    name = model_name(model)
    check_model_type(name, "nextflow")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_weights(NextFlowForConditionalGeneration, name).to(device).eval()
    with naming(f"the processor in {name}"):
        processor = NextFlowProcessor.from_pretrained(name)
        processor.check_fits(loaded.config)
    return loaded, processor


def load_decoder(args: argparse.Namespace, vq_model: "NextFlowVQModel") -> "DiffusionPipeline | None":
    """The diffusion decoder that the options name, or None for the vision tokenizer's.

    Raises:
        ValueError: if the options contradict each other, or it is no decoder, or one for other codes.
    """
    import torch

    if args.decoder == "vq":
        if args.decoder_model is not None or args.decoder_steps is not None:
            raise ValueError("--decoder-model and --decoder-steps belong to --decoder diffusion")
        return None
    name = args.decoder_model
    if name is None and args.model is None and DEFAULT_DECODER.is_dir():
        name = str(DEFAULT_DECODER)
    if name is None:
        raise ValueError("--decoder diffusion needs --decoder-model, a folder or Hub id")
    if args.decoder_steps is not None and args.decoder_steps < 1:
        raise ValueError(f"--decoder-steps must be positive, got {args.decoder_steps}")
    name = model_name(name)
    decoder = decoder_loader(args.decoder)(name)
    if decoder.vq_model is not None:
        ours, theirs = vq_model.quantizer.state_dict(), decoder.vq_model.quantizer.state_dict()
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours):
            raise ValueError(f"{name} decodes another vision tokenizer's codes")
    decoder.set_progress_bar_config(disable=None)
    return decoder.to(vq_model.device)


def decoder_loader(kind: str) -> Callable[[str], "DiffusionPipeline"]:
    """What an installed package loads such decoders by.

    Raises:
        ValueError: if none does, or it lacks a package.
    """
    found = list(entry_points(group=DECODER_GROUP, name=kind))
    if not found:
        raise ValueError(
            f"no installed package loads decoders for --decoder {kind}: install transformers-nextflow anew"
        )
    try:
        return found[0].load()
    except ImportError as error:
        raise ValueError(
            f"--decoder {kind} needs a package that is not installed ({error}): "
            f"pip install 'transformers-nextflow[diffusers]'"
        ) from error


def load_vision_tokenizer(model: str | None) -> "tuple[NextFlowVQModel, NextFlowImageProcessor]":
    """The vision tokenizer of a model, or one saved alone, and its image processor."""
    import torch

    from . import NextFlowImageProcessor, NextFlowProcessor
    from .loading import check_model_type, load_vq_model, naming

    name = model_name(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_vq_model(name).to(device)
    if check_model_type(name, "nextflow", "nextflow_vq") == "nextflow_vq":
        return loaded, NextFlowImageProcessor.from_vq_config(loaded.config)
    with naming(f"the processor in {name}"):
        return loaded, NextFlowProcessor.from_pretrained(name).image_processor


def load_config(model: str | None) -> "NextFlowConfig":
    """The configuration in a model directory, or the paper's 7B model.

    Raises:
        OSError: if there is no such directory, or no readable `config.json` in it.
        ValueError: if it is not NextFlow's.
    """
    from .configuration_nextflow import NextFlowConfig
    from .loading import check_model_type, naming

    if model is None:
        return NextFlowConfig()
    if not Path(model).is_dir():
        raise NotADirectoryError(f"there is no model directory {model}")
    check_model_type(model, NextFlowConfig.model_type)
    with naming(f"the config.json of {model}"):
        return NextFlowConfig.from_pretrained(model)


def open_image(path: str) -> "Image":
    """A local picture, upright."""
    from .image_processing_nextflow import open_picture

    return open_picture(path)


def output_paths(output: str, count: int) -> list[Path]:
    """Where `count` pictures go: `picture.png`, or `picture-0.png`, `picture-1.png`, ..."""
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {output}")
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{index}") for index in range(count)]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="local folder or Hub id (default: the repository's checkpoint)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_picture_options(parser: argparse.ArgumentParser, aspect_ratio: str) -> None:
    """What `generate` and `edit` share; defaults that are not said here are in the model's configuration."""
    add_model_options(parser)
    parser.add_argument("--output", metavar="PNG", default="picture.png", help="default: %(default)s")
    parser.add_argument("--seed", type=int, metavar="N", help="default: a new one, which is printed")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="files get -0, -1, ... from 2 on")
    size = parser.add_argument_group("size")
    size.add_argument("--aspect-ratio", metavar="W:H", help=f"width:height (default: {aspect_ratio})")
    size.add_argument("--level", help="level of the scale schedules, e.g. 256, 512, 1024")
    size.add_argument("--height", type=int, metavar="PIXELS", help="with --width, instead of ratio and level")
    size.add_argument("--width", type=int, metavar="PIXELS")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    sampling.add_argument("--guidance-scale", type=float, metavar="S", help="1 is off")
    add_sampling_options(sampling)
    decoder = parser.add_argument_group("decoder")
    decoder.add_argument(
        "--decoder",
        choices=DECODERS,
        default=DECODERS[0],
        help="what draws the pixels: the vision tokenizer, or a diffusion model (default: %(default)s)",
    )
    decoder.add_argument(
        "--decoder-model",
        metavar="NAME",
        help="local folder or Hub id of a diffusion decoder (default: of the default model, its own)",
    )
    decoder.add_argument("--decoder-steps", type=int, metavar="N", help="of denoising (default: the pipeline's)")


def add_sampling_options(group) -> None:
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely; 0 = all")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the most likely of this probability together"
    )


def add_generate(subparsers) -> None:
    parser = subparsers.add_parser("generate", help="a picture for a prompt")
    parser.add_argument("prompt", metavar="PROMPT")
    add_picture_options(parser, "the model's")
    parser.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> None:
    make_pictures(args, [], args.prompt)


def add_edit(subparsers) -> None:
    parser = subparsers.add_parser("edit", help="a picture made of others by an instruction")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("instruction", metavar="INSTRUCTION")
    add_picture_options(parser, "the first image's")
    parser.set_defaults(run=edit)


def edit(args: argparse.Namespace) -> None:
    make_pictures(args, [open_image(path) for path in args.images], args.instruction)


def make_pictures(args: argparse.Namespace, images: "list[Image]", text: str) -> None:
    """Generate from pictures and a text, write the files, say what was made."""
    paths = output_paths(args.output, args.num_images)
    model, processor = load_model(args.model)
    decoder = load_decoder(args, model.model.vq_model)
    size = {name: getattr(args, name) for name in ("aspect_ratio", "level", "height", "width")}
    seed = random.randrange(2**31) if args.seed is None else args.seed

    inputs = chat_inputs(processor, images, text, generation_mode="image", negative_prompt=args.negative_prompt)
    start = time.perf_counter()
    output = model.generate(
        **inputs.to(model.device),
        **size,
        generation_mode="image",
        seed=seed,
        num_images_per_prompt=args.num_images,
        guidance_scale=args.guidance_scale,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        return_dict_in_generate=True,
    )
    if decoder is None:
        pictures = processor.post_process_image(model.decode_image_tokens(output.sequences, output.image_grid_hw))
    else:
        pictures = draw(decoder, model, output, text, seed, args.decoder_steps)
    seconds = time.perf_counter() - start
    for picture, path in zip(pictures, paths, strict=True):
        write_atomically(path, lambda partial, picture=picture: picture.save(partial, format="PNG"))
    if args.json:
        width, height = pictures[0].size
        figures = {"paths": list(map(str, paths)), "width": width, "height": height, "seed": seed, "seconds": seconds}
        print(json.dumps(figures, indent=2))
        return
    for picture, path in zip(pictures, paths):
        print(f"{path}  {picture.width}x{picture.height} pixels, seed {seed}")
    print(f"{seconds:.1f} s")


def draw(
    decoder: "DiffusionPipeline", model: "NextFlowForConditionalGeneration", output, text: str, seed: int, steps
) -> "list[Image]":
    """Pictures of generated codes by a diffusion decoder, the text as their caption."""
    import torch

    from .sampling import RowGenerators

    codes = output.sequences - model.config.text_vocab_size
    features = torch.cat(model.model.vq_model.condition_features(codes, output.image_grid_hw[0].tolist()), dim=1)
    generator = RowGenerators.create(1, len(codes), seed).generators
    given = {} if steps is None else {"num_inference_steps": steps}
    return decoder([text] * len(codes), features=features, generator=generator, **given).images


def chat_inputs(processor: "NextFlowProcessor", images: "list[Image]", text: str, **kwargs):
    """Model inputs of a chat of one message; tokens with a meaning for the model are plain text in it."""
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, sanitize_control_tokens=True, **kwargs)


def add_describe(subparsers) -> None:
    parser = subparsers.add_parser("describe", help="a picture in words, or the answer to a question about it")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("question", metavar="QUESTION", nargs="?", default="describe the picture")
    add_model_options(parser)
    parser.add_argument("--output", metavar="FILE", help="also write the text to a file")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    add_sampling_options(parser.add_argument_group("sampling (default: the most likely)"))
    parser.set_defaults(run=describe)


def describe(args: argparse.Namespace) -> None:
    import torch

    from .sampling import check_seed

    check_seed(args.seed)
    image = open_image(args.image)
    model, processor = load_model(args.model)
    inputs = chat_inputs(processor, [image], args.question).to(model.device)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    output = model.generate(**inputs, **text_sampling(args, model, processor))
    seconds = time.perf_counter() - start
    (text,) = processor.post_process_multimodal_output(output[:, inputs["input_ids"].shape[1] :])
    text = text.strip()
    if args.output:
        write_atomically(Path(args.output), lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    print(json.dumps({"text": text, "seconds": seconds}, indent=2) if args.json else text)


def add_interleave(subparsers) -> None:
    parser = subparsers.add_parser("interleave", help="an answer of text and pictures in turn")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--image", action="append", default=[], metavar="IMAGE", help="one of the prompt; repeatable")
    add_model_options(parser)
    parser.add_argument(
        "--output", metavar="FOLDER", default="answer", help="gets answer.md and its pictures (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="default: a new one, which is printed")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of text (default: %(default)s)")
    parser.add_argument("--max-images", type=int, default=16, metavar="N", help="of the answer (default: %(default)s)")
    add_sampling_options(parser.add_argument_group("sampling of text (default: the most likely)"))
    pictures = parser.add_argument_group("pictures (default: the model's)")
    pictures.add_argument("--aspect-ratio", metavar="W:H", help="width:height")
    pictures.add_argument("--level", help="level of the scale schedules, e.g. 256, 512, 1024")
    pictures.add_argument("--guidance-scale", type=float, metavar="S", help="1 is off")
    pictures.add_argument("--image-guidance-scale", type=float, metavar="S", help="guidance by earlier pictures")
    pictures.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.set_defaults(run=interleave)


def interleave(args: argparse.Namespace) -> None:
    from tqdm import tqdm
    from transformers import TextStreamer

    images = [open_image(path) for path in args.image]
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output must be a folder, got the file {folder}")
    model, processor = load_model(args.model)
    seed = random.randrange(2**31) if args.seed is None else args.seed
    inputs = chat_inputs(
        processor, images, args.prompt, generation_mode="interleaved", negative_prompt=args.negative_prompt
    ).to(model.device)
    names = ("aspect_ratio", "level", "guidance_scale", "image_guidance_scale")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    with tqdm(desc="scales", unit="scale", disable=None, leave=False) as progress:
        output = model.generate(
            **inputs,
            **text_sampling(args, model, processor),
            generation_mode="interleaved",
            image_generation={name: getattr(args, name) for name in names if getattr(args, name) is not None},
            max_new_images=args.max_images,
            seed=seed,
            streamer=None if args.json else streamer,
            on_scale_end=lambda *scale: progress.update(),
        )
    pictures = model.decode_images(output.image_codes, output.image_grid_hw)
    (parts,) = processor.post_process_multimodal_output(output, generation_mode="interleaved", pictures=pictures)
    seconds = time.perf_counter() - start

    listed: list[dict] = []
    for part in parts:
        if isinstance(part, str):
            listed.append({"text": part})
        else:
            path = folder / f"picture-{sum('path' in entry for entry in listed)}.png"
            write_atomically(path, lambda partial, part=part: part.save(partial, format="PNG"))
            listed.append({"path": str(path), "width": part.width, "height": part.height})
    count = sum("path" in entry for entry in listed)
    while (stale := folder / f"picture-{count}.png").is_file():  # of an earlier, longer answer
        stale.unlink()
        count += 1
    lines = [entry["text"] if "text" in entry else f"![]({Path(entry['path']).name})" for entry in listed]
    write_atomically(
        folder / "answer.md", lambda partial: partial.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    )
    if args.json:
        print(json.dumps({"parts": listed, "seed": seed, "seconds": seconds}, indent=2))
        return
    for entry in listed:
        if "path" in entry:
            print(f"{entry['path']}  {entry['width']}x{entry['height']} pixels")
    print(f"{folder / 'answer.md'}, seed {seed}, {seconds:.1f} s")


def text_sampling(args: argparse.Namespace, model, processor) -> dict:
    """Arguments of `generate` for text: greedy unless one of the sampling options says otherwise."""
    from .sampling import COLDEST, SAMPLING_LIMITS, per_scale

    given = {name: getattr(args, name) for name in SAMPLING_LIMITS}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        per_scale(name, value, 1, *SAMPLING_LIMITS[name])
    do_sample = bool(given) and given.get("temperature", 1.0) >= COLDEST
    eos = model.generation_config.eos_token_id
    return {
        "do_sample": do_sample,
        **(given if do_sample else {}),
        "max_new_tokens": args.max_new_tokens,
        "eos_token_id": processor.tokenizer.eos_token_id if eos is None else eos,
        "pad_token_id": processor.tokenizer.pad_token_id,
    }


def add_reconstruct(subparsers) -> None:
    parser = subparsers.add_parser("reconstruct", help="a picture beside what its codes keep of it, and the PSNR")
    parser.add_argument("image", metavar="IMAGE")
    add_model_options(parser)
    parser.add_argument("--output", metavar="PNG", default="reconstruction.png", help="default: %(default)s")
    parser.add_argument("--level", help="level of the scale schedules (default: the picture's, or the highest)")
    parser.set_defaults(run=reconstruct)


def reconstruct(args: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from .modeling_nextflow_vq import unpatchify

    image = open_image(args.image)
    (path,) = output_paths(args.output, 1)
    vq_model, image_processor = load_vision_tokenizer(args.model)
    level = image_processor.level if args.level is None else args.level
    inputs = image_processor(image, level=level, return_tensors="pt")
    grid = tuple(inputs["image_grid_hw"][0].tolist())
    pixels = inputs["pixel_values"].to(vq_model.device)
    if image_processor.image_size is None:
        pixels = unpatchify(pixels[None], grid, image_processor.patch_size)
    start = time.perf_counter()
    decoded = vq_model.decode(vq_model.encode(pixels), grid)
    seconds = time.perf_counter() - start
    original, reconstruction = image_processor.postprocess(torch.cat([pixels, decoded]))
    difference = np.asarray(original, dtype=np.float64) - np.asarray(reconstruction)
    psnr = float(10 * np.log10(255**2 / np.square(difference).mean().clip(1e-10)))
    width, height = original.size
    pair = Image.new("RGB", (2 * width, height))
    pair.paste(original, (0, 0))
    pair.paste(reconstruction, (width, 0))
    write_atomically(path, lambda partial: pair.save(partial, format="PNG"))
    if args.json:
        figures = {"path": str(path), "width": width, "height": height, "psnr": psnr, "seconds": seconds}
        print(json.dumps(figures, indent=2))
    else:
        print(f"{path}  original and reconstruction, {width}x{height} pixels each, PSNR {psnr:.2f} dB")


def add_flops(subparsers) -> None:
    parser = subparsers.add_parser(
        "flops", help="cost of one image: the paper's estimate (appendix A.2) and this model's own count"
    )
    parser.add_argument("--aspect-ratio", default="1:1", metavar="W:H", help="width:height (default: %(default)s)")
    parser.add_argument("--level", help="level of the scale schedules, e.g. 256, 512, 1024 (default: the highest)")
    parser.add_argument("--prompt-tokens", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--denoising-steps", type=int, default=18, metavar="N", help="of the MMDiT compared (default: %(default)s)"
    )
    parser.add_argument("--no-guidance", action="store_true", help="count one pass of the model instead of two")
    parser.add_argument("--model", metavar="DIR", help="model directory (default: the paper's 7B configuration)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=flops)


def flops(args: argparse.Namespace) -> None:
    from .flops import PAPER_WIDTHS, image_passes, mmdit_passes, model_cost, paper_layer_cost

    config = load_config(args.model)
    table = config.vq_config.schedule_table()
    schedule = table.by_aspect_ratio(args.aspect_ratio, args.level, exact=False)
    passes = image_passes(schedule, args.prompt_tokens)
    nextflow = paper_layer_cost(passes)
    mmdit = paper_layer_cost(mmdit_passes(schedule, args.denoising_steps))
    cost = model_cost(config.text_config, config.vq_config.codebook_size, passes, guidance=not args.no_guidance)
    height, width = table.image_size(schedule)

    figures = {
        "height": height,
        "width": width,
        "scales": len(schedule),
        "codes": schedule.num_codes,
        "prompt_tokens": args.prompt_tokens,
        "paper_per_layer": {
            "nextflow": asdict(nextflow),
            "mmdit": {**asdict(mmdit), "steps": args.denoising_steps},
            "ratio": {str(h): mmdit.flops(h) / nextflow.flops(h) for h in PAPER_WIDTHS},
        },
        "model": {
            "hidden_size": config.text_config.hidden_size,
            "num_hidden_layers": config.text_config.num_hidden_layers,
            "guidance": not args.no_guidance,
            **asdict(cost),
            "total": cost.total,
        },
    }
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    across, down = map(int, args.aspect_ratio.split(":"))
    nearest = "" if width * down == height * across else f", the nearest to {args.aspect_ratio}"
    print(f"{width}x{height} pixels (width x height){nearest}, {len(schedule)} scales,")
    print(f"{schedule.num_codes:,} codes, {args.prompt_tokens} prompt tokens\n")
    print("The paper's estimate, FLOPs of one layer of hidden size h (appendix A.2)")
    print_rows(
        ("NextFlow", f"{nextflow.quadratic:,} h^2 + {nextflow.linear:,} h"),
        (f"MMDiT, {args.denoising_steps} steps", f"{mmdit.quadratic:,} h^2 + {mmdit.linear:,} h"),
        *((f"ratio at h = {h}", f"{mmdit.flops(h) / nextflow.flops(h):.2f}") for h in PAPER_WIDTHS),
    )
    print(f"\nThis model, FLOPs of all {config.text_config.num_hidden_layers} layers and heads,", end=" ")
    print("without guidance" if args.no_guidance else "with guidance (two rows)")
    parts = {**asdict(cost), "total": cost.total}
    print_rows(*((name.replace("_", " "), f"{value:.4e}  {value / cost.total:6.1%}") for name, value in parts.items()))


def print_rows(*rows: tuple[str, str]) -> None:
    """Two columns, the first as wide as its longest entry."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def add_data(subparsers) -> None:
    from .data.cli import add_commands

    add_commands(subparsers.add_parser("data", help="documents to packed training shards, and back"))


def add_doctor(subparsers) -> None:
    parser = subparsers.add_parser("doctor", help="what is wrong with a checkpoint or its training shards")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="local folder or Hub id")
    parser.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="folder of training shards, or of pictures with name.txt beside name.png (default: drawn pictures alone)",
    )
    parser.add_argument("--text-source", metavar="NAME", help="model whose text the checkpoint must have kept")
    parser.add_argument("--report", metavar="FOLDER", help="gets report.html, report.png and report.txt")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .doctor import examine, read_pictures, to_text, write_report

    packs, images = None, None
    for folder in args.data:
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"there is no folder {folder}")
        is_shards = (Path(folder) / "manifest.json").is_file()
        if (packs if is_shards else images) is not None:
            raise ValueError(f"give one folder of shards and one of pictures, got {' and '.join(args.data)}")
        packs, images = (folder, images) if is_shards else (packs, folder)
    model, processor = load_model(args.checkpoint)
    source = None
    if args.text_source is not None:
        from transformers import AutoModelForMultimodalLM

        source = AutoModelForMultimodalLM.from_pretrained(model_name(args.text_source)).to(model.device).eval()
    with tqdm(desc="checks", unit="check", disable=None, leave=False) as progress:
        diagnosis = examine(
            model,
            processor,
            packs=packs,
            pictures=None if images is None else read_pictures(images),
            text_source=source,
            seed=args.seed,
            on_check=lambda finding: progress.update(),
        )
    page = None if args.report is None else write_report(diagnosis, args.report, args.checkpoint)
    if args.json:
        print(json.dumps(diagnosis.to_dict(), indent=2))
        return
    print(to_text(diagnosis), end="")
    print(f"\n{diagnosis.seconds:.1f} s" + (f", {page}" if page else ""))


def add_export(subparsers) -> None:
    parser = subparsers.add_parser("export", help="a checkpoint in the layout of the Hub, or on the Hub")
    parser.add_argument("folder", metavar="MODEL", help="model folder, or id on the Hub")
    parser.add_argument("--to", required=True, metavar="REPO_OR_FOLDER", help="new folder, or with --push owner/name")
    parser.add_argument("--push", action="store_true", help="create the repository on the Hub and upload")
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> None:
    from .export import export as export_checkpoint
    from .loading import check_model_type

    name = model_name(args.folder)
    check_model_type(name, "nextflow")
    print(export_checkpoint(name, args.to, args.push))


SUBCOMMANDS = (
    add_generate,
    add_edit,
    add_describe,
    add_interleave,
    add_reconstruct,
    add_flops,
    add_data,
    add_doctor,
    add_export,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transformers-nextflow", description="Text and images from one next-token, next-scale model."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('transformers-nextflow')}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_subcommand in SUBCOMMANDS:
        add_subcommand(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; a user's error (bad value, missing file) is one line on stderr and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
