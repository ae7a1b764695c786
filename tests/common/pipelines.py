"""transformers' common tests of pipelines, on a tiny checkpoint of NextFlow's classes."""

import atexit
import json
import os
import shutil
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers.utils import is_torchvision_available

from tests.common.library import import_library, repository_folder
from tests.common.processing import tiny_image_processor
from tests.conftest import build_config
from tests.tiny_tokenizer import tiny_text_tokenizer
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowImageProcessor, NextFlowProcessor

CLASSES = {
    "NextFlowProcessor": NextFlowProcessor,
    "NextFlowImageProcessor": NextFlowImageProcessor,
    "PreTrainedTokenizerFast": transformers.PreTrainedTokenizerFast,
}
NEEDS_TORCHVISION = "transformers' any-to-any pipeline needs torchvision: `make pipeline-tests` has it"


def tiny_models() -> Path:
    """A folder as the tests read the library's tiny models."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    name = NextFlowForConditionalGeneration.__name__
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_text_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        extra_special_tokens={"image_token": "<|image_pad|>"},
    )
    torch.manual_seed(2)
    NextFlowForConditionalGeneration(build_config(tokenizer)).save_pretrained(folder / "nextflow" / name)
    NextFlowProcessor(tiny_image_processor(), tokenizer).save_pretrained(folder / "nextflow" / name)
    (folder / "reports").mkdir()
    classes = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": ["NextFlowImageProcessor"]}
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps({name: classes}))
    return folder


os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(tiny_models())
mixin = import_library("test_pipeline_mixin")
mixin.transformers_module = SimpleNamespace(**CLASSES)
mixin.PROCESSOR_MAPPING_NAMES = {"nextflow": "NextFlowProcessor"}


class NextFlowPipelineTest(mixin.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {
        "any-to-any": NextFlowForConditionalGeneration,
        "image-text-to-text": NextFlowForConditionalGeneration,
    }

    @classmethod
    def setUpClass(cls):
        cls.addClassCleanup(os.chdir, os.getcwd())
        os.chdir(repository_folder())  # where the tests' pictures are

    def is_pipeline_test_to_skip_more(self, *args, processor, **kwargs):
        """Of a processor with a chat template the test of any-to-any expects that a chat comes back as a `str`, where
        the pipeline gives its messages; `tests/test_pipelines.py` has chats."""
        processor.chat_template = None
        return super().is_pipeline_test_to_skip_more(*args, processor=processor, **kwargs)

    @unittest.skipUnless(is_torchvision_available(), NEEDS_TORCHVISION)
    def test_pipeline_any_to_any(self):
        super().test_pipeline_any_to_any()

    @unittest.skipUnless(is_torchvision_available(), NEEDS_TORCHVISION)
    def test_pipeline_any_to_any_fp16(self):
        super().test_pipeline_any_to_any_fp16()
