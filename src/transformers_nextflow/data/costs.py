"""What a pack costs to train on: the quantity that packing balances.

A pack's cost is linear in five measures of it. Their coefficients come from the model's configuration, as FLOPs of a
training step, or from measured times.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from math import inf

import numpy as np

VERSION = 1
BACKENDS = ("dense", "blocks")
TRAINING = 3  # forward, and twice that backward


@dataclass(frozen=True)
class CostModel:
    """Cost of packs under one attention backend.

    Args:
        backend: `"dense"` computes every pair of positions of a row, whatever the mask says (SDPA with a mask, eager);
            `"blocks"` only those that see each other (flex attention, one call per scale block).
        per_token, per_pair, per_target, per_document, per_pack: coefficients of positions, computed (query, key)
            pairs, supervised positions (the output head), documents, and one pack.
        source: what the coefficients were derived from.
    """

    backend: str = "blocks"
    per_token: float = 1.0
    per_pair: float = 0.0
    per_target: float = 0.0
    per_document: float = 0.0
    per_pack: float = 0.0
    source: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")

    @classmethod
    def from_config(cls, config, backend: str = "blocks") -> "CostModel":
        """FLOPs of a training step of a [`NextFlowConfig`], counted as [`~transformers_nextflow.flops.model_cost`]
        counts them; every supervised position computes all rows of the head (the joint softmax)."""
        from ..flops import Pass, model_cost

        text, codes = config.text_config, config.vq_config.codebook_size
        unit = model_cost(text, codes, [Pass(1, 1)])
        head = model_cost(text, codes, [Pass(0, 0, text_logits=1, code_logits=1)])
        return cls(
            backend=backend,
            per_token=TRAINING * (unit.projections + unit.mlp),
            per_pair=TRAINING * unit.attention,
            per_target=TRAINING * (head.text_head + head.code_head),
            source={
                "hidden_size": text.hidden_size,
                "intermediate_size": text.intermediate_size,
                "num_hidden_layers": text.num_hidden_layers,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": text.num_key_value_heads,
                "vocab_size": text.vocab_size,
                "codebook_size": codes,
            },
        )

    @classmethod
    def fit(cls, measures: np.ndarray, seconds: Sequence[float], backend: str, source: dict) -> "CostModel":
        """Coefficients from measured packs: least squares of the relative error, none negative.

        Args:
            measures: (packs, 5), rows of [`~CostModel.measures`].
            seconds: (packs,) of a training step.
        """
        from scipy.optimize import nnls

        took = np.asarray(seconds, dtype=np.float64)
        scale = np.maximum(np.abs(measures).max(axis=0), 1e-30)
        coefficients, _ = nnls(measures / scale / took[:, None], np.ones(len(took)))
        values: list = (coefficients / scale).tolist()
        return cls(backend, *values, source=source)

    @property
    def coefficients(self) -> np.ndarray:
        return np.array([self.per_token, self.per_pair, self.per_target, self.per_document, self.per_pack])

    def document_costs(
        self, tokens: np.ndarray, pairs: np.ndarray, targets: np.ndarray, row_length: float
    ) -> np.ndarray:
        """(documents,) what each document adds to a pack of about `row_length` positions, which under dense attention
        every one of its positions is paired with."""
        tokens, pairs, targets = (extent.astype(np.float64) for extent in (tokens, pairs, targets))
        computed = pairs if self.backend == "blocks" else tokens * row_length
        return self.per_token * tokens + self.per_pair * computed + self.per_target * targets + self.per_document

    def measures(self, tokens: np.ndarray, pairs: np.ndarray, targets: np.ndarray, padded: bool = False) -> np.ndarray:
        """(5,) measures of one pack of documents: positions, computed pairs, targets, documents, 1.

        Args:
            tokens, pairs, targets: of each document.
            padded: whether each document is a row of its own, padded to the longest, instead of one row of all.
        """
        tokens, pairs, targets = (extent.astype(np.int64) for extent in (tokens, pairs, targets))
        count = len(tokens)
        positions = count * int(tokens.max()) if padded else int(tokens.sum())
        if self.backend == "blocks":
            # a padded position sees the padding before it
            computed = int(pairs.sum()) + (int(((tokens.max() - tokens) ** 2).sum()) // 2 if padded else 0)
        else:
            computed = count * int(tokens.max()) ** 2 if padded else positions**2
        return np.array([positions, computed, int(targets.sum()), count, 1], dtype=np.float64)

    def pack_cost(self, tokens: np.ndarray, pairs: np.ndarray, targets: np.ndarray, padded: bool = False) -> float:
        """Cost of one pack."""
        return float(self.measures(tokens, pairs, targets, padded) @ self.coefficients)

    def to_dict(self) -> dict:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> "CostModel":
        """What [`~CostModel.to_dict`] gave; raises `ValueError` for anything else."""
        if values.get("version") != VERSION:
            raise ValueError(f"the cost model has version {values.get('version')}, this package reads {VERSION}")
        known = {field.name for field in fields(cls)}
        if unknown := values.keys() - known - {"version"}:
            raise ValueError(f"a cost model has the entries {', '.join(sorted(known))}, got {', '.join(unknown)}")
        for name in known & values.keys() - {"backend", "source"}:
            if not isinstance(values[name], int | float) or not 0 <= values[name] < inf:
                raise ValueError(f"{name} of a cost model must be a finite number of at least 0, got {values[name]!r}")
        return cls(**{name: value for name, value in values.items() if name != "version"})
