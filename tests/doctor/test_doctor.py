"""The doctor names planted faults first, is silent on the good checkpoint, and works on any other."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from faults import FAULTS, LISTED, planted
from own_pictures import build
from PIL import Image
from transformers import TrainerState, TrainingArguments

from transformers_nextflow import cli
from transformers_nextflow.doctor import DoctorCallback, examine, read_pictures, to_html, to_text
from transformers_nextflow.doctor.pictures import default_pictures
from transformers_nextflow.utils import loading

UNTRAINED = {"missing scale embedding"}  # zero before training


@pytest.fixture(scope="module")
def trained():
    """The repository's checkpoint, once it is trained for real."""
    if not (Path(loading.model_name(None)) / "scores.json").exists():
        pytest.skip("the repository's checkpoint comes of a short run, has no scores, and gives the doctor cause")
    return loading.load_model(None)


@pytest.fixture(scope="module")
def packs(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    build(folder, loading.model_name(None), 48, 1024)
    return folder / "packs"


@pytest.fixture(scope="module")
def good(trained, packs):
    return examine(*trained, packs=packs)


@pytest.mark.parametrize("fault", FAULTS[:LISTED], ids=lambda fault: fault.title)
def test_a_planted_fault_is_named_first(fault, trained, packs, tmp_path):
    pictures = default_pictures(trained[0].model.schedules, seed=0, each=4)
    with planted(fault, *trained, packs, tmp_path) as patient:
        diagnosis = examine(**patient, pictures=pictures, stop_at_first=True)
    assert diagnosis.first is not None and diagnosis.first.fault == fault.expected, to_text(diagnosis)
    assert all((diagnosis.first.measured, diagnosis.first.expected, diagnosis.first.cause, diagnosis.first.next_step))


def test_the_good_checkpoint_raises_no_alarm(good):
    assert good.first is None, to_text(good)
    assert len({finding.check for finding in good.findings}) == len(good.findings) > 20


def test_the_report_is_one_page_with_every_check_and_its_pictures(good):
    page = to_html(good, "title & more")
    assert "title &amp; more" in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert len(re.findall("<img ", page)) >= len(good.curves) + len(good.images) > 6
    assert "http" not in page
    for finding in good.findings:
        assert finding.check in page and f"{finding.part}: {finding.check}" in to_text(good)
    assert json.loads(json.dumps(good.to_dict()))["fault"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_checkpoint_can_be_examined(tiny_model, tiny_processor, dtype):
    """Random weights: formulas hold, and no judge is needed."""
    model = copy.deepcopy(tiny_model).to(dtype)
    diagnosis = examine(model, tiny_processor)
    errors = {finding.fault for finding in diagnosis.findings if finding.severity == "error"}
    assert errors == UNTRAINED, to_text(diagnosis)


def test_packs_of_a_checkpoints_own_pictures(tiny_model, tiny_processor, tiny_checkpoint, tmp_path):
    report = build(tmp_path, str(tiny_checkpoint), 10, 256)
    manifest = json.loads((tmp_path / "packs" / "manifest.json").read_text())
    assert manifest["statistics"]["documents"] == 10 and report
    findings = examine(tiny_model, tiny_processor, packs=tmp_path / "packs").findings
    assert {finding.fault for finding in findings if finding.part == "shards"} == {None}


def test_the_command_writes_figures_and_a_report(capsys, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Image.effect_noise((24, 24), 60 + number).convert("RGB").save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}\n")
    assert [picture.caption for picture in read_pictures(tmp_path)] == ["picture 0", "picture 1", "picture 2"]
    assert cli.main(["doctor", str(tiny_checkpoint), ".", "--json", "--report", "report"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["fault"] in UNTRAINED
    assert {"check", "measured", "expected", "severity", "cause", "next_step"} <= set(figures["findings"][0])
    assert "missing scale embedding" in (tmp_path / "report" / "report.txt").read_text()
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert Image.open(tmp_path / "report" / "report.png").width > 1000
    assert cli.main(["doctor", str(tiny_checkpoint), "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["doctor", str(tiny_checkpoint), "empty"]) == 2


def test_the_callback_leaves_training_as_it_was(tiny_model, tiny_processor, tmp_path):
    callback = DoctorCallback(tiny_processor, every=2)
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    model = copy.deepcopy(tiny_model).train()
    state = torch.random.get_rng_state()
    for step in (1, 2):
        now = TrainerState(global_step=step, is_world_process_zero=True)
        callback.on_step_end(arguments, now, control=None, model=model)
    assert list(callback.diagnoses) == [2]
    assert (tmp_path / "doctor" / "step-2" / "report.html").is_file()
    assert model.training and all(module.training for module in model.model.language_model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="every must be at least 1"):
        DoctorCallback(tiny_processor, every=0)
