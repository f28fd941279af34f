"""Optimizers by name, with Keras's defaults, and fused where torch has a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lossledger.errors import EmptyDataError, InputTypeError, UnknownNameError

# Keras 3.15 defaults. Its epsilon is 1e-7 where torch has 1e-8.
_NAMED: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p, **k: torch.optim.SGD(p, lr=0.01, **k),
    "adam": lambda p, **k: torch.optim.Adam(p, lr=0.001, eps=1e-7, **k),
    "adamw": lambda p, **k: torch.optim.AdamW(p, lr=0.001, eps=1e-7, weight_decay=0.004, **k),
    "adagrad": lambda p, **k: torch.optim.Adagrad(p, lr=0.001, initial_accumulator_value=0.1, eps=1e-7, **k),
    "rmsprop": lambda p, **k: torch.optim.RMSprop(p, lr=0.001, alpha=0.9, eps=1e-7, **k),
    "adamax": lambda p, **k: torch.optim.Adamax(p, lr=0.001, eps=1e-7, **k),
    "nadam": lambda p, **k: torch.optim.NAdam(p, lr=0.001, eps=1e-7, **k),
    "adadelta": lambda p, **k: torch.optim.Adadelta(p, lr=0.001, rho=0.95, eps=1e-7, **k),
}
_FUSED = ("sgd", "adam", "adamw", "adagrad")
_FUSED_DEVICES = ("cpu", "cuda")


def make(optimizer: Any, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """An optimizer from its name, from a function of the parameters, or itself.

    Args:
        optimizer: `"adam"` and the like (Keras's defaults), a `torch.optim.Optimizer` (its own), or a callable such
            as `functools.partial(torch.optim.Adam, lr=0.1)`.
        parameters: the trainable parameters of the model.

    Raises:
        UnknownNameError: a name that is no optimizer.
        EmptyDataError: nothing to train.
        InputTypeError: something else.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise EmptyDataError(
            "optimizer: the model has no trainable parameter; expected at least one with requires_grad=True. "
            "A lazy module must see data before compile."
        )
    if isinstance(optimizer, str):
        name = optimizer.lower()
        if name not in _NAMED:
            raise UnknownNameError("optimizer", optimizer, _NAMED)
        fused = name in _FUSED and all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in trainable)
        return _NAMED[name](trainable, **({"fused": True} if fused else {}))
    if callable(optimizer):
        made = optimizer(trainable)
        if isinstance(made, Optimizer):
            return made
        raise InputTypeError(f"optimizer: the function must return a torch optimizer; received {type(made).__name__}.")
    raise InputTypeError(
        f"optimizer: expected a name, a torch optimizer or a function of the parameters; received {optimizer!r}."
    )


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether the kernel itself can leave a step out when a flag on the device says so."""
    return all(group.get("fused") for group in optimizer.param_groups)
