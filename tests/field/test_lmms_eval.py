"""lmms-eval's own command over local data: its scores are those of asking the model itself."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.processing_nextflow import user_message

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
if not entry_points(group="lmms_eval.models", name="nextflow"):
    pytest.skip("the package's entry points are not installed: pip install -e .", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SIZES = [(24, 24), (32, 16), (16, 32), (24, 24), (24, 24)]
QUESTIONS = ["a red circle", "What is it?", "a star", "How many?", "Describe the picture."]
NUM_TOKENS = 5

FUNCTIONS = """
import json
from PIL import Image

def visual(doc):
    return [doc["picture"].convert("RGB")]

def question(doc):
    return doc["question"]

def equal(doc, results):
    (path,) = json.loads(results[0])["images"]
    return {"equal": Image.open(path).tobytes() == Image.open(doc["answer"]).tobytes()}

def mean(values):
    return sum(values) / len(values)
"""
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: !function functions.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false, top_p: 1.0, until: []}}
"""
SEES = "doc_to_visual: !function functions.visual\n"
EXACT = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
DRAWS = """process_results: !function functions.equal
metric_list: [{metric: equal, aggregation: !function functions.mean, higher_is_better: true}]
"""
FEATURES = Features({"picture": Image(), "question": Value("string"), "answer": Value("string")})


@pytest.fixture(scope="module")
def pictures() -> list[Pillow.Image]:
    rng = np.random.default_rng(0)
    return [Pillow.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def tasks(tiny_checkpoint, pictures, tmp_path_factory) -> Path:
    """A folder of tasks, whose targets are the model's own answers but for the last one or two."""
    model, processor = (
        each.from_pretrained(tiny_checkpoint) for each in (NextFlowForConditionalGeneration, NextFlowProcessor)
    )

    def write(chat: list[dict]) -> str:
        inputs = processor.apply_chat_template(chat)
        ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def draw(chat: list[dict], seed: int) -> Pillow.Image:
        inputs = processor.apply_chat_template(chat, generation_mode="image")
        codes = model.generate(**inputs, generation_mode="image", seed=seed)
        return processor.post_process_image(model.decode_image_tokens(codes))[0]

    seeing = [[user_message(question, [picture])] for question, picture in zip(QUESTIONS, pictures)]
    reading = [[user_message(question)] for question in QUESTIONS]
    folder = tmp_path_factory.mktemp("tasks")
    for number, chat in enumerate(seeing):
        answer = draw(chat, 7 + number) if number != 1 else pictures[1]
        answer.save(folder / f"{number}.png")
    answers = {
        "seen": [*map(write, seeing[:3]), "wrong", "wrong"],
        "read": [*map(write, reading[:4]), "wrong"],
        "drawn": [str(folder / f"{number}.png") for number in range(5)],
    }
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, further in (("seen", SEES + EXACT), ("read", EXACT), ("drawn", SEES + DRAWS)):
        data = folder / f"{name}.parquet"
        rows = [dict(zip(FEATURES, row)) for row in zip(pictures, QUESTIONS, answers[name])]
        Dataset.from_list(rows, features=FEATURES).to_parquet(data)
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, tokens=NUM_TOKENS) + further)
    return folder


def scores(tasks: Path, names: str, folder: Path, **model_args) -> dict:
    """What the command writes of each task."""
    arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
    command = [sys.executable, "-m", "lmms_eval", "--model", "nextflow", "--model_args", arguments, "--tasks", names]
    options = ["--include_path", str(tasks), "--batch_size", "2", "--device", "cpu", "--output_path", str(folder)]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run([*command, *options], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = folder.rglob("*_results.json")
    return json.loads(report.read_text())["results"]


def test_answers(tiny_checkpoint, tasks, tmp_path):
    found = scores(tasks, "seen,read", tmp_path, pretrained=tiny_checkpoint)
    assert {name: result["exact_match,none"] for name, result in found.items()} == {"seen": 3 / 5, "read": 4 / 5}


def test_pictures(tiny_checkpoint, tasks, tmp_path):
    given = {"mode": "image", "output_dir": tmp_path / "pictures", "seed": 7}
    found = scores(tasks, "drawn", tmp_path, pretrained=tiny_checkpoint, **given)
    assert found["drawn"]["equal,none"] == 4 / 5
    names = [f"drawn-test-{number}.png" for number in range(5)]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names


def test_answers_end_at_their_stops():
    from transformers_nextflow.lmms_eval import up_to

    assert up_to("one\n\ntwo. three", ["\n\n", ". "]) == "one" and up_to("one", ["\n"]) == "one"
