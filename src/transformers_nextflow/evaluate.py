"""`transformers-nextflow evaluate`: the loss of packs, and how well a vision tokenizer rebuilds a folder of pictures.

These are brought to the sizes of the scale schedules, as always, and measured in 8 bits, as files hold them.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import PrinterCallback
from typer import Argument, Option, Typer

from .image_processing_nextflow import NextFlowImageProcessor, open_picture
from .modeling_nextflow_vq import NextFlowVQModel
from .sampling import integer
from .training import metrics
from .utils.commands import Dtype, Json, Level, Model, command, print_figures
from .utils.lazy import needing_extra
from .utils.loading import load_model, load_vision_tokenizer, naming

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

app = Typer(no_args_is_help=True)

Pictures = Annotated[str, Argument(metavar="PICTURES", help="Folder of pictures.")]
BatchSize = Annotated[int, Option(metavar="N", help="Pictures of one size at once.")]
Rebuilt = Iterator[tuple[torch.Tensor, torch.Tensor]]

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""FID's own InceptionV3, as a release of torch-fidelity has it."""


@command(app)
def loss(
    packs: Annotated[str, Argument(metavar="PACKS", help="Folder or Hub dataset of packs.")],
    model: Model = None,
    batch_size: Annotated[int, Option(metavar="N", help="Packs of a forward.")] = 1,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Of packs: over all targets, of text, of pictures, and of each scale."""
    with needing_extra("train", "evaluate loss"):
        from .data import PackCollator, PackedDataset
        from .training import NextFlowTrainer, NextFlowTrainingArguments

    loaded, processor = load_model(model, dtype and getattr(torch, dtype))
    dataset = PackedDataset(packs, loaded, processor)
    with tempfile.TemporaryDirectory() as folder:
        arguments = NextFlowTrainingArguments(folder, per_device_eval_batch_size=batch_size, report_to="none")
        trainer = NextFlowTrainer(loaded, arguments, PackCollator(dataset), eval_dataset=dataset)
        trainer.remove_callback(PrinterCallback)  # which is there where transformers shows no bars
        measured = trainer.evaluate()
    losses = {name: value for name, value in measured.items() if name.startswith("eval_loss")}
    print_figures({name.removeprefix("eval_"): value for name, value in losses.items()}, json)


@command(app)
def psnr(
    pictures: Pictures, model: Model = None, level: Level = None, batch_size: BatchSize = 16, json: Json = False
) -> None:
    """PSNR in dB and SSIM of reconstructions, means over the pictures; those that come back equal have no PSNR."""
    pairs = reconstructions_of(pictures, model, level, batch_size)
    psnrs, ssims = torch.cat([scores(*pair) for pair in pairs], dim=1)
    psnrs = psnrs[psnrs.isfinite()]
    count, mean_ssim, mean_psnr = len(ssims), ssims.mean().item(), psnrs.mean().item() if len(psnrs) else None
    figures = {"pictures": count, "equal": count - len(psnrs), "psnr": mean_psnr, "ssim": mean_ssim}
    shown = "none, all are equal" if mean_psnr is None else f"{mean_psnr:.2f} dB"
    print_figures(figures, json, f"{count} pictures  PSNR {shown}  SSIM {mean_ssim:.4f}")


@command(app)
def rfid(
    pictures: Pictures,
    weights: Annotated[str | None, Option(metavar="PTH", help=f"InceptionV3: {WEIGHTS} of torch-fidelity.")] = None,
    model: Model = None,
    level: Level = None,
    batch_size: BatchSize = 16,
    json: Json = False,
) -> None:
    """Frechet inception distance between pictures and their reconstructions."""
    distance = inception_distance(weights)
    count, value = distance_of(reconstructions_of(pictures, model, level, batch_size), distance)
    print_figures({"pictures": count, "rfid": value}, json, f"{count} pictures  rFID {value:.3f}")


def inception_distance(weights: str | None) -> "FrechetInceptionDistance":
    """torchmetrics' FID.

    Raises:
        ValueError: without weights, or the packages, or if the file holds anything but this network's tensors.
    """
    if weights is None:
        raise ValueError(f"rfid needs --weights, the file {WEIGHTS} from the releases of torch-fidelity")
    if not Path(weights).is_file():
        raise FileNotFoundError(f"there is no file {weights}")
    with naming(f"FID's InceptionV3 in {weights}"), needing_extra("evaluate", "rfid"):
        from torchmetrics.image.fid import FrechetInceptionDistance

        torch.load(weights, map_location="meta", weights_only=True)  # torch-fidelity would unpickle anything
        return FrechetInceptionDistance(feature_extractor_weights_path=weights)


def distance_of(pairs: Rebuilt, distance: "FrechetInceptionDistance") -> tuple[int, float]:
    """How many pictures there are, and the distance between the two of each pair.

    Raises:
        ValueError: for fewer than two pictures.
    """
    count = 0
    for originals, rebuilt in pairs:
        distance = distance.to(originals.device)
        distance.update(originals, real=True)
        distance.update(rebuilt, real=False)
        count += len(originals)
    if count < 2:
        raise ValueError(f"rfid needs two pictures or more, got {count}")
    return count, float(distance.compute())


def scores(originals: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 pictures -> (2, B) float64, PSNR in dB and SSIM."""
    signed = [pictures.double() / 127.5 - 1 for pictures in (rebuilt, originals)]
    return torch.stack([metrics.psnr(*signed), metrics.ssim(*signed)])


def reconstructions_of(folder: str, model: str | None, level: str | None, batch_size: int) -> Rebuilt:
    """Those of all pictures of a folder.

    Raises:
        ValueError: if there is none.
    """
    integer("--batch-size", batch_size, 1)
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"there is no folder {folder}")
    files = filter(Path.is_file, Path(folder).iterdir())
    formats = Image.registered_extensions()
    paths = sorted(path for path in files if formats.get(path.suffix.lower()) in Image.OPEN)
    if not paths:
        raise ValueError(f"{folder} holds no pictures")
    vq_model, image_processor = load_vision_tokenizer(model)
    opened = map(open_picture, tqdm(paths, unit="picture", disable=None, leave=False))
    return reconstructions(vq_model, image_processor, opened, level, batch_size)


def reconstructions(
    vq_model: NextFlowVQModel,
    image_processor: NextFlowImageProcessor,
    pictures: Iterable[Image.Image],
    level: str | None = None,
    batch_size: int = 1,
) -> Rebuilt:
    """Pictures, and what their codes keep of them: each (B, 3, H, W) uint8, of one size, on the model's device."""
    waiting: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)

    def rebuild(grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.cat(waiting.pop(grid)).to(vq_model.device)
        with torch.no_grad():
            decoded = vq_model.decode(vq_model.encode(pixels), grid)
        both = (np.stack(list(map(np.asarray, image_processor.postprocess(each)))) for each in (pixels, decoded))
        return tuple(torch.from_numpy(each).permute(0, 3, 1, 2).to(vq_model.device) for each in both)

    level = image_processor.level if level is None else level
    for picture in pictures:
        grid, pixels = image_processor.whole(image_processor(picture, level=level, return_tensors="pt"))
        waiting[grid].append(pixels)
        if len(waiting[grid]) == batch_size:
            yield rebuild(grid)
    yield from map(rebuild, list(waiting))
