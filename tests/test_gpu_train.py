"""The benchmark of training on a GPU at a tiny size: that it runs, refuses, goes on, and compares equal work."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_train
from benchmarks.gpu_train import Packs, Setting
from transformers_nextflow.attention import attended_pairs
from transformers_nextflow.data import CostModel
from transformers_nextflow.layout import build_layout
from transformers_nextflow.losses import IGNORE

PLAIN = Setting("blocks", gradient_checkpointing=False, compiled=False)


@pytest.fixture(scope="module")
def model():
    return gpu_train.tiny_model()


def rows_of(model, settings: dict[str, Setting], after_row=lambda result: None) -> dict:
    results = {}
    gpu_train.measure_size(
        model,
        settings,
        length=256,
        count=1,
        deadline=float("inf"),
        after_row=lambda result: (results.update(result["rows"]), after_row(result)),
        backend="eager",
        peak_teraflops=None,
    )
    return results


def test_the_check_runs_every_row_on_equal_work_and_prints_no_figure(capsys, tmp_path, monkeypatch):
    """Were the work not equal, seconds would be compared of different things."""
    losses, measure = [], gpu_train.measure

    def recorded(*args, **options):
        figures = measure(*args, **options)
        losses.append(figures["loss"])
        return figures

    monkeypatch.setattr(gpu_train, "measure", recorded)
    with torch.compiler.set_stance("force_eager"):
        gpu_train.main(["--tiny", "--json", "--output", str(tmp_path / "check.json")])
    check = json.loads(capsys.readouterr().out)
    assert check == json.loads((tmp_path / "check.json").read_text())
    assert check["check"].startswith("tiny model")
    rows = check["would_measure"]["tiny"]["rows"]
    assert list(rows) == list(gpu_train.settings("blocks", liger=False)) and len(rows) == 5
    for row in rows.values():
        setting = row.pop("setting")
        assert set(row.values()) == {"measured"} and {"tokens_per_second", "mfu", "peak_gigabytes"} < row.keys()
        assert setting["attention"] in ("blocks", "sdpa")
    assert losses == pytest.approx([losses[0]] * 5, abs=5e-6) and losses[0] > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_are_no_figures(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_train.main(["--json"])
    captured = capsys.readouterr()
    assert captured.out == "" and "there is no GPU" in captured.err


def test_rows_switch_one_optimisation_each():
    rows = gpu_train.settings("flex_attention", liger=True)
    (full, *others) = (vars(setting) for setting in rows.values())
    assert full == vars(Setting("flex_attention"))
    changed = [{name for name in full if other[name] != full[name]} for other in others]
    alone = ["attention", "attention", "loss_in_chunks", "gradient_checkpointing", "compiled", "liger"]
    assert changed == [*({name} for name in alone), {"liger", "compiled"}]


def test_every_setting_is_in_force(model, monkeypatch):
    seen = []

    def train(model, optimizer, packs):
        layer = model.model.language_model.layers[0]
        chunked = gpu_train.modeling_nextflow.joint_cross_entropy is not gpu_train.logits_at_once
        compiled = hasattr(layer.forward, "_torchdynamo_orig_callable")
        seen.append((layer.self_attn.config._attn_implementation, chunked, layer.gradient_checkpointing, compiled))
        return 1.0, 1.0

    monkeypatch.setattr(gpu_train, "train", train)
    settings = list(gpu_train.settings("blocks", liger=False).values())
    rows_of(model, {str(place): setting for place, setting in enumerate(settings)})
    fields = ("attention", "loss_in_chunks", "gradient_checkpointing", "compiled")
    assert seen[::2] == [tuple(getattr(setting, name) for name in fields) for setting in settings]
    seen.clear()
    train(model, None, None)
    assert seen == [("sdpa", True, False, False)], "everything is put back"


def test_a_row_that_fails_says_so_and_the_next_goes_on(model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.00 GiB.\nMore of it.")

    monkeypatch.setattr(gpu_train, "logits_at_once", full)
    at_once = Setting("sdpa", loss_in_chunks=False, compiled=False)
    flex = Setting("flex_attention", compiled=False)
    lengths = []
    with torch.compiler.set_stance("force_eager"):
        rows = rows_of(
            model,
            {"memory": at_once, "a CPU": flex, "plain": PLAIN},
            after_row=lambda result: lengths.append(len(result["rows"])),
        )
    assert lengths == [1, 2, 3], "told after every row"
    assert rows["memory"]["failed"] == "out of memory"
    assert rows["a CPU"]["failed"].startswith("NotImplementedError: FlexAttention does not support backward on CPU")
    assert rows["memory"].keys() == {"setting", "failed"}
    assert rows["plain"]["loss"] > 1


def test_sizes_share_the_time(model, monkeypatch):
    """A size that takes longer than its share leaves its last rows out, and the next one still gets its own."""
    clock = iter([0.0, 0.0, 0.0, 29.0, 31.0, 31.0, 31.0, 59.0, 61.0])
    monkeypatch.setattr(gpu_train, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(gpu_train, "measure", lambda *_, **__: {"loss": 1.0})
    monkeypatch.setattr(Packs, "draw", lambda *_: Packs([], gpu_train.np.ones(3)))
    results = {}
    rows = {"first": PLAIN, "second": PLAIN, "third": PLAIN}
    options = {"length": 256, "count": 1, "backend": "eager", "peak_teraflops": None}
    models = {"small": lambda: model, "large": lambda: model}
    gpu_train.measure_sizes(models, 1.0, results.update, settings=rows, **options)
    failed = {size: [row.get("failed") for row in result["rows"].values()] for size, result in results.items()}
    assert failed == {size: [None, None, "not run: no time was left"] for size in models}


def test_packs_of_one_length_hold_what_is_counted(model):
    packs = Packs.draw(model, 256, 2)
    tokens, pairs, targets = 0, 0, 0
    assert any("image_codes" in batch for batch in packs.batches)
    for batch in packs.batches:
        ids, documents = batch["input_ids"], batch["document_ids"]
        assert ids.shape == (1, 256)
        layout = build_layout(model.config, ids, batch.get("image_grid_hw"), document_ids=documents)
        tokens += int((documents >= 0).sum())
        pairs += attended_pairs(layout.block_ids, documents)
        targets += int((batch["shift_labels"] != IGNORE).sum())
    assert packs.work.tolist() == [tokens, pairs, targets]
    with pytest.raises(ValueError, match="documents of at most 40 positions fill .* packs, not 300"):
        Packs.draw(model, 40, 300)


def test_rates_by_hand():
    costs = CostModel("blocks", per_token=2e9, per_pair=1e6, per_target=5e8)
    figures = gpu_train.rates(gpu_train.np.array([1000, 50_000, 600]), 0.5, costs, peak_teraflops=20.0)
    assert figures == {"tokens_per_second": 2000.0, "teraflops_per_second": 4.7, "mfu": 0.235}
    assert gpu_train.rates(gpu_train.np.array([1, 1, 1]), 1.0, costs, None)["mfu"] is None


@pytest.mark.parametrize("size, parameters", [("1.5B", 1_543_714_304), ("3B", 3_085_938_688)])
def test_sizes_are_qwens(size, parameters):
    """Those that Qwen2.5's model cards name, 1.54 and 3.09 billion, head and embedding being one."""
    decoder = gpu_train.new_model(size, torch.device("meta")).model.language_model
    assert sum(parameter.numel() for parameter in decoder.parameters()) == parameters
