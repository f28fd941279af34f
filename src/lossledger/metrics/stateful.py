"""Metrics that keep their own state, of torchmetrics and of Keras: `update`, `compute`, `reset`.

Their protocol is not that of `Metric`: nothing is added here, so nothing is promised about splits; weights and masks
count where the framework lets them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from lossledger.errors import InputError, InputTypeError
from lossledger.frameworks import comes_from
from lossledger.metrics.metric import Result
from lossledger.weighting import as_tensor, masked_weight


def is_torchmetrics(metric: Any) -> bool:
    """Whether an object is a metric of torchmetrics, without importing it.

    Subclasses of the user's own count: what they inherit from decides.
    """
    if isinstance(metric, type) or not all(hasattr(metric, name) for name in ("update", "compute", "reset")):
        return False
    return comes_from(metric, "torchmetrics")


class Stateful:
    """Base of the metrics that keep their own state.

    Args:
        name: name of the metric, its key in the history.
    """

    # Whether weights and masks may be given.
    weighs: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = name

    def update(self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None) -> None:
        """Take in a batch."""
        raise NotImplementedError

    def compute(self) -> Result:
        """The value of all batches since the last reset."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all batches."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The state after the batches so far."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` told."""
        raise NotImplementedError


@final
class TorchMetric(Stateful):
    """A metric of torchmetrics, called as it expects: `(preds, target)`.

    Args:
        metric: a `torchmetrics.Metric`. It is used, moved to the device of the predictions and reset, not copied.
        name: name of the metric; its class name in snake case if not given.

    Raises:
        InputTypeError: no metric of torchmetrics, or a collection of several.

    Example:
        >>> import torchmetrics
        >>> metric = TorchMetric(torchmetrics.MeanAbsoluteError())
        >>> metric.update(torch.zeros(2), torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        Result(value=1.5, by_class=None)

    Source: torchmetrics 1.9.
    """

    def __init__(self, metric: Any, name: str | None = None) -> None:
        if not is_torchmetrics(metric):
            raise InputTypeError(
                f"Expected a metric object of torchmetrics (update, compute, reset), received {metric!r}."
            )
        if isinstance(metric, nn.ModuleDict):
            raise InputTypeError("Expected one metric, received a MetricCollection. Pass its metrics one by one.")
        super().__init__(name or _snake(type(metric).__name__))
        self.metric = metric
        self._classifies = any(
            base.__module__.startswith("torchmetrics.classification") for base in type(metric).__mro__
        )
        self._updated = False

    @torch.no_grad()
    def update(self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None) -> None:
        """Take in a batch.

        Args:
            y_true: targets; labels that are whole floats become integers for a classification metric.
            y_pred: predictions.
            sample_weight: must be `None`.
            mask: must be `None`.

        Raises:
            InputError: a weight or a mask, for which torchmetrics has no place; class labels that are not whole.
        """
        for what, value in (("sample_weight", sample_weight), ("mask", mask)):
            if value is not None:
                raise InputError(
                    f"{self.name}: a torchmetrics metric takes no {what}; expected None, received "
                    f"{type(value).__name__}. Use a metric of lossledger.metrics, or pass this one without weights and "
                    "masks."
                )
        pred = as_tensor(y_pred, f"{self.name}: y_pred")
        true = as_tensor(y_true, f"{self.name}: y_true", device=pred.device)
        if self._classifies and true.is_floating_point():
            true = self._labels(true)
        if self.metric.device != pred.device:
            self.metric.to(pred.device)
        self.metric.update(pred, true)
        self._updated = True

    def _labels(self, y_true: Tensor) -> Tensor:
        labels = y_true.long()
        if bool((labels != y_true).any()):
            raise InputError(
                f"{self.name}: a classification metric of torchmetrics needs integer labels; received targets that are "
                "not whole numbers. Pass 0 and 1, or class indices."
            )
        return labels

    @property
    def updated(self) -> bool:
        """Whether a batch has come since the last reset."""
        return self._updated

    def compute(self, over_ranks: bool = False) -> Result:
        """The value of all batches since the last reset; NaN when there were none.

        Args:
            over_ranks: count the batches of all ranks, which must all call this; otherwise no other rank is asked.

        A vector is taken as one value a class, and `value` as the mean of those that are not NaN.

        Raises:
            InputTypeError: the metric computes something else than numbers in one row.
        """
        if not self._updated and not over_ranks:
            return Result(math.nan)
        # By default torchmetrics asks other ranks wherever torch.distributed runs, and would wait for them.
        self.metric.sync_on_compute = over_ranks
        with warnings.catch_warnings():
            # Another rank may have the only batches.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            value = self.metric.compute()
        if not isinstance(value, Tensor) or value.ndim > 1:
            raise InputTypeError(
                f"{self.name}: expected a scalar or one value a class from torchmetrics, received "
                f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}."
            )
        if value.ndim == 0:
            return Result(float(value))
        value = value.double().cpu()
        return Result(float(value.nanmean()), tuple(value.tolist()))

    def reset(self) -> None:
        """Forget all batches."""
        self.metric.reset()
        self._updated = False

    def state_dict(self) -> dict[str, Any]:
        """The state of the metric and of the metrics in it, after the batches so far."""
        states = {
            name: {"values": part.metric_state, "updates": part._update_count}
            for name, part in self._stateful().items()
        }
        return {"updated": self._updated, "states": states}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` told.

        Args:
            state: of the same metric.
            device: of the predictions.
        """
        self.reset()
        self.metric.to(device)
        self._updated = state["updated"]
        for name, part in self._stateful().items():
            for key, value in state["states"][name]["values"].items():
                moved = [v.to(device) for v in value] if isinstance(value, list) else value.to(device, copy=True)
                setattr(part, key, moved)
            part._update_count = state["states"][name]["updates"]

    def _stateful(self) -> dict[str, Any]:
        return {name: part for name, part in self.metric.named_modules() if hasattr(part, "metric_state")}

    def __repr__(self) -> str:
        return f"TorchMetric({self.metric!r}, name={self.name!r})"


def is_keras_metric(metric: Any) -> bool:
    """Whether an object is a metric of Keras, without importing it."""
    return not isinstance(metric, type) and comes_from(metric, "keras") and hasattr(metric, "update_state")


@final
class KerasMetric(Stateful):
    """A metric of Keras on the torch backend: `update_state`, `result`, `reset_state`.

    The value is Keras's own, with one difference: a mask counts as the sample weights 0 and 1 for every metric, where
    Keras applies the mask of an output to means of a function only (so `AUC`, `Precision` and the like see all
    entries there, and only the unmasked ones here).

    Args:
        metric: a `keras.metrics.Metric`. It is used and reset, not copied.
        name: name of the metric; its own name if not given.

    Raises:
        InputTypeError: no metric of Keras.
        InputError: a metric with several thresholds.

    Source: keras.metrics 3.15.
    """

    weighs = True

    def __init__(self, metric: Any, name: str | None = None) -> None:
        if not is_keras_metric(metric):
            raise InputTypeError(f"Expected a metric object of Keras (update_state, result), received {metric!r}.")
        super().__init__(name or str(metric.name))
        several = getattr(metric, "init_thresholds", None)
        if isinstance(several, list | tuple) and len(several) > 1:
            raise InputError(
                f"{self.name}: a metric is one number, and with several thresholds it would be several, of no class; "
                f"expected one threshold, received {list(several)}. Make a metric for each, with a name of its own."
            )
        self.metric = metric
        # Sums of an interrupted epoch, until the first batch makes the variables that they belong to.
        self._waiting: list[Tensor] = []

    @torch.no_grad()
    def update(self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None) -> None:
        """Take in a batch.

        Args:
            y_true: targets.
            y_pred: predictions.
            sample_weight: a scalar, or in the leading axes of the values of the metric.
            mask: in the leading axes of the values of the metric.
        """
        pred = as_tensor(y_pred, f"{self.name}: y_pred")
        true = as_tensor(y_true, f"{self.name}: y_true", device=pred.device)
        weight, inside = (
            None if value is None else as_tensor(value, f"{self.name}: {what}", device=pred.device)
            for what, value in (("sample_weight", sample_weight), ("mask", mask))
        )
        weight = masked_weight(weight, inside)
        if self._waiting:
            self.metric.update_state(true, pred, sample_weight=weight)
            self._assign(self._waiting)
            self._waiting = []
        self.metric.update_state(true, pred, sample_weight=weight)

    def compute(self) -> Result:
        """The value of all batches since the last reset; of a vector, one value a class and their mean.

        Raises:
            InputError: sums of an interrupted epoch that wait for a batch.
            InputTypeError: the metric computes something else than numbers in one row.
        """
        if self._waiting:
            raise InputError(
                f"{self.name}: the run was interrupted after the last batch of an epoch, and this metric of Keras is "
                "built by a batch; expected one that is built when it is made. Use a metric of lossledger.metrics."
            )
        value = self.metric.result()
        if isinstance(value, Mapping):
            raise InputTypeError(
                f"{self.name}: expected a scalar or one value a class from Keras, received a dict with the keys "
                f"{list(value)}. Make a metric for each, with a name of its own."
            )
        # A `result` may return the variable that it counts in.
        value = getattr(value, "value", value)
        tensor = value.detach().double().cpu() if isinstance(value, Tensor) else torch.tensor(value).double()
        if tensor.ndim > 1:
            raise InputTypeError(
                f"{self.name}: expected a scalar or one value a class from Keras, received shape {tuple(tensor.shape)}."
            )
        if tensor.ndim == 0:
            return Result(float(tensor))
        return Result(float(tensor.nanmean()), tuple(tensor.tolist()))

    @property
    def built(self) -> bool:
        """Whether the metric has its variables."""
        return bool(self.metric.variables)

    def values(self) -> list[Tensor]:
        """The sums of the metric on the host; none before it was built.

        Raises:
            InputError: a variable that does not add up over parts of the data.
        """
        for variable in self.metric.variables:
            if getattr(variable, "aggregation", "sum") != "sum":
                raise InputError(
                    f"{self.name}: expected variables that add up over ranks, received {variable.name!r} with the "
                    f"aggregation {variable.aggregation!r}. Use a metric of lossledger.metrics, or one process."
                )
        return [variable.value.detach().cpu().clone() for variable in self.metric.variables]

    def compute_of(self, values: list[Tensor]) -> Result:
        """The value at sums that `values` told, of several ranks added up; this one's stay as they are."""
        before = self.values()
        self._assign(values)
        try:
            return self.compute()
        finally:
            self._assign(before)

    def _assign(self, values: list[Tensor]) -> None:
        for variable, value in zip(self.metric.variables, values, strict=True):
            variable.assign(value)

    def reset(self) -> None:
        """Forget all batches."""
        self.metric.reset_state()
        self._waiting = []

    def state_dict(self) -> dict[str, Any]:
        """The variables of the metric after the batches so far."""
        return {"values": self._waiting or [v.value.detach().cpu().clone() for v in self.metric.variables]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` told; Keras keeps the variables on a device of its own.

        Args:
            state: of the same metric.
            device: of the predictions.
        """
        self.reset()
        if len(state["values"]) == len(self.metric.variables):
            self._assign(state["values"])
        else:
            self._waiting = state["values"]

    def __repr__(self) -> str:
        return f"KerasMetric({type(self.metric).__name__}, name={self.name!r})"


def from_torchmetrics(metric: Any, name: str | None = None) -> TorchMetric:
    """A metric of torchmetrics as a `TorchMetric`.

    Args:
        metric: a `torchmetrics.Metric`.
        name: name of the metric.

    Raises:
        InputTypeError: no metric of torchmetrics.
    """
    return TorchMetric(metric, name)


def _snake(name: str) -> str:
    """`MulticlassF1Score` as `multiclass_f1_score`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
