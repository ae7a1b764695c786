"""The shapes world's diffusion decoder: `python -m examples.shapes.diffusion_decoder --output runs/shapes-decoder`.

A small UNet on the pixels of pictures at twice the size of the coded ones, trained from nothing on scenes drawn as it
goes. Stopped, the same command goes on. `decoder/` in the output, a pipeline's folder with the vision tokenizer, is
what `checkpoints/nextflow-shapes-decoder` holds.

- Latents are the frequencies of patches of 4 x 4 pixels, so that the UNet's coarsest resolution is the codes' grid.
  Each is divided by the root of its standard deviation, which is between pixels, where flat areas come out grainy, and
  equal variances, where the mean of a patch is one of sixteen numbers of equal weight.
- The picture itself is predicted, down to pure noise: codes nearly determine it, so few steps suffice, while velocity
  would carry the noise of 48 channels through a UNet 64 wide, which leaves much of it in the picture.
- Codes say all of a scene. No layer reads the caption, and the text encoder, which the pipeline has, is a token one.
"""

import argparse
import random
import re
import string
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.utils.data import Dataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_nextflow import NextFlowConditioner, NextFlowDecoderPipeline, PixelAutoencoder
from diffusers_nextflow.training import DecoderTrainingArguments, train
from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.cli import model_name
from transformers_nextflow.files import output_folder
from transformers_nextflow.loading import load_vq_model

from .assemble import halve
from .data import sample_canvas, to_pixel_values
from .grammar import describe_scene
from .world import render, sample_scene

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes-decoder"
UPSCALE = 2
WIDTHS = (64, 128, 192)  # of the UNet, at latents of 4, 8 and 16 pixels of the output
STEPS, BATCH = 3_000, 16
SAMPLING_STEPS = 4
CAPTION_LENGTH = 256  # letters


class ShapesBatches(Dataset):
    """Training scenes, drawn by the number of the batch; see `PictureBatches`."""

    def __init__(self, batch_size: int, upscale: int, empty_share: float = 0.0, seed: int = 0):
        self.batch_size, self.upscale, self.empty_share, self.seed = batch_size, upscale, empty_share, seed

    def __getitem__(self, number: int) -> dict:
        """`coded_pixels` (B, 3, H, W) and `pixel_values`, the same scenes drawn `upscale` times as large, with
        `captions`."""
        rng = random.Random(f"diffusion decoder {self.seed} {number}")
        canvas = sample_canvas(rng)
        scenes = [sample_scene(rng, *canvas) for _ in range(self.batch_size)]
        captions = [describe_scene(rng, scene).text for scene in scenes]
        return {
            "coded_pixels": to_pixel_values([render(scene) for scene in scenes]),
            "pixel_values": to_pixel_values([render(scene, self.upscale) for scene in scenes]),
            "captions": ["" if rng.random() < self.empty_share else caption for caption in captions],
        }


def new_decoder(vq_model: NextFlowVQModel, widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> NextFlowDecoderPipeline:
    """The untrained pipeline."""
    torch.manual_seed(seed)
    vae, tokenizer = PixelAutoencoder(frequency_scales=frequency_scales()), letter_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=vae.config.latent_channels + widths[0],
        out_channels=vae.config.latent_channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=["DownBlock2D"] * len(widths),
        mid_block_type="UNetMidBlock2D",
        up_block_types=["UpBlock2D"] * len(widths),
        cross_attention_dim=8,
        norm_num_groups=8,
    )
    return NextFlowDecoderPipeline(
        vae=vae,
        text_encoder=new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            steps_offset=1,  # which this spacing does not read; its default warns
            clip_sample=False,
            set_alpha_to_one=True,
        ),
        conditioner=NextFlowConditioner.for_backbone(vq_model.config, unet, UPSCALE),
        vq_model=vq_model,
    )


def frequency_scales(batches: int = 16) -> list[float]:
    """Roots of the standard deviations of the frequencies over training pictures, all colours together."""
    pictures, vae = ShapesBatches(BATCH, UPSCALE, seed=1), PixelAutoencoder()
    latents = [vae.encode(pictures[number]["pixel_values"]).latents for number in range(batches)]
    # (B, 3 * frequencies, H, W) -> (frequencies, all else)
    values = torch.cat([each.unflatten(1, (3, -1)).movedim(2, 0).flatten(1) for each in latents], 1)
    return [round(float(value), 4) for value in values.std(1).sqrt()]


def letter_tokenizer() -> CLIPTokenizer:
    """A token for each letter."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CAPTION_LENGTH)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=CAPTION_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def settings(output: Path, steps: int) -> DecoderTrainingArguments:
    return DecoderTrainingArguments(
        str(output),
        max_train_steps=steps,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        mixed_precision="bf16",
        use_ema=True,
        ema_decay=0.995,
        checkpointing_steps=200,
        checkpoints_total_limit=2,
        resume_from_checkpoint="latest",
        validation_steps=500,
        num_validation_images=8,
        num_inference_steps=SAMPLING_STEPS,
        logging_steps=25,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="whose vision tokenizer codes the pictures (default: the repository's)")
    parser.add_argument("--output", type=Path, default=Path("runs/shapes-decoder"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    arguments = parser.parse_args()
    pipe = new_decoder(load_vq_model(model_name(arguments.model)))
    pipe.unet.to(memory_format=torch.channels_last)
    batches = ShapesBatches(BATCH, UPSCALE)
    train(pipe, batches, settings(arguments.output, arguments.steps), validation=batches[0])
    if not (arguments.output / "decoder").exists():
        with output_folder(arguments.output / "decoder") as folder:
            export(arguments.output, folder)


def export(trained: Path, folder: Path) -> None:
    """The trained pipeline as it is shipped: what codes do not depend on in half precision; all loads as float32."""
    pipe = NextFlowDecoderPipeline.from_pretrained(trained)
    pipe.unet.to(torch.float16)
    halve(pipe.vq_model)
    pipe.save_pretrained(folder)
    pipe.vq_model.config.dtype = torch.float32
    pipe.vq_model.config.save_pretrained(folder / "vq_model")
    for path in folder.rglob("*.json"):  # diffusers writes where each part was trained
        path.write_text(re.sub(r'\n *"_name_or_path": "[^"]*",', "", path.read_text()))


if __name__ == "__main__":
    main()
