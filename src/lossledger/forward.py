"""How a model is called with the inputs of a batch."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lossledger.objective import collecting, with_added

Forward = Callable[[Any], Any]


def calling(net: nn.Module) -> Forward:
    """How the module takes its inputs: a dict by keyword where forward names the keys, a tuple by position."""
    parameters = inspect.signature(net.forward).parameters
    names = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    any_position = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())

    def forward(x: Any) -> Any:
        if isinstance(x, Mapping) and (any_keyword or names >= set(x)):
            return net(**x)
        if isinstance(x, list | tuple) and (any_position or len(positional) >= len(x) > 0):
            return net(*x)
        return net(x)

    return forward


def run_forward(plan_forward: Forward, x: Any, autocast: torch.dtype | None, device: str) -> Any:
    """What the model returns, with the losses that its modules added."""
    context = torch.autocast(device, autocast) if autocast is not None else contextlib.nullcontext()
    with collecting() as added, context:
        outputs = plan_forward(x)
    return with_added(outputs, added) if added else outputs
