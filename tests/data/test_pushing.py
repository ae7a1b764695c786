"""What a training with `push_to_hub` leaves on the Hub is a whole model."""

import json
from pathlib import Path

from safetensors.torch import load

from tests.fresh import run_fresh
from tests.hub_stand_in import hub_stand_in

ROOT = Path(__file__).parents[2]
TRAININGS = """
from test_vq_trainer import NextFlowVQModel, prepare_vq_stage, tiny_config, trainer
from transformers_nextflow.data import PackedDataset
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.training.loading import load_to_train

quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "push_to_hub": True}
for strategy in ("end", "every_save"):
    model, processor = load_to_train("model", vision_tokenizer=False)
    options = quiet | {"hub_model_id": f"someone/{strategy}", "hub_strategy": strategy}
    arguments = NextFlowTrainingArguments(strategy, max_steps=1, save_steps=1, **options)
    packs = PackedDataset("packs", model, processor)
    training = NextFlowTrainer(model, arguments, train_dataset=packs, processing_class=processor)
    training.train()
    if strategy == "end":
        training.save_model()
    training._finish_current_push()
tokenizer = prepare_vq_stage(NextFlowVQModel(tiny_config().vq_config), "pixel")
training = trainer(tokenizer, "tokenizer", restart_steps=2, push_to_hub=True, hub_model_id="someone/tokenizer")
training.train()
training.save_model()
"""


def test_pushed_models_are_whole(data_model, tiny_processor, packs, tmp_path):
    """Also those of trainings without the vision tokenizer, whose checkpoints refer to a folder."""
    data_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    (tmp_path / "packs").symlink_to(packs)
    path = ":".join(map(str, (ROOT / "src", ROOT, ROOT / "tests")))
    with hub_stand_in() as hub:
        run_fresh(TRAININGS, tmp_path, PYTHONPATH=path, **hub.environment)
    assert hub.repositories.keys() == {"someone/end", "someone/every_save", "someone/tokenizer"}
    for name in ("someone/end", "someone/every_save"):
        files = hub.repositories[name]
        assert json.loads(files["config.json"]).get("vision_tokenizer") is None
        assert load(files["model.safetensors"]).keys() == data_model.state_dict().keys()
    assert {"config.json", "model.safetensors"} <= hub.repositories["someone/tokenizer"].keys()
