"""Pictures along a training: those of the weights at that step, at no cost to the training."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_samples import picture as random_picture
from PIL import Image
from trainings import losses, train, with_dropout
from transformers import TrainerCallback

from transformers_nextflow.training import NextFlowTrainingArguments, SamplesCallback

PROMPTS = ["a red circle", "make it blue"]


@pytest.fixture
def callback(tiny_processor, tmp_path) -> SamplesCallback:
    """Two prompts, the second an edit."""
    (tmp_path / "condition.png").write_bytes(random_picture(0))
    images = [[], [Image.open(tmp_path / "condition.png").convert("RGB")]]
    settings = {"every": 2, "seed": 3, "guidance_scale": 1.5, "aspect_ratio": "2:1"}
    return SamplesCallback(tiny_processor, PROMPTS, images=images, **settings)


def drawn(folder) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


class Draws(TrainerCallback):
    """Takes a random number from the training."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.rand(1)


def test_samples_change_nothing_and_show_the_weights_of_their_step(callback, dataset, data_model, tmp_path):
    run = {"max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
    model = with_dropout(data_model)
    trainer = train(model, dataset, tmp_path / "with", callbacks=[callback], **run)
    without = losses(train(with_dropout(data_model), dataset, tmp_path / "without", **run))
    disturbed = losses(
        train(with_dropout(data_model), dataset, tmp_path, callbacks=[Draws()], **run | {"max_steps": 1})
    )
    assert losses(trainer) == without and disturbed[0]["loss"] != without[0]["loss"]
    pictures = drawn(tmp_path / "with" / "samples")
    assert list(pictures) == ["step-2/00.png", "step-2/01.png", "step-4/00.png", "step-4/01.png"]
    assert any(not np.array_equal(pictures[f"step-2/0{i}.png"], pictures[f"step-4/0{i}.png"]) for i in range(2))
    assert model.training and not (tmp_path / "without" / "samples").exists()

    model.eval()
    for index, chat in enumerate(callback.chats):
        inputs = callback.processor.apply_chat_template(chat, generation_mode="image")
        tokens = model.generate(**inputs, generation_mode="image", seed=3, guidance_scale=1.5, aspect_ratio="2:1")
        (expected,) = callback.processor.post_process_image(model.decode_image_tokens(tokens, (2, 4)))
        assert np.array_equal(pictures[f"step-4/0{index}.png"], np.asarray(expected))


class Tracker(SimpleNamespace):
    """What wandb and trackio have in common."""

    def __init__(self):
        super().__init__(logged=[])

    def Image(self, picture, caption):
        return np.asarray(picture), caption

    def log(self, values):
        self.logged.append(values)


class SummaryWriter:
    """As torch's."""

    made = []

    def __init__(self, folder):
        self.folder, self.images, self.closed = folder, {}, False
        self.made.append(self)

    def add_image(self, tag, picture, step, dataformats):
        assert dataformats == "HWC"
        self.images[tag, step] = picture

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_trackers_that_take_pictures_get_them(callback, data_model, tmp_path, monkeypatch):
    wandb, trackio = Tracker(), Tracker()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    arguments = NextFlowTrainingArguments(str(tmp_path), report_to=["wandb", "tensorboard", "trackio"])
    state = SimpleNamespace(global_step=4, is_world_process_zero=True)
    callback.on_step_end(arguments, state, None, model=data_model)
    callback.on_train_end(arguments, state, None)
    pictures = drawn(tmp_path / "samples")
    for tracker in (wandb, trackio):
        (values,) = tracker.logged
        assert values.pop("train/global_step") == 4
        for index, (tag, (picture, caption)) in enumerate(values.items()):
            assert (tag, caption) == (f"samples/0{index}", PROMPTS[index])
            assert np.array_equal(picture, pictures[f"step-4/0{index}.png"])
    (writer,) = SummaryWriter.made
    assert writer.closed and writer.folder == str(tmp_path / "runs" / "samples")
    assert list(writer.images) == [("samples/00", 4), ("samples/01", 4)]
    assert np.array_equal(writer.images["samples/01", 4], pictures["step-4/01.png"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": "a red circle"}, "prompts must be a list of texts, got 'a red circle'"),
        ({"prompts": []}, r"prompts must be a list of texts, got \[\]"),
        ({"prompts": ["a"], "every": 0}, "every must be at least 1, got 0"),
        ({"prompts": ["a", "b"], "images": [[]]}, "images must have one entry for each of 2 prompts, got 1"),
        ({"prompts": ["a"], "images": [[], []]}, "images must have one entry for each of 1 prompts, got 2"),
    ],
)
def test_samples_that_cannot_be_are_refused(arguments, message, tiny_processor):
    with pytest.raises(ValueError, match=message):
        SamplesCallback(tiny_processor, **arguments)
