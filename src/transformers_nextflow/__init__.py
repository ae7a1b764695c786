"""NextFlow (arXiv 2601.02204) for transformers: importing this package registers the model with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from .generation_nextflow import NextFlowImageOutput
from .image_generation import ImageGenerationConfig
from .image_processing_nextflow import NextFlowImageProcessor
from .interleaved import NextFlowInterleavedOutput
from .modeling_nextflow import NextFlowForConditionalGeneration, NextFlowModel, NextFlowOutput, NextFlowPreTrainedModel
from .modeling_nextflow_vq import NextFlowVQModel, NextFlowVQOutput
from .processing_nextflow import NextFlowProcessor
from .quantizer import SelfCorrection
from .regions import codes_of_region
from .sampling import LinearRamp, ScaleInterval
from .scales import ScaleSchedule, ScheduleTable

__version__ = "0.1.0"

for config in (NextFlowConfig, NextFlowVQConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoImageProcessor.register(config, image_processor_classes={"pil": NextFlowImageProcessor}, exist_ok=True)
for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForImageTextToText):
    auto.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
AutoModel.register(NextFlowConfig, NextFlowModel, exist_ok=True)
AutoModel.register(NextFlowVQConfig, NextFlowVQModel, exist_ok=True)
AutoProcessor.register(NextFlowConfig, NextFlowProcessor, exist_ok=True)
# `transformers serve` asks the tables of names, which `register` leaves alone
for names in (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
):
    names[NextFlowConfig.model_type] = NextFlowForConditionalGeneration.__name__

__all__ = [
    "ImageGenerationConfig",
    "LinearRamp",
    "NextFlowConfig",
    "NextFlowForConditionalGeneration",
    "NextFlowImageOutput",
    "NextFlowImageProcessor",
    "NextFlowInterleavedOutput",
    "NextFlowModel",
    "NextFlowOutput",
    "NextFlowPreTrainedModel",
    "NextFlowProcessor",
    "NextFlowVQConfig",
    "NextFlowVQModel",
    "NextFlowVQOutput",
    "ScaleInterval",
    "ScaleSchedule",
    "ScheduleTable",
    "SelfCorrection",
    "codes_of_region",
]
