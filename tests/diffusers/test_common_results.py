"""What diffusers' own tests said of the decoders when they were last run: nothing failed, and every skip is accounted
for."""

import json

import pytest

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")

from tests.diffusers.common.run import RESULTS, faults
from tests.diffusers.tiny_decoders import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_results(family):
    results = json.loads(RESULTS.read_text())[family]
    assert results["passed"] > 40 and faults(results) == []


def test_faults_are_failures_and_skips_of_ones_own():
    results = json.loads(RESULTS.read_text())["unet"]
    name = results["reasons"]["test requires a hardware accelerator"][0]
    results["stock"]["skipped"].remove(name.replace("TestOurs", "TestStock"))
    results["failed"] = ["TestOursUnet::test_output"]
    assert faults(results) == [
        "failed: TestOursUnet::test_output",
        f"skipped: {name}: test requires a hardware accelerator",
    ]
