"""The model's output together with its activations, each computed at most once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Space = Literal["logits", "probabilities"] | None
"""How a loss reads the output of the model; `None` when it does not matter (regression)."""


class Prediction:
    """An output, class axis last, whose sigmoid and softmax are shared by all losses that read it.

    Args:
        raw: `[B, d…, C]`, the output as the model gave it, at least float32.
    """

    __slots__ = ("_log_softmax", "_sigmoid", "_softmax", "raw", "shared")

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw
        # Whether several losses read it: then what one computes is kept for the next.
        self.shared = False
        self._sigmoid: Tensor | None = None
        self._softmax: Tensor | None = None
        self._log_softmax: Tensor | None = None

    def sigmoid(self) -> Tensor:
        """Independent probabilities of logits."""
        if self._sigmoid is None:
            self._sigmoid = torch.sigmoid(self.raw)
        return self._sigmoid

    def log_softmax(self) -> Tensor:
        """Logarithms of the probabilities of exclusive classes."""
        if self._log_softmax is None:
            self._log_softmax = torch.log_softmax(self.raw, -1)
        return self._log_softmax

    def softmax(self) -> Tensor:
        """Probabilities of exclusive classes."""
        if self._softmax is None:
            self._softmax = self.log_softmax().exp()
        return self._softmax

    def own_sigmoid(self, out: Tensor | None = None) -> Tensor:
        """The sigmoid as a new tensor, to be written to."""
        if self._sigmoid is None:
            return torch.sigmoid(self.raw, out=out)
        return self._sigmoid.clone() if out is None else out.copy_(self._sigmoid)

    def own_log_softmax(self, out: Tensor | None = None) -> Tensor:
        """The logarithms of the softmax as a new tensor, to be written to."""
        if self._log_softmax is None:
            return torch.log_softmax(self.raw, -1) if out is None else torch.log_softmax(self.raw, -1, out=out)
        return self._log_softmax.clone() if out is None else out.copy_(self._log_softmax)

    def map(self, change: Callable[[Tensor], Tensor]) -> Prediction:
        """The prediction with a change of layout, or a part of it, with the activations that are known."""
        found = Prediction(change(self.raw))
        found.shared = self.shared
        for name in ("_sigmoid", "_softmax", "_log_softmax"):
            known = getattr(self, name)
            if known is not None:
                setattr(found, name, change(known))
        return found
