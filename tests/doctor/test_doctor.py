"""The doctor is silent on a good checkpoint, names damage, and works on any other."""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from damage import DAMAGE, damaged, layers, permute, rewrite
from own_pictures import build, png
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import TrainerState, TrainingArguments

from transformers_nextflow import SelfCorrection, cli, doctor
from transformers_nextflow.data import ExtractionSettings, Source, extract
from transformers_nextflow.data.shards import images_of, sequence_spec
from transformers_nextflow.doctor import (
    Diagnosis,
    DoctorCallback,
    alterations,
    examination,
    examine,
    read_pictures,
    shards,
    to_html,
    to_text,
)
from transformers_nextflow.doctor.case import Case, Document, Reading
from transformers_nextflow.doctor.documents import conditions, confidence, ends, familiar, frames, varied
from transformers_nextflow.doctor.findings import Finding
from transformers_nextflow.doctor.pictures import default_pictures
from transformers_nextflow.doctor.sampling import draws, prompts
from transformers_nextflow.doctor.weights import code_rows, copies, finite, spectra, values
from transformers_nextflow.utils import loading

UNTRAINED = "untrained weights"


@pytest.fixture(scope="module")
def trained_packs(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    build(folder, loading.model_name(None), 48, 1024)
    return folder / "packs"


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.title)
def test_damage_is_named(damage, trained, trained_packs, tmp_path):
    model, packs = damaged(damage, trained[0], trained_packs, tmp_path)
    diagnosis = examine(model, trained[1], packs=packs)
    named = [alarm for alarm in diagnosis.alarms if alarm.fault in damage.names]
    assert named and damage.where in named[0].measured, to_text(diagnosis)


@pytest.mark.slow
def test_the_good_checkpoint_raises_no_alarm(trained, trained_packs):
    diagnosis = examine(*trained, packs=trained_packs)
    assert diagnosis.first is None, to_text(diagnosis)


@pytest.fixture(scope="module")
def packs(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    build(folder, str(tiny_checkpoint), 20, 256)
    return folder / "packs"


def examine_tiny(*args, **kwargs) -> Diagnosis:
    """Of a model for which alterations promise nothing, on however few rows they are first tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alterations, "FEW", 1)
        return examine(*args, **kwargs)


@pytest.fixture(scope="module")
def diagnosis(tiny_model, tiny_processor, packs):
    return examine_tiny(copy.deepcopy(tiny_model), tiny_processor, packs=packs)


def faults(diagnosis, part: str | None = None, severity: str | None = None) -> set[str]:
    chosen = (f for f in diagnosis.alarms if part in (None, f.part) and severity in (None, f.severity))
    return {finding.fault for finding in chosen}


@torch.no_grad()
def fault_found(check, model, processor, packs=None) -> str | None:
    """The fault that a check of [`examine`] finds, on pictures of its own."""
    assert check in (*examination.EXACT, *examination.MEANS)
    case = Case(model, processor, default_pictures(model.model.schedules, 0), packs)
    return check(Finding(check.__name__, "toy", ""), case).fault


def test_a_new_model_with_its_shards_is_called_untrained_and_nothing_else_fails(diagnosis):
    assert faults(diagnosis, severity="error") == set(), to_text(diagnosis)
    assert faults(diagnosis, "shards") == set()
    assert UNTRAINED in faults(diagnosis) and "the code raises" not in faults(diagnosis)
    assert all((each.measured, each.expected, each.cause, each.next_step) for each in diagnosis.alarms)
    names = [(finding.part, finding.check) for finding in diagnosis.findings]
    assert len(set(names)) == len(names) > 20


def test_without_shards_the_headline_says_what_was_not_checked(tiny_model, tiny_processor):
    model = copy.deepcopy(tiny_model).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    diagnosis = examine_tiny(model, tiny_processor, pictures=default_pictures(model.model.schedules, 0, each=4))
    assert faults(diagnosis, severity="error") == set() and UNTRAINED in faults(diagnosis), to_text(diagnosis)
    assert "the code raises" not in faults(diagnosis)
    assert "Not checked: files, whose, frames, varied, codes, " in diagnosis.headline
    assert "(no shards were given)" in diagnosis.headline
    assert diagnosis.headline in " ".join(to_text(diagnosis).split())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_report_is_one_page_with_every_check_its_curves_and_pictures(diagnosis):
    page = to_html(diagnosis, "title & more")
    assert "title &amp; more" in page and "http" not in page
    assert len(re.findall('src="data:image/png;base64,', page)) == len(re.findall("src=", page))
    assert len(re.findall("<img ", page)) == len(diagnosis.curves) + len(diagnosis.images) >= 5
    text = to_text(diagnosis)
    assert all(finding.check in page and finding.check in text for finding in diagnosis.findings)
    assert json.loads(json.dumps(diagnosis.to_dict()))["headline"] == diagnosis.headline


def not_finite(model):
    layers(model)[0].mlp.up_proj.weight[0, 0] = torch.inf


def flipped(model):
    """One bit of an exponent."""
    layers(model)[0].mlp.up_proj.weight[0, 0] *= 2**16


def copied(model):
    layers(model)[0].mlp.load_state_dict(layers(model)[1].mlp.state_dict())


def rolled(model):
    model.model.code_embeddings.weight.copy_(model.model.code_embeddings.weight.roll(1, 0))


def restarted(model):
    """Every second entry, after the model had learned them."""
    model.model.vq_model.quantizer.pixel_codebook[::2].normal_()
    model.model.vq_model.quantizer.semantic_codebook[::2].normal_()


def alike(model):
    rows = model.get_input_embeddings().weight
    rows[:6] = rows.mean(dim=0)


@pytest.mark.parametrize(
    "do, check, fault",
    [
        (not_finite, finite, "weights not finite"),
        (flipped, finite, "weights out of bounds"),
        (copied, copies, "copied weights"),
        (lambda model: permute(model.model.code_embeddings.weight), code_rows, "code embeddings without order"),
        (rolled, code_rows, "wrong code offset"),
        (restarted, code_rows, "code embeddings without order in part"),
        (alike, prompts, "control tokens reset"),
        (lambda model: setattr(model.config, "condition_last_scale", False), prompts, "processor of another model"),
        (lambda model: setattr(model.config, "eoi_token_id", 7), prompts, "processor of another model"),
        (lambda model: setattr(model.generation_config, "eos_token_id", [150_000]), prompts, "wrong end of text"),
    ],
)
def test_damaged_weights_are_named(do, check, fault, tiny_model, tiny_processor):
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        do(model)
    assert fault_found(check, model, tiny_processor) == fault


def drop_corrections(row, images, end):
    row["image_input_codes"][:] = 0


def correct_by_any(row, images, end):
    rng = np.random.default_rng(0)
    for _, targets, inputs in images:
        changed = inputs != targets[:, : inputs.shape[1]]
        inputs[changed] = rng.integers(0, 64, changed.sum())


def repeat_one_coding(row, images, end):
    for _, targets, inputs in images:
        if len(inputs):
            chosen = (inputs != targets[:, : inputs.shape[1]]).sum(1).argmax()
            targets[:], inputs[:] = targets[chosen], inputs[chosen]


def fold(row, images, end):
    """Any codes, but for the upper half of the table."""
    row["image_codes"][:] = np.random.default_rng(0).integers(0, 32, len(row["image_codes"]))


def leave_ends_out(row, images, end):
    row["supervised"][row["input_ids"] == end] = 0


def supervise_questions(row, images, end):
    ends = np.cumsum(row["document_lengths"])[:-1]
    for ids, flags in zip(np.split(row["input_ids"], ends), np.split(row["supervised"], ends)):
        flags[2 : ids.tolist().index(end)] |= (
            ids[2 : ids.tolist().index(end)] > 5
        )  # ids of images and controls are less


@pytest.mark.parametrize(
    "change, check, fault",
    [
        (drop_corrections, shards.correction, "wrong share of self-correction"),
        (correct_by_any, shards.correction, "self-correction by any codes"),
        (repeat_one_coding, shards.correction, "variants all alike"),
        (fold, shards.codes, "codes missing"),
        (leave_ends_out, ends, "ends not supervised"),
        (supervise_questions, frames, "questions supervised"),
    ],
)
def test_damaged_shards_are_named(change, check, fault, tiny_model, tiny_processor, packs, tmp_path):
    folder = Path(shutil.copytree(packs, tmp_path / "packs"))
    manifest = json.loads((folder / "manifest.json").read_text())
    spec, end = sequence_spec(manifest["identity"]), tiny_processor.tokenizer.eos_token_id
    rewrite(folder, lambda row: change(row, images_of(row, spec, manifest["variants"]), end))
    assert fault_found(check, tiny_model, tiny_processor, folder) == fault


def test_documents_that_are_copies_are_named(tiny_model, tiny_processor, packs, tmp_path):
    folder = Path(shutil.copytree(packs, tmp_path / "packs"))
    rewrite(folder, lambda row: None, lambda rows: [*rows, *rows])
    assert fault_found(varied, tiny_model, tiny_processor, folder) == "documents repeated"


def test_some_thousand_documents_are_looked_through(tiny_model, tiny_processor, packs, tmp_path):
    folder = Path(shutil.copytree(packs, tmp_path / "packs"))
    case = Case(tiny_model, tiny_processor, [], packs)
    rewrite(folder, lambda row: None, lambda rows: rows * (5000 // len(case.documents)))
    assert 4096 <= len(Case(tiny_model, tiny_processor, [], folder).documents) < 4120


def test_cut_shards_and_those_of_another_tokenizer_are_named(tiny_model, tiny_processor, packs, tmp_path):
    folder = Path(shutil.copytree(packs, tmp_path / "packs"))
    file = next((folder / "data").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-8])
    assert fault_found(shards.files, tiny_model, tiny_processor, folder) == "damaged shards"
    file.unlink()
    assert fault_found(shards.files, tiny_model, tiny_processor, folder) == "damaged shards"
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.model.vq_model.pixel_encoder.conv_in.bias += 1
    assert fault_found(shards.whose, other, tiny_processor, packs) == "vision tokenizer and shards differ"


def exchange_roles(template: str) -> str:
    template = template.replace(
        "+ message['role'] +", "+ {'user': 'assistant', 'assistant': 'user'}[message['role']] +"
    )
    return template.replace("<|im_start|>assistant", "<|im_start|>user")


@pytest.mark.parametrize(
    "change, shown",
    [
        (lambda template: "<|im_start|>system\nBe kind.<|im_end|>\n" + template, "do not open with"),
        (lambda template: template.replace("assistant\\n", "model\\n"), "do not turn to the answer with"),
        (exchange_roles, "do not open with"),
        (lambda template: template, None),
    ],
)
def test_another_chat_template_is_named(change, shown, tiny_model, tiny_processor, packs):
    """Than that of the shards, in the processor."""
    other = copy.deepcopy(tiny_processor)
    other.chat_template = change(other.chat_template)
    assert (other.chat_template != tiny_processor.chat_template) is (shown is not None)
    found = frames(Finding("frames", "toy", ""), Case(tiny_model, other, [], packs))
    fault = "roles exchanged" if change is exchange_roles else "another chat template"
    assert found.fault == (shown and fault) and (not shown or shown in found.measured)


@pytest.mark.parametrize("text, fault", [("thing {}", None), ("<|im_start|>user\nthing {}", "another chat template")])
def test_texts_that_went_through_the_template_before_are_named(text, fault, tiny_checkpoint, tmp_path):
    pictures = of_four_colours(12)
    rows = [{"text": text.format(number), "image": picture} for number, picture in enumerate(pictures)]
    case = case_of(rows, ExtractionSettings("text-to-image", self_correction=None), tiny_checkpoint, tmp_path)
    found = frames(Finding("frames", "toy", ""), case)
    assert found.fault == fault and f"; {12 * (fault is not None)} have it as text" in found.measured


def test_texts_that_are_cut_at_random_are_named(tiny_model, tiny_processor):
    other = copy.deepcopy(tiny_processor)
    backend = json.loads(other.tokenizer.backend_tokenizer.to_str())
    backend["model"]["dropout"] = 0.5
    other.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    case = Case(tiny_model, other, default_pictures(tiny_model.model.schedules, 0))
    assert prompts(Finding("prompts", "toy", ""), case).fault == "text tokenizer at random"


@torch.no_grad()
def test_drawings_away_from_the_prompt_are_named(trained, monkeypatch):
    """Guidance of 0 draws as the null prompt does."""
    model, processor = trained
    case = Case(model, processor, default_pictures(model.model.schedules, 0)[:6])
    assert draws(Finding("draws", "toy", ""), case).fault is None
    monkeypatch.setitem(model.config.image_generation, "guidance_scale", 0.0)
    assert draws(Finding("draws", "toy", ""), case).fault == "drawn against the prompt"


def of_four_colours(count: int) -> list[bytes]:
    """Pictures, encoded."""
    colours = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return [png(Image.fromarray(each).resize((16, 16), Image.Resampling.NEAREST)) for each in colours]


def case_of(rows: list[dict], settings: ExtractionSettings, checkpoint: Path, folder: Path) -> Case:
    """A model and documents that are made of rows."""
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "source.parquet"))
    extract(Source(str(folder / "source.parquet")), str(checkpoint), folder / "documents", settings)
    return Case(*loading.load_model(str(checkpoint)), [], folder / "documents")


@pytest.mark.parametrize(
    "question, picture, fault",
    [
        ("describe picture {}", "of its own", None),
        ("describe: a green thing {}", "of its own", "answers given away"),
        ("describe picture {}", "the same", "one picture many times"),
    ],
)
def test_pictures_and_answers_that_repeat_are_named(question, picture, fault, tiny_checkpoint, tmp_path):
    pictures = of_four_colours(24)
    rows = [
        {
            "question": question.format(number),
            "image": pictures[0 if picture == "the same" and number % 2 else number],
            "text": f"a green thing {number}",
        }
        for number in range(24)
    ]
    case = case_of(rows, ExtractionSettings("captioning"), tiny_checkpoint, tmp_path)
    assert varied(Finding("varied", "toy", ""), case).fault == fault


@pytest.mark.parametrize("share, fault", [(0.1, None), (0.9, "prompts without text")])
def test_texts_that_are_dropped_too_often_are_named(share, fault, tiny_checkpoint, tmp_path):
    pictures = of_four_colours(24)
    rows = [{"text": f"thing {number}", "image": picture} for number, picture in enumerate(pictures)]
    settings = ExtractionSettings("text-to-image", drop_text=share, self_correction=None)
    case = case_of(rows, settings, tiny_checkpoint, tmp_path)
    assert varied(Finding("varied", "toy", ""), case).fault == fault


@pytest.mark.parametrize("correction", [None, SelfCorrection()])
def test_prompts_are_those_of_the_shards_self_corrected_or_not(correction, tiny_checkpoint, tmp_path):
    prompts = [f"thing number {number}" for number in range(4)]
    rows = [
        {"text": text, "image": png(Image.new("RGB", (64, 64), (60 * n, 90, 30)))} for n, text in enumerate(prompts)
    ]
    case = case_of(rows, ExtractionSettings("text-to-image", self_correction=correction), tiny_checkpoint, tmp_path)
    shown = [case.processor.tokenizer.decode(document.prompt) for document in case.asked]
    assert len(shown) == 4 and all(any(text in each for each in shown) for text in prompts)

    first, place = case.documents[0], len(case.documents[0].prompt)
    reasoned = first._replace(ids=np.insert(first.ids, place, 9), flags=np.insert(first.flags, place, True))
    vars(case).pop("asked")
    case.documents.insert(0, reasoned)  # a text goes before its picture, which the null prompt would lack
    assert len(case.asked) == 4 and not any(document is reasoned for document in case.asked)


def reading(factor: float, scale: float, text: float, count: int = 2, disturbed: int = 1) -> Reading:
    """Codes and tokens drawn from logits: the model's are `factor` times those; codes of one of `count` scales, and
    tokens, are any in the shares `scale` and `text`."""

    def values(logits, share):
        drawn = logits.softmax(-1).multinomial(1)[:, 0]
        return torch.where(torch.rand(len(drawn)) < share, torch.randint(logits.shape[1], drawn.shape), drawn)

    logits, words = 3 * torch.randn(20 * count, 64), 3 * torch.randn(20, 64)
    scales = torch.arange(20 * count) // 20
    codes = torch.where(scales == disturbed, values(logits, scale), values(logits, 0.0))
    scales = torch.cat([scales, torch.full((20,), -1)])
    return Reading.of(torch.cat([factor * logits, words]), torch.cat([codes, values(words, text)]), scales)


def of_readings(readings: list[Reading]) -> SimpleNamespace:
    """What checks of costs need of a case."""
    processor = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: f"token {ids[0]}"))
    return SimpleNamespace(readings=readings, documents=[], processor=processor)


def test_what_costs_more_in_the_first_scales_alone_is_the_texts_fault():
    """Of a third of the documents some codes of the first of eight scales are any, as of texts wrong in part."""
    torch.manual_seed(0)
    whole = [reading(1, 0.0 if number % 3 else 0.7, 0, count=8, disturbed=number % 2) for number in range(96)]
    assert familiar(Finding("familiar", "toy", ""), of_readings(whole)).fault == "texts do not fit their pictures"


@pytest.mark.parametrize(
    "factor, scale, text, faults",
    [
        (1, 0, 0, {None}),
        (2.2, 0, 0, {"logits too large"}),
        (0.45, 0, 0, {"logits too small"}),
        (1, 0.4, 0, {"codes of scale 2 in disorder"}),
        (1, 0, 0.4, {"unfamiliar texts"}),
        (1, 0.4, 0.4, {"unfamiliar documents"}),
        ([1] * 90 + [-0.5] * 6, 0, 0, {"unfamiliar pictures"}),
    ],
)
def test_what_costs_more_than_expected_is_named(factor, scale, text, faults):
    """Of logits at fault, surprise is a consequence, and may be found as well."""
    torch.manual_seed(0)
    factors = factor if isinstance(factor, list) else [factor] * 96
    case, check = of_readings([reading(each, scale, text) for each in factors]), Finding("losses", "toy", "")
    found = [confidence(check, case).fault, familiar(check, case).fault]
    assert faults <= set(found) <= {*faults, None, "unfamiliar pictures"}
    assert (found[0] is None) is (factors[0] == 1)


def test_the_token_that_costs_most_is_named():
    """Of all texts together, above what the model expects."""
    torch.manual_seed(0)
    readings = [reading(1, 0, 0) for _ in range(24)]
    for each in readings[:12]:
        each.targets_N[-3:] = torch.tensor([77, 77, 78])
        each.costs_TN[:, -3:], each.expected_N[-3:] = torch.tensor([4.0, 5.0, 8.0]), 1.0
    assert "; most of all 'token 77' +3.50" in familiar(Finding("familiar", "toy", ""), of_readings(readings)).measured


@pytest.mark.parametrize(
    "heeded, fault",
    [({"prompt", "picture"}, None), ({"picture"}, "prompt ignored"), ({"prompt"}, "pictures ignored")],
)
def test_what_answers_do_not_depend_on_is_named(heeded, fault):
    """Of documents whose prompt and picture both say the answer, read by what heeds some of it."""

    def read(document):
        said = {"prompt": document.ids[0], "picture": document.images[0][1][0, 0]}
        wrong = sum(said[name] != document.ids[-1] for name in heeded)
        return Reading(torch.tensor([0]), torch.tensor([-1]), torch.full((5, 1), 1.0 + wrong), torch.ones(1))

    documents = [
        Document(np.array([n, 5, n]), np.array([False, False, True]), [((1, 1), np.array([[n]]), None)], [False])
        for n in range(24)
    ]
    case = SimpleNamespace(documents=documents, readings=[read(each) for each in documents], read=read)
    case.row_of = lambda document: document
    assert conditions(Finding("conditions", "toy", ""), case).fault == fault


@pytest.mark.parametrize(
    "train, alarmed",
    [
        (lambda weight: weight.copy_(torch.linalg.qr(weight).Q), False),  # as Muon leaves it: narrower than chance
        (lambda weight: weight[:, 0].mul_(20), False),
        (lambda weight: weight.normal_(), True),
    ],
    ids=["narrower", "wider", "chance"],
)
def test_a_spectrum_unlike_chance_on_either_side_is_a_trained_one(train, alarmed):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    with torch.no_grad():
        for layer in model:
            layer.weight[:, 0].mul_(20)
        train(model[1].weight)
    found = spectra(Finding("spectra", "weights", ""), SimpleNamespace(model=model, seed=0))
    assert (found.fault == "re-initialised weights") is alarmed, found.measured


def test_of_the_vision_tokenizer_kernels_have_spectra_and_matrices_need_not():
    torch.manual_seed(0)
    model, parts = nn.Module(), nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(3)), nn.Linear(64, 64))
    model.model = nn.ModuleDict({"vq_model": parts})
    with torch.no_grad():
        for kernel in parts[:2]:
            kernel.weight[:, 0].mul_(20)
    found = spectra(Finding("spectra", "weights", ""), SimpleNamespace(model=model, seed=0))
    assert found.fault == "re-initialised weights" and found.measured.startswith("model.vq_model.2.weight of 3")


def cut(weight):
    weight[:, :8] = 0


def clipped(weight):
    weight.clamp_(-0.05, 0.05)


def in_four_bits(weight):
    step = weight.abs().amax(dim=1, keepdim=True) / 7
    weight.copy_((weight / step).round() * step)


def of_low_rank(weight):
    left, sizes, right = torch.linalg.svd(weight)
    weight.copy_(left[:, :16] * sizes[:16] @ right[:16])


@pytest.mark.parametrize(
    "do, check, fault",
    [
        (cut, values, "weights cut off"),
        (lambda weight: cut(weight.T), values, "weights cut off"),
        (clipped, values, "weights clipped"),
        (in_four_bits, values, "weights too coarse"),
        (of_low_rank, spectra, "weights of low rank"),
        (lambda weight: weight, values, None),
        (lambda weight: weight, spectra, None),
    ],
)
def test_a_matrix_that_is_not_whole_is_named(do, check, fault):
    """Among others of its kind, with columns of several sizes as training leaves them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(4)))
    with torch.no_grad():
        for layer in model:
            layer.weight[:, ::12].mul_(4)
        do(model[2].weight)
    found = check(Finding(check.__name__, "weights", ""), SimpleNamespace(model=model, seed=0))
    assert found.fault == fault and (fault is None or found.measured.startswith("2.weight of 4")), found.measured


def test_the_command_writes_figures_and_a_report_and_exits_with_1_on_alarms(
    capsys, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Image.effect_noise((24, 24), 60 + number).convert("RGB").save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}\n")
    assert [picture.caption for picture in read_pictures(tmp_path)] == ["picture 0", "picture 1", "picture 2"]
    kept = []
    monkeypatch.setattr(doctor, "examine", lambda *args, **kwargs: kept.append(examine(*args, **kwargs)) or kept[0])
    assert cli.main(["doctor", str(tiny_checkpoint), ".", "--json", "--report", "report"]) == 1
    figures = json.loads(capsys.readouterr().out)
    assert figures["fault"] == UNTRAINED
    assert {"check", "measured", "expected", "severity", "cause", "next_step"} <= set(figures["findings"][0])
    assert UNTRAINED in (tmp_path / "report" / "report.html").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(doctor, "examine", lambda *args, **kwargs: kept[0])
        assert cli.main(["doctor", str(tiny_checkpoint), "."]) == 1
        out = capsys.readouterr().out
        assert kept[0].first.check in out and out.endswith(f"{kept[0].seconds:.1f} s\n")
        kept[0].findings[:] = [finding for finding in kept[0].findings if not finding.fault]
        assert cli.main(["doctor", str(tiny_checkpoint), "."]) == 0
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "1.txt").write_bytes("ein Bär".encode("latin-1"))
    assert cli.main(["doctor", str(tiny_checkpoint), "."]) == 2
    assert "1.txt is no text in UTF-8" in capsys.readouterr().err
    (tmp_path / "1.txt").unlink()
    assert len(read_pictures(tmp_path)) == 3
    assert cli.main(["doctor", str(tiny_checkpoint), ".", "--report", "0.png"]) == 2
    assert "--report must be a folder, got the file 0.png" in capsys.readouterr().err
    for name in ("nowhere", "no/where/at-all"):
        assert cli.main(["doctor", str(tiny_checkpoint), name]) == 2
        assert f"there is no folder {name}" in capsys.readouterr().err
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "manifest.json").write_text("{}")
    for name in (".", "packs"):
        assert cli.main(["doctor", str(tiny_checkpoint), name, name]) == 2
        assert "give one folder of shards and one of pictures" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["doctor", str(tiny_checkpoint), "empty"]) == 2
    for number in range(50):
        Image.new("RGB", (1, 1)).save(tmp_path / "empty" / f"{number}.bmp")
    assert len(read_pictures("empty")) == 48


def test_the_callback_leaves_training_as_it_was(tiny_model, tiny_processor, tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "MEANS", ())
    callback = DoctorCallback(tiny_processor, every=2)
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    model = copy.deepcopy(tiny_model).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    for step in (1, 2):
        now = TrainerState(global_step=step, is_world_process_zero=True)
        callback.on_step_end(arguments, now, control=None, model=model)
    assert list(callback.diagnoses) == [2]
    assert (tmp_path / "doctor" / "step-2" / "report.html").is_file()
    assert model.training and all(module.training for module in model.model.language_model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="every must be at least 1"):
        DoctorCallback(tiny_processor, every=0)
