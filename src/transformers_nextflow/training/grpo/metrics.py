"""[`Metrics`]: what is logged of several steps and processes."""

import torch
from accelerate.utils import gather_object


class Metrics:
    """Means and extremes since the last [`Metrics.pop`], which alone waits for the device and for other processes."""

    def __init__(self):
        self._means: dict[str, list[tuple[torch.Tensor, int]]] = {}  # sums and how many were summed
        self._extremes: dict[str, list[torch.Tensor]] = {}

    def mean(self, name: str, values: float | torch.Tensor) -> None:
        """Count each of the values that is not NaN."""
        values = torch.as_tensor(values).detach().float()
        values = values[~values.isnan()]
        self._means.setdefault(name, []).append((values.sum(), values.numel()))

    def extreme(self, name: str, values: torch.Tensor) -> None:
        """Count the largest of the values, or the least if the name ends in `min`."""
        if values.numel():
            self._extremes.setdefault(name, []).append(_extreme(name)(values.detach().float()))

    def pop(self) -> dict[str, float]:
        """Of all processes, which must all call this; nothing of a name without values."""
        means = {name: [(float(total), count) for total, count in pairs] for name, pairs in self._means.items()}
        extremes = {name: [float(value) for value in values] for name, values in self._extremes.items()}
        self._means, self._extremes = {}, {}
        means, extremes = (_joined(gather_object([own])) for own in (means, extremes))
        result = {}
        for name, pairs in means.items():
            if count := sum(count for _, count in pairs):
                result[name] = sum(total for total, _ in pairs) / count
        return result | {name: float(_extreme(name)(torch.tensor(values))) for name, values in extremes.items()}


def _extreme(name: str):
    return torch.min if name.endswith("min") else torch.max


def _joined(parts: list[dict[str, list]]) -> dict[str, list]:
    """The lists of several processes, by their names in order."""
    names = sorted({name for part in parts for name in part})
    return {name: [value for part in parts for value in part.get(name, [])] for name in names}
