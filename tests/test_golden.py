"""Checkpoints, adapters and packs of earlier days do what they did (`golden/write.py`)."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import BOI, relative

from tests.golden.write import CONFIGS, FOLDER, adapted, load, packs_of, results


@pytest.fixture(scope="module", params=CONFIGS)
def then_and_now(request) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model, inputs, then = load(request.param)
    now = results(model, inputs)
    for each in (then, now):
        for name in ("chats", "pixels"):
            each[f"{name}/logits"] = real(each[f"{name}/logits"], inputs)
    return then, now


def real(logits: torch.Tensor, inputs: dict[str, dict]) -> torch.Tensor:
    """Those of the last positions that are no padding, which sees what it likes."""
    return logits[inputs["chats"]["attention_mask"][:, -logits.shape[1] :].bool()]


def test_codes_and_words_are_the_same(then_and_now):
    then, now = then_and_now
    assert now.keys() == then.keys()
    integers = [name for name, tensor in then.items() if not tensor.is_floating_point()]
    assert len(integers) >= 13 + 10
    assert [name for name in integers if not torch.equal(now[name], then[name])] == []


def test_logits_pictures_losses_and_gradients_are_the_same(then_and_now):
    then, now = then_and_now
    numbers = [name for name, tensor in then.items() if tensor.is_floating_point()]
    far = {name: error for name in numbers if (error := relative(now[name], then[name])) > 1e-4}
    assert len(numbers) >= 12 + 3 and not far


def test_they_tell_codes_apart(then_and_now):
    """What is compared varies: other controls draw other codes, pixels have many codes, answers hold pictures."""
    then, _ = then_and_now
    drawn = {name: tensor for name, tensor in then.items() if name.startswith("3x3/") and name.endswith("/codes")}
    assert len({tuple(codes.flatten().tolist()) for codes in drawn.values()}) == len(drawn) == 10
    assert all(len(codes.unique()) > 6 for codes in drawn.values())
    assert len(then["encoded/codes"].unique()) > 8
    for turn in ("first turn", "second turn"):
        assert (then[f"{turn}/sequences"] == BOI).sum() > 6


def test_an_adapter_is_opened():
    model, inputs, then = load("two_levels")
    expected = load_file(FOLDER / "adapter" / "results.safetensors")["logits"]
    assert relative(real(adapted(model, inputs), inputs), real(expected, inputs)) < 1e-4
    assert relative(real(then["chats/logits"], inputs), real(expected, inputs)) > 1e-2


def test_packs_are_refused_by_their_version():
    """They name the vision tokenizer by another hash than today's."""
    model, *_ = load("two_levels")
    with pytest.raises(ValueError, match="has format version 1, not 2: extract and pack anew"):
        packs_of(model)
