"""ComfyUI's nodes, called as ComfyUI calls them: by the names in their mappings, with the types they declare."""

import numpy as np
import pytest
import torch
from PIL import Image

import comfyui_nextflow
from comfyui_nextflow import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS


def run(name: str, **given):
    """A node's outputs; what it does not declare is refused, what is not given has its default."""
    node = NODE_CLASS_MAPPINGS[name]
    types = node.INPUT_TYPES()
    declared = types["required"] | types.get("optional", {})
    assert given.keys() <= declared.keys()
    defaults = {
        key: rest[0]["default"] for key, (_, *rest) in types["required"].items() if rest and "default" in rest[0]
    }
    outputs = getattr(node(), node.FUNCTION)(**defaults | given)
    assert len(outputs) == len(node.RETURN_TYPES)
    return outputs


def drawn(model, processor, content, **settings) -> torch.Tensor:
    """(B, H, W, 3) in [0, 1], by the model itself."""
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], generation_mode="image")
    output = model.generate(**inputs, generation_mode="image", return_dict_in_generate=True, **settings)
    pixels = model.decode_image_tokens(output.sequences, output.image_grid_hw)
    return ((pixels + 1) / 2).movedim(1, -1)


def test_every_node_has_a_name():
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()


def test_draws(tiny_checkpoint, tiny_model, tiny_processor):
    (nextflow,) = run("LoadNextFlow", model=str(tiny_checkpoint))
    (images,) = run("NextFlowDraw", nextflow=nextflow, text="a", seed=3, batch_size=2, guidance="1, 2, 2.5")
    expected = drawn(tiny_model, tiny_processor, "a", seed=3, num_images_per_prompt=2, guidance_scale=[1, 2, 2.5])
    assert images.dtype == torch.float32 and torch.equal(images, expected)
    (wide,) = run("NextFlowDraw", nextflow=nextflow, text="a", aspect_ratio="2:1")
    assert torch.equal(wide, drawn(tiny_model, tiny_processor, "a", seed=0, aspect_ratio="2:1"))


def test_edits_and_describes(tiny_model, tiny_processor):
    nextflow = tiny_model, tiny_processor
    (images,) = run("NextFlowDraw", nextflow=nextflow, text="a", batch_size=2, aspect_ratio="2:1")
    pictures = tiny_processor.post_process_image(images.movedim(-1, 1) * 2 - 1)
    content = [*({"type": "image", "image": each} for each in pictures), {"type": "text", "text": "make it red"}]
    (edited,) = run("NextFlowDraw", nextflow=nextflow, text="make it red", image=images, guidance="2")
    assert torch.equal(edited, drawn(tiny_model, tiny_processor, content, seed=0, guidance_scale=2.0))
    (text,) = run("NextFlowDescribe", nextflow=nextflow, image=images[:1], max_new_tokens=5)
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "describe the picture"}]
    inputs = tiny_processor.apply_chat_template([{"role": "user", "content": content}])
    ids = tiny_model.generate(**inputs, max_new_tokens=5, do_sample=False)
    (expected,) = tiny_processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == expected.strip()


def test_grey_pictures_and_those_with_an_alpha_are_read_as_files_are(tiny_model, tiny_processor):
    rgba = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    for pixels in (rgba, rgba[..., :1]):
        picture = Image.fromarray(pixels if pixels.shape[-1] == 4 else pixels[..., 0])
        image = torch.from_numpy(pixels).float()[None] / 255
        (edited,) = run("NextFlowDraw", nextflow=(tiny_model, tiny_processor), text="make it red", image=image)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "make it red"}]
        assert torch.equal(edited, drawn(tiny_model, tiny_processor, content, seed=0))
    with pytest.raises(ValueError, match="the image is not finite"):
        run("NextFlowDescribe", nextflow=(tiny_model, tiny_processor), image=image * float("nan"))


@pytest.mark.parametrize("settings", [{}, {"aspect_ratio": "2:1"}])
def test_shows_each_scale(tiny_model, tiny_processor, monkeypatch, settings):
    """To a stand-in for ComfyUI's progress bar, which is not installed with it."""
    shown = []

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total, preview):
            assert total == self.total
            shown.append((value, preview))

    monkeypatch.setattr(comfyui_nextflow, "ProgressBar", ProgressBar)
    (images,) = run("NextFlowDraw", nextflow=(tiny_model, tiny_processor), text="a", batch_size=2, **settings)
    assert [value for value, _ in shown] == [1, 2, 3]
    kind, picture, _ = shown[-1][1]
    (first, _) = tiny_processor.post_process_image(images.movedim(-1, 1) * 2 - 1)
    assert kind == "PNG" and picture.tobytes() == first.tobytes()


def test_guidance_that_is_no_list_is_refused(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match='guidance must read "3" or "1, 2.5, 3", got \'high\''):
        run("NextFlowDraw", nextflow=(tiny_model, tiny_processor), text="a", guidance="high")
