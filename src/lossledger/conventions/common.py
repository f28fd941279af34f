"""What the conventions share: their errors, tensors from plain lists, and a number with what divided it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class NotSupported(Exception):
    """A combination of framework, loss and arguments that no convention here describes."""


class FrameworkError(Exception):
    """An error that the framework raises; `type_name` is the name of its class."""

    def __init__(self, type_name: str, message: str = "") -> None:
        super().__init__(message or type_name)
        self.type_name = type_name


@dataclass(frozen=True, slots=True)
class Reduced:
    """A reduced loss: what was summed, what divided it, and the number that the framework returns."""

    value: Tensor
    numerator: Tensor | None = None
    divisor: Tensor | None = None


def key(name: str) -> str:
    """One spelling for the class and the function of a loss: `MeanSquaredError`, `mean_squared_error`."""
    return name.replace("_", "").lower()


def tensor(value: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Plain numbers, arrays or tensors in the dtype in which the framework computes; always a copy."""
    return torch.as_tensor(value).detach().clone().to(dtype)


def optional(value: Any, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """`tensor`, or `None` for `None`."""
    return None if value is None else tensor(value, dtype)


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor of the dtype of another."""
    return torch.as_tensor(value, dtype=like.dtype)


def call(function: Callable[..., Any], *args: Any, options: Mapping[str, Any], where: str) -> Any:
    """Calls with options, after checking that the function has arguments of their names."""
    known = inspect.signature(function).parameters
    for option in options:
        if option not in known:
            raise NotSupported(f"{where}: no argument {option!r}")
    return function(*args, **options)


def find(table: Mapping[str, Any], name: Any, where: str) -> Any:
    """An entry of a table of losses.

    Raises:
        NotSupported: the framework has no such loss, or nobody described it here.
    """
    if not isinstance(name, str) or key(name) not in table:
        raise NotSupported(f"{where}: no loss {name!r}")
    return table[key(name)]


def plain_mean(values: Tensor, reduction: str | None) -> Tensor:
    """The reductions `mean`, `sum` and `none` of PyTorch and its relatives."""
    if reduction in (None, "none"):
        return values
    if reduction not in ("mean", "sum"):
        raise FrameworkError("ValueError", f"no reduction {reduction!r}")
    return values.mean() if reduction == "mean" else values.sum()
