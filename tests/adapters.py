"""Whether the installed transformers adds adapters by itself, for which it names a lowest version of PEFT."""

import importlib.metadata
import importlib.util

import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

PEFT = importlib.metadata.version("peft") if importlib.util.find_spec("peft") else "0"

added_by_transformers = pytest.mark.skipif(
    Version(PEFT) < Version(MIN_PEFT_VERSION),
    reason=f"add_adapter of this transformers needs peft {MIN_PEFT_VERSION}, got {PEFT}",
)
