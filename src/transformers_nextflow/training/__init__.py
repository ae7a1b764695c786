"""Training on transformers' Trainer (NextFlow sec. 3). Needs `accelerate`; inference does not.

- `stages.py`, `stages.yaml`: the stages of table 2: what each trains, at which level, on which mixture.
- `trainer.py`: [`NextFlowTrainer`] for the transformer, with every part of the loss logged apart.
- `vq_trainer.py`, `vq_losses.py`, `teacher.py`, `images.py`: [`NextFlowVQTrainer`] for the vision tokenizer, its
  losses, whose features it distils, and pictures in batches of one size.
- `metrics.py`: PSNR, SSIM, LPIPS.
- `chats.py`, `supervised.py`, `preferences.py`, `joint_head.py`: chats in the columns of TRL's datasets, and TRL's
  trainers of answers and of preferences on pictures.
- `attention_logits.py`: the largest attention logit, for the log.
- `checkpoints.py`: which checkpoint a training goes on from, and what is saved: [`SavingTrainer`].
- `ema.py`: [`EMACallback`], an exponential moving average of the weights, for any Trainer.
- `finetuning.py`, `finetune_settings.py`: [`finetune`], own pictures to a model that draws them.
- `fsdp.py`: what FSDP2 has to be told.
- `loading.py`: the model that is trained, in float32, with the adapters that it has.
- `samples.py`: [`SamplesCallback`], pictures drawn along a training.
"""

from ..utils.lazy import lazy_names

_MODULE_OF = {
    "ChatCollator": "chats",
    "EMACallback": "ema",
    "FinetuneSettings": "finetune_settings",
    "ImageBatches": "images",
    "NextFlowDPOTrainer": "preferences",
    "NextFlowSFTTrainer": "supervised",
    "NextFlowTrainer": "trainer",
    "NextFlowTrainingArguments": "trainer",
    "NextFlowVQTrainer": "vq_trainer",
    "NextFlowVQTrainingArguments": "vq_trainer",
    "SamplesCallback": "samples",
    "Stage": "stages",
    "enlarge_decoder": "vq_trainer",
    "finetune": "finetuning",
    "load_stages": "stages",
    "load_teacher": "teacher",
    "prepare_vq_stage": "vq_trainer",
}
__all__ = list(_MODULE_OF)
__getattr__ = lazy_names(__name__, _MODULE_OF)
