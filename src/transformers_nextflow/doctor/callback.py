"""[`DoctorCallback`]: an examination every N steps of a training."""

from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils import logging

from ..lora import below_adapters
from ..training.fsdp import whole_weights
from .examination import Diagnosis, examine
from .report import write_report

logger = logging.get_logger(__name__)


class DoctorCallback(TrainerCallback):
    """Examines the model every `every` steps, writes `doctor/step-N/report.html` in the output folder, and warns of
    the first alarm. Training goes on as if it had not been there: mode, random state and gradients are left alone.
    Every process examines, since sharded weights take all of them; the first one writes.

    Args:
        processor: the model's [`NextFlowProcessor`].
        every: optimizer steps between two examinations.
        packs: folder of packed shards, as the training's.

    Attributes:
        diagnoses: by step.
    """

    def __init__(self, processor, every: int, packs: str | Path | None = None):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if find_spec("matplotlib") is None:
            raise ImportError("reports need matplotlib: pip install 'transformers-nextflow[train]'")
        self.processor, self.every, self.packs = processor, every, packs
        self.diagnoses: dict[int, Diagnosis] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError("DoctorCallback cannot examine weights that ZeRO-3 shards: train with ZeRO-2 or FSDP2")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        model = model.module if hasattr(model, "module") else model  # below a wrapper of devices
        below = below_adapters(model)
        with whole_weights(model), below.base_model.whole():
            diagnosis = examine(below, self.processor, packs=self.packs)
        self.diagnoses[state.global_step] = diagnosis
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "doctor" / f"step-{state.global_step}"
        page = write_report(diagnosis, folder, f"step {state.global_step}")
        if diagnosis.first is not None:
            logger.warning("%s See %s", diagnosis.headline, page)
