"""Checks of documents: what they hold, and what they cost, each on a case of its own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from transformers_nextflow.doctor import tokenizer
from transformers_nextflow.doctor.case import CODES, Document, Reading
from transformers_nextflow.doctor.documents import conditions, confidence, ends, familiar, frames, scales, varied
from transformers_nextflow.doctor.findings import Finding

TOY = Finding("toy", "documents", "that it is so")


def costing(targets: list[int], cost: float, scale: int = -1) -> Reading:
    count = len(targets)
    costs = torch.full((5, count), cost)
    return Reading(torch.tensor(targets), torch.full((count,), scale), costs, torch.zeros(count))


def together(*readings: Reading) -> Reading:
    """The positions of all of them, of one document."""
    return Reading(*(torch.cat(each, dim=-1) for each in zip(*readings)))


@pytest.mark.parametrize("cost, fault", [(0.2, None), (3.0, "worse than the unigram")])
def test_losses_stand_beside_those_by_frequency_in_the_other_documents(cost, fault):
    words = [[number % 2, 0, 0, 0] for number in range(16)]
    readings = [costing(each, cost) for each in words] + [costing([3, 3], 0.1, scale=1) for _ in range(12)]
    config = SimpleNamespace(text_vocab_size=4, vq_config=SimpleNamespace(codebook_size=8))
    case = SimpleNamespace(readings=readings, config=config, curves={})
    found = scales(TOY, case)
    assert found.fault == fault
    expected = []
    for number, own in enumerate(words):
        others = [word for at, each in enumerate(words) if at != number for word in each]
        shares = {word: (others.count(word) + 0.5) / (len(others) + 0.5 * 4) for word in own}
        expected.append(-np.mean([np.log(shares[word]) for word in own]))
    assert f"text {cost:.2f} ({np.mean(expected):.2f})" in found.measured
    alone = -np.log((22 + 0.5) / (22 + 0.5 * 8))
    assert f"scale 2 0.10 ({alone:.2f})" in found.measured
    assert case.curves["loss of each scale, nats a code"]["unigram"] == pytest.approx([alone], abs=1e-5)


@pytest.mark.parametrize(
    "supervised, cost, count, fault",
    [
        (1.0, 0.1, 12, None),
        (0.7, 0.1, 20, "ends not supervised"),
        (0.8, 0.1, 20, None),
        (1.0, 5.0, 12, "texts cut short"),
        (1.0, 5.0, 11, None),
    ],
)
def test_ends_of_texts_are_supervised_and_expected(supervised, cost, count, fault):
    end, words = 2, np.array([2, 8, 9, 2])  # an end that begins a document ends nothing
    flags = [np.array([False, True, True, number < supervised * count]) for number in range(count)]
    documents = [Document(words, each, [], []) for each in flags]
    drawing = Document(np.array([7, 2]), np.array([True, True]), [], [True])  # which ends in no text
    readings = [costing([8, 9, 2], 1.0) for _ in documents] + [costing([2], 9.0)]
    for reading in readings[:-1]:
        reading.costs_TN[:, 2] = cost
    tokens = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=end))
    case = SimpleNamespace(documents=[*documents, drawing], readings=readings, processor=tokens)
    found = ends(TOY, case)
    assert found.fault == fault, found.measured
    assert f"by their frequency {np.log(3):.2f}" in found.measured
    assert found.measured.startswith(f"{round(supervised * count)} of {count} are supervised; {count} cost {cost:.2f}")
    case.readings = []  # as of documents behind the first ones
    assert "0 cost nan nats, by their frequency 0.00" in ends(TOY, case).measured
    case.documents = [drawing]
    assert ends(TOY, case).severity == "unchecked"


def documents_of(count: int, change=lambda number, document: document) -> list[Document]:
    """Which draw pictures of eight codes of their own after prompts of their own."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        images = [((2, 2), rng.integers(0, 64, (1, 8)), np.zeros((0, 4), np.int64))]
        plain = Document(np.array([10 + number, 5]), np.array([False, True]), images, [True])
        made.append(change(number, plain))
    return made


def varied_of(documents: list[Document]) -> Finding:
    """Of documents whose tokens are words of one letter, after the null prompt `[10]`."""
    decode = lambda ids, skip_special_tokens: "".join(chr(97 + token % 26) for token in ids)  # noqa: E731
    processor = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode))
    case = SimpleNamespace(documents=documents, processor=processor, compact=np.asarray, null_prompt=[10])
    return varied(TOY, case)


@pytest.mark.parametrize("copies, fault", [(0, None), (10, None), (11, "documents repeated")])
def test_a_fifth_of_the_documents_may_be_copies(copies, fault):
    documents = documents_of(50)
    found = varied_of([*documents[: 50 - copies], *documents[:copies]])
    assert found.fault == fault and f"{copies} of 50 documents are copies" in found.measured


@pytest.mark.parametrize("times, fault", [(1, None), (12, None), (13, "one picture many times")])
def test_a_picture_may_stand_twelve_times_among_few(times, fault):
    one = documents_of(1)[0].images
    found = varied_of(documents_of(60, lambda number, it: it._replace(images=one) if number < times else it))
    assert found.fault == fault and f"of 60 pictures one stands {times} times" in found.measured


@pytest.mark.parametrize(
    "count, times, usual, fault",
    [
        (300, 15, 1, None),
        (300, 16, 1, "one picture many times"),
        (124, 16, 4, None),
        (124, 17, 4, "one picture many times"),
    ],
)
def test_a_picture_may_be_a_twentieth_or_four_times_as_frequent_as_others(count, times, usual, fault):
    pictures = [it.images for it in documents_of(count + usual)]
    chosen = [*[pictures[0]] * times, *(pictures[number // usual] for number in range(times + usual, count + usual))]
    found = varied_of(documents_of(count, lambda number, it: it._replace(images=chosen[number])))
    assert found.fault == fault and f"of {count} pictures one stands {times} times" in found.measured


@pytest.mark.parametrize("kept, times", [(8, 20), (6, 20), (5, 1)])
def test_codings_of_one_picture_are_alike_in_more_than_half_of_what_is_not_alike_in_all(kept, times):
    """Of pictures that have two of eight codes in common."""
    rng = np.random.default_rng(0)

    def draw(number, document):
        codes = np.append([7, 7], np.arange(6) + 6 * number)[None]
        if number < 20:
            codes[0, 2:kept] = np.arange(1000, 998 + kept)
        return document._replace(images=[((2, 2), codes, rng.integers(0, 64, (0, 4)))])

    assert f"of 60 pictures one stands {times} times" in varied_of(documents_of(60, draw)).measured


@pytest.mark.parametrize(
    "bare, count, fault",
    [
        (12, 24, None),
        (13, 24, "prompts without text"),
        (7, 12, "prompts without text"),
        (6, 12, None),
        (11, 11, None),
    ],
)
def test_half_of_the_prompts_may_be_the_null_prompt(bare, count, fault):
    flags = np.array([False, True])
    found = varied_of(
        documents_of(count, lambda number, it: it._replace(ids=np.array([10 + (number >= bare), 5]), flags=flags))
    )
    assert found.fault == fault and f"{bare} of {count} prompts of drawings are the null prompt" in found.measured


@pytest.mark.parametrize(
    "given, count, length, fault",
    [
        (4, 20, 10, None),
        (5, 20, 10, "answers given away"),
        (20, 20, 9, None),
        (3, 12, 10, "answers given away"),
        (11, 11, 10, None),
    ],
)
def test_a_fifth_of_the_answers_may_stand_in_their_prompts(given, count, length, fault):
    def answer(number, document):
        words = np.random.default_rng(number).integers(0, 26, 2 * length)
        ids = np.concatenate([words[:length], words[:length] if number < given else words[length:]])
        return Document(ids, np.arange(2 * length) >= length, [], [])

    found = varied_of(documents_of(count, answer))
    assert found.fault == fault
    assert (f"{given} of {count} answers" if length == 10 else "0 of 0 answers") in found.measured


@pytest.mark.parametrize("way", ["mirrored", "upside down", "with colours exchanged", "in negative", "transposed"])
def test_pictures_that_were_turned_are_likelier_turned_back(way):
    """Of a tokenizer whose codes are the pixels, and a model that knows every picture."""
    pixels = [torch.randint(1, 64, (1, 3, 2, 2), generator=torch.Generator().manual_seed(seed)) for seed in range(24)]
    stored = [tokenizer.turned(each)[way].flatten(1) for each in pixels]

    def read(row):
        is_known = any(torch.equal(row["image_codes"], each.flatten()) for each in pixels)
        return costing([0] * 12, 0.1 if is_known else 3.0, scale=0)

    def decode(codes, grid):
        assert grid == (2, 2)
        return codes.view(1, 3, 2, 2)

    row_of = lambda document: dict.fromkeys(CODES, document.images[0][1][0])  # noqa: E731
    documents = [Document(np.array([0]), np.array([True]), [((2, 2), codes, None)], [True]) for codes in stored]
    both = [together(costing([1], 3.0, 0), costing([1], 3.0, 1))] * 24
    case = SimpleNamespace(documents=documents, readings=both, read=read, row_of=row_of)
    case.decoded = lambda row: row["image_codes"][None]
    case.vq_model = SimpleNamespace(decode=decode, encode=lambda pixels: pixels.flatten(1))
    assert familiar(TOY, case).fault == f"pictures {way}"


@pytest.mark.parametrize(
    "gain, spread, fault",
    [
        (1.6, 0.0, "pictures mirrored"),
        (1.4, 0.0, "unfamiliar pictures"),  # less than half of 3 nats too many
        (2.0, 4.0, "pictures mirrored"),  # 2.4 standard errors
        (2.0, 5.5, "unfamiliar pictures"),  # 1.7
    ],
)
def test_what_turns_pictures_back_saves_half_of_what_they_cost_too_much(gain, spread, fault):
    pixels = [torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(24)]

    def read(row):
        number = row["number"]
        is_mirrored = torch.equal(row["image_codes"], pixels[number].flip(-1).flatten())
        return costing([0] * 12, 10.0 - (gain + (-1) ** number * spread) * is_mirrored, scale=0)

    row_of = lambda document: {"number": document.ids[0]} | dict.fromkeys(CODES, document.images[0][1][0])  # noqa: E731
    documents = [
        Document(np.array([n]), np.array([True]), [((2, 2), it.flatten(1), None)], [True])
        for n, it in enumerate(pixels)
    ]
    both = [together(costing([1], 3.0, 0), costing([1], 3.0, 1))] * 24
    case = SimpleNamespace(documents=documents, readings=both, read=read, row_of=row_of)
    case.decoded = lambda row: row["image_codes"][None]
    case.vq_model = SimpleNamespace(
        decode=lambda codes, grid: codes.view(1, 3, 2, 2), encode=lambda pixels: pixels.flatten(1)
    )
    assert familiar(TOY, case).fault == fault


SYSTEM, START, END, USER, ASSISTANT, LINE, SPELLED = 13, 6, 4, 10, 11, 12, 30
HEAD, TAIL = [START, SYSTEM, END, START, USER, LINE], [END, LINE, START, ASSISTANT, LINE]


def frames_of(documents: list[Document], frame=(HEAD, TAIL)) -> Finding:
    """Of documents whose tokens are letters, but for six special ones."""
    shown = {number: f"<{number}>" for number in range(1, 7)} | {SPELLED: f"<{START}>"}
    tokens = SimpleNamespace(
        added_tokens_decoder={number: shown[number] for number in range(1, 7)},
        convert_ids_to_tokens=lambda ids: [shown[token] for token in ids],
        decode=lambda ids: "".join(shown.get(token, chr(64 + token)) for token in ids),
    )
    special = SimpleNamespace(boi=1, eoi=2, image=3, eos=END, pad=5)
    case = SimpleNamespace(documents=documents, frame=frame, spec=SimpleNamespace(special=special))
    case.processor = SimpleNamespace(tokenizer=tokens)
    return frames(TOY, case)


def chat(number: int, head=HEAD, tail=TAIL, said=0, asked=False, turns=1) -> Document:
    """Of turns whose answers are supervised, and in the last turn what the user says, if `asked`."""
    ids, flags = [], []
    for turn in range(turns):
        question = [40 + number, 21, said or 22, *[23] * 20]
        ids += [*(head if turn == 0 else [START, USER, LINE]), *question, *tail, 24, 25, END, LINE]
        flags += [False] * (len(ids) - len(flags) - 4) + [True] * 3 + [False]
        if asked and turn == turns - 1:
            flags[-len(tail) - 8] = True
    return Document(np.array(ids), np.array(flags), [], [])


OTHER_HEAD, OTHER_TAIL, ROLES = [START, USER, LINE], [END, START, ASSISTANT, LINE], [START, ASSISTANT, LINE]
TEMPLATE = "another chat template"


@pytest.mark.parametrize(
    "most, others, count, fault, shown",
    [
        ({}, {}, 0, None, "0 of 20 chats do not turn to the answer with '<4>L<6>KL'"),
        ({}, {"head": OTHER_HEAD}, 4, None, "0 of 20 chats do not turn"),
        ({}, {"head": OTHER_HEAD}, 5, TEMPLATE, "5 of 20 chats do not open with '<6>M<4><6>JL', as "),
        ({}, {"tail": OTHER_TAIL}, 4, None, "4 of 20 chats do not turn to the answer with"),
        ({}, {"tail": OTHER_TAIL}, 5, TEMPLATE, "5 of 20 chats do not turn to the answer with"),
        ({"head": OTHER_HEAD}, {"head": ROLES}, 4, TEMPLATE, "20 of 20 chats do not open with"),
        ({"head": OTHER_HEAD}, {"head": ROLES}, 5, "roles exchanged", "20 of 20 chats do not open with"),
        ({}, {"said": SPELLED}, 1, None, "; 1 have it as text"),
        ({}, {"said": SPELLED}, 2, TEMPLATE, "; 2 have it as text"),
        ({}, {"asked": True}, 1, None, "1 turns of users are targets"),
        ({}, {"asked": True}, 2, "questions supervised", "2 turns of users are targets"),
        ({"turns": 2}, {"turns": 2, "asked": True}, 2, "questions supervised", "2 turns of users are targets"),
        ({"turns": 2}, {}, 0, None, "0 turns of users are targets"),
    ],
)
def test_chats_are_framed_as_prompts_are(most, others, count, fault, shown):
    documents = [chat(number, **(others if number < count else most)) for number in range(20)]
    found = frames_of(documents)
    assert found.fault == fault and shown in found.measured, found.measured
    if shown.endswith("as "):  # the first of them, as far as 24 tokens
        assert f"{shown}'<6>JLhUV{'W' * 18}';" in found.measured


def test_fewer_than_twelve_chats_are_not_checked():
    texts = [Document(np.array([1, 3, 2, 20, END, 5]), np.zeros(6, bool), [], [])] * 9
    found = frames_of([*map(chat, range(11)), *texts])
    assert found.severity == "unchecked" and found.measured == "11 documents are chats"
    assert frames_of([*map(chat, range(12)), *texts]).severity == "ok"


def test_a_template_may_turn_to_the_answer_without_a_control_token():
    tail = [END, LINE, ASSISTANT]
    assert frames_of([chat(number, tail=tail) for number in range(20)], (HEAD, tail)).fault is None
    documents = [chat(number, tail=tail, asked=True) for number in range(20)]
    assert frames_of(documents, (HEAD, tail)).fault == "questions supervised"


def edit(number: int, same: int = 0, exchanged=False, prompt=None, grid=(2, 2)) -> Document:
    """Which shows a picture and draws that of a number 100 higher, which the prompt says; `same` codes as shown."""
    shown, drawn = np.full((2, 4), number), np.full((2, 4), number + 100)
    drawn[0, 4 - same :] = shown[0, 4 - same :]
    shown[1], drawn[1] = -1, -2  # another coding, which nothing looks at
    images = [((2, 2), shown, None), (grid, drawn, None)]
    ids = np.array([number if prompt is None else prompt, 3, 3])
    return Document(ids, np.array([False, False, True]), images[:: -1 if exchanged else 1], [False, True])


def text(number: int) -> Document:
    return Document(np.array([number, 5, 6]), np.array([False, True, True]), [], [])


def conditions_of(documents: list[Document], rises=None) -> tuple[Finding, int]:
    """Of a model that knows what [`edit`] makes; and how many rows it reads. `rises`: of texts after other prompts."""
    calls, rises = [], iter(rises or ())

    def read(row):
        calls.append(row)
        prompt, codes = row["ids"][0], row["image_codes"]
        if not len(codes):
            return costing([5, 6], 1.0 + next(rises, 1.0))
        wrong = float(prompt + 100 != codes[4]) + float(codes[0] + 100 != codes[4])
        return together(costing([1], 1.0 + wrong, 0), costing([1], 7.0))

    def row_of(document):
        codes = [torch.from_numpy(targets[0]) for _, targets, _ in document.images]
        return {"ids": document.ids} | dict.fromkeys(CODES, torch.cat([torch.empty(0), *codes]))

    case = SimpleNamespace(documents=documents, row_of=row_of, read=read)
    case.readings = [read(row_of(it)) if it.images else costing([5, 6], 1.0) for it in documents]
    calls.clear()
    return conditions(TOY, case), len(calls)


PLACE = "shown and drawn pictures in each other's place"


@pytest.mark.parametrize(
    "documents, fault, shown",
    [
        (
            [*map(edit, range(24))],
            None,
            f"{PLACE} +2.000, prompt (1 shown) before pictures +1.000, pictures before pictures +1.000; 0 draw what",
        ),
        ([edit(n, same=3 * (n < 4)) for n in range(24)], None, "; 4 draw what they show"),
        ([edit(n, same=3 * (n < 5)) for n in range(24)], "pictures repeated", "; 5 draw what they show"),
        ([edit(n, same=2) for n in range(24)], None, "; 0 draw what they show"),
        ([edit(n, same=3) for n in range(12)], "pictures repeated", "; 12 draw what they show"),
        ([*(edit(n, same=3) for n in range(11)), *map(text, range(13))], None, "; 11 draw what they show"),
        ([edit(n, exchanged=True) for n in range(24)], "pictures exchanged", f"{PLACE} -2.000"),
        ([edit(n, grid=(1, 4), same=3) for n in range(24)], None, "before pictures +1.000; 0 draw what they show"),
        ([edit(n, prompt=500) for n in range(24)], None, f": {PLACE} +1.000, pictures before pictures +1.000; 0"),
    ],
)
def test_pictures_that_are_drawn_are_others_than_those_shown(documents, fault, shown):
    """Documents without a target, or that draw before they show, say nothing."""
    silent = edit(0)._replace(flags=np.zeros(3, bool)), edit(0)._replace(draws=[True, False])
    found, _ = conditions_of([*silent, *documents])
    assert found.fault == fault and shown in found.measured, found.measured


@pytest.mark.parametrize("mean, fault", [(0.6, None), (0.35, "prompt ignored")])
def test_prompts_that_say_little_are_heeded(mean, fault):
    """At 2.9 standard errors, not at 1.7."""
    found, _ = conditions_of([*map(text, range(25))], [mean + (-1) ** n for n in range(24)])
    assert found.fault == fault and f"prompt (0 shown) before texts {mean:+.3f}; 0 draw" in found.measured


def test_twelve_of_a_kind_are_needed_and_thirty_two_are_read():
    few, _ = conditions_of([*map(text, range(12))])
    assert few.severity == "unchecked" and few.measured == "fewer than 12 documents of a kind answer something"
    assert conditions_of([*map(text, range(13))])[0].severity == "ok"
    assert [conditions_of([*map(text, range(count))])[1] for count in (33, 40)] == [32, 32]


@pytest.mark.parametrize(
    "half, twice, fault",
    [
        ([0.97, 1.94], [2.0, 2.0], "logits too large"),
        ([0.97, 1.97], [2.0, 2.0], None),
        ([0.985, 1.94], [2.0, 2.0], None),
        ([2.0, 2.0], [0.97, 1.94], "logits too small"),
        ([2.0, 2.0], [0.985, 1.97], None),
    ],
)
def test_at_every_scale_a_fiftieth_is_to_be_saved_by_other_logits(half, twice, fault):
    costs = [torch.tensor([t, 0.1, own, 0.1, h])[:, None] for own, h, t in zip((1.0, 2.0), half, twice)]
    readings = [Reading(torch.tensor([1]), torch.tensor([n]), cost, torch.zeros(1)) for n, cost in enumerate(costs)]
    found = confidence(TOY, SimpleNamespace(readings=[*readings, costing([1], 3.0)]))
    assert found.fault == fault
    assert f"1.50 nats a code, mean of scales, with half the logits {np.mean(half):.2f}" in found.measured
    assert f"with twice {np.mean(twice):.2f}" in found.measured
    assert confidence(TOY, SimpleNamespace(readings=[costing([1], 3.0)])).severity == "unchecked"


def surprising(surprise: list[float], of_text: float, noise=0.0, tilt=0.0, outliers=(), count: int = 24) -> Finding:
    """Of documents that cost more than expected by the given nats: codes of each scale, and text. `tilt`: as noise,
    with the other sign behind the first two scales."""

    def reading(number):
        more = outliers[number] if number < len(outliers) else noise * (-1) ** number
        tilts = [tilt * (-1) ** (number + (at > 1)) for at in range(len(surprise))]
        costs = torch.tensor([2.0 + each + more + other for each, other in zip(surprise, tilts)] + [2.0 + of_text])
        scales = torch.tensor([*range(len(surprise)), -1])
        return Reading(torch.full_like(scales, 7), scales, costs.expand(5, -1), torch.full_like(costs, 2.0))

    decode = lambda ids: f"token {ids[0]}"  # noqa: E731
    case = SimpleNamespace(documents=[], processor=SimpleNamespace(tokenizer=SimpleNamespace(decode=decode)))
    case.readings = [reading(number) for number in range(count)]
    return familiar(TOY, case)


PICTURES, TEXTS, FIT = "unfamiliar pictures", "unfamiliar texts", "texts do not fit their pictures"


@pytest.mark.parametrize(
    "scales, text, more, fault",
    [
        ([0.25] * 4, 0.0, {}, None),
        ([0.35] * 4, 0.0, {}, PICTURES),
        ([0.35] * 4, 0.0, {"noise": 0.35}, PICTURES),  # 4.8 standard errors
        ([0.35] * 4, 0.0, {"noise": 0.48}, None),  # 3.5
        ([0.0, 0.0, 0.0, 0.55], 0.0, {}, None),
        ([0.0, 0.0, 0.0, 0.65], 0.0, {}, PICTURES),
        ([0.0, 0.0, 0.0, 0.65], 0.0, {"noise": 0.7}, PICTURES),  # 4.5 standard errors
        ([0.0, 0.0, 0.0, 0.65], 0.0, {"noise": 0.85}, None),  # 3.7
        ([0.0, 0.0, 0.65, 0.65], 0.0, {}, PICTURES),
        ([-0.5, -0.5, -0.5, 2.1], 0.0, {}, "codes of scale 4 in disorder"),
        ([-0.5, -0.5, -0.5, 1.9], 0.0, {}, PICTURES),
        ([0.25, 0.25, 0.25, 2.1], 0.0, {}, "codes of scale 4 in disorder"),
        ([0.35, 0.25, 0.25, 2.1], 0.0, {}, PICTURES),
        ([-0.5, -0.5, 2.1, 2.1], 0.0, {}, PICTURES),
        ([0.0] * 4, 0.55, {}, None),
        ([0.0] * 4, 0.65, {}, TEXTS),
        ([0.0] * 4, 2.1, {}, TEXTS),
        ([0.0, 0.0, 0.0, 0.65], 0.65, {}, "unfamiliar documents"),
        ([0.5, 0.5, -0.2, -0.2], 0.0, {}, FIT),
        ([0.5, 0.5, -0.2, -0.2], 0.0, {"tilt": 0.3}, FIT),  # 5.6 standard errors
        ([0.5, 0.5, -0.2, -0.2], 0.0, {"tilt": 0.5}, None),  # 3.4
        ([0.4, 0.4, -0.15, -0.15], 0.0, {}, None),
        ([0.9, 0.9, 0.2, 0.2], 0.0, {}, PICTURES),
        ([0.0] * 4, 0.0, {"outliers": [1.3]}, None),  # of 24
        ([0.0] * 4, 0.0, {"outliers": [1.3] * 2}, PICTURES),
        ([0.0] * 4, 0.0, {"outliers": [1.1] * 2}, None),
        ([0.1, 0.1], 0.0, {}, None),  # and no other scales to compare these with
    ],
)
def test_what_is_surprising_is_named(scales, text, more, fault):
    found = surprising(scales, text, **more)
    assert found.fault == fault, found.measured
    assert ("+nan above the others" in found.measured) is (len(scales) == 2)
    assert f"most of all 'token 7' {text:+.2f}" in found.measured


@pytest.mark.parametrize("count, fault", [(20, None), (19, PICTURES)])
def test_one_of_twenty_pictures_may_be_strange(count, fault):
    found = surprising([0.0] * 4, 0.0, outliers=[1.3], count=count)
    assert found.fault == fault and f"above 1.2 1 of {count}" in found.measured
