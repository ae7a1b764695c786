"""TokenFlow's semantic branches, which know one grid: encoders of SigLIP and CLIP, and a ViT as decoder.

transformers' own models. CLIP and the ViT can read a larger grid than their own, on stretched positions.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
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
    """(B, 3, H, W) -> (B, h*w, D): hidden states of layer `layer`, or, for `None`, those after the last norm."""
    with_class_token = isinstance(model.config, CLIPVisionConfig)
    output = model(pixel_values, interpolate_pos_encoding=with_class_token, output_hidden_states=layer is not None)
    features = output.last_hidden_state if layer is None else output.hidden_states[layer]
    if with_class_token:
        features = features[:, 1:]
        if layer is None:  # transformers norms CLIP's class token alone
            features = model.post_layernorm(features)
    return features


def fixed_size_decoder(config: ViTConfig) -> ViTModel:
    """transformers' own ViT, for maps of quantised semantic entries, one patch for each cell."""
    model = ViTModel(config, add_pooling_layer=False)
    model.embeddings = StretchedViTEmbeddings(config)
    return model
