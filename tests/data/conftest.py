"""A tiny checkpoint whose pictures get different codes, and documents of every kind extracted with it."""

import copy
from pathlib import Path

import datasets
import pytest
import torch
from data_samples import SETTINGS, documents
from tiny_models import enlarge_

from transformers_nextflow.data import ComputeBudget, CostModel, PackedDataset, Source, extract, pack

datasets.disable_progress_bars()


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """`datasets` copies what it reads into a cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def data_model(tiny_model):
    """Weights are large enough to matter."""
    torch.manual_seed(1)
    return enlarge_(copy.deepcopy(tiny_model)).eval()


@pytest.fixture(scope="session")
def data_checkpoint(data_model, tiny_processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data-checkpoint")
    data_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def document_source(tmp_path_factory) -> Source:
    path = tmp_path_factory.mktemp("source") / "documents.parquet"
    datasets.Dataset.from_list([document.to_row() for document in documents()]).to_parquet(str(path))
    return Source(str(path))


@pytest.fixture(scope="session")
def extracted(document_source, data_checkpoint, tmp_path_factory) -> Path:
    """Every kind of document, extracted with two self-corrected variants."""
    folder = tmp_path_factory.mktemp("extracted") / "documents"
    extract(document_source, data_checkpoint, folder, SETTINGS)
    return folder


@pytest.fixture(scope="session")
def packs(extracted, tmp_path_factory) -> Path:
    """Eight of them."""
    folder = tmp_path_factory.mktemp("trainer") / "packs"
    pack([extracted], folder, ComputeBudget(300), CostModel("blocks", 1.0, 3e-4, 0.5), multiple_of=8)
    return folder


@pytest.fixture
def dataset(packs, data_model, tiny_processor) -> PackedDataset:
    return PackedDataset(packs, data_model, tiny_processor)
