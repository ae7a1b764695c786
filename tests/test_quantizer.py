"""The dual codebook, multi-scale residual quantisation, and self-correction."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from transformers_nextflow import quantizer as quantizer_module
from transformers_nextflow.quantizer import (
    CODEBOOK_LOSSES,
    DualCodebookQuantizer,
    SelfCorrection,
    to_map,
    to_sequence,
)
from transformers_nextflow.scales import ScaleSchedule

SQUARE = ScaleSchedule(((1, 1), (2, 2), (3, 3), (5, 5)))
WIDE = ScaleSchedule(((1, 1), (1, 2), (2, 4), (3, 7)))
SCHEDULES = pytest.mark.parametrize("schedule", [SQUARE, WIDE], ids=["square", "wide"])
CODES, SEMANTIC, PIXEL, WEIGHTS = 50, 6, 4, (0.25, 1.0)


@pytest.fixture(scope="module", params=[True, False], ids=["normalized", "euclidean"])
def quantizer(request):
    torch.manual_seed(0)
    config = SimpleNamespace(
        semantic_dim=SEMANTIC,
        pixel_dim=PIXEL,
        semantic_weight=WEIGHTS[0],
        pixel_weight=WEIGHTS[1],
        codebook_size=CODES,
        normalize_entries=request.param,
    )
    quantizer = DualCodebookQuantizer(config).requires_grad_(False)
    quantizer.semantic_codebook.normal_()
    quantizer.pixel_codebook.normal_()
    return quantizer


def features(schedule: ScaleSchedule, batch: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, SEMANTIC + PIXEL, *schedule.final_grid, generator=generator)


def squared_distances(quantizer: DualCodebookQuantizer, vectors_NC: torch.Tensor) -> torch.Tensor:
    """(N, V), written out: each half normalised if so configured, the difference squared, summed, weighted."""
    total = 0
    codebooks = (quantizer.semantic_codebook, quantizer.pixel_codebook)
    for half, codebook, weight in zip(vectors_NC.split((SEMANTIC, PIXEL), -1), codebooks, WEIGHTS):
        if quantizer.normalize:
            half, codebook = (rows / rows.norm(dim=-1, keepdim=True) for rows in (half, codebook))
        total = total + weight * (half[:, None] - codebook[None]).square().sum(-1)
    return total


def entry_maps(quantizer: DualCodebookQuantizer, codes_BL: torch.Tensor, schedule: ScaleSchedule) -> list:
    """Each scale's entries, normalised if so configured, on the final grid."""
    codebooks = (quantizer.semantic_codebook, quantizer.pixel_codebook)
    if quantizer.normalize:
        codebooks = [codebook / codebook.norm(dim=-1, keepdim=True) for codebook in codebooks]
    table = torch.cat(list(codebooks), -1)
    maps = []
    for scale, (h, w) in enumerate(schedule):
        cells = table[codes_BL[:, schedule.slice(scale)]].view(-1, h, w, SEMANTIC + PIXEL).permute(0, 3, 1, 2)
        maps.append(F.interpolate(cells, size=schedule.final_grid, mode="bicubic"))
    return maps


def nearest_by_hand(quantizer, features_BChw, input_codes_BL, schedule) -> torch.Tensor:
    """(B, L, V) distances at every scale of the residual that the codes of the scales before leave over."""
    residual, distances = features_BChw, []
    for (h, w), entries in zip(schedule, entry_maps(quantizer, input_codes_BL, schedule)):
        pooled = F.adaptive_avg_pool2d(residual, (h, w))
        flat = pooled.permute(0, 2, 3, 1).reshape(-1, SEMANTIC + PIXEL)
        distances.append(squared_distances(quantizer, flat).view(len(features_BChw), h * w, CODES))
        residual = residual - entries
    return torch.cat(distances, dim=1)


@SCHEDULES
def test_targets_are_the_nearest_entries(quantizer, schedule):
    source = features(schedule)
    output = quantizer.quantize(source, schedule)
    assert output.target_codes.shape == (3, schedule.num_codes)
    assert torch.equal(output.input_codes, output.target_codes)
    distances = nearest_by_hand(quantizer, source, output.target_codes, schedule)
    assert torch.equal(output.target_codes, distances.argmin(-1))


def test_distances_are_weighted_squared_distances_less_the_querys_square(quantizer):
    vectors = features(SQUARE).permute(0, 2, 3, 1).reshape(-1, SEMANTIC + PIXEL)
    got = quantizer.distances(quantizer.normalized(vectors), quantizer())
    expected = squared_distances(quantizer, vectors)
    torch.testing.assert_close(got.diff(dim=-1), expected.diff(dim=-1), atol=2e-5, rtol=1e-5)


def test_a_lookup_in_chunks_finds_the_same(quantizer, monkeypatch):
    whole = quantizer.quantize(features(SQUARE), SQUARE, SelfCorrection(), keys="abc")
    monkeypatch.setattr(quantizer_module, "DISTANCES_AT_ONCE", 5 * len(quantizer()))
    chunks = quantizer.quantize(features(SQUARE), SQUARE, SelfCorrection(), keys="abc")
    assert torch.equal(chunks.target_codes, whole.target_codes)
    assert torch.equal(chunks.input_codes, whole.input_codes)
    assert not torch.equal(whole.input_codes, whole.target_codes)


@SCHEDULES
def test_quantized_is_the_decoded_codes(quantizer, schedule):
    output = quantizer.quantize(features(schedule), schedule, SelfCorrection(), keys="abc")
    torch.testing.assert_close(output.quantized, quantizer.decode(output.input_codes, schedule))
    torch.testing.assert_close(output.quantized, sum(entry_maps(quantizer, output.input_codes, schedule)))


def sums_of_scales(quantizer, codes_BL: torch.Tensor, schedule: ScaleSchedule) -> list[torch.Tensor]:
    """The running sum on the final grid after each scale."""
    maps = entry_maps(quantizer, codes_BL, schedule)
    return [sum(maps[: scale + 1]) for scale in range(len(schedule))]


@SCHEDULES
def test_tokenflows_pairs_are_each_scales_entries_and_normalised_queries(quantizer, schedule):
    source = features(schedule)
    output = quantizer.quantize(source, schedule, SelfCorrection(), keys="abc")
    sums = [torch.zeros_like(source), *sums_of_scales(quantizer, output.input_codes, schedule)]
    assert len(output.pairs) == len(schedule)
    for scale, (given, meant) in enumerate(output.pairs):
        entries = quantizer()[output.input_codes[:, schedule.slice(scale)]]
        torch.testing.assert_close(given, to_map(entries, schedule[scale]))
        pooled = F.adaptive_avg_pool2d(source - sums[scale], schedule[scale])
        if quantizer.normalize:
            pooled = torch.cat(
                [half / half.norm(dim=1, keepdim=True) for half in pooled.split((SEMANTIC, PIXEL), 1)], 1
            )
        torch.testing.assert_close(meant, pooled, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.queries[scale], to_sequence(meant).flatten(0, 1))


def test_vars_pairs_are_the_sum_so_far_and_the_features(quantizer):
    source = features(SQUARE)
    output = quantizer.quantize(source, SQUARE, codebook_loss="var")
    assert len(output.pairs) == len(SQUARE)
    for (given, meant), expected in zip(output.pairs, sums_of_scales(quantizer, output.target_codes, SQUARE)):
        torch.testing.assert_close(given, expected)
        assert torch.equal(meant, source)


@pytest.mark.parametrize("codebook_loss", CODEBOOK_LOSSES)
def test_dropped_scales_leave_no_pair(quantizer, codebook_loss):
    keep_scales = [True, False, True, False]
    output = quantizer.quantize(features(SQUARE), SQUARE, keep_scales=keep_scales, codebook_loss=codebook_loss)
    assert len(output.pairs) == 2 and len(output.queries) == 4


@SCHEDULES
def test_both_forms_have_one_value_and_gradients_of_their_own(quantizer, schedule):
    source = features(schedule).requires_grad_()
    direction = features(schedule, seed=2)
    outputs = {name: quantizer.quantize(source, schedule, codebook_loss=name) for name in CODEBOOK_LOSSES}
    assert torch.equal(outputs["tokenflow"].target_codes, outputs["var"].target_codes)
    assert torch.equal(outputs["tokenflow"].quantized, outputs["var"].quantized)
    got = {
        name: torch.autograd.grad((output.quantized * direction).sum(), source)[0] for name, output in outputs.items()
    }
    torch.testing.assert_close(got["var"], direction)
    lookups = []
    for (h, w), left in zip(schedule, [0.0, *sums_of_scales(quantizer, outputs["var"].target_codes, schedule)]):
        query = F.adaptive_avg_pool2d(source - left, (h, w))
        if quantizer.normalize:
            query = torch.cat([half / half.norm(dim=1, keepdim=True) for half in query.split((SEMANTIC, PIXEL), 1)], 1)
        lookups.append(F.interpolate(query, size=schedule.final_grid, mode="bicubic"))
    (expected,) = torch.autograd.grad((sum(lookups) * direction).sum(), source)
    torch.testing.assert_close(got["tokenflow"], expected, atol=1e-4, rtol=1e-4)


def test_residual_norms_precede_each_scale(quantizer):
    source = features(SQUARE)
    output = quantizer.quantize(source, SQUARE)
    sums = sums_of_scales(quantizer, output.target_codes, SQUARE)
    residuals = [source, *(source - partial for partial in sums[:-1])]
    expected = torch.stack([residual.square().mean().sqrt() for residual in residuals])
    torch.testing.assert_close(output.residual_norms, expected)


def test_a_dropped_scale_subtracts_nothing(quantizer):
    source = features(SQUARE)
    dropped = quantizer.quantize(source, SQUARE, keep_scales=[True, False, True, True])
    maps = entry_maps(quantizer, dropped.target_codes, SQUARE)
    torch.testing.assert_close(dropped.quantized, maps[0] + maps[2] + maps[3])
    third = F.adaptive_avg_pool2d(source - maps[0], SQUARE[2]).permute(0, 2, 3, 1).reshape(-1, SEMANTIC + PIXEL)
    expected = squared_distances(quantizer, third).argmin(-1).view(3, -1)
    assert torch.equal(dropped.target_codes[:, SQUARE.slice(2)], expected)


@SCHEDULES
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_the_residual_continues_from_the_drawn_code(quantizer, schedule, temperature):
    source = features(schedule)
    correction = SelfCorrection(top_k=4, temperature=temperature)
    output = quantizer.quantize(source, schedule, correction, seed=3, keys=[0, 1, 2])
    drawn = output.input_codes != output.target_codes
    assert drawn.any()
    distances = nearest_by_hand(quantizer, source, output.input_codes, schedule)
    assert torch.equal(output.target_codes, distances.argmin(-1))
    plain = quantizer.quantize(source, schedule).target_codes
    assert not torch.equal(output.target_codes, plain)  # later targets correct the disturbance
    nearest = distances.topk(4, largest=False).indices
    assert (nearest == output.input_codes[..., None]).any(-1).all()


def test_draws_depend_on_seed_and_key_alone(quantizer):
    source, keys, correction = features(SQUARE), ["cat", "dog", 7], SelfCorrection()
    together = quantizer.quantize(source, SQUARE, correction, seed=5, keys=keys)
    for i, key in enumerate(keys):
        alone = quantizer.quantize(source[i : i + 1], SQUARE, correction, seed=5, keys=[key])
        assert torch.equal(alone.input_codes[0], together.input_codes[i])
        assert torch.equal(alone.target_codes[0], together.target_codes[i])
    order = [2, 0, 1]
    permuted = quantizer.quantize(source[order], SQUARE, correction, seed=5, keys=[keys[i] for i in order])
    assert torch.equal(permuted.input_codes, together.input_codes[order])
    torch.manual_seed(99)
    assert torch.equal(quantizer.quantize(source, SQUARE, correction, 5, keys).input_codes, together.input_codes)
    for seed, names in ((6, keys), (5, "xyz")):
        other = quantizer.quantize(source, SQUARE, correction, seed, names)
        assert not torch.equal(other.input_codes, together.input_codes)


@pytest.mark.parametrize(
    "correction", [SelfCorrection(token_share=0.0), SelfCorrection(probability=0.0), SelfCorrection(top_k=1)]
)
def test_nothing_to_disturb_is_plain(quantizer, correction):
    plain = quantizer.quantize(features(SQUARE), SQUARE)
    output = quantizer.quantize(features(SQUARE), SQUARE, correction, keys="abc")
    assert torch.equal(output.input_codes, plain.target_codes)
    assert torch.equal(output.target_codes, plain.target_codes)
    assert torch.equal(output.quantized, plain.quantized)


def test_all_scales_and_the_ten_nearest_by_default():
    assert SelfCorrection(token_share=1.0).draws(SQUARE, 0, "abc")[0].all()
    draw = lambda pick: DualCodebookQuantizer._draw(torch.arange(12.0)[None], pick, SelfCorrection())  # noqa: E731
    assert draw(torch.zeros(1)) == 0 and draw(torch.tensor([1 - 2**-24])) == 9


def test_share_of_disturbed_tokens():
    schedule = ScaleSchedule(((1, 1), (16, 16), (32, 32)))
    disturb, pick = SelfCorrection().draws(schedule, seed=0, keys=range(20))
    assert disturb.shape == pick.shape == (20, schedule.num_codes)
    for scale in (1, 2):  # standard error 0.007 and 0.003
        assert abs(disturb[:, schedule.slice(scale)].float().mean() - 0.6) < 0.025
    assert 0 <= pick.min() and pick.max() < 1 and abs(pick.mean() - 0.5) < 0.02


def test_share_range_is_drawn_per_sample_and_scale():
    schedule = ScaleSchedule(((1, 1), (32, 32), (32, 32)))
    disturb, _ = SelfCorrection(token_share=(0.2, 0.8)).draws(schedule, seed=0, keys=range(40))
    shares = torch.stack([disturb[:, schedule.slice(scale)].float().mean(1) for scale in (1, 2)])
    assert 0.15 < shares.min() < 0.3 and 0.7 < shares.max() < 0.85
    assert (shares[0] - shares[1]).abs().max() > 0.2


def test_probability_is_the_share_of_disturbed_samples():
    disturb, _ = SelfCorrection(probability=0.5).draws(SQUARE, seed=0, keys=range(400))
    assert abs(disturb.any(1).float().mean() - 0.5) < 0.1


def test_uniform_draws_are_uniform_over_the_top_k():
    distance = torch.arange(8.0).expand(20000, 8)
    pick = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    counts = DualCodebookQuantizer._draw(distance, pick, SelfCorrection(top_k=4)).bincount(minlength=8)
    torch.testing.assert_close(counts / 20000, torch.tensor([0.25] * 4 + [0.0] * 4), atol=0.02, rtol=0)


def test_temperature_draws_follow_the_softmax_of_distance():
    distance = torch.arange(8.0).expand(20000, 8)
    pick = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    correction = SelfCorrection(top_k=4, temperature=2.0)
    counts = DualCodebookQuantizer._draw(distance, pick, correction).bincount(minlength=8)
    expected = F.pad((-torch.arange(4.0) / 2).softmax(0), (0, 4))
    torch.testing.assert_close(counts / 20000, expected, atol=0.02, rtol=0)


def test_the_largest_pick_stays_in_the_top_k():
    almost_one = torch.tensor([1 - 2**-24])
    for temperature in (None, 0.3):
        correction = SelfCorrection(top_k=7, temperature=temperature)
        assert DualCodebookQuantizer._draw(torch.arange(9.0)[None], almost_one, correction) <= 6
        assert DualCodebookQuantizer._draw(torch.arange(9.0)[None], torch.zeros(1), correction) == 0
    # rounding can leave the last cumulative weight below the pick
    distance = torch.rand(2000, 64, generator=torch.Generator().manual_seed(0))
    drawn = DualCodebookQuantizer._draw(distance, almost_one.expand(2000), SelfCorrection(top_k=64, temperature=0.1))
    assert drawn.max() < 64


def test_top_k_beyond_the_codebook_is_the_codebook(quantizer):
    output = quantizer.quantize(features(SQUARE), SQUARE, SelfCorrection(top_k=CODES + 5), keys="abc")
    assert output.input_codes.max() < CODES


@pytest.mark.parametrize("first, last", [(1, 2), (0, 0), (2, None)])
def test_only_scales_within_the_limits_are_disturbed(quantizer, first, last):
    correction = SelfCorrection(token_share=1.0, first_scale=first, last_scale=last, top_k=20)
    disturb, _ = correction.draws(SQUARE, seed=0, keys="abc")
    output = quantizer.quantize(features(SQUARE), SQUARE, correction, keys="abc")
    for scale in range(len(SQUARE)):
        inside = first <= scale <= (len(SQUARE) - 1 if last is None else last)
        at = SQUARE.slice(scale)
        assert disturb[:, at].all() if inside else not disturb[:, at].any()
        assert torch.equal(output.input_codes[:, at], output.target_codes[:, at]) != inside


def test_bfloat16_autocast_changes_no_code(quantizer):
    source = features(SQUARE, batch=8)
    plain = quantizer.quantize(source, SQUARE, SelfCorrection(), keys=range(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = quantizer.quantize(source, SQUARE, SelfCorrection(), keys=range(8))
    assert torch.equal(autocast.target_codes, plain.target_codes)
    assert torch.equal(autocast.input_codes, plain.input_codes)
    assert autocast.quantized.dtype == torch.float32
    assert torch.equal(autocast.quantized, plain.quantized)


def test_maps_and_sequences_are_row_major():
    source = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)
    assert torch.equal(to_sequence(source)[:, 5], source[:, :, 1, 1])
    assert torch.equal(to_map(to_sequence(source), (2, 4)), source)


def test_errors(quantizer):
    with pytest.raises(ValueError, match="codebook_loss must be one of tokenflow, var, got 'vqgan'"):
        quantizer.quantize(features(SQUARE), SQUARE, codebook_loss="vqgan")
    with pytest.raises(ValueError, match=r"grid \(3, 7\), the schedule ends in \(5, 5\)"):
        quantizer.quantize(features(WIDE), SQUARE)
    with pytest.raises(ValueError, match=r"grid \(5, 5\), the schedule ends in \(3, 7\)"):
        quantizer.quantize(features(SQUARE), WIDE)
    for keys in (None, ["one"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match="one key for each of the 3 samples"):
            quantizer.quantize(features(SQUARE), SQUARE, SelfCorrection(), keys=keys)
    shares = (-0.1, 1.1, (0.8, 0.2), (0.8, 1.1))
    for wrong in ({"probability": 1.1}, {"probability": -0.1}, *({"token_share": share} for share in shares)):
        with pytest.raises(ValueError, match="shares must lie in"):
            replace(SelfCorrection(), **wrong)
    for wrong in ({"top_k": 0}, {"temperature": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            replace(SelfCorrection(), **wrong)
