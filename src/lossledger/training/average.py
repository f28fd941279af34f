"""Exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lossledger.distributed import as_part, as_whole, local


class Average:
    """The average of the parameters, updated after each step and installed at the end.

    As in Keras it starts from the parameters after the first step, so that no share of the initial ones stays in it.

    Args:
        parameters: the trainable parameters.
        decay: share of the old average that a step keeps; `None` averages nothing.
    """

    def __init__(self, parameters: tuple[nn.Parameter, ...], decay: float | None) -> None:
        self._parameters, self.decay = parameters, decay
        self._average: list[Tensor] = []

    def update(self) -> None:
        """Take in the parameters as they are now."""
        assert self.decay is not None
        if not self._average:
            self._average = [local(p.detach()).clone() for p in self._parameters]
            return
        torch._foreach_lerp_(self._average, [local(p.detach()) for p in self._parameters], 1 - self.decay)

    def state_dict(self) -> list[Tensor]:
        """The average; empty before the first step."""
        return [as_whole(a, p) for a, p in zip(self._average, self._parameters, strict=False)]

    def load_state_dict(self, state: list[Tensor]) -> None:
        """Go on from an average that `state_dict` told."""
        parts = (local(as_part(a, p)) for a, p in zip(state, self._parameters, strict=False))
        self._average = [part.to(p.device, copy=True) for part, p in zip(parts, self._parameters, strict=False)]

    def install(self) -> None:
        """Put the average in the place of the parameters; before the first step there is none."""
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._average, strict=False):
                local(parameter).copy_(average)
