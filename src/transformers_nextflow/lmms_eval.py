"""NextFlow as a model of lmms-eval, which finds it by the entry point `lmms_eval.models`.

python -m lmms_eval --model nextflow --model_args pretrained=FOLDER --tasks mmstar
python -m lmms_eval --model nextflow --model_args pretrained=FOLDER,mode=image,output_dir=OUT --tasks WISE
"""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from .rewriting import Rewriting
from .sampling import SAMPLING_LIMITS
from .text_generation import text_sampling
from .utils.files import save_png
from .utils.loading import load_model

MAX_NEW_TOKENS = 256
"""Where a task does not say."""


def manifest() -> ModelManifest:
    return ModelManifest("nextflow", chat_class_path=f"{__name__}.NextFlow")


class NextFlow(lmms):
    """Answers in text, or pictures for tasks whose judges look at them (WISE, GEdit-Bench, ImgEdit).

    Args:
        pretrained: folder or id on the Hub; default: the repository's checkpoint.
        mode: `"text"`, or `"image"`: answers are `{"text": "", "images": [PATH]}`, as those tasks read them.
        output_dir: where pictures go, as `TASK-SPLIT-NUMBER.png`.
        seed: a picture of document n draws from seed + n.
        rewrite, rewrite_model: of prompts of pictures, see [`Rewriting`].
        batch_size: texts written at once; pictures are drawn one by one, as their sizes differ.
        device: default: the GPU, where there is one.
        max_batch_size: of lmms-eval's automatic batches; nothing is made of it.
    """

    is_simple = False  # asks by chats

    def __init__(
        self,
        pretrained: str | None = None,
        mode: str = "text",
        output_dir: str | None = None,
        seed: int = 0,
        rewrite: str | None = None,
        rewrite_model: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if mode not in ("text", "image"):
            raise ValueError(f'mode must be "text" or "image", got {mode!r}')
        if (mode == "image") != (output_dir is not None):
            raise ValueError(f"output_dir belongs to mode=image, got mode={mode}, output_dir={output_dir}")
        self.rewriting = Rewriting(rewrite, rewrite_model)
        self.model, self.processor = load_model(pretrained)
        self.model.to(device or self.model.device)
        self.mode, self.output_dir, self.seed, self.batch_size = mode, output_dir, seed, int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests."""
        answers = []
        with tqdm(total=len(requests), desc="nextflow") as progress:
            for batch in self._batches(requests):
                answers += [self._draw(batch[0])] if self.mode == "image" else self._write(batch)
                progress.update(len(batch))
        return answers

    def _batches(self, requests: Iterable[Instance]) -> Iterable[list[Instance]]:
        """Neighbours with the same controls of sampling."""
        size = 1 if self.mode == "image" else self.batch_size
        for alike in (list(group) for _, group in groupby(requests, key=lambda request: request.args[2])):
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    def _chat(self, request: Instance) -> list[dict]:
        _, messages_of, _, number, task, split = request.args
        return ChatMessages(messages=messages_of(self.task_dict[task][split][number])).to_hf_messages()

    def _inputs(self, chats: list, mode: str):
        inputs = self.processor.apply_chat_template(chats, generation_mode=mode, sanitize_control_tokens=True)
        return inputs.to(self.model.device)

    def _write(self, requests: list[Instance]) -> list[str]:
        controls = requests[0].args[2]
        given = {}
        if controls.get("do_sample", controls.get("temperature", 0) > 0):
            given = {"temperature": 1.0} | {name: controls[name] for name in SAMPLING_LIMITS if name in controls}
        max_new_tokens = controls.get("max_new_tokens", MAX_NEW_TOKENS)
        sampling = text_sampling(self.model, self.processor, max_new_tokens, **given)
        inputs = self._inputs(list(map(self._chat, requests)), "text")
        ids = self.model.generate(**inputs, **sampling, num_beams=controls.get("num_beams", 1))
        texts = self.processor.post_process_multimodal_output(ids[:, inputs["input_ids"].shape[1] :])
        stops = controls.get("until") or []
        return [up_to(text, [stops] if isinstance(stops, str) else stops) for text in texts]

    def _draw(self, request: Instance) -> str:
        _, _, _, number, task, split = request.args
        chat = self._chat(request)
        for part in chat[-1]["content"]:
            if part["type"] == "text":
                part["text"] = self.rewriting(part["text"])
        codes = self.model.generate(**self._inputs(chat, "image"), generation_mode="image", seed=self.seed + number)
        (picture,) = self.processor.post_process_image(self.model.decode_image_tokens(codes))
        path = Path(self.output_dir) / f"{task}-{split}-{number}.png"
        save_png(picture, path)
        return json.dumps({"text": "", "images": [str(path)]})

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks of likelihoods are not served: use generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not served: use generate_until")


def up_to(text: str, stops: Iterable[str]) -> str:
    """A text up to the first of its stops."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
