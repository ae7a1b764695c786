"""Whatever wrote a folder, it loads in a process that has imported nothing, and is written anew from there."""

import json

import pytest

from tests.fresh import run_fresh
from tests.hub_stand_in import hub_stand_in
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowImageProcessor, NextFlowProcessor

LOADED = """
import sys
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoModelForMultimodalLM, AutoProcessor
assert "transformers_nextflow" not in sys.modules
TRUST = {"trust_remote_code": True}
"""
WHOLE = """
doors = (AutoProcessor, AutoImageProcessor, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText)
print(*(type(door.from_pretrained(NAME, **TRUST)).__name__ for door in (*doors, AutoModelForMultimodalLM)))
"""
NAMES = "NextFlowProcessor NextFlowImageProcessor NextFlowConfig NextFlowModel"
NAMES += 3 * " NextFlowForConditionalGeneration"


def test_a_saved_folder(tiny_checkpoint, tmp_path):
    """And what was loaded from it, saved again; the processor comes from its files, or is an error without trust."""
    script = f"""{LOADED}
NAME = {str(tiny_checkpoint)!r}
try:
    AutoProcessor.from_pretrained(NAME, trust_remote_code=False)
except ValueError as error:
    print("trust_remote_code" in str(error))
{WHOLE}
AutoModelForMultimodalLM.from_pretrained(NAME, **TRUST).save_pretrained("again")
AutoProcessor.from_pretrained(NAME, **TRUST).save_pretrained("again")
"""
    assert run_fresh(script, tmp_path).splitlines()[-2:] == ["True", NAMES]
    assert run_fresh(f"{LOADED}\nNAME = 'again'\n{WHOLE}", tmp_path).strip() == NAMES
    for name in ("config.json", "processor_config.json"):
        first, again = (json.loads((folder / name).read_text()) for folder in (tiny_checkpoint, tmp_path / "again"))
        assert first["auto_map"] == again["auto_map"]


def test_a_file_for_each_module_imports_its_classes(tiny_checkpoint):
    maps = [json.loads((tiny_checkpoint / f"{name}.json").read_text()) for name in ("config", "processor_config")]
    expected = {}
    for reference in {reference for each in maps for reference in each["auto_map"].values()}:
        module, name = reference.split(".")
        expected.setdefault(f"{module}.py", set()).add(name)
    found = {path.name: path.read_text().split(" import ")[1] for path in tiny_checkpoint.glob("*.py")}
    assert {name: set(names.strip().split(", ")) for name, names in found.items()} == expected


def test_a_pushed_model(tiny_checkpoint, tmp_path):
    """Each of the two ways to push, then loaded by its id, and saved into a folder that needs the Hub no more."""
    script = f"""
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
for part in (NextFlowForConditionalGeneration, NextFlowProcessor):
    loaded = part.from_pretrained({str(tiny_checkpoint)!r})
    loaded.push_to_hub("someone/pushed")
    loaded.save_pretrained("saved", push_to_hub=True, repo_id="someone/saved")
"""
    load = """
AutoModelForMultimodalLM.from_pretrained(NAME, **TRUST).save_pretrained("again")
AutoProcessor.from_pretrained(NAME, **TRUST).save_pretrained("again")
"""
    with hub_stand_in() as hub:
        run_fresh(script, tmp_path, **hub.environment)
        whole = "".join(f"\nNAME = {name!r}\n{WHOLE}" for name in ("someone/pushed", "someone/saved"))
        assert run_fresh(LOADED + whole + load, tmp_path, **hub.environment).splitlines() == [NAMES, NAMES]
    assert run_fresh(f"{LOADED}\nNAME = 'again'\n{WHOLE}", tmp_path).strip() == NAMES


def test_a_vision_tokenizer_alone(tiny_model, tmp_path):
    tiny_model.model.vq_model.save_pretrained(tmp_path / "vq")
    NextFlowImageProcessor.from_vq_config(tiny_model.config.vq_config).save_pretrained(tmp_path / "vq")
    doors = "(AutoConfig, AutoModel, AutoImageProcessor)"
    script = f"print(*(type(door.from_pretrained('vq', **TRUST)).__name__ for door in {doors}))"
    names = "NextFlowVQConfig NextFlowVQModel NextFlowImageProcessor"
    assert run_fresh(LOADED + script, tmp_path).strip() == names


@pytest.mark.parametrize("part", [NextFlowForConditionalGeneration, NextFlowProcessor])
def test_saving_again_changes_nothing(part, tiny_checkpoint, tmp_path):
    part.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "first")
    part.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_adapters_find_their_base(tiny_checkpoint, tmp_path):
    """By PEFT's class for the task that `lora_config` names."""
    pytest.importorskip("peft")
    train = f"""
import peft
from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.lora import lora_config
model = NextFlowForConditionalGeneration.from_pretrained({str(tiny_checkpoint)!r})
peft.get_peft_model(model, lora_config(r=2)).save_pretrained("adapter")
"""
    run_fresh(train, tmp_path)
    load = "import peft\nmodel = peft.AutoPeftModelForCausalLM.from_pretrained('adapter', trust_remote_code=True)\n"
    script = f"{load}print(type(model.get_base_model()).__name__)"
    assert run_fresh(script, tmp_path).strip() == "NextFlowForConditionalGeneration"
