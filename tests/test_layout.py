"""Where tokens stand: positions, scales, blocks, targets, and who sees whom."""

import pytest
import torch
from accelerate.utils import send_to_device
from tiny_models import BOI, EOI, IMAGE, SQUARE, WIDE, Picture, batch_of, relative, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_nextflow import ScaleSchedule
from transformers_nextflow.layout import (
    build_layout,
    find_images,
    num_image_slots,
    scale_coordinates,
    text_positions,
)

A, CAT, OK = 10, 11, 12
CONFIG = tiny_config(position_scale=1.0)
ONE_SCALE = tiny_config(position_scale=1.0, vq={"scale_schedules": [[[1, 1]]], "levels": {"12": 1}})


def lay_out(ids, grids, config=CONFIG, **kwargs):
    rows = ids if isinstance(ids[0], list) else [ids]
    return build_layout(config, torch.tensor(rows), grids, **kwargs)


def spans(ids, grids, config=CONFIG):
    rows = ids if isinstance(ids[0], list) else [ids]
    return find_images(config, torch.tensor(rows), grids)


def image(slots: int = 13) -> list[int]:
    return [BOI, *[IMAGE] * slots, EOI]


EXAMPLE = [A, CAT, *image(), OK]


def test_the_worked_example():
    layout = lay_out(EXAMPLE, [SQUARE])
    (span,) = spans(EXAMPLE, [SQUARE])
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
    layout = lay_out(EXAMPLE, [SQUARE], labels=torch.tensor([EXAMPLE]))
    assert layout.supervised.tolist() == list(range(17))
    assert layout.target_codes.tolist() == [-1, -1, *range(14), -1]
    assert layout.targets[layout.target_codes < 0].tolist() == [CAT, BOI, OK]
    raw = [1.0, *[4**-0.9] * 4, *[9**-0.9] * 9]
    expected = [1, 1, *(weight * 14 / sum(raw) for weight in raw), 1]
    torch.testing.assert_close(layout.weights, torch.tensor(expected))


def test_places_count_through_the_batch():
    rows = [[A, *image(), OK], [0] * 4 + [BOI, *[IMAGE] * 10, EOI, A]]
    layout = lay_out(rows, [SQUARE, WIDE], attention_mask=torch.tensor([[1] * 17, [0] * 4 + [1] * 13]))
    assert layout.image_places.tolist() == [*range(1, 15), *range(21, 32)]
    assert layout.slot_places.tolist() == [*range(2, 15), *range(22, 32)]
    assert layout.coarse_places.tolist() == [*range(5), *range(14, 17)]
    used = layout.taps.places[layout.taps.weights != 0].unique()
    assert used.tolist() == layout.coarse_places.tolist(), "all but the last scales are read"
    per_slot = torch.zeros(23).index_add_(
        0,
        torch.bucketize(torch.arange(len(layout.taps.places)), layout.taps.starts, right=True) - 1,
        layout.taps.weights,
    )
    torch.testing.assert_close(per_slot, torch.ones(23))
    assert layout.supervised is layout.targets is layout.target_codes is layout.weights is None


def test_a_layout_goes_to_a_device_as_a_whole():
    layout = lay_out(EXAMPLE, [SQUARE], labels=torch.tensor([EXAMPLE])).to("meta")
    tensors = [*layout.taps, *(each for each in vars(layout).values() if isinstance(each, torch.Tensor))]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and len(tensors) == 14
    assert layout.position_ids.dtype == torch.float32
    assert lay_out(EXAMPLE, [SQUARE]).to("meta").targets is None


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
    ids = [A, BOI, EOI, OK]
    layout = lay_out(ids, [(1, 1)], ONE_SCALE, labels=torch.tensor([ids]))
    assert layout.position_ids[0, 0].tolist() == [0, 1, 2, 3]
    assert layout.scale_ids[0].tolist() == [0, 1, 0, 0] and layout.block_ids.unique().tolist() == [-1]
    (span,) = spans(ids, [(1, 1)], ONE_SCALE)
    assert not span.is_open and num_image_slots(span.schedule) == 0
    assert not spans(ids[:3], [(1, 1)], ONE_SCALE)[0].is_open
    assert layout.supervised.tolist() == [0, 1, 2] and layout.target_codes.tolist() == [-1, 0, -1]
    assert layout.targets[[0, 2]].tolist() == [BOI, OK]
    ids = [A, BOI, IMAGE, EOI, OK]
    assert spans(ids, [(1, 1)], ONE_SCALE)[0].has_last_scale
    assert lay_out(ids, [(1, 1)], ONE_SCALE).position_ids[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_condition_image_may_carry_its_last_scale():
    ids = [A, *image(13 + 9), OK]
    layout = lay_out(ids, [SQUARE])
    assert spans(ids, [SQUARE])[0].has_last_scale
    assert layout.taps.places[layout.taps.starts[13:]].tolist() == list(range(5, 14))
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
    layout = lay_out(ids, [SQUARE, WIDE], attention_mask=valid)
    assert torch.equal(layout.position_ids[:, :1], lay_out(EXAMPLE, [SQUARE]).position_ids)
    assert torch.equal(layout.position_ids[:, 1:, -len(short) :], lay_out(short, [WIDE]).position_ids)
    assert (layout.block_ids[1, : -len(short)] == -1).all()
    assert not layout.position_ids[:, 1, : -len(short)].any()


@pytest.mark.parametrize("valid", [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], ids=["right", "left"])
def test_a_mask_counts_beside_documents(valid):
    """Padding has no target, and its neighbours the positions and targets they have without documents."""
    ids, valid = torch.tensor([[10, 11, 12, 13, 14, 15]]), torch.tensor([valid])
    alone = build_layout(CONFIG, ids, None, valid, labels=ids)
    packed = build_layout(CONFIG, ids, None, valid, torch.zeros_like(ids), labels=ids)
    assert torch.equal(packed.position_ids, alone.position_ids)
    assert torch.equal(text_positions(ids, valid), alone.position_ids)
    assert torch.equal(packed.supervised, alone.supervised) and torch.equal(packed.targets, alone.targets)
    assert not set(packed.supervised.tolist()) & set((valid == 0).flatten().nonzero().flatten().tolist())


def test_labels_of_text_are_its_ids():
    """The first and the last text row too; nothing else."""
    top = CONFIG.text_vocab_size - 1
    layout = build_layout(CONFIG, torch.tensor([[1, 0, top]]), labels=torch.tensor([[1, 0, top]]))
    assert layout.targets.tolist() == [0, top]
    for label in (-1, top + 1):
        with pytest.raises(ValueError, match=rf"labels of text must be -100 or lie in \[0, {top + 1}\)"):
            build_layout(CONFIG, torch.tensor([[1, 1]]), labels=torch.tensor([[1, label]]))


def test_padding_of_a_pack_has_no_targets():
    """Whatever its labels say, of text and of images."""
    row = [A, CAT, *image()]
    ids = torch.tensor([[*row, *row]])
    documents = torch.tensor([[0] * len(row) + [-1] * len(row)])
    layout = build_layout(CONFIG, ids, [SQUARE, SQUARE], document_ids=documents, labels=ids)
    assert layout.supervised.max() < len(row)
    masked = build_layout(CONFIG, ids, [SQUARE, SQUARE], (documents == 0).long(), labels=ids)
    assert masked.supervised.max() < len(row)


def test_a_row_may_end_in_an_open_image():
    rows, grids = [[A, *image(), OK, BOI], [0] * 15 + [A, CAT, BOI]], [SQUARE, WIDE, SQUARE]
    layout = lay_out(rows, grids)
    assert [span.is_open for span in spans(rows, grids)] == [False, True, True]
    assert [span.num_codes for span in spans(rows, grids)] == [14, 0, 0]
    assert layout.scale_ids[:, -1].tolist() == [1, 1] and layout.num_scales[:, -1].tolist() == [3, 3]


def test_without_grids_every_token_is_text():
    layout = lay_out(EXAMPLE, None)
    assert len(layout.image_places) == 0 and layout.position_ids[:, 0].tolist() == [list(range(len(EXAMPLE)))] * 3


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        (EXAMPLE, [SQUARE, WIDE], r"hold 1 images \(<boi> tokens\), image_grid_hw has 2"),
        ([A, CAT], [SQUARE], "hold 0 images"),
        (EXAMPLE, [], "hold 1 images"),
        ([A, *image(12), OK], [SQUARE], r"takes 13 <image> tokens \(22 with its last scale\), got 12 in row 0"),
        ([A, *image(14), OK], [SQUARE], "got 14 in row 0"),
        ([A, BOI, EOI, OK], [SQUARE], "got 0 in row 0"),
        ([A, BOI, *[IMAGE] * 4, EOI], [SQUARE], "got 4 in row 0"),
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


@pytest.mark.parametrize(
    "ids", [torch.zeros(4, dtype=torch.long), torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(1, 4)]
)
def test_other_ids_than_rows_of_integers_are_refused(ids):
    with pytest.raises(ValueError, match=r"input_ids must hold int64 in 2 dimensions, got .* of the shape \("):
        build_layout(tiny_config(), ids)


# What forward does with a layout


def training_batch(model) -> dict[str, torch.Tensor]:
    """Two documents in one row, one after padding in another; a picture is only read."""
    first = [A, Picture(SQUARE), OK, CAT, Picture(WIDE, 1, last_scale=True), A, 13]
    batch = batch_of(model, first, [CAT, Picture(WIDE, 2), OK, A])
    valid = batch.pop("attention_mask").bool()
    labels = batch["input_ids"].masked_fill(~valid, -100)
    labels[0, 18:37] = -100
    documents = torch.where(valid, 0, -1)
    documents[0, 17:] = 1
    return batch | {"labels": labels, "document_ids": documents}


class Watch(TorchDispatchMode):
    """Operations whose result has to be known before the next can be given to a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "equal")

    def __init__(self):
        super().__init__()
        self.seen, self.waits = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.seen.append(name)
        if by_mask or name in self.WAITING:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_forward_never_waits_for_the_device(packed):
    model = tiny_model().train()
    batch = training_batch(model)
    if not packed:
        del batch["document_ids"]
    layout = build_layout(model.config, **batch)
    with Watch() as watch:
        loss = model(**batch, layout=layout, use_cache=False, logits_over="none").loss
    assert watch.waits == [] and "_embedding_bag" in watch.seen
    with Watch() as watch:
        assert torch.equal(model(**batch, use_cache=False, logits_over="none").loss, loss)
    assert "nonzero" in watch.waits, "without a layout forward makes one"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_training_forward_is_one_graph(backend):
    model = tiny_model(tiny_config({"num_hidden_layers": 1})).train()
    batch = training_batch(model)
    batch["layout"] = build_layout(model.config, **batch)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    losses, gradients = [], []
    for run in (model, compiled):
        loss = run(**batch, use_cache=False, logits_over="none").loss
        losses.append(loss.detach())
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        gradients.append(dict(zip(dict(named), torch.autograd.grad(loss, [each for _, each in named]))))
    torch.testing.assert_close(losses[1], losses[0])
    for name, gradient in gradients[0].items():
        assert relative(gradients[1][name], gradient) < 1e-4, name


def test_a_layout_needs_codes(one_layer):
    batch = batch_of(one_layer, [A, Picture(SQUARE), OK])
    layout = build_layout(one_layer.config, **batch)
    with pytest.raises(ValueError, match="a layout goes with image_codes, got pixel_values"):
        one_layer(batch["input_ids"], layout=layout, pixel_values=torch.zeros(9, 48))
    with pytest.raises(ValueError, match="the layout has 13 <image> tokens, but no image_codes came"):
        one_layer(batch["input_ids"], layout=layout)
    text = torch.tensor([[A, CAT, OK]])
    of_text = build_layout(one_layer.config, text, labels=text)
    one_layer.train()
    assert torch.equal(one_layer(text, layout=of_text).loss, one_layer(text, labels=text).loss)
    one_layer.eval()


def test_what_stands_beside_the_ids_has_their_shape(one_layer):
    ids = torch.tensor([[A, CAT, OK]])
    for name in ("attention_mask", "document_ids", "labels", "shift_labels"):
        for shape in ((1, 2), (2, 3), (3,)):
            with pytest.raises(ValueError, match=f"input_ids, and {name} beside them, must have the shape .B, L."):
                build_layout(CONFIG, ids, **{name: torch.ones(shape, dtype=torch.long)})
    for text, mask in ((ids, torch.ones(3)), (ids[0], torch.ones(3)), (ids, torch.ones(1, 4))):
        with pytest.raises(ValueError, match="input_ids, and attention_mask beside them, must have the shape"):
            one_layer(input_ids=text, attention_mask=mask)


def test_positions_that_begin_again_begin_a_document(one_layer):
    """Of text alone, as of the library's models."""
    ids, positions = torch.tensor([[A, CAT, OK, CAT, A], [OK, OK, A, CAT, CAT]]), torch.tensor([[0, 1, 2, 0, 1]])
    with torch.no_grad():
        together = one_layer(input_ids=ids, position_ids=positions).logits
        embedded = one_layer(inputs_embeds=one_layer.get_input_embeddings()(ids), position_ids=positions).logits
        alone = torch.cat([one_layer(input_ids=part).logits for part in (ids[:, :3], ids[:, 3:])], dim=1)
        goes_on = one_layer(input_ids=ids, position_ids=torch.arange(5)[None]).logits
        whole = one_layer(input_ids=ids).logits
    for logits, expected in ((together, alone), (embedded, alone), (goes_on, whole)):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(together, whole, atol=1e-3)


def test_accelerate_moves_a_layout_with_its_batch():
    batch = batch_of(tiny_model(), [A, Picture(SQUARE), OK])
    batch["layout"] = build_layout(CONFIG, **batch)
    moved = send_to_device(batch, "meta")["layout"]
    tensors = [*moved.taps, *(each for each in vars(moved).values() if isinstance(each, torch.Tensor))]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and len(tensors) == 10
