"""transformers' common tests of processors and image processors, on NextFlow's."""

import unittest
from functools import partialmethod
from unittest import mock

from transformers import ProcessorMixin

from tests.common.controls import IMPOSSIBLE
from tests.common.library import import_library
from tests.conftest import LEVELS, PATCH_SIZE, SCHEDULES
from tests.tiny_tokenizer import tiny_text_tokenizer
from transformers_nextflow import NextFlowImageProcessor, NextFlowProcessor

ProcessorTesterMixin = import_library("test_processing_common").ProcessorTesterMixin
image_processing = import_library("test_image_processing_common")


def tiny_image_processor() -> NextFlowImageProcessor:
    return NextFlowImageProcessor(patch_size=PATCH_SIZE, scale_schedules=SCHEDULES, levels=LEVELS)


class NextFlowProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = NextFlowProcessor
    grids_input_name = "image_grid_hw"

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        """The library's own compares with the next class, which here is not yet `ProcessorMixin`."""
        return getattr(processor_class, method_name) is not getattr(ProcessorMixin, method_name)

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_text_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return tiny_image_processor()

    @classmethod
    def _setup_test_attributes(cls, processor):
        cls.image_token = processor.image_placeholder

    def _test_apply_chat_template(self, modality, batch_size, return_tensors, input_name, *args):
        """With the library's defaults: NextFlow's own give at once what `generate` takes. Patches are flat, as in
        Qwen; what has a row for each picture is the grids."""
        defaults = {"add_generation_prompt": False, "tokenize": False, "return_dict": False}
        as_in_library = partialmethod(NextFlowProcessor.apply_chat_template, **defaults)
        with mock.patch.object(NextFlowProcessor, "apply_chat_template", as_in_library):
            super()._test_apply_chat_template(modality, batch_size, return_tensors, "grids_input_name", *args)


class NextFlowImageProcessingTester(image_processing.ImageProcessingTester):
    def _get_image_processing_classes(self):
        return {"pil": NextFlowImageProcessor}

    def prepare_image_processor_dict(self):
        return {"patch_size": PATCH_SIZE, "scale_schedules": SCHEDULES, "levels": LEVELS, "do_normalize": True}

    def expected_shape(self, images) -> tuple[int, int]:
        """Of the flat patches."""
        processor = tiny_image_processor()
        sizes = [image.size[::-1] if hasattr(image, "getpixel") else image.shape for image in images]
        sizes = [(size[0], size[1]) if len(size) == 2 or size[-1] == 3 else size[1:] for size in sizes]
        cells = sum(processor.get_number_of_image_patches(*size) for size in sizes)
        return cells, 3 * PATCH_SIZE**2


class NextFlowImageProcessingTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = NextFlowImageProcessingTester
    test_cast_dtype = True

    def check_call(self, **kwargs):
        """The library's own three expect pictures of one size, as Qwen2-VL's do not either."""
        images = self.image_processor_tester.prepare_image_inputs(equal_resolution=False, **kwargs)
        processor = tiny_image_processor()
        for given in (images[:1], images):
            encoded = processor(given, return_tensors="pt")
            self.assertEqual(tuple(encoded.pixel_values.shape), self.image_processor_tester.expected_shape(given))
            self.assertEqual(tuple(encoded.image_grid_hw.shape), (len(given), 2))

    def test_call_pil(self):
        self.check_call()

    def test_call_numpy(self):
        self.check_call(numpify=True)

    def test_call_pytorch(self):
        self.check_call(torchify=True)

    @unittest.skip("pictures have three channels, which others become or are refused")
    def test_call_numpy_4_channels(self):
        pass

    @unittest.skip(IMPOSSIBLE["NextFlowImageProcessingTest::test_new_models_require_torchvision_backend"])
    def test_new_models_require_torchvision_backend(self):
        pass
