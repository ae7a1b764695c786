"""The examples that keep part of a picture's codes."""

import numpy as np
import pytest
import torch
from PIL import Image

from examples.forks import inpaint, locked_edit, read_codes, variations


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))


@pytest.fixture
def drawn(tiny_model, monkeypatch) -> list:
    """The codes of every picture that is decoded."""
    seen, decode = [], tiny_model.decode_image_tokens
    monkeypatch.setattr(tiny_model, "decode_image_tokens", lambda ids, grid: seen.append(ids) or decode(ids, grid))
    return seen


def test_variations_share_their_first_scales(tiny_model, tiny_processor, picture, drawn):
    codes, grid = read_codes(tiny_model, tiny_processor, picture)
    (whole,) = tiny_processor.post_process_image(tiny_model.model.vq_model.decode(codes, grid))
    assert all(
        each.tobytes() == whole.tobytes() for each in variations(tiny_model, tiny_processor, picture, "a", 3, 2)
    )
    assert len(variations(tiny_model, tiny_processor, picture, "a", 2)) == 4
    kept = drawn[-1][:, :5] - tiny_model.config.text_vocab_size
    assert torch.equal(kept, codes[:, :5].expand(4, -1)) and len(drawn[-1].unique(dim=0)) == 4


def test_inpainting_changes_only_cells_inside_the_box(tiny_model, tiny_processor, picture, drawn):
    codes, _ = read_codes(tiny_model, tiny_processor, picture)
    inpaint(tiny_model, tiny_processor, picture, "a", (8, 8, 24, 24))
    (changed,) = (drawn[-1][0] - tiny_model.config.text_vocab_size != codes[0]).nonzero(as_tuple=True)
    free = {4, *(5 + 3 * row + column for row in (1, 2) for column in (1, 2))}  # of 1x1, 2x2 and 3x3
    assert changed.numel() > 1 and set(changed.tolist()) <= free


def test_a_locked_edit_keeps_the_first_scales(tiny_model, tiny_processor, picture, drawn):
    codes, _ = read_codes(tiny_model, tiny_processor, picture)
    locked_edit(tiny_model, tiny_processor, picture, "make it blue", 2)
    same = drawn[-1][0] - tiny_model.config.text_vocab_size == codes[0]
    assert same[:5].all() and not same.all()


@pytest.mark.parametrize("box", [(100, 100, 200, 200), (-8, 0, 8, 8), (8, 8, 8, 24)])
def test_a_box_outside_of_the_picture_is_refused(tiny_model, tiny_processor, picture, box):
    with pytest.raises(ValueError, match="the box must lie within the model's picture of 24x24 pixels"):
        inpaint(tiny_model, tiny_processor, picture, "a", box)
