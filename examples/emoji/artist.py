"""A checkpoint, asked through its processor and `generate` as a user would ask it."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor

from .documents import draw_picture
from .tasks import Item, Picture
from .world import World

BATCH = 32
SEED = 0
MAX_NEW_TOKENS = 96  # of an answer's text; the longest thoughts have some 60


class Artist:
    """Answers items of the tasks, of which it sees the user's part alone.

    One picture for each prompt, without a choice: item n of a list draws from the seed n, in whatever batch it stands.

    Args:
        level: of the pictures that are read and drawn.
        sampling: controls of pictures over the checkpoint's own (`guidance_scale`, `temperature`, ...).
    """

    def __init__(
        self,
        model: NextFlowForConditionalGeneration,
        processor: NextFlowProcessor,
        world: World,
        level: str = "64",
        **sampling,
    ):
        self.model, self.processor, self.world, self.level = model, processor, world, level
        self.sampling = sampling

    def at_level(self, level: str) -> "Artist":
        """The same model at another level."""
        return Artist(self.model, self.processor, self.world, level, **self.sampling)

    def draw(self, items: Sequence[Item]) -> list[np.ndarray]:
        """The picture that each item asks for, uint8 (H, W, 3) of its shape."""
        drawings: dict[int, np.ndarray] = {}
        for numbers in self._batches(items, "pictures"):
            output = self.model.generate(
                **self._inputs(items, numbers, "image"),
                generation_mode="image",
                seed=[SEED + number for number in numbers],
                aspect_ratio=_aspect_ratio(items[numbers[0]]),
                level=self.level,
                return_dict_in_generate=True,
                **self.sampling,
            )
            pixels = self.model.decode_image_tokens(output.sequences, output.image_grid_hw)
            drawings |= zip(numbers, map(np.asarray, self.processor.post_process_image(pixels)))
        return [drawings[number] for number in range(len(items))]

    def answer(self, items: Sequence[Item]) -> list[str]:
        """The likeliest answer in text."""
        answers: dict[int, str] = {}
        for numbers in self._batches(items, "answers"):
            inputs = self._inputs(items, numbers, "text")
            ids = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers |= zip(numbers, (text.strip() for text in texts))
        return [answers[number] for number in range(len(items))]

    def interleave(self, items: Sequence[Item], max_pictures: int) -> list[tuple[str, list[np.ndarray]]]:
        """The text and the square pictures, at most so many, of an answer that says by itself when a picture comes
        and when it ends."""
        answers: dict[int, tuple[str, list[np.ndarray]]] = {}
        for numbers in self._batches(items, "answers in text and pictures"):
            output = self.model.generate(
                **self._inputs(items, numbers, "interleaved"),
                generation_mode="interleaved",
                image_generation={"level": self.level, "aspect_ratio": "1:1", **self.sampling},
                max_new_images=max_pictures,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                seed=[SEED + number for number in numbers],
            )
            pixels = self.model.decode_images(output.image_codes, output.image_grid_hw)
            parts = self.processor.post_process_multimodal_output(
                output, generation_mode="interleaved", pictures=pixels
            )
            for number, row in zip(numbers, parts):
                text = "".join(part for part in row if isinstance(part, str)).strip()
                answers[number] = text, [np.asarray(part) for part in row if not isinstance(part, str)]
        return [answers[number] for number in range(len(items))]

    def rebuild(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What the vision tokenizer keeps of uint8 (H, W, 3) pictures of the level's sizes."""
        rebuilt = []
        for start in range(0, len(pictures), BATCH):
            images = [Image.fromarray(picture) for picture in pictures[start : start + BATCH]]
            inputs = self.processor.image_processor(images, return_tensors="pt").to(self.model.device)
            codes = self.model.encode_images(inputs["pixel_values"], inputs["image_grid_hw"])
            for pixels in self.model.decode_images(codes, inputs["image_grid_hw"]):
                rebuilt += map(np.asarray, self.processor.post_process_image(pixels[None]))
        return rebuilt

    def _batches(self, items: Sequence[Item], what: str) -> Iterator[list[int]]:
        """Numbers of items to be run together: pictures of one shape, prompts of like length next to each other."""
        texts = [sum(len(part) for part in item.user if isinstance(part, str)) for item in items]
        order = sorted(range(len(items)), key=lambda n: (_aspect_ratio(items[n]), len(items[n].read), texts[n]))
        with tqdm(total=len(items), desc=what, leave=False) as progress:
            for _, group in groupby(order, key=lambda n: _aspect_ratio(items[n])):
                numbers = list(group)
                for start in range(0, len(numbers), BATCH):
                    yield numbers[start : start + BATCH]
                    progress.update(len(numbers[start : start + BATCH]))

    def _inputs(self, items: Sequence[Item], numbers: Sequence[int], mode: str):
        chats = [[{"role": "user", "content": [self._part(part) for part in items[n].user]}] for n in numbers]
        return self.processor.apply_chat_template(chats, generation_mode=mode).to(self.model.device)

    def _part(self, part: str | Picture) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image", "image": Image.fromarray(draw_picture(part, self.world, self.level))}


def _aspect_ratio(item: Item) -> str:
    """Of the pictures it asks for; those of one item are alike."""
    return item.drawn[0].aspect_ratio if item.drawn else "1:1"
