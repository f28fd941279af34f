"""Penalties on parameters, with Keras's formulas: each is a term of the objective, never hidden in the data loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossledger.errors import InputError, InputTypeError, UnknownNameError


class Regularizer:
    """Base of the penalties: a function from one parameter tensor to a scalar.

    Subclass it and write `__call__`; `name` becomes the name of the term.
    """

    name = "regularizer"

    def __call__(self, weight: Tensor) -> Tensor:
        """The penalty of one parameter, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, weight).")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


class L1L2(Regularizer):
    """`l1 · Σ|w| + l2 · Σw²`.

    Args:
        l1: factor of the absolute values.
        l2: factor of the squares; torch's `weight_decay` d is the gradient of `d/2 · Σw²`, so d = 2·l2.

    Example:
        >>> float(L1L2(l1=0.5, l2=1.0)(torch.tensor([1.0, -2.0])))
        6.5

    Source: keras.regularizers.L1L2 3.15.
    """

    name = "l1_l2"

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        self.l1 = _factor(l1, "l1")
        self.l2 = _factor(l2, "l2")

    def __call__(self, weight: Tensor) -> Tensor:
        """The penalty of one parameter."""
        penalty = weight.new_zeros(())
        if self.l1:
            penalty = penalty + self.l1 * weight.abs().sum()
        if self.l2:
            penalty = penalty + self.l2 * weight.square().sum()
        return penalty


class L1(Regularizer):
    """`l1 · Σ|w|`.

    Args:
        l1: factor.

    Example:
        >>> float(L1(0.5)(torch.tensor([1.0, -2.0])))
        1.5

    Source: keras.regularizers.L1 3.15.
    """

    name = "l1"

    def __init__(self, l1: float = 0.01) -> None:
        self.l1 = _factor(l1, "l1")

    def __call__(self, weight: Tensor) -> Tensor:
        """The penalty of one parameter."""
        return self.l1 * weight.abs().sum()


class L2(Regularizer):
    """`l2 · Σw²`, without a factor of one half.

    Args:
        l2: factor.

    Example:
        >>> float(L2(0.5)(torch.tensor([1.0, -2.0])))
        2.5

    Source: keras.regularizers.L2 3.15.
    """

    name = "l2"

    def __init__(self, l2: float = 0.01) -> None:
        self.l2 = _factor(l2, "l2")

    def __call__(self, weight: Tensor) -> Tensor:
        """The penalty of one parameter."""
        return self.l2 * weight.square().sum()


class OrthogonalRegularizer(Regularizer):
    """`factor · ½ Σ_{i≠j} |cos(w_i, w_j)| / (n(n − 1)/2)` over the rows (or columns) of a matrix.

    Args:
        factor: factor of the mean cosine.
        mode: `"rows"` or `"columns"`. Mind that torch's linear layers hold one row an output, Keras's one column.

    Raises:
        InputError: a parameter that is no matrix, or with a single row.

    Example:
        >>> float(OrthogonalRegularizer(1.0)(torch.eye(3)))
        0.0

    Source: keras.regularizers.OrthogonalRegularizer 3.15.
    """

    name = "orthogonal"

    def __init__(self, factor: float = 0.01, mode: str = "rows") -> None:
        if mode not in ("rows", "columns"):
            raise UnknownNameError("mode of OrthogonalRegularizer", mode, ("rows", "columns"))
        self.factor = _factor(factor, "factor")
        self.mode = mode

    def __call__(self, weight: Tensor) -> Tensor:
        """The penalty of one parameter."""
        if weight.ndim != 2:
            raise InputError(
                f"OrthogonalRegularizer needs a matrix; received a parameter of shape {tuple(weight.shape)}. "
                "Choose parameters by a pattern that names matrices only."
            )
        rows = weight if self.mode == "rows" else weight.T
        if rows.shape[0] < 2:
            raise InputError(f"OrthogonalRegularizer needs two {self.mode} at least; received {tuple(weight.shape)}.")
        unit = torch.nn.functional.normalize(rows, dim=1)
        cosines = (unit @ unit.T).abs()
        pairs = rows.shape[0] * (rows.shape[0] - 1) / 2
        return self.factor * 0.5 * (cosines.sum() - cosines.diagonal().sum()) / pairs


_NAMES: dict[str, type[Regularizer]] = {
    "l1": L1,
    "L1": L1,
    "l2": L2,
    "L2": L2,
    "l1_l2": L1L2,
    "L1L2": L1L2,
    "orthogonal": OrthogonalRegularizer,
    "OrthogonalRegularizer": OrthogonalRegularizer,
}


def get(identifier: Any) -> Regularizer:
    """A regularizer from its name or itself.

    Raises:
        UnknownNameError: a name that is no regularizer.
        InputTypeError: something else.

    Example:
        >>> get("l2")
        L2(l2=0.01)
    """
    if isinstance(identifier, Regularizer):
        return identifier
    if isinstance(identifier, str):
        if identifier not in _NAMES:
            raise UnknownNameError("regularizer", identifier, _NAMES)
        return _NAMES[identifier]()
    raise InputTypeError(f"A regularizer must be a name or a Regularizer; received {type(identifier).__name__}.")


def _factor(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InputError(f"{name} of a regularizer must be a finite number >= 0; received {value!r}.")
    return float(value)
