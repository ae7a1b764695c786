"""What a training does that is told nothing: a default that changes unseen makes another model of the same command."""

import dataclasses
import inspect

import pytest

pytest.importorskip("trl")
pytest.importorskip("diffusers")

from diffusers_nextflow.training import DecoderTrainingArguments
from diffusers_nextflow.training_command import DecoderOptions
from diffusers_nextflow.training_data import PictureBatches
from transformers_nextflow.training import (
    EMACallback,
    FinetuneSettings,
    ImageBatches,
    NextFlowTrainingArguments,
    NextFlowVQTrainingArguments,
    SamplesCallback,
)
from transformers_nextflow.training.commands.grpo import GRPOOptions
from transformers_nextflow.training.commands.options import ModelOptions
from transformers_nextflow.training.commands.tokenizer import TokenizerOptions
from transformers_nextflow.training.commands.transformer import TransformerOptions
from transformers_nextflow.training.grpo import NextFlowGRPOConfig
from transformers_nextflow.training.grpo.reward_models import ClipScore, RewardServer

DEFAULTS = {
    FinetuneSettings: dict(
        full=False, lora_r=16, learning_rate=None, rate=1e-3, steps=400, batch_size=8, evaluations=20, every=20,
        patience=3, held_out=0.1, level=None, drop_captions=0.1, prior=(), samples=6, seed=0,
    ),
    NextFlowTrainingArguments: dict(
        per_device_train_batch_size=1, remove_unused_columns=False, peak_flops=None, z_loss=0.0,
        log_attention_logits=True,
    ),
    NextFlowVQTrainingArguments: dict(
        stage="pixel", learning_rate=1e-4, lr_scheduler_type="constant_with_warmup", weight_decay=0.0, adam_beta2=0.95,
        per_device_train_batch_size=1, per_device_eval_batch_size=1, remove_unused_columns=False,
        codebook_loss="tokenflow", l2_weight=1.0, perceptual_weight=1.0, codebook_weight=1.0, commitment_weight=0.25,
        distillation_weight=1.0, discriminator_weight=0.5, discriminator_start=20_000,
        adaptive_discriminator_weight=False, scale_drop=0.1, restart_steps=0,
    ),
    DecoderTrainingArguments: dict(
        max_steps=15_000, learning_rate=1e-4, lr_scheduler_type="constant_with_warmup", weight_decay=1e-2,
        per_device_train_batch_size=1, per_device_eval_batch_size=1, remove_unused_columns=False,
        logging_nan_inf_filter=False, logging_steps=10, rank=None, use_ema=False, ema_decay=0.9999,
        guidance_scale=3.5, sample_steps=500, num_samples=4, num_inference_steps=20,
    ),
    NextFlowGRPOConfig: dict(
        learning_rate=None, bf16=False, loss_type="grpo", temperature=1.0, top_k=0, top_p=1.0, guidance_scale=1.0,
        ddp_find_unused_parameters=True, optimize="image", text_temperature=1.0, text_top_k=0, text_top_p=1.0,
        text_loss_weight=1.0, scale_prefix=None, prefix_tokens=256, scale_loss_alpha=0.9, logprob_mode="conditional",
        aspect_ratio=None, rollout_level=None, vmr_continuations=1, vmr_eta=1.0, reward_timeout=None,
    ),
    ModelOptions: dict(model_name_or_path=None, use_peft=False, lora_dropout=0.0),
    GRPOOptions: dict(dataset_name=None, reward_funcs=[], ema_decay=None),
    TokenizerOptions: dict(
        images=..., eval_images=None, model=None, teacher=None, level=None, images_per_batch=16, ema_decay=None,
    ),
    TransformerOptions: dict(
        packs=None, documents=None, eval_packs=None, stage=None, stages=None, ema_decay=None, sample_prompts=[],
        sample_every=500,
    ),
    DecoderOptions: dict(
        pretrained_model_name_or_path=..., dataset_name=..., vision_tokenizer=None, stage="base", adapter=None,
        dataset_config_name=None, dataset_split="train", shards=None, image_column="image", caption_column="text",
        level=None, train_batch_size=16, proportion_empty_prompts=0.0,
    ),
}  # fmt: skip
CALLS = {
    EMACallback: dict(decay=0.999, warmup=False),
    ImageBatches: dict(level=None, seed=0),
    PictureBatches: dict(upscale=1, empty_share=0.0, seed=0),
    SamplesCallback: dict(every=500, images=None, seed=0),
    ClipScore: dict(processor=None, scaled=False, device=None),
    RewardServer: dict(timeout=60.0, retries=5, backoff=1.0, columns=()),
}


@pytest.mark.parametrize("options", DEFAULTS, ids=lambda options: options.__name__)
def test_options_have_their_documented_defaults(options, tmp_path):
    expected = DEFAULTS[options]
    own = set(vars(options)["__annotations__"]) - {"output_dir"}
    assert own == set(expected) - {name for name, value in vars(options).items() if isinstance(value, property)}
    needed = {name: "given" for name, value in expected.items() if value is ...}
    here = {"output_dir": str(tmp_path), "use_cpu": True} if hasattr(options, "output_dir") else {}
    made = options(**here, **needed)
    assert {name: getattr(made, name) for name in expected} == expected | needed


@pytest.mark.parametrize("called", CALLS, ids=lambda called: called.__name__)
def test_arguments_have_their_documented_defaults(called):
    parameters = inspect.signature(called).parameters.values()
    assert {each.name: each.default for each in parameters if each.default is not each.empty} == CALLS[called]


def test_settings_of_own_pictures_at_their_limits():
    lowest = {"lora_r": 1, "steps": 1, "batch_size": 1, "evaluations": 1, "patience": 1, "samples": 1}
    lowest |= {"held_out": 1e-3, "learning_rate": 1e-9}
    assert dataclasses.asdict(FinetuneSettings(**lowest)).items() >= lowest.items()
    for name in lowest:
        with pytest.raises(ValueError, match=f"{name} must .*, got 0"):
            FinetuneSettings(**{name: 0})
    with pytest.raises(ValueError, match=r"held_out must lie in \(0, 1\), got 1"):
        FinetuneSettings(held_out=1)


def test_rate_and_interval_of_own_pictures():
    assert FinetuneSettings(full=True).rate == 1e-5
    assert FinetuneSettings(full=True, learning_rate=0.5).rate == FinetuneSettings(learning_rate=0.5).rate == 0.5
    assert FinetuneSettings(steps=7, evaluations=2).every == 3
    assert FinetuneSettings(steps=2, evaluations=5).every == 1
