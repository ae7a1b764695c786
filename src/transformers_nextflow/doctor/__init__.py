"""Why the loss falls and the pictures look bad: [`examine`] a checkpoint, its shards, and its sampling.

- `findings.py`: what a finding is. `case.py`: what is examined. `pictures.py`: pictures to examine it with.
- `weights.py`, `alterations.py`, `tokenizer.py`, `shards.py`, `documents.py` and `sampling.py`: the checks.
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
    "tables": "report",
    "to_html": "report",
    "to_text": "report",
    "write_report": "report",
}
__all__ = list(_MODULE_OF)
__getattr__ = lazy_names(__name__, _MODULE_OF)
