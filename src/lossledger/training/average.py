"""Exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import nn


class Average:
    """The average of the parameters, updated after each step and installed at the end.

    Args:
        parameters: the trainable parameters.
        decay: share of the old average that a step keeps; `None` averages nothing.
    """

    def __init__(self, parameters: tuple[nn.Parameter, ...], decay: float | None) -> None:
        self._parameters, self._decay = parameters, decay
        self._average = [p.detach().clone() for p in parameters] if decay is not None else []

    def update(self) -> None:
        """Take in the parameters as they are now."""
        assert self._decay is not None
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - self._decay)

    def install(self) -> None:
        """Put the average in the place of the parameters."""
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._average, strict=False):
                parameter.copy_(average)
