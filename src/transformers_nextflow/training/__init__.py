"""Training on transformers' Trainer (NextFlow sec. 3). Needs `accelerate`; inference does not.

- `stages.py`, `stages.yaml`: the stages of table 2: what each trains, at which level, on which mixture.
- `trainer.py`: [`NextFlowTrainer`] for the transformer, with every part of the loss logged apart.
"""

from importlib import import_module

_MODULE_OF = {
    "NextFlowTrainer": "trainer",
    "NextFlowTrainingArguments": "trainer",
    "Stage": "stages",
    "load_stages": "stages",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
