"""Losses with the names, arguments and defaults of keras.losses, and the functions of the same names."""

from lossledger.losses.classification import (
    BinaryCrossentropy,
    BinaryFocalCrossentropy,
    CategoricalCrossentropy,
    CategoricalFocalCrossentropy,
    SparseCategoricalCrossentropy,
)
from lossledger.losses.custom import FunctionLoss, TorchLoss
from lossledger.losses.expression import Expression
from lossledger.losses.functions import (
    binary_crossentropy,
    binary_focal_crossentropy,
    categorical_crossentropy,
    categorical_focal_crossentropy,
    dice,
    huber,
    jaccard,
    mean_absolute_error,
    mean_squared_error,
    sparse_categorical_crossentropy,
    tversky,
)
from lossledger.losses.loss import Loss
from lossledger.losses.overlap import Dice, Jaccard, Tversky
from lossledger.losses.registry import deserialize, get, serialize
from lossledger.losses.regression import Huber, MeanAbsoluteError, MeanSquaredError

__all__ = [
    "BinaryCrossentropy",
    "BinaryFocalCrossentropy",
    "CategoricalCrossentropy",
    "CategoricalFocalCrossentropy",
    "Dice",
    "Expression",
    "FunctionLoss",
    "Huber",
    "Jaccard",
    "Loss",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "SparseCategoricalCrossentropy",
    "TorchLoss",
    "Tversky",
    "binary_crossentropy",
    "binary_focal_crossentropy",
    "categorical_crossentropy",
    "categorical_focal_crossentropy",
    "deserialize",
    "dice",
    "get",
    "huber",
    "jaccard",
    "mean_absolute_error",
    "mean_squared_error",
    "serialize",
    "sparse_categorical_crossentropy",
    "tversky",
]
