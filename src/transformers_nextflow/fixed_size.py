"""TokenFlow's semantic branches, which know one grid: encoders of SigLIP and CLIP, and a ViT as decoder.

transformers' own models. CLIP and the ViT can read a larger grid than their own, on stretched positions.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings, CLIPVisionModel
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTModel

from .quantizer import to_map, to_sequence
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


def fixed_size_encoder(config: PreTrainedConfig) -> SiglipVisionModel | CLIPVisionModel:
    """transformers' own vision model of a `SiglipVisionConfig` or `CLIPVisionConfig`."""
    if isinstance(config, SiglipVisionConfig):
        model = SiglipVisionModel(config)
        model.use_head = False  # pooled features are not read, but their weights are kept
        return model
    model = CLIPVisionModel(config)
    model.embeddings = StretchedCLIPEmbeddings(config)
    return model


def fixed_size_features(
    model: SiglipVisionModel | CLIPVisionModel, pixel_values: torch.Tensor, layer: int | None
) -> torch.Tensor:
    """(B, 3, H, W) -> (B, h*w, D), see [`features_at`]."""
    has_class_token = isinstance(model.config, CLIPVisionConfig)
    hidden = model.embeddings(pixel_values, interpolate_pos_encoding=has_class_token)
    if has_class_token:
        hidden = model.pre_layrnorm(hidden)
    features = features_at(layer, model, hidden)
    return features[:, 1:] if has_class_token else features


def features_at(layer: int | None, model: PreTrainedModel, hidden_BLD: torch.Tensor) -> torch.Tensor:
    """What transformers' vision models make of embedded patches that all see each other: the hidden states of `layer`,
    or, for `None`, those after the last norm. To record them, the library leaves hooks on a model that no pickle
    takes."""
    layers = list(model.encoder.layers)
    for each in layers if layer is None else layers[: range(len(layers) + 1)[layer]]:
        hidden_BLD = each(hidden_BLD, None)
    return model.post_layernorm(hidden_BLD) if layer is None else hidden_BLD


def fixed_size_decoder(config: ViTConfig) -> ViTModel:
    """transformers' own ViT, for maps of quantised semantic entries, one patch for each cell."""
    model = ViTModel(config, add_pooling_layer=False)
    model.embeddings = StretchedViTEmbeddings(config)
    return model
