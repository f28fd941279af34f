"""Metrics as additive statistics: the same value for every batch size, accumulation and number of ranks."""

from lossledger.metrics.accuracy import BinaryAccuracy, CategoricalAccuracy, SparseCategoricalAccuracy
from lossledger.metrics.metric import Metric, Result
from lossledger.metrics.overlap import DiceScore, IoU
from lossledger.metrics.registry import get, known
from lossledger.metrics.regression import MeanAbsoluteError, MeanMetric, MeanSquaredError, RootMeanSquaredError
from lossledger.metrics.stateful import KerasMetric, Stateful, TorchMetric, from_torchmetrics

__all__ = [
    "BinaryAccuracy",
    "CategoricalAccuracy",
    "DiceScore",
    "IoU",
    "KerasMetric",
    "MeanAbsoluteError",
    "MeanMetric",
    "MeanSquaredError",
    "Metric",
    "Result",
    "RootMeanSquaredError",
    "SparseCategoricalAccuracy",
    "Stateful",
    "TorchMetric",
    "from_torchmetrics",
    "get",
    "known",
]
