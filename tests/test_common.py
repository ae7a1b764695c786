"""transformers' own common tests on NextFlow's classes, see `tests/common/run.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common.library import HOW, is_available
from tests.common.run import RESULTS

recorded = pytest.mark.skipif(not RESULTS.exists(), reason="no run of the common tests is recorded yet")


@recorded
def test_the_recorded_run_has_no_failure_and_a_reason_for_each_skip():
    results = json.loads(RESULTS.read_text())
    assert results["failed"] == [] and results["passed"] > 200
    assert sum(map(len, results["reasons"].values())) == results["skipped"]
    assert all(reason.strip() for reason in results["reasons"])


@recorded
@pytest.mark.skipif(not is_available(), reason=HOW)
def test_a_fresh_run_is_as_recorded():
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-m", "tests.common.run"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
