"""The moving average of a plain Trainer's weights: by hand, in every checkpoint, and over a resume."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from transformers_nextflow.training import EMACallback


class Line(nn.Module):
    """A slope that is trained, an offset that is not."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
        self.offset = nn.Parameter(torch.tensor(0.5, dtype=dtype), requires_grad=False)

    def forward(self, x, labels):
        y = x.to(self.slope.dtype) @ self.slope + self.offset
        return {"loss": (y - labels).float().pow(2).mean(), "logits": y}


class Recorded(TrainerCallback):
    """The weights that training begins with, and those after every step."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.slope.detach().clone())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.slope.detach().clone())


def rows(count: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(2, generator=generator), "labels": torch.tensor(float(i))} for i in range(count)]


def train(output, decay=0.9, dtype=torch.float32, resume=None, **arguments) -> tuple[Line, EMACallback, list]:
    values = {"max_steps": 8, "save_steps": 3, "learning_rate": 0.1, "per_device_train_batch_size": 4, "seed": 5}
    values |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "optim": "sgd"}
    callback, recorded = decay if isinstance(decay, EMACallback) else EMACallback(decay), Recorded()
    trainer = Trainer(
        Line(dtype),
        TrainingArguments(str(output), **(values | arguments)),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[callback, recorded],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model, callback, recorded.weights


def average_of(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = weights[0].double()
    for each in weights[1:]:
        average = decay * average + (1 - decay) * each.double()
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_checkpoint_has_the_average_up_to_it(tmp_path, dtype):
    model, callback, weights = train(tmp_path, dtype=dtype)
    assert len(weights) == 9 and not torch.equal(weights[0], weights[-1])
    for step in (3, 6, 8):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "ema.safetensors")
        assert list(saved) == ["slope"] and saved["slope"].dtype == torch.float32
        torch.testing.assert_close(saved["slope"].double(), average_of(weights[: step + 1], 0.9), rtol=1e-6, atol=0)
    assert torch.equal(callback.averages["slope"], saved["slope"])
    callback.copy_to(model)
    assert torch.equal(model.slope.detach(), saved["slope"].to(dtype)) and model.offset.item() == 0.5


def test_a_decay_is_reached_by_warming_up(tmp_path):
    _, callback, weights = train(tmp_path, EMACallback(0.3, warmup=True))
    average = weights[0].double()
    for step, each in enumerate(weights[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * each.double()
    torch.testing.assert_close(callback.averages["slope"].double(), average, rtol=1e-6, atol=0)


def test_weights_with_channels_last_have_an_average_too(tmp_path):
    callback, model = EMACallback(0.5), nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)
    callback.on_save(arguments, TrainerState(global_step=1), TrainerControl())
    assert torch.equal(load_file(tmp_path / "checkpoint-1" / "ema.safetensors")["weight"], model.weight)


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_checkpoints_of_epochs_and_of_the_best(tmp_path, strategy):
    best = {"metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 3} if strategy == "best" else {}
    _, _, weights = train(tmp_path, save_strategy=strategy, **best)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert checkpoints
    for path in checkpoints:
        step = json.loads((path / "trainer_state.json").read_text())["global_step"]
        saved = load_file(path / "ema.safetensors")["slope"].double()
        torch.testing.assert_close(saved, average_of(weights[: step + 1], 0.9), rtol=1e-6, atol=0)


def test_the_average_at_the_end_is_that_of_the_best_checkpoint(tmp_path):
    """As the weights are; here at a rate that makes them ever worse."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    model, callback, weights = train(tmp_path, learning_rate=2.0, **best)
    assert torch.equal(model.slope.detach(), weights[2]) and not torch.equal(weights[2], weights[-1])
    torch.testing.assert_close(callback.averages["slope"].double(), average_of(weights[:3], 0.9), rtol=1e-6, atol=0)
    noted = best | {"load_best_model_at_end": False, "metric_for_best_model": "loss"}  # where the weights are the last
    _, callback, weights = train(tmp_path / "last", learning_rate=2.0, **noted)
    torch.testing.assert_close(callback.averages["slope"].double(), average_of(weights, 0.9), rtol=1e-6, atol=0)


def test_a_resumed_average_is_the_undisturbed_one(tmp_path):
    _, whole, _ = train(tmp_path)
    for place in ("here", "elsewhere"):
        output = tmp_path if place == "here" else tmp_path / place
        named = {} if place == "here" else {"resume_from_checkpoint": str(tmp_path / "checkpoint-3")}
        _, resumed, weights = train(output, resume=str(tmp_path / "checkpoint-3"), **named)
        assert len(weights) == 6
        assert torch.equal(resumed.averages["slope"], whole.averages["slope"])


def test_what_cannot_be_averaged_is_refused(tmp_path):
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"decay must lie in \[0, 1\), got {decay}"):
            EMACallback(decay)
    assert EMACallback(0.0).decay == 0.0
    train(tmp_path)
    checkpoint = tmp_path / "checkpoint-6"
    with pytest.raises(ValueError, match="elsewhere.*ema.safetensors: the training to resume kept no average"):
        train(tmp_path / "elsewhere", resume=str(checkpoint))
    model = Line()
    model.slope.ds_id = 0  # as DeepSpeed marks what ZeRO-3 shards
    with pytest.raises(ValueError, match="ZeRO-3 shards"):
        EMACallback().on_train_begin(None, None, None, model=model)
    with pytest.raises(ValueError, match="runs of a search have folders that it does not know"):
        EMACallback().on_train_begin(None, TrainerState(is_hyper_param_search=True), None, model=Line())
    (checkpoint / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-6/ema.safetensors: the training to resume kept no average"):
        train(tmp_path, resume=str(checkpoint))


def test_other_parameters_than_the_averaged_are_named(tmp_path):
    train(tmp_path, max_steps=3)
    model = Line().requires_grad_(True)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="holds other parameters than are trained, the first is offset"):
        EMACallback().on_train_begin(arguments, TrainerState(global_step=3), None, model=model)
    model.slope.requires_grad_(False)
    save_file({"offset": torch.zeros(()), "slope": torch.zeros(2)}, tmp_path / "checkpoint-3" / "ema.safetensors")
    with pytest.raises(ValueError, match="holds other parameters than are trained, the first is slope"):
        EMACallback().on_train_begin(arguments, TrainerState(global_step=3), None, model=model)


def test_an_average_goes_into_a_part_of_the_model_or_one_like_it(tmp_path):
    model, callback = nn.Sequential(Line(), nn.Sequential(Line(), nn.Linear(1, 1))), EMACallback()
    callback.on_train_begin(None, TrainerState(), None, model=model)
    like = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (*model.parameters(), *like.parameters()):
            parameter.add_(1)
        callback.copy_to(model[1])
        callback.copy_to(like)
    for name, average in callback.averages.items():
        assert torch.equal(like.get_parameter(name), average)
        assert torch.equal(model.get_parameter(name), average) == name.startswith("1.")
    with pytest.raises(ValueError, match="the model has none of the averaged parameters, such as 0.slope"):
        callback.copy_to(nn.Linear(1, 1))
