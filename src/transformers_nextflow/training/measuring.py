"""[`MeasuringTrainer`]: evaluations that measure a dataset, where the library's gather outputs."""

from collections.abc import Mapping

from .checkpoints import SavingTrainer


def refuse_functions_of_outputs(given: Mapping) -> None:
    """Raise a `ValueError` for arguments of a Trainer that are to be called with outputs or logits."""
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if given.get(name) is not None:
            raise ValueError(f"{name} is of outputs that this trainer never gathers: `evaluate` has all its measures")


class MeasuringTrainer(SavingTrainer):
    """Trainer with a loss and measures of its own, which `evaluate` gives of a dataset, or of each of several by name.

    Raises:
        ValueError: for functions of outputs, which are never gathered.
    """

    def __init__(self, *args, **kwargs):
        refuse_functions_of_outputs(kwargs)
        super().__init__(*args, **kwargs)

    def measure(self, dataset, prefix: str) -> dict[str, float]:
        """What an evaluation says of a dataset; nothing is trained then. The names get the prefix after it."""
        raise NotImplementedError

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """What [`measure`] says; of several datasets their names stand after the prefix, as the Trainer's do."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        if isinstance(dataset, dict):
            results = [self.evaluate(each, None, f"{metric_key_prefix}_{name}") for name, each in dataset.items()]
            return {name: value for result in results for name, value in result.items()}
        self.model.eval()
        if hasattr(self.optimizer, "eval"):  # a schedule-free one
            self.optimizer.eval()
        measured = self.measure(dataset, metric_key_prefix)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args, **kwargs):
        """Raises a `ValueError`: no outputs are gathered."""
        raise ValueError(f"{type(self).__name__} gathers no outputs: measure a dataset by `evaluate`")
