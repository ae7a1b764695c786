"""The repository's checkpoint, and a tiny model with no weight as it begins."""

import copy

import pytest
import torch

from transformers_nextflow.utils import loading


@pytest.fixture(scope="session")
def trained():
    """Model and processor."""
    return loading.load_model(None)


@pytest.fixture(scope="session")
def random_model(tiny_model):
    model, generator = copy.deepcopy(tiny_model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "vq_model" not in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model
