"""transformers' own common tests on NextFlow's classes, see `tests/common/run.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common.controls import CONTROLS, IMPOSSIBLE, NEAREST, skipped
from tests.common.library import HOW, is_available
from tests.common.run import PIPELINES, RESULTS

recorded = pytest.mark.skipif(not RESULTS.exists(), reason="no run of the common tests is recorded yet")


@recorded
def test_the_recorded_run_has_no_failure_and_a_reason_for_each_skip():
    results = json.loads(RESULTS.read_text())
    assert results["failed"] == [] and results["passed"] > 200
    assert sum(map(len, results["reasons"].values())) == results["skipped"]
    assert all(reason.strip() for reason in results["reasons"])


@recorded
def test_each_skip_is_one_of_the_library_or_listed_as_impossible():
    results, controls = json.loads(RESULTS.read_text()), json.loads(CONTROLS.read_text())
    assert controls["transformers"] == results["transformers"] and controls["device"] == results["device"]
    too, nowhere = set(), set()
    for group in controls["skipped_by"]:
        (too if group["classes"] else nowhere).update(group["tests"])
        assert all(set(group["classes"]) <= set(NEAREST[name.split("::")[0]]) for name in group["tests"])
        assert all(reason.strip() for reason in group["classes"].values())
    models = {name for name in skipped(results) if name.split("::")[0] in NEAREST}
    assert too | nowhere == models  # what was compared is what is skipped
    assert nowhere == set(IMPOSSIBLE)  # nothing unlisted, nothing stale


@recorded
def test_pipelines_of_our_tasks_run_in_one_environment_or_the_other():
    with_torchvision = json.loads(PIPELINES.read_text())
    assert with_torchvision["failed"] == [] and "torchvision" in with_torchvision["packages"]
    ours = {f"NextFlowPipelineTest::test_pipeline_{task}" for task in ("any_to_any", "image_text_to_text")}
    ours |= {f"{name}_fp16" for name in ours}
    assert not ours & set(skipped(with_torchvision)) and with_torchvision["passed"] >= len(ours)
    without = ours & set(skipped(json.loads(RESULTS.read_text())))
    assert without == {name for name in ours if "any_to_any" in name}


@recorded
@pytest.mark.skipif(not is_available(), reason=HOW)
def test_a_fresh_run_is_as_recorded():
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-m", "tests.common.run"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
