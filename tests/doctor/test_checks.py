"""Single checks of the doctor: tokenizers, documents, sampling and the diagnosis, each on a case of its own."""

import copy
from contextlib import ExitStack
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from transformers_nextflow import SelfCorrection
from transformers_nextflow.doctor import Diagnosis, examination, examine, sampling, shards, tokenizer
from transformers_nextflow.doctor.alterations import hooked
from transformers_nextflow.doctor.case import Case, Document
from transformers_nextflow.doctor.findings import Finding, difference, tolerance, z_score
from transformers_nextflow.doctor.pictures import default_pictures
from transformers_nextflow.doctor.weights import code_rows, copies, finite, values
from transformers_nextflow.scales import ScaleSchedule
from transformers_nextflow.training.metrics import psnr

TOY = Finding("toy", "weights", "that it is so")


@pytest.fixture(scope="module")
def pictures(trained):
    """Sixteen squares of the lowest level, and no other form."""
    return default_pictures(trained[0].model.schedules, 0, each=16)[:16]


@pytest.fixture(scope="module")
def case(trained, pictures):
    case = Case(*trained, pictures)
    with torch.no_grad():
        assert case.coded
    return case


@torch.no_grad()
def test_curves_and_pictures_of_the_tokenizer_go_scale_by_scale(case):
    assert tokenizer.reconstruction(TOY, case).fault is None
    schedule, by_scale = case.coded[0][1], []
    for scale in range(1, len(schedule) + 1):
        codes = [(each.quantization.target_codes, pixels) for pixels, _, each in case.coded]
        shown = [(case.vq_model.decode_prefix(own, schedule.final_grid, scale), pixels) for own, pixels in codes]
        by_scale.append(np.mean([float(psnr(*each)) for each in shown]))
    figures = case.curves["picture after each scale, PSNR in dB"]["PSNR"]
    assert figures == pytest.approx(by_scale, abs=1e-3) and figures == sorted(figures)
    [row] = case.images["picture, and what its codes keep of it"]
    assert len(row) == 2


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda module, inputs, output: output.flip(-2), "pictures come back upside down"),
        (lambda module, inputs, output: -output, "pictures come back in negative"),
        (lambda module, inputs, output: output / 2, "pictures come back of half the contrast"),
        (lambda module, inputs, output: torch.randn_like(output), "damaged vision tokenizer"),
    ],
)
@torch.no_grad()
def test_pictures_that_come_back_otherwise_are_named(change, fault, case):
    own = Case(case.model, case.processor, case.pictures)
    vars(own)["coded"] = case.coded
    torch.manual_seed(0)
    with hooked(change, case.vq_model.pixel_decoder):
        assert tokenizer.reconstruction(TOY, own).fault == fault


@pytest.mark.parametrize(
    "count, scale, different, fault",
    [
        (16, 2, 5, None),
        (16, 2, 4, "collapsed codes"),
        (16, 0, 1, None),
        (16, 3, 1, "collapsed codes"),
        (12, 1, 1, "collapsed codes"),
        (11, 1, 1, None),
    ],
)
def test_a_scale_of_few_codes_is_collapsed(count, scale, different, fault, case):
    own = Case(case.model, case.processor, case.pictures)
    vars(own)["coded"] = copy.deepcopy(case.coded[:count])
    for number, (_, schedule, output) in enumerate(own.coded):
        output.quantization.target_codes[:, schedule.slice(scale)] = number % different
    found = tokenizer.codes(TOY, own)
    assert found.fault == fault
    assert found.measured.split(" different")[0].split(", ")[scale] == str(different)


@torch.no_grad()
def test_of_a_single_scale_no_codes_are_collapsed(case):
    """Which has one code a picture."""
    own = Case(case.model, case.processor, case.pictures)
    quantization = SimpleNamespace(target_codes=torch.tensor([[7]]))
    output = SimpleNamespace(quantization=quantization)
    vars(own)["coded"] = [(None, ScaleSchedule(((1, 1),)), output)] * 16
    assert tokenizer.codes(TOY, own).fault is None


@torch.no_grad()
def test_few_pictures_raise_no_alarm_of_the_tokenizer(trained):
    few = default_pictures(trained[0].model.schedules, 0, each=12)[:12]
    few = Case(*trained, few)
    checks = (tokenizer.reconstruction, tokenizer.codes, tokenizer.semantics)
    assert [check(TOY, few).fault for check in checks] == [None] * 3


@torch.no_grad()
def test_a_semantic_branch_that_says_no_more_than_the_mean_is_lost(case):
    assert tokenizer.semantics(TOY, case).fault is None
    own = Case(case.model, case.processor, case.pictures)
    vars(own)["coded"] = [
        (pixels, schedule, copy.copy(case.coded[number - 1][2]))
        for number, (pixels, schedule, _) in enumerate(case.coded)
    ]
    assert tokenizer.semantics(TOY, own).fault == "semantic branch lost"  # each has another picture's


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda codes, size: codes, None),
        (lambda codes, size: np.roll(codes, 1, axis=1), "shifted targets"),
        (lambda codes, size: (codes - 1) % size, "wrong code offset"),
        (
            lambda codes, size: np.random.default_rng(0).permutation(codes.ravel()).reshape(codes.shape),
            "stored codes in disorder",
        ),
    ],
)
@torch.no_grad()
def test_stored_codes_that_are_not_those_of_their_pictures_are_named(change, fault, case):
    own, size = Case(case.model, case.processor, case.pictures), case.config.vq_config.codebook_size
    coded = [(each.quantization.target_codes.numpy(), schedule.final_grid) for _, schedule, each in case.coded[:12]]
    vars(own)["documents"] = [
        Document(np.array([0]), np.array([True]), [(grid, change(codes, size), codes[:0])], [True])
        for codes, grid in coded
    ]
    assert shards.codes(TOY, own).fault == fault
    vars(own)["documents"] = own.documents[:11]
    vars(own).pop("stored")
    assert shards.codes(TOY, own).severity == "unchecked"


@torch.no_grad()
def test_targets_numbered_from_elsewhere_are_told_where_inputs_are_not(case):
    """Of the pictures a third have no inputs of their own, as those that are only shown."""
    own, size = Case(case.model, case.processor, case.pictures), case.config.vq_config.codebook_size
    vars(own)["stored"] = [
        (it.final_grid, (codes + 1) % size, codes[: bool(number % 3), : it.offsets[-1]])
        for number, (_, it, output) in enumerate(case.coded[:12])
        for codes in [output.quantization.target_codes.numpy()]
    ]
    found = shards.codes(TOY, own)
    assert found.fault == "wrong code offset", found.measured


def corrected(
    count: int, change=lambda targets, inputs: None, share=0.6, variants=2, settings=None, first=0
) -> SimpleNamespace:
    """Of a table of 64 numbers on a line, and pictures of 1 + 16 + 64 codes, where a share of the inputs is one on."""
    rng, stored = np.random.default_rng(0), []
    for _ in range(count):
        targets = np.repeat(rng.integers(0, 63, (1, 81)), variants, 0)
        is_more = (rng.random((variants, 17)) < share) & (np.arange(17) >= (1 if first else 0))
        inputs = targets[:, :17] + is_more
        change(targets, inputs)
        stored.append(((8, 8), targets, inputs))
    named, schedule = asdict(SelfCorrection(first_scale=first)), ScaleSchedule(((1, 1), (4, 4), (8, 8)))
    manifest = {"settings": {"self_correction": named if settings is None else settings}}
    case = SimpleNamespace(shards=(None, manifest), stored=stored, curves={}, seed=0)
    case.schedules = SimpleNamespace(by_grid=lambda grid: schedule)
    case.vq_model = SimpleNamespace(quantizer=lambda: torch.arange(64.0)[:, None])
    return case


def write_into(targets, inputs):
    targets[1, 0] = (targets[0, 0] + 1) % 64


def repeat(targets, inputs):
    inputs[:] = inputs[:1]


def draw_any(targets, inputs):
    changed = inputs != targets[:, :17]
    inputs[changed] = np.random.default_rng(1).integers(0, 64, changed.sum())


@pytest.mark.parametrize(
    "count, change, share, first, fault",
    [
        (24, lambda targets, inputs: None, 0.6, 0, None),
        (24, lambda targets, inputs: None, 0.6, 1, None),
        (24, write_into, 0.6, 0, "self-correction written into targets"),
        (24, lambda targets, inputs: None, 0.9, 0, "wrong share of self-correction"),
        (12, lambda targets, inputs: None, 0.0, 0, "wrong share of self-correction"),
        (11, lambda targets, inputs: None, 0.0, 0, None),
        (12, repeat, 0.6, 0, "variants all alike"),
        (11, repeat, 0.6, 0, None),
        (24, draw_any, 0.6, 0, "self-correction by any codes"),
    ],
)
def test_self_correction_is_as_its_settings_say(count, change, share, first, fault):
    case = corrected(count, change, share, first=first)
    found = shards.correction(TOY, case)
    assert found.fault == fault, found.measured
    curve = case.curves["disturbed inputs of each scale, share"]["share"]
    assert len(curve) == 2 and curve[1] == pytest.approx(share, abs=0.1) and (not first or curve[0] == 0)


def test_of_several_settings_or_none_self_correction_is_not_checked():
    case = corrected(24)
    several = [{"self_correction": {"probability": p}} for p in (0.5, 1.0)]
    case.shards = (None, {"documents": {"settings": several}})
    assert shards.correction(TOY, case).severity == "unchecked"
    assert shards.correction(TOY, corrected(24, settings=False)).severity == "unchecked"
    assert shards.correction(TOY, corrected(0)).severity == "unchecked"


@pytest.fixture(scope="module")
def tiny_case(random_model, tiny_processor):
    return Case(random_model, tiny_processor, default_pictures(random_model.model.schedules, 0, each=1))


def by_count(module, inputs, output):
    """As of a head that depends on how many positions it is given at once."""
    return output * (1 + torch.arange(output.shape[-1]) / output[..., 0].numel())


@pytest.mark.parametrize(
    "check, hooks, fault",
    [
        (sampling.forced, {}, None),
        (sampling.guidance, {}, None),
        (sampling.forced, {"code_head": by_count}, "sampling unlike training"),
        (sampling.guidance, {"code_head": by_count}, "wrong guidance"),
        (sampling.guidance, {"attention": lambda module, inputs, output: 0 * output}, "guidance without effect"),
    ],
)
@torch.no_grad()
def test_sampling_that_is_no_training_is_named(check, hooks, fault, tiny_case):
    model = tiny_case.model
    attention = [layer.self_attn.o_proj for layer in model.model.language_model.layers]
    modules = {"code_head": [model.code_head], "attention": attention}
    with ExitStack() as stack:
        for name, change in hooks.items():
            stack.enter_context(hooked(change, *modules[name]))
        assert check(TOY, tiny_case).fault == fault


def finding_of(name: str, fault: str | None = None, severity: str = "warning") -> Finding:
    return Finding(name, "weights", "", severity, measured="no reason", fault=fault)


@pytest.mark.parametrize(
    "findings, headline",
    [
        ([finding_of("a"), finding_of("b")], "Nothing wrong was found in 2 checks."),
        (
            [finding_of("a"), finding_of("b", severity="unchecked"), finding_of("c", severity="unchecked")],
            "Nothing wrong was found in 1 checks. Not checked: b, c (no reason).",
        ),
        ([finding_of("a"), finding_of("b", "bad")], "Most likely: bad (b)."),
        (
            [finding_of("a", "bad"), finding_of("b", "worse")],
            "Most likely: bad (a). 1 further alarm may follow from it.",
        ),
        (
            [finding_of("a", "bad"), finding_of("b", "worse"), finding_of("c", "worst")],
            "Most likely: bad (a). 2 further alarms may follow from it.",
        ),
    ],
)
def test_the_headline_says_what_was_found_and_what_not_checked(findings, headline):
    diagnosis = Diagnosis(findings, {"loss": {"own": [1.0]}}, {}, 1.234)
    assert diagnosis.headline == headline
    first = next((each.fault for each in findings if each.fault), None)
    figures = diagnosis.to_dict()
    assert figures.pop("findings")[0]["check"] == "a"
    assert figures == {"fault": first, "headline": headline, "curves": {"loss": {"own": [1.0]}}, "seconds": 1.23}


def spoiled_by(kind: type[Exception]):
    def spoiled_check(check, case):
        """That it
        is so."""
        raise kind("too bad")

    spoiled_check.__module__ = "transformers_nextflow.doctor.weights"
    return spoiled_check


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, IndexError, KeyError, TypeError, OSError])
@pytest.mark.parametrize("order, severity", [("EXACT", "error"), ("MEANS", "warning")])
def test_a_check_that_raises_is_a_finding(kind, order, severity, tiny_model, tiny_processor, monkeypatch):
    monkeypatch.setattr(examination, "EXACT", ())
    monkeypatch.setattr(examination, "MEANS", ())
    monkeypatch.setattr(examination, order, (spoiled_by(kind),))
    seen = []
    diagnosis = examine(tiny_model, tiny_processor, pictures=[], on_check=seen.append)
    [finding] = diagnosis.findings
    assert seen == [finding] and finding.part == "weights" and finding.severity == severity
    assert (finding.check, finding.expected) == ("spoiled check", "That it is so.")
    assert finding.fault == "the code raises" and finding.measured == f"{kind.__name__}: {kind('too bad')}"
    monkeypatch.setattr(examination, order, (spoiled_by(AttributeError),))
    with pytest.raises(AttributeError, match="too bad"):
        examine(tiny_model.train(), tiny_processor, pictures=[])
    assert tiny_model.training
    tiny_model.eval()


@pytest.mark.parametrize(
    "values, score",
    [
        ([1.0] * 11, 0.0),
        ([1.0] * 12, float("inf")),
        ([-1.0] * 12, float("-inf")),
        ([0.0] * 12, 0.0),
        ([1.0, 3.0] * 8, 2 / (np.std([1.0, 3.0] * 8, ddof=1) / 4)),
    ],
)
def test_a_mean_is_told_in_its_standard_error(values, score):
    assert z_score(torch.tensor(values)) == pytest.approx(score)


def test_differences_are_those_of_the_largest():
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    assert difference(a, b) == pytest.approx(0.5 / 4) and difference(b, b) == 0.0
    assert difference(a, b[:1]) == difference(a, a / 0) == float("inf")
    assert difference(torch.zeros(2), torch.zeros(2)) == 0.0
    assert tolerance(torch.float32) == pytest.approx(3.45e-4, rel=0.01) and tolerance(torch.bfloat16) > 0.05


@pytest.mark.parametrize("highest, is_missing", [(64, False), (56, False), (55, True), (32, True), (8, False)])
@torch.no_grad()
def test_an_eighth_of_the_table_may_be_without_use(highest, is_missing, tiny_model, tiny_processor):
    """Unless codes are too few to tell, or most of the others are without use as well."""
    case, rng = Case(tiny_model, tiny_processor, []), np.random.default_rng(0)
    schedule = tiny_model.model.schedules.by_grid((3, 3))
    draw = lambda: rng.integers(0, highest, (1, schedule.num_codes)) * (1 if highest > 8 else 4)  # noqa: E731
    pictures = [((3, 3), draw(), np.zeros((0, schedule.offsets[-1]), np.int64)) for _ in range(60)]
    vars(case)["documents"] = [Document(np.array([0]), np.array([True]), [picture], [True]) for picture in pictures]
    found = shards.codes(TOY, case)
    assert (found.fault == "codes missing") is is_missing, found.measured
    if is_missing:
        assert f"the longest gap in the ids of 840 codes is {64 - highest} from {highest} on" in found.measured
    vars(case).update(documents=case.documents[:36], stored=pictures[:36])  # no more than eight for each entry
    assert shards.codes(TOY, case).fault != "codes missing"


def linear(rows: int = 96, columns: int = 96) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for _ in range(4)))


def fault_of(check, model) -> str | None:
    with torch.no_grad():
        return check(TOY, SimpleNamespace(model=model, seed=0)).fault


@pytest.mark.parametrize(
    "factor, fault", [(60, None), (70, "weights out of bounds"), (torch.nan, "weights not finite")]
)
def test_an_entry_may_be_sixty_times_the_second(factor, fault):
    model = linear()
    model[1].weight.data[3, 4] = factor * model[1].weight.abs().max().item()
    assert fault_of(finite, model) == fault
    model[1].weight.data.zero_()
    assert fault_of(finite, model) is None


@pytest.mark.parametrize("count, columns, fault", [(90, 96, None), (96, 96, "weights clipped"), (90, 48, None)])
def test_a_hundredth_of_a_matrix_may_be_its_largest_entry(count, columns, fault):
    model = linear(columns=columns)
    largest = model[1].weight.abs().max().item()
    model[1].weight.data.view(-1)[torch.randperm(96 * columns)[:count]] = largest
    assert fault_of(values, model) == fault


@pytest.mark.parametrize("bits, fault", [(8, None), (4, "weights too coarse")])
@pytest.mark.parametrize("group", [16, 96])
def test_four_bits_are_told_from_eight_whatever_their_groups(bits, group, fault):
    model = linear()
    groups = model[1].weight.data.view(-1, group)
    step = groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    groups.copy_((groups / step).round() * step)
    groups.add_(1e-3 * torch.randn(len(groups), 1) * step)  # so that few entries are the largest
    assert fault_of(values, model) == fault


@pytest.mark.parametrize("noise, fault", [(0.0, "copied weights"), (0.02, "copied weights"), (0.1, None)])
def test_a_copy_is_one_though_it_was_rounded(noise, fault):
    model = linear()
    spread = model[0].weight.std()
    model[2].weight.data.copy_(model[0].weight + noise * spread * torch.randn(96, 96))
    assert fault_of(copies, model) == fault


def coded(share: float, shift: int = 0) -> SimpleNamespace:
    """Entries of a table, embeddings that began with them and a head that is like them, but for a share of rows."""
    torch.manual_seed(0)
    table = torch.randn(1024, 16)
    rows = (table @ torch.randn(16, 32) + 0.1 * torch.randn(1024, 32)).roll(shift, 0)
    mixed = rows.clone()
    mixed[torch.randperm(1024)[: int(share * 1024)]] = rows.mean(0) + rows.std() * torch.randn(int(share * 1024), 32)
    parts = [SimpleNamespace(weight=weight) for weight in (rows, mixed)]
    model = SimpleNamespace(model=SimpleNamespace(code_embeddings=parts[0]), code_head=parts[1])
    return SimpleNamespace(model=model, vq_model=SimpleNamespace(quantizer=lambda: table))


@pytest.mark.parametrize(
    "share, shift, fault",
    [
        (0.0, 0, None),
        (0.15, 0, None),
        (0.4, 0, "code head without order in part"),
        (1.0, 0, "code head without order"),
        (0.0, 1, "wrong code offset"),
        (0.0, -1, "wrong code offset"),
        (0.0, 2, "code embeddings without order"),
    ],
)
def test_rows_of_codes_are_in_the_order_of_the_table(share, shift, fault):
    found = code_rows(TOY, coded(share, shift))
    assert found.fault == fault, found.measured


@pytest.mark.parametrize("count, shown", [(1, "0.weight of 4"), (3, "0.weight, 1.weight, 2.weight of 4")])
def test_at_most_three_names_are_shown(count, shown):
    model = linear()
    for layer in model[:count]:
        layer.weight.data[0, 0] = torch.nan
    found = finite(TOY, SimpleNamespace(model=model))
    assert found.measured == f"{shown} are not"
    model[3].weight.data[0, 0] = torch.nan
    if count == 3:
        assert finite(TOY, SimpleNamespace(model=model)).measured == f"{shown[:-5]} and 1 more of 4 are not"
