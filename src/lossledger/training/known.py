"""What a model returns for inputs of a form: asked once, so that later calls of `fit` and `evaluate` need not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lossledger.objective import Objective, unpacked
from lossledger.weighting import carried_mask

Known = dict[Any, dict[str, Tensor]]
"""By the form of the inputs, a stand-in for each output with a loss."""

Check = Callable[[Mapping[str, Tensor]], None]
"""Checks data against outputs."""


def form_of(x: Any) -> Any:
    """What of the inputs decides the shape of the outputs: structure, shapes without the samples, dtypes."""
    if isinstance(x, Tensor):
        return tuple(x.shape[1:]), x.dtype
    if isinstance(x, Mapping):
        return tuple((name, form_of(part)) for name, part in x.items())
    return (type(x), *map(form_of, x)) if isinstance(x, list | tuple) else x


def stand_in(output: Tensor) -> Tensor:
    """A tensor with the shape and dtype of an output, and whether it carried a mask, in the memory of one number."""
    found = torch.full((), 0.5).to(output.dtype).expand(output.shape)
    if carried_mask(output) is not None:
        found._keras_mask = torch.ones((), dtype=torch.bool)  # type: ignore[attr-defined]
    return found


class Assumed:
    """Checks that were made against stand-ins: the first batch shows whether the model still returns such outputs.

    Args:
        known: takes a form back that no longer holds.
        form: of the inputs.
        objective: splits the outputs.
        checks: made again with real outputs, where the model now returns others.
    """

    def __init__(self, known: Known, form: Any, objective: Objective, checks: list[Check]) -> None:
        self._known, self._form, self._objective, self._checks = known, form, objective, checks
        self.waiting = True

    def joined(self, other: Assumed, about: Callable[[], AbstractContextManager[None]]) -> Assumed:
        """Both, for inputs of the same form; errors of the other are raised within `about`."""

        def theirs(found: Mapping[str, Tensor]) -> None:
            with about():
                for check in other._checks:
                    check(found)

        return Assumed(self._known, self._form, self._objective, [*self._checks, theirs])

    def confirm(self, outputs: Any) -> None:
        """Look at outputs, those of the first batch.

        Raises:
            InputError: the model returns others than it did, and the data do not fit them.
        """
        if not self.waiting:
            return
        self.waiting = False
        found = self._objective.split(unpacked(outputs)[0], "y_pred")
        known = self._known[self._form]
        if all(_alike(found[name], output) for name, output in known.items()):
            return
        del self._known[self._form]
        for check in self._checks:
            check(found)


def _alike(output: Any, known: Tensor) -> bool:
    return isinstance(output, Tensor) and output.shape[1:] == known.shape[1:] and output.dtype == known.dtype
