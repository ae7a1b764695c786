"""Defaults for PEFT: which parts of a NextFlow a LoRA changes.

```python
model = get_peft_model(model, lora_config())
```
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig

# The decoder's linear layers; the vision tokenizer has some of the same names, and no part in training.
DECODER_LINEARS = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
CODE_MODULES = ["code_head", "code_embeddings"]


def lora_config(**kwargs) -> "LoraConfig":
    """A `peft.LoraConfig` for [`NextFlowForConditionalGeneration`], to be changed by `kwargs` of the same names.

    Adapters on the decoder's linear layers; code head and code embeddings trained and saved whole, since a picture's
    codes are new to Qwen's weights. The vision tokenizer stays as it is.

    Raises:
        ImportError: if peft is not installed.
    """
    from peft import LoraConfig

    defaults = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": DECODER_LINEARS,
        "modules_to_save": CODE_MODULES,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**defaults | kwargs)
