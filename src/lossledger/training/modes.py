"""Train and eval modes of a module and its parts, put back as they were found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """All parts in eval mode meanwhile."""
    modes = _modes(net)
    net.eval()
    try:
        yield
    finally:
        _restore(modes)


@contextlib.contextmanager
def training(net: nn.Module) -> Iterator[None]:
    """The module in train mode meanwhile; parts that were put in eval mode on purpose stay so.

    A module that is in eval mode as a whole (the state that `predict` or a loaded checkpoint leaves) is switched with
    all of its parts; in a module in train mode, a part in eval mode is a frozen one. What `train` of a module itself
    keeps in eval mode stays there too.
    """
    modes = _modes(net)
    frozen = [module for module, mode in modes if not mode] if net.training else []
    # Also where it is in train mode: a `train` of its own may keep parts in eval mode, such as batch norm.
    net.train()
    for module in frozen:
        module.training = False
    try:
        yield
    finally:
        _restore(modes)


def _modes(net: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in net.modules()]


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode
