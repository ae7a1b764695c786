"""The Ray Data pipeline writes the local engine's shards. Needs ray, which no extra installs."""

import os

import pytest
from data_samples import SETTINGS, files_of

from transformers_nextflow.data import extract

ray = pytest.importorskip("ray")


def test_a_local_cluster_writes_the_same_shards(document_source, data_checkpoint, extracted, tmp_path, monkeypatch):
    environment = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment}, log_to_driver=False)
    try:
        extract(document_source, data_checkpoint, tmp_path / "out", SETTINGS, num_proc=2, engine="ray")
    finally:
        ray.shutdown()
    assert files_of(tmp_path / "out") == files_of(extracted)
