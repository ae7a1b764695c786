"""The shapes recipe at a few steps each, its optimizer and its log."""

import copy
import json
import shutil
import sys
from itertools import accumulate

import pytest
import torch
from transformers import TrainerControl, TrainerState

from examples.shapes import tokenizer, train, transformer
from examples.shapes.assemble import assemble
from examples.shapes.muon import MuonWithAdamW
from examples.shapes.stages import StopAt, is_finished
from examples.shapes.transformer import TUNED_SHARE
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.weight": (4, 6), "layer.norm": (6,), "head.weight": (5, 4)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def steps(optimizer, named, count: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def combined(named) -> MuonWithAdamW:
    return MuonWithAdamW(named.items(), lambda name: "layer" in name, 1e-2, 0.1, (0.9, 0.95))


def test_muon_moves_the_named_matrices_and_adamw_the_others():
    together, apart = parameters(), parameters()
    muon = torch.optim.Muon([apart["layer.weight"]], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": [apart["head.weight"]]}, {"params": [apart["layer.norm"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    steps(combined(together), together, 3)

    class Both:
        def step(self):
            muon.step()
            adamw.step()

    steps(Both(), apart, 3)
    for name in together:
        torch.testing.assert_close(together[name], apart[name], rtol=0, atol=0)


def test_the_scheduler_and_checkpoints_reach_both_optimizers():
    whole, cut = parameters(), parameters()
    optimizer = combined(whole)
    steps(optimizer, whole, 2)
    state = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for name in cut:
            cut[name].copy_(whole[name])
    again = combined(cut)
    again.load_state_dict(state)
    for each, named in ((optimizer, whole), (again, cut)):
        for group in each.param_groups:
            group["lr"] = 3e-3
        steps(each, named, 2, seed=2)
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], rtol=0, atol=0)
    for group in again.param_groups:
        group["lr"] = 0.0
    before = {name: parameter.clone() for name, parameter in cut.items()}
    steps(again, cut, 1)
    assert all(torch.equal(before[name], cut[name]) for name in cut)


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Two steps for each stage, little data, no compilation."""
    monkeypatch.setattr(tokenizer, "STEPS", dict.fromkeys(tokenizer.STEPS, 2))
    monkeypatch.setattr(tokenizer, "CODEBOOK_BATCHES", 3)
    monkeypatch.setattr(tokenizer, "CODEBOOK_BATCH", 8)
    monkeypatch.setattr(transformer, "DOCUMENTS", 60)
    monkeypatch.setattr(transformer, "STEPS", 2)
    monkeypatch.setattr(transformer, "TUNING_DOCUMENTS", 60)
    rounds = {stage: (2, peak) for stage, (_, peak) in transformer.TUNING_ROUNDS.items()}
    monkeypatch.setattr(transformer, "TUNING_ROUNDS", rounds)
    monkeypatch.setattr(transformer, "PACKS", 4)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kwargs: None)
    monkeypatch.setattr("examples.shapes.stages.LOGGING_STEPS", 1)
    monkeypatch.setattr("sys.argv", ["train", "--output", str(tmp_path / "run")])
    return tmp_path / "run"


def weight_of(model: NextFlowForConditionalGeneration) -> torch.Tensor:
    return model.model.language_model.layers[0].mlp.up_proj.weight


def test_stopping_early_leaves_the_saves_before_it():
    control = TrainerControl(should_save=True)
    StopAt(5).on_step_end(None, TrainerState(global_step=4), control)
    assert control.should_save and not control.should_training_stop
    control = TrainerControl()
    StopAt(5).on_step_end(None, TrainerState(global_step=5), control)
    assert control.should_save and control.should_training_stop


def test_the_stages_lead_to_a_checkpoint_and_run_once(short, monkeypatch):
    early = short / "transformer" / "checkpoint-1"
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", [*sys.argv, "--stop-at", "1"])
        train.main()
    start, stopped = (weight_of(NextFlowForConditionalGeneration.from_pretrained(x)) for x in (short / "start", early))
    assert not torch.equal(start, stopped)
    assert NextFlowProcessor.from_pretrained(early).tokenizer.vocab_size
    assert not is_finished(short / "transformer") and not (short / "tuning_data").exists()
    train.main()
    with pytest.raises(ValueError, match="stop at step 1: .* is trained to its end"):
        shutil.rmtree(early)
        transformer.train_transformer(short, None, None, stop_at=1)
    model, processor = assemble(short)
    assert model.config.vq_config.decoder_blocks == 2
    names = ("transformer", *transformer.TUNING_ROUNDS)
    weights = [weight_of(NextFlowForConditionalGeneration.from_pretrained(short / name)) for name in names]
    assert all((after - before).abs().max() > 1e-6 for before, after in zip(weights, weights[1:]))
    *before_last, mixed = accumulate(weights, lambda mixed, weight: TUNED_SHARE * weight + (1 - TUNED_SHARE) * mixed)
    torch.testing.assert_close(weight_of(model), mixed, rtol=1e-6, atol=1e-8)
    message = [{"role": "user", "content": "a large red circle"}]
    inputs = processor.apply_chat_template(message, generation_mode="image")
    tokens = model.generate(**inputs, generation_mode="image", seed=0)
    assert processor.post_process_image(model.decode_image_tokens(tokens, (8, 8)))[0].size == (64, 64)
    rows = [json.loads(line) for line in (short / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, step) for stage in ("pixel", "teacher", "joint", *names, "decoder") for step in (1, 2)
    ]
    train.main()
    assert len((short / "log.jsonl").read_text().splitlines()) == len(rows)

    # what the last round starts from
    shutil.rmtree(short / names[-1])
    monkeypatch.setitem(transformer.TUNING_ROUNDS, names[-1], (2, 0.0))
    transformer.tune_transformer(short)
    start = NextFlowForConditionalGeneration.from_pretrained(short / names[-1])
    torch.testing.assert_close(weight_of(start), before_last[-1], rtol=1e-6, atol=1e-8)
