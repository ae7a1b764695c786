"""Codes of pictures: from pixels, to pixels, and as ids that name their grid."""

from collections.abc import Sequence

import torch

from .layout import check_integers, each_by_grid, final_grids, joined
from .sampling import plain
from .scales import ScaleSchedule


class ImageCodesMixin:
    """What a model with a vision tokenizer does with codes."""

    def id_shift(self, schedule: ScaleSchedule) -> int:
        """How far ids of a picture are from text row + code. Where several schedules have as many codes each has ids
        of its own, so that ids alone name their grid: those of the n-th (from 1 on) are n codebooks further."""
        rivals = [other for other in self.model.schedules if other.num_codes == schedule.num_codes]
        return (1 + rivals.index(schedule) if len(rivals) > 1 else 0) * self.config.vq_config.codebook_size

    @torch.no_grad()
    def decode_image_tokens(
        self, image_tokens: torch.LongTensor, image_grid_hw: torch.LongTensor | Sequence[int] | None = None
    ) -> torch.Tensor:
        """(B, codes) ids from `generate(generation_mode="image")` -> (B, 3, H, W) float32 pictures in [-1, 1].

        Args:
            image_grid_hw: their common final grid. The ids that `generate` returns by themselves name it; those of an
                output, text rows + code, only where no other schedule has as many codes.
        """
        check_integers("image_tokens", image_tokens, 2)
        size, ids = self.config.vq_config.codebook_size, image_tokens - self.config.text_vocab_size
        if image_grid_hw is None:
            fitting = [each for each in self.model.schedules if each.num_codes == image_tokens.shape[1]]
            named = [each for each in fitting if bool((ids // size * size == self.id_shift(each)).all())]
            if len(fitting) != 1 and len(named) != 1:
                found = f"{len(fitting)} schedules ({[each.final_grid for each in fitting]})"
                raise ValueError(f"{image_tokens.shape[1]} codes fit {found}; name one by image_grid_hw")
            (schedule,) = fitting if len(fitting) == 1 else named
        else:
            rows = plain(image_grid_hw)
            is_pair = isinstance(rows, Sequence) and len(rows) == 2 and isinstance(rows[0], int)
            grids = sorted(set(final_grids([rows] if is_pair else rows)))
            if len(grids) != 1:
                raise ValueError(f"the vision tokenizer decodes pictures of one grid at a time, got {grids}")
            schedule = self.model.schedules.by_grid(grids[0])
        shift = self.id_shift(schedule)
        codes = ids - shift if bool((ids // size * size == shift).all()) else ids
        return self.model.vq_model.decode(codes, schedule.final_grid)

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.FloatTensor, image_grid_hw: torch.LongTensor) -> torch.LongTensor:
        """Flat patches of pictures, as the image processor gives them, to their flat codes; see [`decode_images`]."""
        return joined(self.model.encode_images(pixel_values, final_grids(image_grid_hw)), pixel_values.device)

    @torch.no_grad()
    def decode_images(self, image_codes: torch.LongTensor, image_grid_hw: torch.LongTensor) -> list[torch.Tensor]:
        """Flat codes of pictures of any grids, as a [`NextFlowInterleavedOutput`] holds them, to float32 pictures
        (3, H, W) in [-1, 1]."""
        check_integers("image_codes", image_codes, 1)
        grids = final_grids(image_grid_hw)
        lengths = [self.model.schedules.by_grid(grid).num_codes for grid in grids]
        if len(image_codes) != sum(lengths):
            raise ValueError(f"image_codes must hold {sum(lengths)} codes for {grids}, got {len(image_codes)}")
        codes, decode = image_codes.split(lengths), self.model.vq_model.decode
        return each_by_grid(
            grids, lambda grid, members: decode(torch.stack([codes[index] for index in members]), grid)
        )

    @torch.no_grad()
    def decode_preview(self, codes: torch.LongTensor, image_grid_hw: Sequence[int]) -> torch.Tensor:
        """(B, n) or (n,) codes of the first scales, as `on_scale_end` gets them -> (B, 3, H, W) or (3, H, W) float32
        pictures of the final size in [-1, 1].

        Raises:
            ValueError: if the codes do not end with a scale.
        """
        check_integers("codes", codes, 1, 2)
        schedule = self.model.schedules.by_grid(*final_grids([image_grid_hw]))
        num_scales = num_scales_of(codes, schedule)
        missing = schedule.num_codes - codes.shape[-1]
        codes_BL = torch.nn.functional.pad(codes.reshape(-1, codes.shape[-1]), (0, missing))
        pictures = self.model.vq_model.decode_prefix(codes_BL, schedule.final_grid, num_scales)
        return pictures if codes.ndim == 2 else pictures[0]


def num_scales_of(codes: torch.Tensor, schedule: ScaleSchedule) -> int:
    """How many scales (..., n) codes are."""
    if codes.shape[-1] not in schedule.ends:
        raise ValueError(
            f"the first scales of the final grid {schedule.final_grid} have "
            f"{', '.join(map(str, schedule.ends))} codes, got {codes.shape[-1]}"
        )
    return schedule.ends.index(codes.shape[-1]) + 1
