"""Optimizers by name, with Keras's defaults, and fused where torch has a fused kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lossledger.distributed import local
from lossledger.errors import EmptyDataError, InputError, InputTypeError, UnknownNameError

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
_SPARSE = ("sgd", "adagrad")
_FUSED_DEVICES = ("cpu", "cuda")


def make(optimizer: Any, net: nn.Module) -> Optimizer:
    """An optimizer from its name, from a function of the parameters, or itself.

    Args:
        optimizer: `"adam"` and the like (Keras's defaults), a `torch.optim.Optimizer` (its own), or a callable such
            as `functools.partial(torch.optim.Adam, lr=0.1)`.
        net: the module whose trainable parameters it updates.

    Raises:
        UnknownNameError: a name that is no optimizer.
        EmptyDataError: nothing to train.
        InputError: an optimizer of other parameters, or one that a training step cannot drive.
        InputTypeError: something else.
    """
    trainable = [p for p in net.parameters() if p.requires_grad]
    check_trainable(trainable)
    if isinstance(optimizer, str):
        return _named(optimizer.lower(), optimizer, trainable, net)
    if isinstance(optimizer, Optimizer):
        made: Any = optimizer
    elif callable(optimizer):
        made = optimizer(trainable)
    else:
        raise InputTypeError(
            f"optimizer: expected a name, a torch optimizer or a function of the parameters; received {optimizer!r}."
        )
    if not isinstance(made, Optimizer):
        raise InputTypeError(f"optimizer: the function must return a torch optimizer; received {type(made).__name__}.")
    _check(made, trainable)
    return made


def check_trainable(parameters: Sequence[nn.Parameter]) -> None:
    """There is something to train.

    Raises:
        EmptyDataError: nothing.
    """
    if not parameters:
        raise EmptyDataError(
            "optimizer: the model has no trainable parameter; expected at least one with requires_grad=True. A lazy "
            "module must see data before compile; after thawing parameters, call compile again."
        )


def idle(optimizer: Any) -> Optimizer:
    """The optimizer of a model without trainable parameters, which is evaluated and never stepped: the one given as an
    object, or one of nothing.
    """
    return optimizer if isinstance(optimizer, Optimizer) else Optimizer([{"params": []}], {"lr": 0.0})


def _named(name: str, given: str, trainable: list[nn.Parameter], net: nn.Module) -> Optimizer:
    if name not in _NAMED:
        raise UnknownNameError("optimizer", given, _NAMED)
    # A module says by this attribute that its gradients are sparse, which no fused kernel takes.
    sparse = any(getattr(module, "sparse", False) is True for module in net.modules())
    if sparse and name not in _SPARSE:
        raise InputError(
            f"optimizer: {given!r} takes no sparse gradients, which a module of the model makes (sparse=True); "
            f"expected one of {list(_SPARSE)}, or an optimizer of your own. Or make that module with sparse=False."
        )
    # Not every fused kernel takes the parts of sharded parameters.
    fits = all(p.is_floating_point() and local(p) is p and _has_kernel(name, p.device.type) for p in trainable)
    return _NAMED[name](trainable, **({"fused": True} if name in _FUSED and fits and not sparse else {}))


def _has_kernel(name: str, device: str) -> bool:
    """Whether torch fuses the optimizer on such devices; Adagrad came to CUDA years after it came to processors."""
    if name != "adagrad" or device == "cpu":
        return device in _FUSED_DEVICES
    kernel = "aten::_fused_adagrad_", device.upper()
    return device in _FUSED_DEVICES and torch._C._dispatch_has_kernel_for_dispatch_key(*kernel)


def _check(optimizer: Optimizer, trainable: list[nn.Parameter]) -> None:
    """The optimizer updates this model, and one call of `step` is all that it needs."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in trainable):
        raise InputError(
            f"optimizer: expected the parameters of this model, received a {type(optimizer).__name__} that holds none "
            "of the trainable ones. Make it from net.parameters() of the same module, after moving or replacing parts."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise InputError(
            f"optimizer: {type(optimizer).__name__} needs a closure, since it calculates the loss several times in one "
            "step; expected an optimizer that takes the gradients of one pass, such as 'adam'."
        )
