"""Where tokens stand: positions, scales, blocks, targets, and who sees whom."""

import pytest
import torch
from tiny_models import BOI, EOI, IMAGE, SQUARE, WIDE, Picture, batch_of, tiny_config, tiny_model

from transformers_nextflow import ScaleSchedule, ScheduleTable
from transformers_nextflow.layout import build_layout, num_image_slots, scale_coordinates
from transformers_nextflow.losses import fill_code_targets, shift_labels_of

A, CAT, OK = 10, 11, 12
TABLE = ScheduleTable([[(1, 1), (2, 2), (3, 3)], [(1, 1), (1, 2), (2, 4)]], {"all": 3}, patch_size=4)


def lay_out(ids, grids, table=TABLE, **kwargs):
    rows = ids if isinstance(ids[0], list) else [ids]
    return build_layout(torch.tensor(rows), grids, table, BOI, EOI, IMAGE, finest_edge=1.0, **kwargs)


def image(slots: int = 13) -> list[int]:
    return [BOI, *[IMAGE] * slots, EOI]


EXAMPLE = [A, CAT, *image(), OK]


def test_the_worked_example():
    layout = lay_out(EXAMPLE, [SQUARE])
    (span,) = layout.images
    assert (span.row, span.start, span.num_inputs, span.is_open) == (0, 2, 13, False)
    assert span.schedule == ScaleSchedule(((1, 1), (2, 2), (3, 3)))
    quarter, sixth = [1 / 4, 3 / 4], [1 / 6, 3 / 6, 5 / 6]
    expected = [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    expected += [(3, i, j) for i in quarter for j in quarter]
    expected += [(4, i, j) for i in sixth for j in sixth]
    expected += [(5, 5, 5), (6, 6, 6)]
    assert layout.position_ids.dtype == torch.float32
    torch.testing.assert_close(layout.position_ids[:, 0].T, torch.tensor(expected, dtype=torch.float32))
    assert layout.scale_ids[0].tolist() == [0, 0, 1, *[2] * 4, *[3] * 9, 0, 0]
    assert layout.num_scales[0].tolist() == [0, 0, *[3] * 14, 0, 0]
    blocks = layout.block_ids[0].tolist()
    assert blocks[:3] == [-1] * 3 and blocks[16:] == [-1] * 2
    assert len(set(blocks[3:7])) == len(set(blocks[7:16])) == 1 and -1 < blocks[3] != blocks[7] > -1


def test_targets_of_the_worked_example():
    layout = lay_out(EXAMPLE, [SQUARE])
    shifted = shift_labels_of(torch.tensor([EXAMPLE]), layout, BOI)
    codes = torch.arange(14)
    targets, weights = fill_code_targets(shifted, layout, [codes], text_vocab_size=100, alpha=0.9)
    assert targets[0].tolist() == [CAT, BOI, *(100 + codes).tolist(), OK, -100]
    raw = [1.0, *[4**-0.9] * 4, *[9**-0.9] * 9]
    expected = [1, 1, *(weight * 14 / sum(raw) for weight in raw), 1, 0]
    torch.testing.assert_close(weights[0], torch.tensor(expected))


def test_figure_5_of_the_paper():
    ids = [*image(), *range(10, 15), *image()]
    layout = lay_out(ids, [SQUARE, SQUARE])
    counter = [0, *[1] * 4, *[2] * 9, 3, 4, 5, 6, 7, 8, 9, *[10] * 4, *[11] * 9, 12]
    assert layout.position_ids[0, 0].tolist() == counter
    on_diagonal = [0, *range(14, 21), 34]
    for index in on_diagonal:
        assert layout.position_ids[:, 0, index].unique().numel() == 1
    assert torch.equal(layout.position_ids[1:, 0, 1:14], layout.position_ids[1:, 0, 21:34])
    blocks = layout.block_ids[0]
    assert len(blocks[blocks >= 0].unique()) == 4  # no block is shared by two images


def test_rows_come_before_columns_and_share_one_step():
    rows, columns = scale_coordinates((2, 4), finest_edge=8.0)
    step = 8.0 / 8**0.5
    torch.testing.assert_close(rows, step * torch.tensor([0.5] * 4 + [1.5] * 4))
    torch.testing.assert_close(columns, step * torch.tensor([0.5, 1.5, 2.5, 3.5] * 2))


def test_one_scale_is_legal():
    table = ScheduleTable([[(1, 1)]], {"all": 1}, patch_size=4)
    layout = lay_out([A, BOI, EOI, OK], [(1, 1)], table)
    assert layout.position_ids[0, 0].tolist() == [0, 1, 2, 3]
    assert layout.scale_ids[0].tolist() == [0, 1, 0, 0] and layout.block_ids.unique().tolist() == [-1]
    assert not layout.images[0].is_open and num_image_slots(layout.images[0].schedule) == 0
    shifted = shift_labels_of(torch.tensor([[A, BOI, EOI, OK]]), layout, BOI)
    targets, _ = fill_code_targets(shifted, layout, [torch.tensor([7])], 100, 0.9)
    assert targets[0].tolist() == [BOI, 107, OK, -100]
    with_last = lay_out([A, BOI, IMAGE, EOI, OK], [(1, 1)], table)
    assert with_last.images[0].has_last_scale and with_last.position_ids[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_condition_image_may_carry_its_last_scale():
    layout = lay_out([A, *image(13 + 9), OK], [SQUARE])
    assert layout.images[0].has_last_scale
    assert layout.scale_ids[0, 15:24].tolist() == [4] * 9
    assert layout.position_ids[0, 0, 15:].tolist() == [4] * 9 + [5, 6]
    assert torch.equal(layout.position_ids[1:, 0, 15:24], layout.position_ids[1:, 0, 6:15])
    assert len(layout.block_ids[0, 15:24].unique()) == 1 and layout.block_ids[0, 14] != layout.block_ids[0, 15]


def test_packed_documents_restart_the_counter():
    first, second = [*image(), OK], [A, CAT, *image(11 - 1), OK]
    documents = torch.tensor([[4] * len(first) + [9] * len(second) + [-1] * 2])
    packed = lay_out([*first, *second, 0, 0], [SQUARE, WIDE], document_ids=documents)
    alone = [lay_out(first, [SQUARE]), lay_out(second, [WIDE])]
    expected = torch.cat([layout.position_ids for layout in alone], dim=-1)
    assert torch.equal(packed.position_ids[..., :-2], expected)
    assert torch.equal(packed.scale_ids[:, :-2], torch.cat([layout.scale_ids for layout in alone], dim=-1))


def test_left_padding_does_not_count():
    short = [A, *image(10)]
    ids = [EXAMPLE, [0] * (len(EXAMPLE) - len(short)) + short]
    valid = torch.tensor([[1] * len(EXAMPLE), [0] * (len(EXAMPLE) - len(short)) + [1] * len(short)])
    layout = lay_out(ids, [SQUARE, WIDE], valid=valid)
    assert torch.equal(layout.position_ids[:, :1], lay_out(EXAMPLE, [SQUARE]).position_ids)
    assert torch.equal(layout.position_ids[:, 1:, -len(short) :], lay_out(short, [WIDE]).position_ids)
    assert (layout.block_ids[1, : -len(short)] == -1).all()


def test_a_row_may_end_in_an_open_image():
    layout = lay_out([[A, *image(), OK, BOI], [0] * 15 + [A, CAT, BOI]], [SQUARE, WIDE, SQUARE])
    assert [span.is_open for span in layout.images] == [False, True, True]
    assert len(layout.closed_images) == 1
    assert layout.scale_ids[:, -1].tolist() == [1, 1] and layout.num_scales[:, -1].tolist() == [3, 3]


def test_without_grids_every_token_is_text():
    layout = lay_out(EXAMPLE, None)
    assert layout.images == [] and layout.position_ids[:, 0].tolist() == [list(range(len(EXAMPLE)))] * 3


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        (EXAMPLE, [SQUARE, WIDE], r"hold 1 images \(<boi> tokens\), image_grid_hw has 2"),
        ([A, CAT], [SQUARE], "hold 0 images"),
        (EXAMPLE, [], "hold 1 images"),
        ([A, *image(12), OK], [SQUARE], r"takes 13 <image> tokens \(22 with its last scale\), got 12 in row 0"),
        ([A, *image(14), OK], [SQUARE], "got 14 in row 0"),
        ([A, BOI, EOI, OK], [SQUARE], "got 0 in row 0"),
        (EXAMPLE, [WIDE], r"final grid \(2, 4\) takes 10 <image> tokens"),
        ([A, IMAGE, *image()], [SQUARE], "<image> tokens that do not follow a <boi>"),
        ([A, *image(), IMAGE], [SQUARE], "<image> tokens that do not follow a <boi>"),
        ([A, BOI, *[IMAGE] * 13, OK], [SQUARE], f"must be followed by <eoi>, got id {OK}"),
        (EXAMPLE, [(5, 5)], r"no scale schedule ends in the grid \(5, 5\); nearest"),
    ],
)
def test_wrong_sequences_are_refused(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        lay_out(ids, grids)


def rule(documents: list[int], blocks: list[int]) -> torch.Tensor:
    """sees[q, k]: one document, no padding, and k <= q or one block; written out."""
    length = len(documents)
    sees = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            one_block = blocks[q] >= 0 and blocks[q] == blocks[k]
            sees[q, k] = documents[k] >= 0 and documents[q] == documents[k] and (k <= q or one_block)
    return sees


def influence(model, **inputs) -> torch.Tensor:
    """changes[b, k, q]: whether the output at q moves with the input at k, in a model of one layer."""
    batch, length = inputs["input_ids"].shape
    copies = {
        name: value.repeat(length, *[1] * (value.ndim - 1)) for name, value in inputs.items()
    }  # whole batches, one after the other

    def disturb(module, args, kwargs):
        hidden = args[0].clone()
        for k in range(length):
            hidden[k * batch : (k + 1) * batch, k] += torch.linspace(-1, 1, hidden.shape[-1])
        return (hidden, *args[1:]), kwargs

    with torch.no_grad():
        before = model.model(**copies).last_hidden_state
        handle = model.model.language_model.layers[0].register_forward_pre_hook(disturb, with_kwargs=True)
        after = model.model(**copies).last_hidden_state
        handle.remove()
    return ((after - before).abs().amax(-1) > 1e-6).view(length, batch, length).transpose(0, 1)


@pytest.fixture(scope="module", params=["sdpa", "eager", "blocks"])
def one_layer(request):
    config = tiny_config(text={"num_hidden_layers": 1})
    model = tiny_model(config)
    model.set_attn_implementation(request.param)
    return model


BLOCKS_SQUARE = [-1, *[0] * 4, *[1] * 9, -1]
BLOCKS_WIDE = [-1, *[2] * 2, *[3] * 8, -1]


def test_who_sees_whom_in_a_padded_batch(one_layer):
    inputs = batch_of(one_layer, [A, Picture(SQUARE), OK], [A, CAT, Picture(WIDE)])
    changes = influence(one_layer, **inputs)
    first, second = [-1, *BLOCKS_SQUARE, -1], [-1, -1, *BLOCKS_WIDE]
    assert torch.equal(changes[0].T, rule([0] * 17, first))
    padding = 17 - len(second)
    assert torch.equal(changes[1].T[padding:], rule([-1] * padding + [0] * 14, [-1] * padding + second)[padding:])


def test_who_sees_whom_in_packed_documents(one_layer):
    inputs = batch_of(one_layer, [A, Picture(SQUARE), OK, CAT, Picture(WIDE), A, OK, 0, 0])
    documents = [0] * 17 + [1] * 13 + [2] * 2 + [-1] * 2
    inputs["document_ids"] = torch.tensor([documents])
    del inputs["attention_mask"]
    blocks = [-1, *BLOCKS_SQUARE, -1, -1, *BLOCKS_WIDE, *[-1] * 4]
    assert len(blocks) == len(documents) == inputs["input_ids"].shape[1]
    changes = influence(one_layer, **inputs)[0].T
    assert torch.equal(changes[:-2], rule(documents, blocks)[:-2])


def test_who_sees_whom_in_packed_text(one_layer):
    documents = [0, 0, 0, 1, 1]
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "document_ids": torch.tensor([documents])}
    assert torch.equal(influence(one_layer, **inputs)[0].T, rule(documents, [-1] * 5))


def test_who_sees_whom_with_the_last_scale(one_layer):
    inputs = batch_of(one_layer, [A, Picture(SQUARE, last_scale=True), OK])
    blocks = [-1, *BLOCKS_SQUARE[:-1], *[4] * 9, -1, -1]
    assert torch.equal(influence(one_layer, **inputs)[0].T, rule([0] * 26, blocks))


def test_scale_blocks_refuse_flash_attention(one_layer):
    implementation = one_layer.config._attn_implementation
    one_layer.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot express scale blocks"):
        one_layer(**batch_of(one_layer, [A, Picture(SQUARE), OK]))
    one_layer.config.text_config._attn_implementation = implementation
