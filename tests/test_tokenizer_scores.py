"""Scores of a vision tokenizer over a folder of pictures: those of its reconstructions, asked for one by one."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_nextflow import evaluate
from transformers_nextflow.evaluate import distance_of, reconstructions

SIZES = [(24, 24), (32, 16), (24, 24), (40, 40), (32, 16), (24, 24)]  # width, height


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture
def folder(pictures, tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_psnr_and_ssim_are_means_over_the_pictures(console, folder, pictures):
    status, out, _ = console("evaluate", "psnr", folder, "--batch-size", 2, "--json")
    figures = json.loads(out)
    assert status == 0 and figures["pictures"] == len(pictures)
    each, pairs = [], []
    for path in sorted(folder.glob("*.png")):
        _, out, _ = console("reconstruct", path, "--output", "pair.png", "--json")
        each.append(json.loads(out)["psnr"])
        pairs.append(np.split(np.asarray(Image.open("pair.png")), 2, axis=1))
    assert figures["psnr"] == pytest.approx(np.mean(each))
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    window = {"gaussian_weights": True, "use_sample_covariance": False, "channel_axis": 2}
    expected = np.mean([metrics.structural_similarity(*pair, **window) for pair in pairs])
    assert figures["ssim"] == pytest.approx(expected, abs=1e-6)


def test_pictures_that_come_back_equal_have_no_psnr(console, folder, tiny_model, tiny_processor, tmp_path):
    """Of a tokenizer that rebuilds everything grey: JSON knows no infinity."""
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in model.model.vq_model.pixel_decoder.conv_out.parameters():
            parameter.zero_()
    for part in (model, tiny_processor):
        part.save_pretrained(tmp_path / "grey")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (24, 24), (127, 127, 127)).save(tmp_path / "more" / "grey.png")

    def scores(*words) -> dict:
        return json.loads(console(*words, "--json", model=tmp_path / "grey")[1], parse_constant=pytest.fail)

    assert scores("evaluate", "psnr", "more") == {"pictures": 1, "equal": 1, "psnr": None, "ssim": 1.0}
    assert "PSNR none, all are equal" in console("evaluate", "psnr", "more", model=tmp_path / "grey")[1]
    assert scores("reconstruct", "more/grey.png")["psnr"] is None
    Image.new("RGB", (24, 24), (127, 127, 137)).save(tmp_path / "more" / "other.png")
    both = scores("evaluate", "psnr", "more")
    assert (both["pictures"], both["equal"]) == (2, 1)
    assert both["psnr"] == pytest.approx(10 * np.log10(255**2 / (10**2 / 3)))


def test_pictures_of_one_size_are_rebuilt_together(tiny_model, tiny_processor, pictures):
    alone = list(reconstructions(tiny_model.model.vq_model, tiny_processor.image_processor, pictures))
    together = list(reconstructions(tiny_model.model.vq_model, tiny_processor.image_processor, pictures, batch_size=3))
    assert [tuple(originals.shape) for originals, _ in together] == [(3, 3, 24, 24), (2, 3, 16, 32), (1, 3, 24, 24)]
    of_square = [0, 2, 3, 5]
    for part in (0, 1):
        order = [together[0][part], together[2][part]]
        assert torch.equal(torch.cat(order), torch.cat([alone[number][part] for number in of_square]))
        assert torch.equal(together[1][part], torch.cat([alone[number][part] for number in (1, 4)]))
    assert torch.equal(alone[0][0][0], torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1))


class MeanColours(torch.nn.Module):
    """Features of pictures of any size."""

    num_features = 3

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.double().mean((2, 3))


def test_the_distance_is_frechets(tiny_model, tiny_processor, pictures):
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    rebuild = (tiny_model.model.vq_model, tiny_processor.image_processor)
    count, found = distance_of(
        reconstructions(*rebuild, pictures, batch_size=2), fid.FrechetInceptionDistance(MeanColours())
    )
    pairs = list(reconstructions(*rebuild, pictures))
    means, covariances = [], []
    for part in (0, 1):
        features = torch.cat([MeanColours()(pair[part]) for pair in pairs]).numpy()
        means.append(features.mean(0))
        covariances.append(np.cov(features, rowvar=False))
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert count == len(pictures) and found == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="two pictures or more, got 1"):
        distance_of(reconstructions(*rebuild, pictures[:1]), fid.FrechetInceptionDistance(MeanColours()))


class Brightness:
    """Takes the place of torchmetrics' distance: how much brighter the real pictures are."""

    def __init__(self):
        self.pictures = {True: [], False: []}

    def to(self, device: torch.device) -> "Brightness":
        return self

    def update(self, pictures: torch.Tensor, real: bool) -> None:
        self.pictures[real] += list(pictures)

    def compute(self) -> torch.Tensor:
        mean = lambda pictures: torch.stack([each.double().mean() for each in pictures]).mean()  # noqa: E731
        return mean(self.pictures[True]) - mean(self.pictures[False])


def test_all_pictures_and_their_reconstructions_are_measured(
    console, folder, tiny_model, tiny_processor, pictures, monkeypatch
):
    pairs = list(reconstructions(tiny_model.model.vq_model, tiny_processor.image_processor, pictures))
    real, rebuilt = (np.mean([pair[part].double().mean() for pair in pairs]) for part in (0, 1))
    count, found = distance_of(pairs, Brightness())
    assert count == len(pictures) and found == pytest.approx(real - rebuilt) and found != 0
    monkeypatch.setattr(evaluate, "inception_distance", lambda weights: Brightness())
    assert f"{count} pictures  rFID {found:.3f}" in console("evaluate", "rfid", folder)[1]
    assert distance_of(pairs[:2], Brightness())[0] == 2
    with pytest.raises(ValueError, match="two pictures or more, got 1"):
        distance_of(pairs[:1], Brightness())


def test_inception_as_torch_fidelity_has_it(console, folder, tmp_path):
    """The network itself, its weights at random."""
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )

    class Untrained(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    torch.save({}, tmp_path / "none.pth")
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048"], str(tmp_path / "none.pth"))
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    status, out, err = console("evaluate", "rfid", folder, "--weights", tmp_path / "inception.pth", "--json")
    assert status == 0, err
    figures = json.loads(out)
    assert figures["pictures"] == len(SIZES) and figures["rfid"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("rfid",), "rfid needs --weights, the file weights-inception-2015-12-05-6726825d.pth"),
        (("rfid", "--weights", "none.pth"), "there is no file none.pth"),
        (("psnr", "--batch-size", "0"), "--batch-size"),
        (("psnr", "--level", "512"), "512"),
    ],
)
def test_what_is_missing_is_said(console, folder, arguments, message):
    command, *options = arguments
    status, _, err = console("evaluate", command, folder, *options)
    assert status == 2 and message in err


def test_odd_folders(console, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in console("evaluate", "psnr", "empty")[2]
    (tmp_path / "empty" / "folder.png").mkdir()
    assert "holds no pictures" in console("evaluate", "psnr", "empty")[2]
    assert "there is no folder nowhere" in console("evaluate", "psnr", "nowhere")[2]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    status, _, err = console("evaluate", "psnr", "bad")
    assert status == 2 and "a.png" in err


def test_files_that_pillow_only_writes_are_no_pictures(console, folder, pictures):
    pictures[0].save(folder / "0.pdf")
    status, out, _ = console("evaluate", "psnr", folder, "--json", "--batch-size", 1)
    assert status == 0 and json.loads(out)["pictures"] == len(pictures)


def test_weights_that_are_something_else(console, folder, tmp_path):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    torch.save(Path("code"), tmp_path / "odd.pth")
    status, _, err = console("evaluate", "rfid", folder, "--weights", "odd.pth")
    assert status == 2 and "FID's InceptionV3 in odd.pth cannot be loaded" in err
