"""Losses of Keras 3 as losses of the library: the built-in ones by class and arguments, others by their `call`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lossledger.errors import InputError, InputTypeError
from lossledger.frameworks import comes_from
from lossledger.losses.custom import FunctionLoss
from lossledger.losses.loss import Loss

_HOME = "keras.src.losses.losses"


def is_keras(loss: Any) -> bool:
    """Whether a loss is an object or a function of Keras, or an object of a class that inherits from one of them."""
    if isinstance(loss, type):
        return False
    return comes_from(loss, "keras") and (callable(loss) or hasattr(loss, "call"))


def from_keras(loss: Any, names: Mapping[str, type[Loss]]) -> Loss:
    """A loss or a loss function of Keras.

    Args:
        loss: a `keras.losses.Loss` or a function of `keras.losses`.
        names: the losses of the library by the names of Keras.

    Returns:
        the loss of the same class and arguments; for a subclass of the user's own, its `call` with its reduction.

    Raises:
        InputError: a loss that cannot be taken apart into the values of entries.
        InputTypeError: an object of Keras that is no loss, or a loss with a dtype of its own.

    Example:
        >>> from_keras(type("Loss", (), {"__module__": "keras.src.x", "call": None})(), {})
        Traceback (most recent call last):
        ...
        lossledger.errors.InputTypeError: loss: expected a loss of Keras, received Loss.

    Source: keras.losses 3.15.
    """
    if inspect.isfunction(loss):
        if loss.__module__ == _HOME and loss.__name__ in names:
            return names[loss.__name__]()
        return FunctionLoss(loss)
    if not any(base.__module__ == "keras.src.losses.loss" for base in type(loss).__mro__):
        raise InputTypeError(f"loss: expected a loss of Keras, received {type(loss).__name__}.")
    _check_dtype(loss)
    if type(loss).__module__ != _HOME:
        return _of_call(loss)
    arguments = {"name": loss.name, "reduction": loss.reduction}
    options = dict(loss._fn_kwargs)
    name = type(loss).__name__
    if name == "LossFunctionWrapper":
        if loss.fn.__module__ != _HOME:
            return _of_call(loss)
        name = loss.fn.__name__
    if name not in names:
        raise InputError(
            f"loss: expected a loss of Keras 3.15, received {name}, which lossledger does not know. Write its entries "
            "as a function of (y_true, y_pred)."
        )
    kind = names[name]
    known = inspect.signature(kind.__init__).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise InputError(
            f"loss: keras.losses.{name} has the argument {unknown[0]!r}, which lossledger does not know; expected "
            f"{[k for k in known if k != 'self']}. Write its entries as a function of (y_true, y_pred)."
        )
    if name.lower() == "tversky":
        # Keras multiplies the false negatives by alpha; the paper, and the library, the false positives.
        options = {"alpha": options["beta"], "beta": options["alpha"], **{k: options[k] for k in ("axis",)}}
    return kind(**options, **arguments)


def _of_call(loss: Any) -> Loss:
    """The values that `call` returns, reduced here, so that they stay divisible."""
    own = next(base for base in type(loss).__mro__ if "__call__" in vars(base))
    if own.__module__ != "keras.src.losses.loss":
        raise InputError(
            f"loss: {type(loss).__name__} overrides __call__, so that its reduction is not known; expected a loss of "
            "Keras that only defines call(y_true, y_pred). Move the values of the entries into call."
        )
    return FunctionLoss(loss.call, loss.name, loss.reduction)


def _check_dtype(loss: Any) -> None:
    if str(loss.dtype) not in ("float32", "float64"):
        raise InputTypeError(
            f"loss: {type(loss).__name__} has dtype {loss.dtype!r}; expected 'float32': losses are calculated in the "
            "dtype of the outputs, at least float32. Make it without dtype."
        )
