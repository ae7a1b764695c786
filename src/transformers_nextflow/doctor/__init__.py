"""Why the loss falls and the pictures look bad: [`examine`] a checkpoint, its shards, and its sampling.

- `findings.py`: what a finding is, and when figures differ by more than rounding or chance.
- `reference.py`: the paper's formulas, written apart from the model's code.
- `tokenizer.py`, `shards.py`, `transformer.py`, `sampling.py`: the checks.
- `examination.py`: their order. `report.py`: text and HTML. `callback.py`: every N steps of a training.
"""

from ..utils.lazy import lazy_names

_MODULE_OF = {
    "Diagnosis": "examination",
    "DoctorCallback": "callback",
    "Finding": "findings",
    "Picture": "pictures",
    "examine": "examination",
    "read_pictures": "pictures",
    "to_html": "report",
    "to_png": "report",
    "to_text": "report",
    "write_report": "report",
}
__all__ = list(_MODULE_OF)
__getattr__ = lazy_names(__name__, _MODULE_OF)
