"""Options that all trainings share, on a small network: what is resumed is the whole run, whatever was set."""

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from transformers_nextflow import NextFlowProcessor
from transformers_nextflow.lora import DECODER_LINEARS
from transformers_nextflow.training import EMACallback, NextFlowVQTrainingArguments
from transformers_nextflow.training.checkpoints import DataOrder, Epochs, SavingTrainer
from transformers_nextflow.training.commands.options import ModelOptions
from transformers_nextflow.training.loading import check_trained, load_to_train
from transformers_nextflow.training.order import EpochOrder


class Network(nn.Module):
    """With dropout, so that losses depend on random numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x, labels):
        outputs = self.layers(x)[:, 0]
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def rows(count: int = 12) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(float(i % 3))} for i in range(count)]


def train(output, resume=None, callbacks=(), trainer=SavingTrainer, metrics=None, **arguments) -> SavingTrainer:
    """Eight steps of six in an epoch; `resume` is the step of a checkpoint."""
    values = {"max_steps": 8, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "seed": 3}
    values |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    run = trainer(
        Network(),
        TrainingArguments(str(output), **(values | arguments)),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=list(callbacks),
        compute_metrics=metrics,
    )
    run.train(resume_from_checkpoint=resume and str(output / f"checkpoint-{resume}"))
    return run


def logs(run) -> list[tuple]:
    return [(row["step"], row["loss"], row["learning_rate"]) for row in run.state.log_history if "loss" in row]


def are_equal(one, other) -> bool:
    weights = zip(one.model.state_dict().values(), other.model.state_dict().values())
    return logs(one) == logs(other) and all(torch.equal(a, b) for a, b in weights)


JUDGED = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_kwargs": {"patience": 0}}


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_torch"},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
        {"optim": "adagrad"},
        {"optim": "rmsprop", "optim_args": "momentum=0.9,centered=true"},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", **JUDGED},
        {"lr_scheduler_type": "greedy", **JUDGED},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
        {"restore_callback_states_from_checkpoint": True},
    ],
    ids=lambda options: options.get("optim") or options.get("lr_scheduler_type") or next(iter(options)),
)
def test_what_is_resumed_is_the_whole_run(options, tmp_path):
    whole, resumed = (train(tmp_path, resume, [EMACallback(0.5)], **options) for resume in (None, 3))
    assert are_equal(whole, resumed) and len({loss for _, loss, _ in logs(whole)}) == 8


def test_what_workers_draw_and_in_which_order_items_come_follow_from_the_epoch(tmp_path):
    """Also below what deals batches out to several devices."""
    order, seen = EpochOrder(6, seed=1), []
    loader = DataLoader(range(6), sampler=order, generator=torch.Generator())
    dealt = DataLoader(range(6), batch_sampler=BatchSamplerShard(loader.batch_sampler, 2, 0, even_batches=True))
    arguments = TrainingArguments(str(tmp_path), seed=3, use_cpu=True, report_to="none")
    for epoch in (0.0, 1.0, 0.0):
        Epochs().on_epoch_begin(arguments, TrainerState(epoch=epoch), None, train_dataloader=loader)
        seen.append((torch.rand(2, generator=loader.generator).tolist(), list(order)))
    assert seen[0] == seen[2] and all(one != other for one, other in zip(seen[0], seen[1]))
    Epochs().on_epoch_begin(arguments, TrainerState(epoch=1.0), None, train_dataloader=dealt)
    assert list(order) == seen[1][1]


@pytest.mark.parametrize(
    "now, said",
    [
        ({"seed": 6}, "seed 5, with 6"),
        ({"seed": 4}, "seed 5, with 4"),
        ({"items_per_step": 1}, "items per step 2, with 1"),
        ({"items_per_step": 4}, "items per step 2, with 4"),
        ({"items": 9}, "items 12, with 9"),
        ({}, None),
    ],
    ids=str,
)
def test_data_in_another_order_is_not_gone_on_with(now, said, tmp_path):
    before = {"seed": 5, "items_per_step": 2, "items": 12}
    noted = {"stateful_callbacks": {"DataOrder": DataOrder(**before).state()}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(noted))
    with pytest.raises(ValueError, match=f"was trained with {said} its epoch") if said else nullcontext():
        DataOrder(**before | now).check(str(tmp_path))
    (tmp_path / "trainer_state.json").write_text("{}")  # of a training that noted nothing
    DataOrder(**before | now).check(str(tmp_path))


@pytest.mark.parametrize("option", [{}, {"ignore_data_skip": True}, {"auto_find_batch_size": True}], ids=str)
def test_the_order_is_that_of_the_data_seed_unless_it_is_not_to_be_gone_on_with(option, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    noted = {"stateful_callbacks": {"DataOrder": DataOrder(3, 2, 12).state()}}
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(noted))
    for seeds, other in (({"seed": 3}, False), ({"data_seed": 3}, False), ({"data_seed": 5}, True)):
        said = "with seed 3, with 5 its epoch" if other and not option else "Can't find a valid checkpoint"
        with pytest.raises(ValueError, match=said):
            train(tmp_path, 3, **{"seed": 1} | seeds | option)


def test_a_run_resumed_at_its_end_makes_no_step(tmp_path):
    whole, again = (train(tmp_path, resume, max_steps=2, save_steps=2) for resume in (None, 2))
    assert again.state.global_step == 2 and are_equal(whole, again)


def test_a_checkpoint_that_is_written_anew_is_not_whole_meanwhile(tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    run = train(tmp_path, None, [EMACallback(0.5)], max_steps=1, save_strategy="no")
    run._save_checkpoint(run.model, None)  # as whoever asks for one at any time
    assert {"ema.safetensors", "trainer_state.json"} <= {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    monkeypatch.setattr(SavingTrainer, "_save_optimizer_and_scheduler", die)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, max_steps=1)
    assert not (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


def test_a_result_has_its_tokenizer_and_a_checkpoint_refers_to_it(tiny_checkpoint, tmp_path, monkeypatch):
    """By a name that holds in any folder."""
    with monkeypatch.context() as there:
        there.chdir(tiny_checkpoint.parent)
        model, processor = load_to_train(tiny_checkpoint.name, vision_tokenizer=False)
    assert isinstance(processor, NextFlowProcessor)
    run = SavingTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    run.save_model(str(tmp_path / "result"))
    run.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    for name, is_whole in (("result", True), ("checkpoint-1", False)):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["vision_tokenizer"] is None) == is_whole
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert any("vq_model" in tensor for tensor in tensors) == is_whole
    assert config["vision_tokenizer"]["model"] == str(tiny_checkpoint.resolve())


def test_adapters_leave_the_model_as_it_is_asked_for(tiny_checkpoint):
    """Which they name without a revision where none was given."""
    options = ModelOptions(str(tiny_checkpoint), dtype="bfloat16", use_peft=True)
    model, _, adapters = options.load(vision_tokenizer=False)
    assert model.dtype == torch.bfloat16 and all(weight.requires_grad for weight in model.lm_head.parameters())
    assert adapters.revision is None and adapters.target_modules == DECODER_LINEARS


def test_what_would_not_be_trained_is_named(caplog):
    network = Network()
    check_trained(network)
    network.layers[0].to(torch.float16)
    network.layers[3].weight.requires_grad_(False)
    assert not caplog.text
    check_trained(network)
    assert "2 of 3 trained tensors are float16, such as layers.0.weight" in caplog.text
    with pytest.raises(ValueError, match="all parameters are frozen"):
        check_trained(network.requires_grad_(False))


def test_intervals_and_callbacks_are_those_that_are_asked_for_now(tmp_path):
    train(tmp_path, max_steps=3)
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "load_best_model_at_end": True}
    run = train(tmp_path, 3, [EarlyStoppingCallback(9)], logging_steps=4, save_steps=2, **best)
    assert [step for step, _, _ in logs(run)] == [1, 2, 3, 4, 8]
    assert [row["step"] for row in run.state.log_history if "eval_loss" in row] == [4, 6, 8]
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["EarlyStoppingCallback"]["args"]["early_stopping_patience"] == 9


def test_what_an_optimizer_goes_on_with_is_named(tmp_path, caplog):
    train(tmp_path)
    run = train(tmp_path, 3, learning_rate=1e-3, weight_decay=0.5)
    assert [rate for _, _, rate in logs(run)][3] == pytest.approx(0.01 * 5 / 8)
    assert "checkpoint-3 goes on with its own initial_lr, weight_decay: to train with others" in caplog.text
    caplog.clear()
    train(tmp_path, 3)
    assert "goes on with its own" not in caplog.text


def test_a_rate_of_another_kind_is_not_resumed(tmp_path):
    train(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", **JUDGED)
    with pytest.raises(ValueError, match="checkpoint-3 is of another training than this"):
        train(tmp_path, 3, lr_scheduler_type="cosine")


def test_a_layerwise_optimizer_is_not_resumed(tmp_path):
    """Its state is in none of its checkpoints."""

    class Layerwise(SavingTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = LayerWiseDummyOptimizer({})
            return self.optimizer

    train(tmp_path, trainer=Layerwise)
    with pytest.raises(ValueError, match="checkpoint-3 has no state of a layerwise optimizer: begin with it as"):
        train(tmp_path, 3, trainer=Layerwise)


@pytest.mark.parametrize("lowest", [False, True])
def test_a_rate_follows_a_metric_in_its_own_direction(lowest, tmp_path):
    """It falls where the metric gets worse, not where it gets better."""
    values = iter(range(8))
    better = {"metric_for_best_model": "cost" if lowest else "score", "greater_is_better": not lowest}
    run = train(
        tmp_path,
        metrics=lambda prediction: dict.fromkeys(("cost", "score"), float(next(values))),
        lr_scheduler_type="reduce_lr_on_plateau",
        **JUDGED | better,
    )
    assert (run.optimizer.param_groups[0]["lr"] < 1e-2) == lowest
    assert run.args.lr_scheduler_kwargs == {"patience": 0}  # as they were given, for whoever trains with them next


class Terminated(TrainerCallback):
    """What comes three seconds after SIGTERM, in the fifth step."""

    def on_substep_end(self, args, state, control, **kwargs):
        (callback,) = (each for each in self.callbacks if type(each).__name__ == "JITCheckpointCallback")
        callback.jit_manager.is_checkpoint_requested = state.global_step == 4


def test_a_checkpoint_after_sigterm_has_the_average(tmp_path):
    class Run(SavingTrainer):
        def train(self, *args, **kwargs):
            terminated.callbacks = self.callback_handler.callbacks
            return super().train(*args, **kwargs)

    terminated, average = Terminated(), EMACallback(0.5)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    split |= {"lr_scheduler_type": "constant"}
    train(tmp_path, None, [terminated, EMACallback(0.5)], trainer=Run, enable_jit_checkpoint=True, **split)
    train(tmp_path / "undisturbed", None, [average], max_steps=4, **split)
    saved = load_file(tmp_path / "checkpoint-4" / "ema.safetensors")
    assert saved.keys() == average.averages.keys()
    assert all(torch.equal(saved[name], each) for name, each in average.averages.items())
    assert train(tmp_path, 4, [EMACallback(0.5)], **split).state.global_step == 8


class ScheduleFree(torch.optim.SGD):
    """Trains weights that are one more than those it has found."""

    ahead = False

    def train(self):
        self._move(not self.ahead)
        self.ahead = True

    def eval(self):
        self._move(-int(self.ahead))
        self.ahead = False

    @torch.no_grad()
    def _move(self, by: int) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(by)


def test_weights_of_a_schedule_free_optimizer_are_those_it_has_found(tmp_path):
    class Run(SavingTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = ScheduleFree(self.model.parameters(), lr=0.0)
            return self.optimizer

    run = train(tmp_path, trainer=Run, save_steps=1)
    for name, weight in Network().state_dict().items():
        for checkpoint in (1, 8):
            saved = load_file(tmp_path / f"checkpoint-{checkpoint}" / "model.safetensors")
            torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(run.model.state_dict()[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", ["get_cp_size", "get_sp_size"])
def test_devices_that_share_sequences_are_refused(shared, tmp_path, monkeypatch):
    """accelerate lets accelerators alone do so."""
    monkeypatch.setattr(SavingTrainer, shared, lambda self: 2)
    with pytest.raises(ValueError, match="would cut pictures: leave cp_size and sp_size at 1"):
        train(tmp_path)


BEST = {"eval_strategy": "steps", "save_strategy": "best", "eval_steps": 1}


@pytest.mark.parametrize(
    "options, metric, greatest",
    [
        ({}, None, None),
        (BEST, "psnr", True),
        (JUDGED | {"lr_scheduler_type": "greedy"}, "psnr", True),
        (BEST | {"metric_for_best_model": "eval_lpips"}, "eval_lpips", False),
        (BEST | {"metric_for_best_model": "kl/image"}, "kl/image", False),
        (BEST | {"metric_for_best_model": "eval_loss_text", "greater_is_better": True}, "eval_loss_text", True),
        (BEST | {"metric_for_best_model": "ssim", "greater_is_better": False}, "ssim", False),
    ],
)
def test_the_best_goes_by_what_is_asked_for_in_its_direction(options, metric, greatest, tmp_path):
    arguments = NextFlowVQTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == (metric, greatest)
