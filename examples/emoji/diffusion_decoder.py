"""The emoji world's diffusion decoder: `python -m examples.emoji.diffusion_decoder --large runs/emoji/data-128`.

A small UNet on the pixels of pictures at twice the size of the coded ones, trained from nothing. The truth at that
size is no enlargement: `python -m examples.emoji.data --size 128 --output runs/emoji/data-128` renders the same
drawings again. Stopped, the same command goes on. `decoder/` in the output is a pipeline's folder with the vision
tokenizer.

- Latents are the frequencies of patches of 4 x 4 pixels, so that the UNet's coarsest resolution is the codes' grid.
  Each is divided by the root of its standard deviation, which is between pixels, where flat areas come out grainy, and
  equal variances, where the mean of a patch is one of sixteen numbers of equal weight.
- The picture itself is predicted, down to pure noise: codes nearly determine it, so few steps suffice, while velocity
  would carry the noise of 48 channels through a UNet 64 wide, which leaves much of it in the picture.
- No layer reads the caption, and the text encoder, which the pipeline has, is a token one.
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
from diffusers_nextflow.training import DecoderTrainingArguments, NextFlowDecoderTrainer
from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.training.checkpoints import newest_checkpoint
from transformers_nextflow.utils.files import output_folder
from transformers_nextflow.utils.loading import load_vq_model, model_name

from .sizes import PATCH_SIZE, SCHEDULES
from .stages import bfloat16_is_fast
from .wordings import CAPTION
from .world import World, in_a_row, to_pixel_values

UPSCALE = 2
ROW_SHARE = 0.2  # of batches, of several pictures side by side
WIDTHS = (64, 128, 192)  # of the UNet, at latents of 4, 8 and 16 pixels of the output
STEPS, BATCH = 3_000, 16
SAMPLING_STEPS = 4
CAPTION_LENGTH = 256  # letters


class EmojiBatches(Dataset):
    """Seen pictures, `count` batches drawn by their numbers; see `PictureBatches`.

    Args:
        world, large: the data set and its rendering at `UPSCALE` times the size.
    """

    def __init__(self, world: World, large: World, batch_size: int, seed: int = 0, count: int = STEPS):
        edges = world.pictures.shape[1], large.pictures.shape[1]
        if edges[1] != UPSCALE * edges[0] or (large.names, large.styles) != (world.names, world.styles):
            raise ValueError(
                f"the large pictures must be the {len(world)} of the data set at {UPSCALE * edges[0]} pixels, got "
                f"{len(large)} of {edges[1]}: make them by examples.emoji.data --size"
            )
        self.world, self.large, self.batch_size, self.seed, self.count = world, large, batch_size, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict:
        """`coded_pixels` (B, 3, H, W) and `pixel_values`, the same `UPSCALE` times as large, with `captions`."""
        rng = random.Random(f"diffusion decoder {self.seed} {number}")
        grids = SCHEDULES[1:] if rng.random() < ROW_SHARE else SCHEDULES[:1]
        height, width = (length * PATCH_SIZE for length in rng.choice(grids)[-1])
        cells = max(height, width) // min(height, width)
        rows = [rng.choices(self.world.seen, k=cells) for _ in range(self.batch_size)]

        def canvases(world: World, scale: int) -> torch.Tensor:
            size = scale * height, scale * width
            return to_pixel_values([in_a_row([world.pictures[row] for row in each], *size) for each in rows])

        return {
            "coded_pixels": canvases(self.world, 1),
            "pixel_values": canvases(self.large, UPSCALE),
            "captions": [caption_of(self.world, each) for each in rows],
        }


def caption_of(world: World, rows: list[int]) -> str:
    text = ", ".join(CAPTION.format(name=world.names[row], style=world.styles[row]) for row in rows)
    return text[:CAPTION_LENGTH]


def new_decoder(
    vq_model: NextFlowVQModel, frequency_scales: list[float], widths: tuple[int, ...] = WIDTHS, seed: int = 0
) -> NextFlowDecoderPipeline:
    """The untrained pipeline; for the scales see [`frequency_scales_of`]."""
    torch.manual_seed(seed)
    vae, tokenizer = PixelAutoencoder(frequency_scales=frequency_scales), letter_tokenizer()
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


def frequency_scales_of(batches: EmojiBatches, count: int = 16) -> list[float]:
    """Roots of the standard deviations of the frequencies over training pictures, all colours together."""
    vae = PixelAutoencoder()
    latents = [vae.encode(batches[number]["pixel_values"]).latents for number in range(count)]
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
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        bf16=bfloat16_is_fast(),
        use_cpu=not torch.cuda.is_available(),  # where bf16 has to be asked for so
        use_ema=True,
        ema_decay=0.995,
        save_steps=200,
        save_total_limit=2,
        sample_steps=500,
        num_samples=8,
        num_inference_steps=SAMPLING_STEPS,
        logging_steps=25,
    )


def export(trained: Path, folder: Path) -> None:
    """The trained pipeline as it is shipped: the UNet in half precision; all loads as float32."""
    pipe = NextFlowDecoderPipeline.from_pretrained(trained)
    pipe.unet.to(torch.float16)
    pipe.save_pretrained(folder)
    for path in folder.rglob("*.json"):  # diffusers writes where each part was trained
        path.write_text(re.sub(r'\n *"_name_or_path": "[^"]*",', "", path.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="whose vision tokenizer codes the pictures (default: the repository's)")
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="default: %(default)s")
    parser.add_argument("--large", type=Path, default=Path("runs/emoji/data-128"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji-decoder"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    arguments = parser.parse_args()
    batches = EmojiBatches(World(arguments.data), World(arguments.large), BATCH, count=arguments.steps)
    pipe = new_decoder(load_vq_model(model_name(arguments.model)), frequency_scales_of(batches))
    pipe.unet.to(memory_format=torch.channels_last)
    trainer = NextFlowDecoderTrainer(pipe, settings(arguments.output, arguments.steps), batches, samples=batches[0])
    trainer.train(resume_from_checkpoint=newest_checkpoint(arguments.output))
    trainer.save_model()
    if not (arguments.output / "decoder").exists():
        with output_folder(arguments.output / "decoder") as folder:
            export(arguments.output, folder)


if __name__ == "__main__":
    main()
