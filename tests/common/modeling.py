"""transformers' common tests of models and configurations, on NextFlow's."""

import unittest
from functools import partial

import torch
from transformers.models.auto import modeling_auto

from tests.common.library import import_library
from tests.tiny_models import PATCH, SCHEDULES, SQUARE, TEXT_ROWS, tiny_config
from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowModel,
    NextFlowVQConfig,
    NextFlowVQModel,
)

ModelTesterMixin = import_library("test_modeling_common").ModelTesterMixin
GenerationTesterMixin = import_library("generation.test_utils").GenerationTesterMixin
ConfigTester = import_library("test_configuration_common").ConfigTester

# The tests know by these tables, which hold the library's own models, which classes have losses and heads.
modeling_auto.MODEL_MAPPING_NAMES |= {"nextflow": "NextFlowModel", "nextflow_vq": "NextFlowVQModel"}
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["nextflow"] = "NextFlowForConditionalGeneration"

BOI, EOI, IMAGE = 1, 2, 3  # low, because the tests of resizing cut the vocabulary
EOS, PAD, BOS = 4, 5, 6


class NextFlowModelTester:
    """Three rows of text, one picture in the given scales and text; the picture is supervised, or only read."""

    def __init__(self, scales=SCHEDULES[0], is_read: bool = False):
        self.batch_size = 3
        self.scales = scales
        cells = [height * width for height, width in scales]
        self.patches = cells[-1]
        self.image_slots = sum(cells) - 1 + (cells[-1] if is_read else 0)
        self.seq_length = 3 + 1 + self.image_slots + 1 + 4
        self.is_training = True
        config = self.get_config()
        self.text_config = config.text_config.to_dict()
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads
        self.vocab_size = TEXT_ROWS

    def get_config(self, **text):
        text |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        vq = {"scale_schedules": [self.scales], "levels": {"12": len(self.scales)}}
        return tiny_config(text=text, vq=vq, boi_token_id=BOI, eoi_token_id=EOI, image_token_id=IMAGE)

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(BOS + 1, TEXT_ROWS, (self.batch_size, self.seq_length))
        input_ids[:, 3] = BOI
        input_ids[:, 4 : 4 + self.image_slots] = IMAGE
        input_ids[:, 4 + self.image_slots] = EOI
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size * self.patches, PATCH * PATCH * 3) * 2 - 1,
            "image_grid_hw": torch.tensor([self.scales[-1]] * self.batch_size),
        }
        return self.get_config(), inputs


class NextFlowModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (NextFlowModel, NextFlowForConditionalGeneration)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # the year is read off a copyright header

    def setUp(self):
        self.model_tester = NextFlowModelTester()
        self.config_tester = ConfigTester(self, config_class=NextFlowConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        """Pictures carry their last scale, and patches are flat: those of so many rows."""
        self.model_tester = NextFlowModelTester(self.model_tester.scales, is_read=True)
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        pixel_values = self.model_tester.prepare_config_and_inputs_for_common()[1]["pixel_values"]
        inputs["pixel_values"] = pixel_values[: len(inputs["input_ids"]) * self.model_tester.patches]
        return config, inputs

    def test_forward_with_logits_to_keep(self):
        """The test expects as many logits as rows of the text vocabulary."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs["logits_over"] = "text"
        self.model_tester.prepare_config_and_inputs_for_common = lambda: (config, inputs)
        super().test_forward_with_logits_to_keep()

    def test_generate_compile_model_forward_fullgraph(self):
        """The test cuts every tensor as if it had a row for each row of ids, which flat patches have not: pictures of
        one patch."""
        self.model_tester = NextFlowModelTester([[1, 1]], is_read=True)
        super().test_generate_compile_model_forward_fullgraph()

    def test_generate_continue_from_past_key_values(self):
        """The test generates from the inputs of training."""
        self.model_tester = NextFlowModelTester(is_read=True)
        super().test_generate_continue_from_past_key_values()

    def attention_mask_padding_matches_padding_free_with_position_ids(self, attn_implementation, fa_kwargs=False):
        """As Qwen2.5-VL, with its own way to say where rows without padding begin: `document_ids`."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = NextFlowForConditionalGeneration._from_config(config, attn_implementation=attn_implementation).eval()
        ids, images = inputs["input_ids"], {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
        rows = [row[: len(row) - index] for index, row in enumerate(ids)]  # of different lengths
        padded = torch.stack([torch.cat([ids.new_full([index], PAD), row]) for index, row in enumerate(rows)])
        mask = torch.stack([torch.arange(ids.shape[1]) >= index for index in range(len(rows))])
        documents = torch.cat([torch.full([len(row)], index) for index, row in enumerate(rows)])
        with torch.no_grad():
            expected = model(input_ids=padded, attention_mask=mask.long(), **images).logits[mask]
            packed = model(input_ids=torch.cat(rows)[None], document_ids=documents[None], **images).logits[0]
        torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)

    def test_model_rope_scaling_frequencies(self):
        """The test takes the number of sections for that of axes, as in Qwen."""
        rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 2, 2]}
        self.model_tester.get_config = partial(self.model_tester.get_config, rope_parameters=rope)
        super().test_model_rope_scaling_frequencies()


class NextFlowVQModelTester:
    """Three square pictures."""

    def __init__(self):
        self.batch_size = 3
        self.seq_length = SQUARE[0] * SQUARE[1]
        self.is_training = True
        config = self.get_config()
        self.hidden_size = config.semantic_config.hidden_size
        self.num_hidden_layers = config.semantic_config.num_hidden_layers
        self.num_attention_heads = config.semantic_config.num_attention_heads

    def get_config(self):
        return tiny_config().vq_config

    def prepare_config_and_inputs_for_common(self):
        height, width = (length * PATCH for length in SQUARE)
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, height, width) * 2 - 1}


class NextFlowVQModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (NextFlowVQModel,)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    has_attentions = False
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = NextFlowVQModelTester()
        self.config_tester = ConfigTester(self, config_class=NextFlowVQConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("a vision tokenizer returns no hidden states")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("a vision tokenizer returns no hidden states")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("a vision tokenizer has no embeddings of ids")
    def test_model_get_set_embeddings(self):
        pass
