"""Losses by name: the class names, the function names and the short names of Keras."""

from __future__ import annotations

from typing import Any

from lossledger.errors import InputError, InputTypeError, UnknownNameError
from lossledger.losses.classification import (
    BinaryCrossentropy,
    BinaryFocalCrossentropy,
    CategoricalCrossentropy,
    CategoricalFocalCrossentropy,
    SparseCategoricalCrossentropy,
)
from lossledger.losses.custom import from_callable
from lossledger.losses.expression import Expression
from lossledger.losses.loss import Loss, snake_case
from lossledger.losses.overlap import Dice, Jaccard, Tversky
from lossledger.losses.regression import Huber, MeanAbsoluteError, MeanSquaredError

CLASSES: dict[str, type[Loss]] = {
    c.__name__: c
    for c in (
        BinaryCrossentropy,
        BinaryFocalCrossentropy,
        CategoricalCrossentropy,
        CategoricalFocalCrossentropy,
        SparseCategoricalCrossentropy,
        MeanSquaredError,
        MeanAbsoluteError,
        Huber,
        Dice,
        Jaccard,
        Tversky,
    )
}

_SHORT = {"bce": "BinaryCrossentropy", "mse": "MeanSquaredError", "mae": "MeanAbsoluteError"}
NAMES: dict[str, type[Loss]] = {
    **CLASSES,
    **{snake_case(name): c for name, c in CLASSES.items()},
    **{short: CLASSES[name] for short, name in _SHORT.items()},
    **{short.upper(): CLASSES[name] for short, name in _SHORT.items()},
}


def get(identifier: Any) -> Loss | Expression:
    """A loss from a name, a configuration, a callable, a torch loss, or a loss itself.

    Args:
        identifier: for example `"mse"`, `"BinaryCrossentropy"`, `{"class_name": …, "config": …}`,
            `torch.nn.BCEWithLogitsLoss()`, a function of `(y_true, y_pred)`.

    Raises:
        UnknownNameError: a name that is no loss, with a suggestion.
        InputTypeError: something that cannot be a loss.

    Example:
        >>> get("mse")
        MeanSquaredError()
    """
    if isinstance(identifier, Loss | Expression):
        return identifier
    if isinstance(identifier, str):
        if identifier not in NAMES:
            raise UnknownNameError("loss", identifier, NAMES)
        return NAMES[identifier]()
    if isinstance(identifier, dict):
        return deserialize(identifier)
    if callable(identifier):
        return from_callable(identifier)
    raise InputTypeError(
        f"A loss must be a name, a Loss, an expression of losses or a function; received {type(identifier).__name__}."
    )


def serialize(loss: Loss | Expression) -> dict[str, Any]:
    """The configuration of a loss, as plain values.

    Example:
        >>> deserialize(serialize(Huber(delta=2.0)))
        Huber(delta=2.0)
    """
    if isinstance(loss, Expression):
        return {"class_name": "Expression", "config": {"terms": [[c, serialize(part)] for c, part in loss.terms]}}
    return {"class_name": type(loss).__name__, "config": loss.get_config()}


def deserialize(config: dict[str, Any]) -> Loss | Expression:
    """The loss of a configuration made by `serialize`.

    Raises:
        InputError: not a configuration of a loss.
        UnknownNameError: a class that is no built-in loss.
    """
    if not isinstance(config, dict) or set(config) < {"class_name", "config"}:
        raise InputError(f"Expected {{'class_name': …, 'config': …}}, received {config!r}.")
    if config["class_name"] == "Expression":
        terms = [(float(c), deserialize(part)) for c, part in config["config"]["terms"]]
        return Expression(tuple((c, part) for c, part in terms if isinstance(part, Loss)))
    if config["class_name"] not in CLASSES:
        raise UnknownNameError("loss class", config["class_name"], CLASSES)
    return CLASSES[config["class_name"]].from_config(config["config"])
