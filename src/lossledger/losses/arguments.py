"""Arguments of losses: their names, and those that every loss has, its name and its dtype."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from lossledger.errors import InputTypeError


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


@cache
def arguments(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The arguments of a function by name, looked up once: every run notes those of its losses."""
    return inspect.signature(function).parameters
