"""Decoding over a cache: rows of text and pictures that grow each at its own pace.

`RowDecoder` is the transformer's side, one step at a time; `draw_images` is next-scale decoding (NextFlow sec. 2.2).

Shape suffixes: R rows of the cache, r rows of a step, B pictures, l codes of one scale, D hidden, V codebook size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .attention import row_mask, visible_lengths
from .layout import SequenceLayout, scale_coordinates
from .quantizer import next_scale_step, same_scale_step
from .row_cache import RowCache
from .sampling import RowGenerators, guide, sample
from .scales import ScaleSchedule

if TYPE_CHECKING:
    from .modeling_nextflow import NextFlowForConditionalGeneration


@dataclass(frozen=True)
class ImageControls:
    """How pictures are drawn; the lists have one value for each scale.

    Attributes:
        schedule: the pictures' scales.
        guidance, image_guidance: see [`guide`].
        temperature, top_k, top_p: see [`sample`].
        refine_top_k: one further pass over every scale but the first for each entry, see [`draw_images`].
    """

    schedule: ScaleSchedule
    guidance: list[float]
    image_guidance: list[float]
    temperature: list[float]
    top_k: list[int]
    top_p: list[float]
    refine_top_k: tuple[int, ...] = ()

    def num_contexts(self, scale: int) -> int:
        """Which rows scale `scale` is predicted from: 1 = the prompt's, 2 = and the null prompt's, 3 = and those of
        the null prompt without its images."""
        if self.image_guidance[scale] != 1.0:
            return 3
        return 2 if self.guidance[scale] != 1.0 else 1

    def num_passes(self, scale: int) -> int:
        """How often a scale is predicted."""
        return 1 + len(self.refine_top_k) if scale else 1

    @property
    def max_contexts(self) -> int:
        return max(map(self.num_contexts, range(len(self.schedule))))


class RowDecoder:
    """Rows that read prompts, then grow by tokens and scales, over one [`RowCache`].

    Attributes:
        device: of the prompts; wherever the model's parts are, what goes between them is here.
        counters: of each row, the position counter of what comes next (NextFlow fig. 5).
    """

    def __init__(self, model: "NextFlowForConditionalGeneration", cache: RowCache, device: torch.device):
        self.model = model
        self.cache = cache
        self.device = device
        self.counters = [0] * cache.num_rows

    def read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, layout: SequenceLayout, codes: list[torch.Tensor]
    ) -> torch.Tensor:
        """Read of every row what the cache does not hold yet; returns the (R, 1, D) hidden states of the last tokens.

        Args:
            input_ids, attention_mask: (R, L) whole rows; padding may stand anywhere.
            codes: each finished image's (L_i,) codes.

        Raises:
            ValueError: if the cache holds anything but the beginning of the rows, or a row brings nothing new.
        """
        fresh = []
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask)):
            columns = mask.nonzero().flatten()
            held, given = self.cache.token_ids[row], ids[columns].tolist()
            if given[: len(held)] != held or len(given) <= len(held):
                raise ValueError(
                    f"row {row} must begin with the {len(held)} tokens past_key_values hold of it and go on, got "
                    f"{len(given)} tokens"
                )
            fresh.append(columns[len(held) :])
        counts = [len(columns) for columns in fresh]
        # rows are padded on the right by their last token
        columns_RL = torch.nn.utils.rnn.pad_sequence(fresh, batch_first=True, padding_value=-1)
        padding_RL = columns_RL < 0
        columns_RL = torch.where(padding_RL, columns_RL.amax(dim=1, keepdim=True), columns_RL)
        rows_R1 = torch.arange(len(fresh), device=input_ids.device)[:, None]
        embeds_RLD = self.model.get_input_embeddings()(input_ids).to(self.device)
        if layout.images:
            embeds_RLD = self.model.model.embed_images(embeds_RLD, layout, codes)
        blocks_RL = layout.block_ids[rows_R1, columns_RL].masked_fill(padding_RL, -1)
        hidden_RLD = self._forward(
            list(range(len(fresh))),
            embeds_RLD[rows_R1, columns_RL],
            layout.position_ids[:, rows_R1, columns_RL],
            [input_ids[row, columns].tolist() for row, columns in enumerate(fresh)],
            visible=visible_lengths(blocks_RL),
        )
        lasts_R1 = torch.tensor(counts, device=hidden_RLD.device)[:, None] - 1
        self.counters = (layout.position_ids[0, rows_R1, columns_RL[:, -1:]].flatten().long() + 1).tolist()
        return hidden_RLD[rows_R1, lasts_R1]

    def write_tokens(
        self, rows: Sequence[int], token_ids: Sequence[int], opens: ScaleSchedule | None = None
    ) -> torch.Tensor:
        """One token for each of `rows`; returns their (r, 1, D) hidden states. `opens`: the tokens are `<boi>` of
        pictures of this schedule."""
        ids_r1 = torch.tensor(token_ids, device=self.device)[:, None]
        embeds_r1D = self.model.get_input_embeddings()(ids_r1).to(self.device)
        if opens is not None:
            embeds_r1D = embeds_r1D + self._scale_embedding(0, opens).to(embeds_r1D)
        positions_r1 = torch.tensor([self.counters[row] for row in rows], device=embeds_r1D.device).float()[:, None]
        return self._forward(rows, embeds_r1D, positions_r1.expand(3, -1, -1), [[token] for token in token_ids])

    def write_scale(
        self, rows: Sequence[int], inputs_rlD: torch.Tensor, schedule: ScaleSchedule, scale: int
    ) -> torch.Tensor:
        """The block of scale `scale` (0-based; len(schedule) is the further block of the last codes) for each of
        `rows`; returns its (r, l, D) hidden states."""
        inputs_rlD = inputs_rlD + self._scale_embedding(scale, schedule).to(inputs_rlD)
        grid = schedule[min(scale, len(schedule) - 1)]
        cells_2l = scale_coordinates(grid, self.model.model.finest_edge).to(inputs_rlD.device)
        counter_r = torch.tensor([self.counters[row] for row in rows], device=inputs_rlD.device)
        counter_rl = counter_r[:, None].expand(-1, grid[0] * grid[1]).float()
        positions_3rl = torch.stack([counter_rl, *(cells.expand_as(counter_rl) for cells in cells_2l)])
        ids = [self.model.config.image_token_id] * (grid[0] * grid[1])
        return self._forward(rows, inputs_rlD, positions_3rl, [ids] * len(rows))

    def position(self, row: int) -> tuple[int, int]:
        """How many tokens a row holds, and its counter."""
        return len(self.cache.token_ids[row]), self.counters[row]

    def rewind(self, row: int, position: tuple[int, int]) -> None:
        """Take a row back to an earlier `position`."""
        length, self.counters[row] = position
        self.cache.truncate(row, length)

    def select(self, rows: Sequence[int]) -> None:
        """Keep, order and repeat rows."""
        self.cache.select(rows)
        self.counters = [self.counters[row] for row in rows]

    def _scale_embedding(self, scale: int, schedule: ScaleSchedule) -> torch.Tensor:
        index, count = torch.tensor([[scale + 1], [len(schedule)]], device=self.device)
        return self.model.model.scale_embedding(index, count)

    def _forward(
        self,
        rows: Sequence[int],
        inputs_rlD: torch.Tensor,
        positions_3rl: torch.Tensor,
        token_ids: Sequence[Sequence[int]],
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.cache.begin(rows, inputs_rlD.shape[1], inputs_rlD.device)
        mask, is_causal = row_mask(self.model.config.text_config, inputs_rlD, self.cache, visible)
        hidden_rlD = self.model.model.language_model(
            inputs_embeds=inputs_rlD,
            position_ids=positions_3rl,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **({} if is_causal else {"is_causal": False}),
        ).last_hidden_state.to(self.device)
        self.cache.commit(token_ids)
        for row in rows:
            self.counters[row] += 1
        return hidden_rlD


def draw_images(
    decoder: RowDecoder,
    contexts: list[list[int]],
    hidden_r1D: torch.Tensor,
    controls: ImageControls,
    generators: RowGenerators,
    repeats: int = 1,
    forced_codes: torch.Tensor | None = None,
    forced_mask: torch.Tensor | None = None,
    keep_contexts: bool = True,
    output_logits: bool | int = False,
    on_scale_end: Callable[[int, int, torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Draw one picture or `repeats` after each row that has just read `<boi>`.

    Args:
        contexts: the rows of the prompts, then as many of the null prompts, then of those without images, as far as
            `controls` needs them.
        hidden_r1D: their hidden states, in this order.
        repeats: pictures for each prompt; the rows part at the first scale that is not forced as a whole.
        forced_codes, forced_mask: (prompts, codes of the first scales) codes, and where they are forced.
        keep_contexts: whether rows must hold the whole picture afterwards; if not, null rows stop after the last
            scale they guide, which nothing reads.
        on_scale_end: called with (picture, scale, (n,) codes so far).

    A further pass of `refine_top_k` predicts a scale again from that scale's own codes, in place of the previous
    scale's (TokenFlow's sampling in several steps); later scales see the block as it was first read.

    Returns:
        (B, codes) codes, and with `output_logits` of each scale, or of the first so many, the (B, l, V) float32 guided
        logits of its last pass.
    """
    model, schedule = decoder.model, controls.schedule
    needed = [controls.num_contexts(scale) for scale in range(len(schedule))]
    forced_scales = 0
    if forced_codes is not None:
        whole = [bool(forced_mask[:, schedule.slice(scale)].all()) for scale in range(len(schedule))]
        reached = [schedule.slice(scale).stop <= forced_codes.shape[1] for scale in range(len(schedule))]
        forced_scales = [*(a and b for a, b in zip(whole, reached)), False].index(False)
    hidden_rlD, device = hidden_r1D, decoder.device
    codes_BL = torch.empty(len(contexts[0]), 0, dtype=torch.long, device=device)
    logits, num_logits = [], len(schedule) if output_logits is True else int(output_logits)
    total = 0.0 if model.config.feature_mode == "accumulated" else None

    def predict(hidden_rlD: torch.Tensor, scale: int) -> torch.Tensor:
        logits_rlV = model.code_head(hidden_rlD[: needed[scale] * len(codes_BL)]).to(device, torch.float32)
        return guide(logits_rlV, controls.guidance[scale], controls.image_guidance[scale], needed[scale])

    def pick(logits_BlV: torch.Tensor, scale: int, top_k: int) -> torch.Tensor:
        uniform_Bl = generators.uniform(schedule.lengths[scale], device)
        drawn_Bl = sample(logits_BlV, controls.temperature[scale], top_k, controls.top_p[scale], uniform_Bl)
        at = schedule.slice(scale)
        if forced_codes is None or at.start >= forced_codes.shape[1]:
            return drawn_Bl
        each = len(drawn_Bl) // len(forced_codes)
        codes_Bl, mask_Bl = (x[:, at].repeat_interleave(each, dim=0) for x in (forced_codes, forced_mask))
        return torch.where(mask_Bl, codes_Bl, drawn_Bl)

    for scale in range(len(schedule)):
        if scale == forced_scales and repeats > 1:
            decoder.select([row for context in contexts for row in context for _ in range(repeats)])
            rows, count = iter(range(decoder.cache.num_rows)), len(codes_BL) * repeats
            contexts = [[next(rows) for _ in range(count)] for _ in contexts]
            hidden_rlD, codes_BL = (x.repeat_interleave(repeats, dim=0) for x in (hidden_rlD, codes_BL))
            logits = [each.repeat_interleave(repeats, dim=0) for each in logits]
            total = total.repeat_interleave(repeats, dim=0) if isinstance(total, torch.Tensor) else total
        rows = [row for context in contexts for row in context]

        if scale < forced_scales:
            codes_Bl = forced_codes[:, schedule.slice(scale)]
            for _ in range(controls.num_passes(scale)):  # so that the others are drawn as if none was forced
                generators.uniform(schedule.lengths[scale], device)
            if scale < num_logits:
                logits.append(predict(hidden_rlD, scale))
        else:
            logits_BlV = predict(hidden_rlD, scale)
            codes_Bl = pick(logits_BlV, scale, controls.top_k[scale])
            if controls.num_passes(scale) > 1:
                first_columns = decoder.cache.last_columns(rows, schedule.lengths[scale])
                for top_k in controls.refine_top_k:
                    features_BlC = same_scale_step(model.model.code_embeddings(codes_Bl), schedule, scale, total)
                    inputs_rlD = model.model.connector(features_BlC).to(hidden_rlD).repeat(len(contexts), 1, 1)
                    for row in rows:
                        length, counter = decoder.position(row)
                        decoder.rewind(row, (length - schedule.lengths[scale], counter - 1))
                    logits_BlV = predict(decoder.write_scale(rows, inputs_rlD, schedule, scale), scale)
                    codes_Bl = pick(logits_BlV, scale, top_k)
                decoder.cache.restore_columns(rows, first_columns)
            if scale < num_logits:
                logits.append(logits_BlV)
        codes_BL = torch.cat([codes_BL, codes_Bl], dim=1)
        if on_scale_end is not None:
            pictures = len(generators.generators)
            for picture, so_far in enumerate(codes_BL.repeat_interleave(pictures // len(codes_BL), dim=0)):
                on_scale_end(picture, scale, so_far)
        if scale + 1 < len(schedule):
            if not keep_contexts:
                contexts = contexts[: max(needed[scale + 1 :])]
                rows = [row for context in contexts for row in context]
            features_BlC, total = next_scale_step(model.model.code_embeddings(codes_Bl), schedule, scale, total)
            inputs_rlD = model.model.connector(features_BlC).to(hidden_rlD).repeat(len(contexts), 1, 1)
            hidden_rlD = decoder.write_scale(rows, inputs_rlD, schedule, scale + 1)
    if forced_scales == len(schedule) and repeats > 1:
        codes_BL, logits = (
            codes_BL.repeat_interleave(repeats, dim=0),
            [each.repeat_interleave(repeats, dim=0) for each in logits],
        )
    return codes_BL, logits
