"""Figures of drawings and answers that are known, on a small world; and the way from a run to its card."""

import json
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from examples import demo
from examples.emoji import artist, assemble, card, choose_sampling, evaluate, panels, scoring, sheet
from examples.emoji.artist import Artist
from examples.emoji.baselines import other_styles
from examples.emoji.groups import drawings_32, reasoning
from examples.emoji.scoring import (
    FREQUENT,
    MEAN,
    MODEL,
    OTHER,
    SOURCE,
    TOKENIZER,
    Exam,
    answers,
    arrangements,
    change_figures,
    changed_pictures,
    frames,
    judged,
    single_pictures,
)
from examples.emoji.splits import COMBINATION, NAME, PAIR, SEEN
from examples.emoji.stages import FINISHED
from examples.emoji.tasks import KINDS, Tasks
from examples.emoji.world import to_pixel_values
from transformers_nextflow import LinearRamp, NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.training import prepare_vq_stage
from transformers_nextflow.utils.loading import DEFAULT_MODEL


@pytest.fixture(scope="module", autouse=True)
def short_answers() -> Iterator[None]:
    """The model has not learnt to end them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artist, "MAX_NEW_TOKENS", 12)
        patch.setattr(scoring, "TRAINING_ANSWERS", 200)
        yield


@pytest.fixture(scope="module")
def exam(world_folder, emoji_checkpoint) -> Exam:
    whole = evaluate.load_artist(emoji_checkpoint, world_folder, torch.device("cpu"))
    return Exam(whole, Tasks.of(whole.world))


def items_of(exam: Exam, task: str, kind: str, count: int = 12):
    return [exam.tasks.draw(task, "train", number, kind=kind) for number in range(count)]


# What is handed in, and what it is worth


def test_truths_are_right_and_pictures_that_were_not_drawn_are_wrong(exam):
    items = items_of(exam, "text-to-image", "")
    right = single_pictures(exam, items, exam.truths(items))
    assert all(values.all() for values in right[MODEL].values())
    missing = single_pictures(exam, items, [None] * len(items))
    assert not any(values.any() for values in missing[MODEL].values())
    known = [other is not None for other in other_styles(exam.world, [item.targets[0] for item in items])]
    assert right[OTHER]["name"].tolist() == known and not right[OTHER]["style"].any()
    rebuilt = judged(exam, exam.artist.rebuild(exam.truths(items)), [item.targets[0] for item in items], ["picture"])
    assert np.array_equal(right[TOKENIZER]["picture"], rebuilt["picture"])


def test_only_the_missing_of_several_pictures_are_wrong(exam):
    items = items_of(exam, "text-to-image", "")
    handed_in = exam.truths(items)
    handed_in[3] = handed_in[7] = None
    right = single_pictures(exam, items, handed_in)[MODEL]["picture"]
    assert np.flatnonzero(~right).tolist() == [3, 7]


def test_every_attribute_is_right_only_where_all_of_them_are(exam):
    row = exam.world.index["woman: dark skin tone", "noto"]
    item = exam.tasks.draw("text-to-image", "test", 0, part=COMBINATION, kind="")
    names = {"woman: dark skin tone": (1, 1, 1), "man: dark skin tone": (0, 1, 0), "woman": (1, 0, 0)}
    for name, (gender, tone, every) in names.items():
        drawing = exam.world.pictures[exam.world.index[name, "noto"]]
        measures = ["noun", "gender", "tone", "every attribute"]
        right = {name: bool(values[0]) for name, values in judged(exam, [drawing], [row], measures).items()}
        assert right == {"noun": True, "gender": gender, "tone": tone, "every attribute": every}
    assert item.targets[0] in (row, exam.world.index["woman: dark skin tone", "twemoji"])


def test_what_an_edit_leaves_as_it_is_has_its_error_beside_the_tokenizers(exam):
    items = items_of(exam, "editing", "colour")
    handed_in = []
    for truth in exam.truths(items):
        handed_in.append(truth.copy())
        handed_in[-1][:32] += 3  # the half that no colour changes
    verdicts = changed_pictures(exam, items, handed_in)
    assert verdicts[MODEL]["picture"].all() and not verdicts[SOURCE]["picture"].any()
    result = change_figures(verdicts)["squared error of untouched pixels"]
    rebuilt = zip(exam.artist.rebuild(exam.truths(items)), exam.truths(items))
    own = np.mean([np.square(drawn[:32].astype(float) - truth[:32]).mean() for drawn, truth in rebuilt])
    assert result[MODEL] == 9 and result[TOKENIZER] == round(own, 2)
    assert result["ratio"] == round(9 / own, 3) and result["difference"]["n"] == len(items)


def test_a_change_of_all_pixels_has_no_error_of_untouched_ones(exam):
    items = items_of(exam, "editing", "style")
    verdicts = changed_pictures(exam, items, exam.truths(items))
    assert np.isnan(verdicts[MODEL]["untouched"]).all()
    assert "squared error of untouched pixels" not in change_figures(verdicts)


def test_a_sequence_wants_all_its_frames_and_no_others(exam):
    items = items_of(exam, "sequence", "hour", 2)
    truth = [[exam.world.pictures[row] for row in item.targets] for item in items]
    number = sum(map(len, truth))
    right = frames(exam, items, truth)
    assert all(values.all() for values in right[MODEL].values()) and len(right[MODEL]["frames"]) == number
    short = frames(exam, items, [truth[0], truth[1][:-1]])[MODEL]
    assert short["all frames"].tolist() == short["number of frames"].tolist() == [True, False]
    assert short["frames"].tolist() == [True] * (number - 1) + [False]
    longer = frames(exam, items, [[*truth[0], truth[0][0]], truth[1]])[MODEL]
    assert longer["all frames"].tolist() == [False, True] and longer["frames"].all()


def test_things_that_changed_places_are_wrong_in_position_alone(exam):
    items = [item for item in items_of(exam, "arrangement", "left", 40) if len(set(item.targets)) == 2]
    truths = exam.truths(items)
    right = arrangements(exam, items, truths)
    assert all(values.all() for values in right[MODEL].values())
    swapped = arrangements(exam, items, [np.roll(canvas, canvas.shape[1] // 2, axis=1) for canvas in truths])[MODEL]
    names = exam.world.names
    other = np.array([len({names[row] for row in item.targets}) == 2 for item in items])
    assert other.any() and not swapped["position"][other].any() and not swapped["every cell"].any()
    assert swapped["two objects"].all() and swapped["counting"].all()


def test_answers_are_compared_to_the_letter(exam):
    items = items_of(exam, "question", "style")
    truths = [item.assistant[0] for item in items]
    right = answers(exam, items, [truths[0], truths[1].upper(), *truths[2:-1], ""])
    assert right[MODEL]["exact"].tolist() == [True, False, *[True] * (len(items) - 3), False]
    drawn = (exam.tasks.draw("question", "train", number, kind="style") for number in range(scoring.TRAINING_ANSWERS))
    (frequent, _), *_ = Counter(item.assistant[0] for item in drawn).most_common()
    assert right[FREQUENT]["exact"].tolist() == [truth == frequent for truth in truths]


def test_items_of_another_wording_are_the_same(exam):
    few = Exam(exam.artist, exam.tasks, prompts=3)
    first, second = (few.items("question", "style", (SEEN,), wording) for wording in (0, 1))
    assert [item.targets for item in first] == [item.targets for item in second]
    assert {item.user[1] for item in first} == {"which style is it?"} and first[0].assistant == second[0].assistant
    assert {item.user[1] for item in second} == {"what is the style?"}


def test_items_of_a_group_are_its_targets_once_each_or_as_many_as_asked_for(exam):
    few = Exam(exam.artist, exam.tasks, prompts=5)
    everything = exam.items("text-to-image", "", (SEEN, PAIR))
    assert len({item.targets for item in everything}) == len(everything) > 20
    assert [item.targets for item in few.items("text-to-image", "", (SEEN, PAIR))] != everything[:5]
    assert len({item.targets for item in few.items("text-to-image", "", (SEEN, PAIR))}) == 5
    assert all(exam.world.splits[row] != "dev" for item in everything for row in item.targets)


# The artist


@pytest.mark.parametrize("task, kind", [("text-to-image", ""), ("editing", "colour"), ("arrangement", "row")])
def test_a_drawing_depends_on_the_number_of_its_prompt_and_not_on_its_batch(exam, task, kind):
    items = items_of(exam, task, kind, 6)
    together = exam.artist.draw(items)
    assert [drawing.shape for drawing in together] == [truth.shape for truth in exam.truths(items)]
    for drawing, alone in zip(together, exam.artist.draw(items[:2])):
        assert np.array_equal(drawing, alone)
    assert not np.array_equal(*exam.artist.draw([items[0], items[0]]))


def test_answers_in_text_and_in_turn_do_not_depend_on_their_batch(exam):
    items = items_of(exam, "captioning", "", 5)
    assert exam.artist.answer(items)[:2] == exam.artist.answer(items[:2])
    items = items_of(exam, "reasoning", "", 4)
    together, alone = exam.artist.interleave(items, 2), exam.artist.interleave(items[:2], 2)
    for (text, pictures), (text_alone, pictures_alone) in zip(together, alone):
        assert text == text_alone and len(pictures) == len(pictures_alone) <= 2
        assert all(np.array_equal(*pair) for pair in zip(pictures, pictures_alone))


def test_a_ramp_as_a_checkpoint_holds_it_is_one_at_either_level(exam):
    ramp = choose_sampling.setting(LinearRamp(1.0, 4.0))
    ramped = Artist(exam.artist.model, exam.artist.processor, exam.world, guidance_scale=ramp)
    result = drawings_32(Exam(ramped, exam.tasks, prompts=2))
    assert set(result) == {SEEN, PAIR, COMBINATION}


# Sheets


def test_a_panel_shows_its_pictures_enlarged_and_nothing_else_above_its_text(exam):
    first, second = exam.world.pictures[:2]
    pixels = np.asarray(panels.panel([first, second], "", height=128))
    assert np.array_equal(pixels[:128, :128], first.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(pixels[:128, 132:260], second.repeat(2, 0).repeat(2, 1))
    assert (pixels[128:] == 255).all() and not np.array_equal(pixels, panels.panel([first, second], "text"))
    assert panels.wrap("three words here", 11) == ["three words", "here"]


def test_a_sheet_shows_held_out_prompts_in_their_order_beside_the_truth(exam):
    (row,) = sheet.prompts(exam.artist, exam.tasks, count=2)
    items = [exam.tasks.draw("text-to-image", "test", number, part=PAIR, kind="") for number in range(2)]
    for cell, item, drawing in zip(row, items, exam.artist.draw(items), strict=True):
        expected = panels.panel([drawing, exam.world.pictures[item.targets[0]]], item.user[0])
        assert np.array_equal(cell, expected)
    kinds = sum(len(row) for row in sheet.edits(exam.artist, exam.tasks))
    assert kinds == len([kind for kind in KINDS["editing"] if exam.tasks.targets("editing", kind, "test", PAIR)])


def test_the_demo_needs_the_checkpoint_alone(emoji_checkpoint, tmp_path, capsys):
    demo.demo(tmp_path, emoji_checkpoint)
    names = {"drawing", "scales", "edit", "caption", "reasoning"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in names}
    assert Image.open(tmp_path / "scales.png").width > 6 * Image.open(tmp_path / "drawing.png").width
    assert len(capsys.readouterr().out.splitlines()) >= len(names)


# From a run to its card


@pytest.fixture(scope="module")
def scores(world_folder, emoji_checkpoint, tmp_path_factory):
    """What the command wrote."""
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    arguments = ["--model", emoji_checkpoint, "--data", world_folder, "--prompts", 2, "--output", path]
    arguments += ["--guidance-scale", 1.5, "--only", *GROUPS_SCORED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        evaluate.main()
    return json.loads(path.read_text())


GROUPS_SCORED = ("drawings", "captions", "edits", "reasoning", "sequences", "wordings")


def test_the_command_scores_the_groups_that_it_is_asked_for(scores):
    assert set(scores) == {"settings", "machine", "seconds", *GROUPS_SCORED}
    assert set(scores["seconds"]) == set(GROUPS_SCORED)
    assert scores["settings"]["sampling"]["guidance_scale"] == 1.5
    assert scores["drawings"][PAIR][MODEL]["picture"]["n"] == 2
    assert set(scores["captions"]) == {SEEN, PAIR, COMBINATION, NAME}
    assert scores["edits"]["all kinds"]["held out"][MODEL]["picture"]["n"] >= 3  # style, colour, gender, ...
    assert list(scores["wordings"]["question style"]) == ["which style is it?", "what is the style?"]
    assert all(set(levels) == {"64", "32"} for asked in scores["wordings"].values() for levels in asked.values())
    assert "hour" in scores["sequences"] and scores["reasoning"][PAIR]["difference"]["picture"]["n"] == 2


def test_reasoning_is_compared_on_the_same_tags(exam):
    """The figures without thoughts are those of the tags' own items of the same targets."""
    few = Exam(exam.artist, exam.tasks, prompts=2)
    thinking = few.items("reasoning", "", (PAIR,))
    rows = [item.targets[0] for item in thinking]
    texts = [f"{', '.join(exam.world.tags[row][:6])}, {exam.world.styles[row]}" for row in rows]
    assert [item.user[0] for item in thinking] == [f"think first: {text}" for text in texts]
    plain = [exam.tasks.draw("tags", "test", number, part=PAIR, kind="") for number in range(3)]
    by_row = {item.targets[0]: item for item in plain}
    assert [by_row[row].user[0] for row in rows] == texts
    right = judged(few, few.artist.draw([by_row[row] for row in rows]), rows, ["style"])["style"]
    assert reasoning(few)[PAIR]["tags alone"][MODEL]["style"]["score"] == right.mean()


def test_sampling_is_the_best_of_the_table(exam):
    result = choose_sampling.choose(Exam(exam.artist, exam.tasks, "dev"), (1.0, 2.0), (1.0, 0.5))
    assert [(row["guidance_scale"], row["temperature"]) for row in result["rows"]] == [
        *((1.0, 1.0), (1.0, 0.5)),
        *((2.0, 1.0), (2.0, 0.5)),
    ]
    best = max(row["picture"]["score"] for row in result["rows"])
    chosen = next(row for row in result["rows"] if row["picture"]["score"] == best)
    assert result["best"] == {name: chosen[name] for name in ("guidance_scale", "temperature")}
    assert chosen["picture"]["n"] == 2


@pytest.fixture
def run(emoji_checkpoint, tmp_path):
    """A run whose last stage was stopped after a save."""
    model = NextFlowForConditionalGeneration.from_pretrained(emoji_checkpoint)
    folder = tmp_path / "run"
    checkpoint = folder / "pretraining-64" / "checkpoint-3"
    model.save_pretrained(checkpoint)
    NextFlowProcessor.from_pretrained(emoji_checkpoint).save_pretrained(checkpoint)
    averages = {name: p + 0.25 for name, p in model.named_parameters() if p.requires_grad}
    save_file({name: average.detach().clone() for name, average in averages.items()}, checkpoint / "ema.safetensors")
    (folder / "sampling.json").write_text(json.dumps({"rows": [], "best": {"guidance_scale": 2.5}}))
    return folder


def assembled(run, world, output):
    model, processor, parts = assemble.assemble(run)
    sizes = assemble.save(model, processor, output, world.pictures[:8])
    return NextFlowForConditionalGeneration.from_pretrained(output).eval(), parts, sizes


def test_a_checkpoint_holds_the_average_and_codes_as_the_run_did(run, exam, tmp_path):
    model, parts, sizes = assembled(run, exam.world, tmp_path / "out")
    before = exam.artist.model
    assert parts["transformer"] == "pretraining-64, the average at checkpoint-3" and min(sizes.values()) > 0
    assert model.config.image_generation["guidance_scale"] == 2.5
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for name, parameter in before.named_parameters():
        if name.startswith("model.language_model"):
            expected = (parameter + 0.25).bfloat16().float()
            assert torch.equal(model.get_parameter(name), expected), name
    pixels = to_pixel_values(list(exam.world.pictures))
    assert torch.equal(model.model.vq_model.encode(pixels), before.model.vq_model.encode(pixels))
    chat = [{"role": "user", "content": "cat, noto"}]
    inputs = NextFlowProcessor.from_pretrained(tmp_path / "out").apply_chat_template(chat, generation_mode="image")
    assert model.generate(**inputs, generation_mode="image", seed=0).shape == (1, 155)


def test_weights_that_bfloat16_holds_are_stored_in_it(run, exam, tmp_path):
    model = NextFlowForConditionalGeneration.from_pretrained(run / "pretraining-64" / "checkpoint-3")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(run / "pretraining-64" / "checkpoint-3")
    _, _, sizes = assembled(run, exam.world, tmp_path / "out")
    assert sizes["float32"] == 0


def test_a_stored_tokenizer_that_codes_otherwise_is_refused(run, exam, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "CODES_DEPEND_ON", ("quantizer",))
    with pytest.raises(ValueError, match="gives other codes"):
        assembled(run, exam.world, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trained_decoder_is_taken_and_one_of_another_tokenizer_refused(run, exam, tmp_path):
    larger = prepare_vq_stage(exam.artist.model.model.vq_model, "decoder")
    with torch.no_grad():
        next(larger.pixel_decoder.parameters()).add_(1)
    larger.save_pretrained(run / "decoder")
    assert assemble.assemble(run)[2]["pixel decoder"] == "as the transformer was trained with"  # it is not finished
    (run / "decoder" / FINISHED).touch()
    model, parts, _ = assembled(run, exam.world, tmp_path / "out")
    assert parts["pixel decoder"] == "of the decoder's stage"
    assert model.config.vq_config.decoder_blocks == 2 * exam.artist.model.config.vq_config.decoder_blocks
    trained, stored = next(larger.pixel_decoder.parameters()), next(model.model.vq_model.pixel_decoder.parameters())
    assert torch.equal(stored, trained.bfloat16().float())
    with torch.no_grad():
        larger.quantizer.pixel_codebook.add_(1)
    larger.save_pretrained(run / "decoder")
    with pytest.raises(ValueError, match="the decoder of another vision tokenizer: quantizer.pixel_codebook"):
        assemble.assemble(run)


def test_a_run_without_a_transformer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no transformer"):
        assemble.assemble(tmp_path)


LOG = [
    {"stage": "pixel", "step": 25, "seconds": 1800.0, "loss": 1.0},
    {"stage": "pretraining-64", "step": 25, "seconds": 10.0, "loss": 2.0, "loss_text": 1.5, "loss_scale_1": 3.0},
    {"stage": "pretraining-64", "step": 25, "seconds": 1800.0, "loss": 2.0, "loss_text": 1.25, "loss_scale_1": 3.0},
]


def test_the_card_holds_every_figure_between_its_comments(scores):
    found = card.blocks(scores, {"entries unused": 0.01}, {"rows": []}, LOG)
    text = card.card(scores, found)
    for name, body in found.items():
        assert text.count(card.marked(name, body)) == 1, name
    pair = scores["drawings"][PAIR][MODEL]["style"]
    line = next(line for line in found["scores"].splitlines() if "held-out pairs: style" in line)
    assert f"{pair['score']:.2f} ({pair['low']:.2f}-{pair['high']:.2f})" in line and line.endswith("| 2 |")
    (summed,) = (line.split(" | ") for line in found["summary"].splitlines() if line.startswith("| its style"))
    best = max(figures["style"]["score"] for who, figures in scores["drawings"][PAIR].items() if who in (MEAN, OTHER))
    assert summed[2] == card.share(pair) and summed[4].split(" / ")[1] == f"{best:.2f}"
    assert "| all |  |  | 1.00 |" in found["training"]  # what was run again counts once
    assert "| 25 | 1.25 | 3.00 |" in found["curve"]


def test_the_card_counts_the_steps_of_a_stage_beyond_its_last_log():
    table = card.training_table([{"stage": "alignment", "step": step, "seconds": 2.0 * step} for step in (25, 50)])
    assert "| alignment | 60 | 32 packs of 192 positions, 4,000 documents | 0.03 |" in table


def test_the_card_names_the_stages_that_the_checkpoint_is_without():
    """That of the repository too."""
    log = [{"stage": stage, "step": 1, "seconds": 1.0} for stage in ("pixel", "alignment", "tuning-64", "decoder")]
    said = card.training_command(log)
    assert said.endswith("\nThe command goes on with `continued-64`, `covering-64`, which this checkpoint is without.")
    assert card.marked("command", said) in (DEFAULT_MODEL / "README.md").read_text()
    assert card.training_command([*log, {"stage": "covering-64"}]) == said.splitlines()[0]
    assert "with `tuning-64`, `continued-64`, `covering-64`, which" in card.training_command(LOG)


def test_blocks_of_a_text_are_renewed_and_the_rest_is_kept():
    text = "a <!-- scores -->\nold\n<!-- /scores --> b <!-- data -->\nold\n<!-- /data -->"
    renewed = card.renewed(text, {"scores": r"new \1", "other": "unused"})
    assert renewed == "a <!-- scores -->\nnew \\1\n<!-- /scores --> b <!-- data -->\nold\n<!-- /data -->"
