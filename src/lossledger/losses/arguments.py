"""Arguments of losses: their names, and those that every loss has, its name and its dtype."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from lossledger.errors import InputError, InputTypeError

TARGETS = ("y_true", "true", "target", "targets", "label", "labels", "y", "gt", "ground_truth", "t")
OUTPUTS = (
    "y_pred",
    "y_hat",
    "yhat",
    "p",
    "pred",
    "preds",
    "prediction",
    "predictions",
    "input",
    "inputs",
    "output",
    "outputs",
    "out",
    "logit",
    "logits",
    "score",
    "scores",
    "prob",
    "probs",
)
"""What people call the two arguments of a loss, in small letters."""


def snake_case(name: str) -> str:
    """`MeanSquaredError` as `mean_squared_error`."""
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype, the dtype of a name, or that in which a dtype policy of Keras computes.

    Raises:
        InputTypeError: no dtype of torch.
    """
    dtype = getattr(dtype, "compute_dtype", dtype)
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype):
        raise InputTypeError(f"dtype: expected a torch dtype or its name such as 'float32', received {dtype!r}.")
    return found


def check_made(made: Any, base: str, *needed: str) -> None:
    """An object of somebody's own class went through the `__init__` of its base, which sets what everything else reads.

    Raises:
        InputTypeError: it did not.
    """
    missing = [name for name in needed if not hasattr(made, name)]
    if missing:
        kind = type(made).__name__
        raise InputTypeError(
            f"{kind}: expected a {base} with what {base}.__init__ sets, received one without "
            f"{missing[0].lstrip('_')!r}. "
            f"Call super().__init__({'name' if base == 'Metric' else ''}) first in {kind}.__init__."
        )


def check_order(fn: Callable[..., Any], name: str) -> None:
    """The names of a function's arguments do not say that it takes the output first, as torch's losses do.

    The numbers could not tell: a loss of two arrays of one shape runs either way, with another value and gradient.

    Raises:
        InputError: they do.
    """
    try:
        names = list(inspect.signature(fn).parameters)[:2]
    except (TypeError, ValueError):
        # Functions written in C have no signature.
        return
    if len(names) == 2 and names[0].lower() in OUTPUTS and names[1].lower() in TARGETS:
        raise InputError(
            f"{name}: it would be called with the targets first, and its arguments are named in torch's order; "
            f"expected (y_true, y_pred), received ({', '.join(names)}). Swap them, or wrap it: lambda y_true, y_pred: "
            f"{name}(y_pred, y_true)."
        )


@cache
def arguments(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The arguments of a function by name, looked up once: every run notes those of its losses."""
    return inspect.signature(function).parameters
