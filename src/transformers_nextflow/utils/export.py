"""A checkpoint in the layout of the Hub, to be loaded by anyone who has the package installed.

What lies in several places becomes one first: adapters and the model that they are for, a checkpoint and the vision
tokenizer that it refers to.
"""

import json
import math
import re
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError

from .files import output_folder, read_text
from .loading import base_of, load_config, load_generation_config, load_merged, load_processor, source_name
from .safetensors_folder import SafetensorsFolder

README, SCORES = "README.md", "scores.json"

PIPELINE = {
    "_class_name": "NextFlowPipeline",
    "decoder": [None, None],
    "model": ["diffusers_nextflow", "NextFlowForConditionalGeneration"],
    "processor": ["diffusers_nextflow", "NextFlowProcessor"],
}
"""For diffusers, which finds both parts in the folder itself."""
PIPELINE_CODE = "from diffusers_nextflow import NextFlowPipeline as Pipeline  # noqa: F401\n"

ENDPOINT_CODE = '''\
"""For Inference Endpoints of the Hub: {"inputs": prompt, "parameters": keywords of NextFlowPipeline}."""

from base64 import b64decode
from io import BytesIO

import torch
from diffusers_nextflow import NextFlowPipeline
from PIL import Image


class EndpointHandler:
    def __init__(self, path="", **kwargs):
        self.pipeline = NextFlowPipeline.from_pretrained(path)
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, data):
        """One PIL picture; an `image` among the parameters, to edit, comes in base64."""
        parameters = dict(data.get("parameters") or {})
        if "image" in parameters:  # never an address or a path, which would be the server's
            parameters["image"] = Image.open(BytesIO(b64decode(parameters["image"], validate=True)))
        return self.pipeline(data["inputs"], **parameters).images[0]
'''
PROMPT = "a red circle to the left of a blue square"

CARD = """\
---
{front_matter}
---
# {title}

A NextFlow ([arXiv 2601.02204](https://arxiv.org/abs/2601.02204)): one decoder that writes text by next token and
images by next scale. {parameters}

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
chat = [{{"role": "user", "content": "{prompt}"}}]
inputs = processor.apply_chat_template(chat, generation_mode="image")
output = model.generate(**inputs, generation_mode="image", seed=0, return_dict_in_generate=True)
pixels = model.decode_image_tokens(output.sequences, output.image_grid_hw)
processor.post_process_image(pixels)[0].save("picture.png")
```

The package `transformers-nextflow` must be installed; after `import transformers_nextflow` no `trust_remote_code` is
needed. Pictures have these sizes (height x width): {sizes}.

{about}"""

ABOUT_UNKNOWN = """\
## Licence, sources, scores

The folder that this was exported from says nothing of them.

## Limits

No evaluation came with these weights. Weights that were converted draw nothing before the new parts are trained.
"""

MERGED = """\
# {name}

## Licence and sources

The weights of {base} with the adapters of {adapters} added. The licences of both apply.
"""


def merge(adapters: str, output: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the model that adapters make of another, with its processor, into a new folder.

    Args:
        adapters: folder or Hub id.
        dtype: of the weights; by default as those of the model below are stored. Codebook, code embeddings and vision
            tokenizer stay float32.

    Raises:
        ValueError: if there are no adapters, or they do not fit the model that they name.
        FileExistsError: if there is something at `output`.
    """
    base = base_of(adapters)
    if base is None:
        raise ValueError(f"{adapters} holds no adapters: there is no adapter_config.json")
    with output_folder(output) as folder:
        write_whole(adapters, folder, dtype)
        names = {"name": Path(output).name, "base": source_name(base), "adapters": source_name(adapters)}
        (folder / README).write_text(MERGED.format(**names), encoding="utf-8")


def write_whole(name: str, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the whole model that a folder or Hub id holds a part of, with its processor, README.md and scores."""
    load_merged(name, dtype).save_pretrained(folder)
    load_processor(name).save_pretrained(folder)
    source = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=[README, SCORES]))
    for file in (README, SCORES):
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)


def export(folder: str | Path, to: str, push: bool = False) -> str:
    """Write a NextFlow checkpoint in the Hub's layout.

    Args:
        folder: what `save_pretrained` of model and processor wrote, or the id of such a repository on the Hub. Its
            README.md, if any, becomes part of the model card: licence and sources, scores, limits. Adapters are
            merged first, see [`merge`]; so is the vision tokenizer that a checkpoint refers to.
        to: a new folder, or with `push` the id of a repository, which is created if it is not there.

    Returns:
        The folder, or the URL of the commit.

    Raises:
        ValueError: if the folder's weights are damaged, or other than safetensors.
        FileExistsError: if the new folder exists.
        OSError: if the Hub does not answer, or refuses.
    """
    name = str(folder)
    is_adapter = base_of(name) is not None
    if load_config(name).vision_tokenizer is not None or is_adapter:
        with tempfile.TemporaryDirectory() as partial:
            whole = Path(partial, Path(name).resolve().name)
            (merge if is_adapter else write_whole)(name, whole)
            return export(whole, to, push)
    folder = Path(folder) if Path(folder).is_dir() else Path(snapshot_download(name))
    if push and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", to):
        raise ValueError(f'a repository reads "owner/name", got {to!r}')
    with tempfile.TemporaryDirectory() if push else output_folder(to) as partial:
        _write(folder, Path(partial), name=to)
        if not push:
            return to
        api = HfApi()
        try:
            api.create_repo(to, exist_ok=True)
            return str(api.upload_folder(repo_id=to, folder_path=partial, commit_message="Export").commit_url)
        except OSError:  # what the Hub answers
            raise
        except HTTPError as error:
            raise ConnectionError(f"the Hub does not answer: {error}") from error


def _write(folder: Path, output: Path, name: str) -> None:
    weights = SafetensorsFolder(folder)
    config, processor = load_config(str(folder)), load_processor(str(folder))
    for part in (config, processor, load_generation_config(folder, config)):
        part.save_pretrained(output)
    scores = [SCORES] if (folder / SCORES).is_file() else []
    for file in weights.files + scores:
        shutil.copyfile(folder / file, output / file)
    (output / "model_index.json").write_text(json.dumps(PIPELINE, indent=2) + "\n", encoding="utf-8")
    (output / "pipeline.py").write_text(PIPELINE_CODE, encoding="utf-8")
    (output / "handler.py").write_text(ENDPOINT_CODE, encoding="utf-8")
    (output / "requirements.txt").write_text("transformers-nextflow[diffusers]\n", encoding="utf-8")
    (output / README).write_text(model_card(folder, config, weights, name), encoding="utf-8")


def model_card(folder: Path, config, weights: SafetensorsFolder, name: str) -> str:
    """Usage under the name `name`, and below it what the folder's own README.md says.

    Of the README's front matter, every line is kept; `library_name`, `pipeline_tag`, `tags` and
    `widget` are added where absent.
    """
    readme = folder / README
    text = read_text(readme) if readme.is_file() else ""
    found = re.match(r"---\n(.*?)\n---(?:\n|$)", text, flags=re.DOTALL)
    lines = found[1].splitlines() if found else []
    given = {line.split(":")[0] for line in lines}
    defaults = {"library_name": "transformers", "pipeline_tag": "any-to-any", "tags": "[nextflow]"}
    defaults["widget"] = json.dumps([{"text": PROMPT}])  # JSON is YAML
    lines += [f"{key}: {value}" for key, value in defaults.items() if key not in given]
    body = text[found.end() :] if found else text
    body = re.sub(r"^# (.*)$", r"## \1, as its authors describe it", body.strip(), count=1, flags=re.MULTILINE)

    table = config.vq_config.schedule_table()
    sizes = ["{} x {}".format(*table.image_size(schedule)) for schedule in table.of_level()]
    count = sum(math.prod(shape) for shape in weights.shapes.values())
    return CARD.format(
        front_matter="\n".join(lines),
        title=Path(name).name,
        name=name,
        parameters=f"{count / 1e6:,.1f} M parameters, the vision tokenizer among them.",
        prompt=PROMPT,
        sizes=", ".join(sizes[:12]) + (f" and {len(sizes) - 12} more" if len(sizes) > 12 else ""),
        about=body + "\n" if body else ABOUT_UNKNOWN,
    )
