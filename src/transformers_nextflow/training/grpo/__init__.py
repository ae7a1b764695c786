"""Prefix-tuning GRPO, TRL style (NextFlow sec. 3.2.5). Needs `trl` and `accelerate`.

- `objective.py`: advantages, weights, ratios, clipping and KL as plain functions (eq. 3 to 5).
- `config.py`: [`NextFlowGRPOConfig`]. `rollouts.py`: prompts to pictures and what training needs of them.
- `texts.py`: the text that an answer writes before its picture, where that is optimised.
- `rewards.py`: reward functions in TRL's signature, called safely; shipped rewards.
- `trainer.py`: [`NextFlowGRPOTrainer`].
"""

from ...utils.lazy import lazy_names

_MODULE_OF = {
    "NextFlowGRPOConfig": "config",
    "NextFlowGRPOTrainer": "trainer",
    "RewardError": "rewards",
}
__all__ = list(_MODULE_OF)
__getattr__ = lazy_names(__name__, _MODULE_OF)
