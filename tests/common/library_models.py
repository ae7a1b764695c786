"""transformers' common tests on its own classes nearest to NextFlow's, at tiny sizes, for `controls.py`.

Flags and explicit skips are those of transformers' own tests of these classes (`tests/models` of its repository, which
the distribution lacks). Emu3's vision tokenizer is tested within its model: alone it has no forward pass.
"""

import copy
import unittest

import torch
import transformers
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)

from tests.common.library import import_library
from tests.tiny_tokenizer import tiny_text_tokenizer

ModelTesterMixin = import_library("test_modeling_common").ModelTesterMixin
GenerationTesterMixin = import_library("generation.test_utils").GenerationTesterMixin
ProcessorTesterMixin = import_library("test_processing_common").ProcessorTesterMixin
image_processing = import_library("test_image_processing_common")

BATCH, SIDE, TEXT_ROWS = 7, 16, 99
PAD, BOS, EOS, START, IMAGE, VIDEO = range(6)
TEXT = {
    "vocab_size": TEXT_ROWS,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 4, "latent_channels": 4}


def text_with_a_picture(*placeholders: int) -> dict:
    """Each row the ids of a picture, then text."""
    input_ids = torch.randint(VIDEO + 1, TEXT_ROWS, (BATCH, len(placeholders) + 8))
    input_ids[:, : len(placeholders)] = torch.tensor(placeholders)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def pictures() -> torch.Tensor:
    return torch.rand(BATCH, 3, SIDE, SIDE)


class ModelTester:
    """What the tests ask of a tester, around a configuration, inputs and the sizes of the first stack of layers."""

    batch_size, is_training = BATCH, True

    def __init__(self, config: transformers.PreTrainedConfig, inputs: dict, sizes: dict = TEXT):
        self.config, self.inputs = config, inputs
        vars(self).update(sizes)
        self.seq_length = next(iter(inputs.values())).shape[1]

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), copy.deepcopy(self.inputs)


class Qwen2_5_VLModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (transformers.Qwen2_5_VLModel, transformers.Qwen2_5_VLForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32}
        vision |= {"patch_size": SIDE, "spatial_merge_size": 1, "fullatt_block_indexes": [0]}
        config = transformers.Qwen2_5_VLConfig(
            text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            vision_config=vision,
            vision_start_token_id=START,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
        rows = text_with_a_picture(START, IMAGE)
        patches = {
            "mm_token_type_ids": (rows["input_ids"] == IMAGE).int(),
            "pixel_values": torch.rand(BATCH, 2 * 3 * SIDE**2),
            "image_grid_thw": torch.tensor([[1, 1, 1]] * BATCH),
        }
        self.model_tester = ModelTester(config, rows | patches)


class JanusModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (transformers.JanusModel, transformers.JanusForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        config = transformers.JanusConfig(
            text_config={"model_type": "llama"} | TEXT,
            vision_config=VISION
            | {"image_size": SIDE, "patch_size": 8, "num_image_tokens": 4, "projection_dim": TEXT["hidden_size"]},
            vq_config=VQ | {"num_embeddings": 12, "projection_dim": 10, "image_token_embed_dim": TEXT["hidden_size"]},
            image_token_id=IMAGE,
        )
        self.model_tester = ModelTester(config, text_with_a_picture(*[IMAGE] * 4) | {"pixel_values": pictures()})


class Emu3ModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (transformers.Emu3Model, transformers.Emu3ForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        codes = 20
        names = {IMAGE: "<image>", VIDEO: "<|extra_200|>"}  # the id after the picture's ends a row of it
        names |= {VIDEO + 1 + code: f"<|visual token {code:06d}|>" for code in range(codes)}
        vq = VQ | {"codebook_size": codes, "temporal_downsample_factor": 1, "hidden_size": 32, "attn_resolutions": []}
        config = transformers.Emu3Config(
            text_config=TEXT, vq_config=vq, vocabulary_map={name: row for row, name in names.items()}
        )
        half = SIDE // 2
        rows = text_with_a_picture(*[IMAGE] * (half * (half + 1)))
        images = {"pixel_values": pictures(), "image_sizes": torch.tensor([[SIDE, SIDE]] * BATCH)}
        self.model_tester = ModelTester(config, rows | images)


class JanusVQVAETest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (transformers.JanusVQVAE,)
    has_attentions = False
    test_resize_embeddings = False

    def setUp(self):
        config = transformers.JanusVQVAEConfig(**VQ, num_embeddings=12, num_patches=SIDE // 2)
        self.model_tester = ModelTester(config, {"pixel_values": pictures()})

    @unittest.skip("Janus' vision tokenizer has no hidden states")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("Janus' vision tokenizer has no hidden states")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("Janus' vision tokenizer has no embeddings of ids")
    def test_model_get_set_embeddings(self):
        pass


class Siglip2VisionModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (transformers.Siglip2VisionModel,)
    additional_model_inputs = ["pixel_attention_mask", "spatial_shapes"]
    test_resize_embeddings = False

    def setUp(self):
        config = transformers.Siglip2VisionConfig(**VISION, patch_size=2, num_patches=16)
        inputs = {
            "pixel_values": torch.rand(BATCH, SIDE, 3 * 2**2),
            "pixel_attention_mask": torch.ones(BATCH, SIDE, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
        }
        self.model_tester = ModelTester(config, inputs, VISION)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{{ tokens[part['type']] if part['type'] in tokens else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
)


class LibraryProcessorTest(ProcessorTesterMixin):
    """With a tiny text tokenizer and a chat template without tools, as in transformers' tests of Emu3."""

    special_tokens: dict[str, str]

    @classmethod
    def _setup_tokenizer(cls):
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tiny_text_tokenizer().backend_tokenizer,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            extra_special_tokens=cls.special_tokens,
        )

    @classmethod
    def prepare_processor_dict(cls):
        tokens = {"image": cls.special_tokens["image_token"], "video": cls.special_tokens.get("video_token", "")}
        return {"chat_template": "{% set tokens = " + repr(tokens) + " %}" + CHAT_TEMPLATE}


class Qwen2_5_VLProcessorTest(LibraryProcessorTest, unittest.TestCase):
    processor_class = transformers.Qwen2_5_VLProcessor
    special_tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}

    @classmethod
    def _setup_image_processor(cls):
        return transformers.Qwen2VLImageProcessor(patch_size=4, min_pixels=28**2, max_pixels=56**2)

    @classmethod
    def _setup_video_processor(cls):
        return transformers.Qwen2VLVideoProcessor(patch_size=4, min_pixels=28**2, max_pixels=56**2)


class JanusProcessorTest(LibraryProcessorTest, unittest.TestCase):
    processor_class = transformers.JanusProcessor
    special_tokens = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}

    @classmethod
    def _setup_image_processor(cls):
        return transformers.JanusImageProcessor(size={"height": SIDE, "width": SIDE})


class Emu3ProcessorTest(LibraryProcessorTest, unittest.TestCase):
    processor_class = transformers.Emu3Processor
    special_tokens = JanusProcessorTest.special_tokens | {"image_wrapper_token": "<wrapper>", "eof_token": "<eof>"}

    @classmethod
    def _setup_image_processor(cls):
        return transformers.Emu3ImageProcessor(min_pixels=28**2, max_pixels=56**2)


class LibraryImageProcessingTester(image_processing.ImageProcessingTester):
    model_type: str

    def _get_image_processing_classes(self):
        names = IMAGE_PROCESSOR_MAPPING_NAMES[self.model_type]
        return {backend: get_image_processor_class_from_name(name) for backend, name in names.items()}


class Qwen2_5_VLImageProcessingTester(LibraryImageProcessingTester):
    model_type = "qwen2_5_vl"


class JanusImageProcessingTester(LibraryImageProcessingTester):
    model_type = "janus"


class Emu3ImageProcessingTester(LibraryImageProcessingTester):
    model_type = "emu3"


class Siglip2ImageProcessingTester(LibraryImageProcessingTester):
    model_type = "siglip2"


class Qwen2_5_VLImageProcessingTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Qwen2_5_VLImageProcessingTester

    @unittest.skip("four channels are not yet treated alike from Pillow and from NumPy")
    def test_call_numpy_4_channels(self):
        pass


class JanusImageProcessingTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = JanusImageProcessingTester

    @unittest.skip("not supported")
    def test_call_numpy_4_channels(self):
        pass


class Emu3ImageProcessingTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Emu3ImageProcessingTester


class Siglip2ImageProcessingTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Siglip2ImageProcessingTester

    @unittest.skip("not supported")
    def test_call_numpy_4_channels(self):
        pass
