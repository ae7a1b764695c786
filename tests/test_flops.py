"""Inference cost: the paper's figures to the last digit, and a real configuration against counted FLOPs."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from tests import fresh
from transformers_nextflow import NextFlowConfig
from transformers_nextflow.cache_name import CACHE
from transformers_nextflow.cli import main
from transformers_nextflow.flops import (
    LayerCost,
    Pass,
    cache_size,
    image_passes,
    mmdit_passes,
    model_cost,
    null_passes,
    paper_layer_cost,
)
from transformers_nextflow.scales import PAPER_LEVELS, ScaleSchedule, ScheduleTable, paper_schedules
from transformers_nextflow.utils.loading import load_model

SQUARE_1024 = ScheduleTable(paper_schedules(), PAPER_LEVELS, patch_size=16).by_aspect_ratio("1:1", "1024")
TINY_SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (3, 4)))
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}


def test_nextflow_layer_cost_is_the_papers():
    cost = paper_layer_cost(image_passes(SQUARE_1024, prompt_tokens=100))
    assert cost == LayerCost(quadratic=122_208, linear=256_215_912)


def test_mmdit_layer_cost_is_the_papers():
    assert paper_layer_cost(mmdit_passes(SQUARE_1024)) == LayerCost(quadratic=884_736, linear=1_207_959_552)


@pytest.mark.parametrize("hidden_size, ratio", [(2048, 5.96), (4096, 6.38)])
def test_ratio(hidden_size, ratio):
    nextflow, mmdit = paper_layer_cost(image_passes(SQUARE_1024, 100)), paper_layer_cost(mmdit_passes(SQUARE_1024))
    assert round(mmdit.flops(hidden_size) / nextflow.flops(hidden_size), 2) == ratio
    assert round(mmdit.quadratic / nextflow.quadratic, 1) == 7.2
    assert round(mmdit.linear / nextflow.linear, 1) == 4.7


def test_passes_of_a_small_image():
    assert image_passes(TINY_SCHEDULE, prompt_tokens=5) == [
        Pass(5, 5),
        Pass(1, 6, code_logits=1),
        Pass(4, 10, code_logits=4),
        Pass(12, 22, code_logits=12),
    ]
    assert image_passes(TINY_SCHEDULE, prompt_tokens=0)[0] == Pass(1, 1, code_logits=1)


def test_model_cost_equals_counted_flops():
    """Qwen2.5-VL's own decoder, driven pass by pass over its cache under torch's FLOP counter."""
    torch.manual_seed(0)
    config = Qwen2_5_VLTextConfig(**TINY)
    config._attn_implementation = "eager"  # whose two products the counter sees as such on every device
    decoder = Qwen2_5_VLTextModel(config).eval()
    text_head, code_head = torch.nn.Linear(32, 50, bias=False), torch.nn.Linear(32, 70, bias=False)
    passes = [*image_passes(TINY_SCHEDULE, prompt_tokens=5), Pass(2, 24, text_logits=2)]
    cache = DynamicCache(config=config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for step in passes:
            embeds = torch.randn(1, step.queries, 32)
            positions = torch.arange(step.keys - step.queries, step.keys).expand(3, 1, -1)
            output = decoder(
                inputs_embeds=embeds,
                position_ids=positions,
                attention_mask={"full_attention": None},
                past_key_values=cache,
            )
            text_head(output.last_hidden_state[:, : step.text_logits])
            code_head(output.last_hidden_state[:, : step.code_logits])
    assert counter.get_total_flops() == model_cost(config, 70, passes).total


SEVEN_BILLION = Qwen2_5_VLTextConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)


def test_null_prompts_run_through_the_last_guided_scale():
    passes = image_passes(TINY_SCHEDULE, 5)
    assert image_passes(TINY_SCHEDULE, 0) == [Pass(n, k, code_logits=n) for n, k in ((1, 1), (4, 5), (12, 17))]
    assert mmdit_passes(TINY_SCHEDULE, 1) == [Pass(12, 12)]
    assert null_passes(TINY_SCHEDULE, 5, 0) == []
    assert null_passes(TINY_SCHEDULE, 5, 2) == passes[:3]
    assert null_passes(TINY_SCHEDULE, 5, 3) == passes


@pytest.mark.parametrize("guided, tera", [(18, 322.0), (16, 214.6), (12, 174.5), (0, 161.0)])
def test_guidance_of_the_last_scales_costs_most(guided, tera):
    passes = image_passes(SQUARE_1024, 100) + null_passes(SQUARE_1024, 100, guided)
    assert round(model_cost(SEVEN_BILLION, 32768, passes).total / 1e12, 1) == tera


@pytest.mark.parametrize("guided", [0, 2, 3])
def test_cache_is_as_large_as_generations(tiny_model, tiny_processor, guided):
    """At the step after which most is held."""
    inputs = tiny_processor.apply_chat_template([{"role": "user", "content": "a"}], generation_mode="image")
    inputs["negative_input_ids"], inputs["negative_attention_mask"] = inputs["input_ids"], inputs["attention_mask"]
    held = []

    def remember(module, args, kwargs, output):
        layers = [layer for part in kwargs[CACHE].parts for layer in part.cache.layers]
        held.append(sum(x.numel() for layer in layers for x in (layer.keys, layer.values)))

    scales = [2.0] * guided + [1.0] * (3 - guided)
    handle = tiny_model.model.language_model.register_forward_hook(remember, with_kwargs=True)
    try:
        tiny_model.generate(**inputs, generation_mode="image", guidance_scale=scales, seed=0)
    finally:
        handle.remove()
    schedule = tiny_model.model.schedules.by_grid((3, 3))
    prompt_tokens = inputs["input_ids"].shape[1] - 1  # without <boi>
    assert max(held) == cache_size(tiny_model.config.text_config, schedule, prompt_tokens, guided)


def test_seven_billion_parameters_cost_two_flops_each_at_the_least():
    cost = model_cost(SEVEN_BILLION, 32768, [Pass(1, 1, text_logits=1)])
    weights = 7_615_616_512 - 152064 * 3584  # Qwen2.5-7B without its embedding table
    norms_and_biases = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584
    assert cost.projections + cost.mlp + cost.text_head == 2 * (weights - norms_and_biases)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: image_passes(TINY_SCHEDULE, -1), "got -1"),
        (lambda: mmdit_passes(TINY_SCHEDULE, 0), "got 0"),
        (lambda: null_passes(TINY_SCHEDULE, 5, -1), "guided_scales must lie in .* got -1"),
        (lambda: null_passes(TINY_SCHEDULE, 5, 4), r"guided_scales must lie in \[0, 3\], the scales, got 4"),
    ],
)
def test_impossible_counts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_command_prints_json_in_its_own_process(tmp_path):
    command = ["-m", "transformers_nextflow", "flops", "--json", "--prompt-tokens", 100]
    process = fresh.start(*command, "--aspect-ratio", "1:1", "--level", 1024, folder=tmp_path, outputs=tmp_path)
    assert (process.wait(), process.error.read_text()) == (0, "")
    figures = json.loads(process.out.read_text())
    assert figures["paper_per_layer"]["nextflow"] == {"quadratic": 122208, "linear": 256215912}
    assert figures["paper_per_layer"]["mmdit"] == {"quadratic": 884736, "linear": 1207959552, "steps": 18}
    model = figures["model"]
    assert (model["hidden_size"], model["num_hidden_layers"], model["guided_scales"]) == (3584, 28, 18)
    assert model["total"] == sum(model[part] for part in ("projections", "attention", "mlp", "text_head", "code_head"))


def test_command_tells_memory(capsys):
    """7B and its tokenizer, and the cache of 100 tokens and all scales but the last, with and without null prompt."""
    command = ["flops", "--json", "--aspect-ratio", "1:1", "--level", "1024", "--num-images", "3"]
    memory = {}
    for dtype, guided in (("float32", 18), ("bfloat16", 0)):
        assert main([*command, "--dtype", dtype, "--guided-scales", str(guided)]) == 0
        memory[dtype] = json.loads(capsys.readouterr().out)["memory_in_bytes"]
    each = 2 * 28 * 512 * (10_184 - 64 * 64)
    assert memory["bfloat16"]["cache"] == 3 * each * 2 and memory["float32"]["cache"] == 3 * 2 * each * 4
    assert memory["float32"]["weights"] > 4 * 8e9


def test_weights_are_as_large_as_the_models(tiny_checkpoint, tmp_path, capsys):
    """Vision tokenizer, wherever it lies, and code embeddings stay float32."""
    settings = json.loads((tiny_checkpoint / "config.json").read_text())
    settings["vision_tokenizer"] = {"model": str(tiny_checkpoint), "sha256": "0"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for dtype in ("float32", "bfloat16"):
        model, _ = load_model(str(tiny_checkpoint), getattr(torch, dtype))
        for folder in (tiny_checkpoint, tmp_path):
            assert main(["flops", "--json", "--model", str(folder), "--dtype", dtype]) == 0
            told = json.loads(capsys.readouterr().out)["memory_in_bytes"]["weights"]
            assert told == sum(parameter.nbytes for parameter in model.parameters())


def test_command_prints_a_table(capsys):
    assert main(["flops", "--aspect-ratio", "2:1", "--level", "256", "--guided-scales", "0"]) == 0
    output = capsys.readouterr().out
    assert "352x176 pixels (width x height), 12 scales" in output
    assert "0 of 12 scales guided" in output
    words = " ".join(output.split())
    schedule = NextFlowConfig().vq_config.schedule_table().by_aspect_ratio("2:1", "256")
    passes, steps = image_passes(schedule, 100), mmdit_passes(schedule)
    costs = paper_layer_cost(passes), paper_layer_cost(steps)
    for name, cost in zip(("NextFlow", "MMDiT, 18 steps"), costs):
        assert f" {name} {cost.quadratic:,} h^2 + {cost.linear:,} h " in words
    assert f" ratio at h = 4096 {costs[1].flops(4096) / costs[0].flops(4096):.2f} " in words
    cost = model_cost(NextFlowConfig().text_config, 32768, passes)
    assert f" attention {cost.attention:.4e} {cost.attention / cost.total:.1%} " in words
    assert f" total {cost.total:.4e} 100.0% " in words
    assert 16 < float(re.search(r" weights (\S+) GiB", words)[1]) < 18  # of 8.3 billion, half of them twice as large
    assert main(["flops", "--aspect-ratio", "16:9", "--level", "256"]) == 0
    assert "the nearest to 16:9, 12 scales" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--aspect-ratio", "16x9"], 'error: aspect_ratio must read "width:height"'),
        (["--prompt-tokens", "-3"], "error: prompt_tokens must not be negative, got -3"),
        (["--model", "no/such/model"], "error: there is no model directory no/such/model"),
    ],
)
def test_user_errors_are_one_line_and_status_2(capsys, arguments, message):
    assert main(["flops", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message) and captured.err.count("\n") == 1


def test_command_reads_a_model_directory(tmp_path, capsys):
    config = NextFlowConfig(text_config=TINY, boi_token_id=0, eoi_token_id=1, image_token_id=2)
    config.save_pretrained(tmp_path)
    assert main(["flops", "--json", "--model", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["hidden_size"] == 32


def test_command_refuses_another_models_directory(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert main(["flops", "--model", str(tmp_path)]) == 2
    assert "type \"nextflow\", got 'qwen2'" in capsys.readouterr().err
