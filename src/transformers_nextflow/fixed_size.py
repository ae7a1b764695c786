"""TokenFlow's semantic branches, which know one grid: encoders of SigLIP and CLIP, and a ViT as decoder.

transformers' own models. CLIP and the ViT can read a larger grid than their own, on stretched positions.
"""

import torch
import torch.nn.functional as F
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings, CLIPVisionModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTModel

from .quantizer import to_map, to_sequence
from .remote_code import LibraryModel
from .scales import Grid


def stretch_positions(positions_1ND: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(1, 1 + n*n, D) positions, the class token's first -> (1, 1 + h*w, D), bicubic.

    The factor is a tenth of a cell too large, as DINO's was, and so TokenFlow's.
    """
    of_class, of_patches = positions_1ND[:, :1], positions_1ND[:, 1:]
    edge = round(of_patches.shape[1] ** 0.5)
    if grid == (edge, edge):
        return positions_1ND
    factors = tuple((length + 0.1) / edge for length in grid)
    stretched = F.interpolate(to_map(of_patches, (edge, edge)), scale_factor=factors, mode="bicubic")
    return torch.cat([of_class, to_sequence(stretched)], dim=1)


class StretchedCLIPEmbeddings(CLIPVisionEmbeddings):
    def interpolate_pos_encoding(self, embeddings, height, width):
        grid = (height // self.patch_size, width // self.patch_size)
        return stretch_positions(self.position_embedding(self.position_ids), grid)


class StretchedViTEmbeddings(ViTEmbeddings):
    def interpolate_pos_encoding(self, embeddings, height, width):
        return stretch_positions(self.position_embeddings, (height, width))


class HiddenStates(LibraryModel):
    """Of a vision model of transformers: a call that gives the hidden states of one layer. To record them, the library
    leaves hooks on a model that no pickle takes."""

    num_class_tokens = 0

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.embeddings(pixel_values)

    def forward(self, pixel_values: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """(B, C, H, W) -> (B, h*w, D): the hidden states of `layer`, as the library counts them, or, for `None`, those
        after the last norm."""
        hidden_BLD, layers = self.embed(pixel_values), list(self.encoder.layers)
        for each in layers if layer is None else layers[: range(len(layers) + 1)[layer]]:
            hidden_BLD = each(hidden_BLD, None)
        hidden_BLD = self.post_layernorm(hidden_BLD) if layer is None else hidden_BLD
        return hidden_BLD[:, self.num_class_tokens :]


class SiglipEncoder(HiddenStates, SiglipVisionModel):
    """transformers' SigLIP."""


class CLIPEncoder(HiddenStates, CLIPVisionModel):
    """transformers' CLIP, on stretched positions."""

    num_class_tokens = 1

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        self.embeddings = StretchedCLIPEmbeddings(config)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding=True))


class ViTDecoder(LibraryModel, ViTModel):
    """transformers' ViT, for (B, C, h, w) quantised semantic entries, one patch for each cell -> (B, h*w, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__(config, add_pooling_layer=False)
        self.embeddings = StretchedViTEmbeddings(config)

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        output = super().forward(quantized, interpolate_pos_encoding=True)
        return output.last_hidden_state[:, 1:]  # the first is the class token
