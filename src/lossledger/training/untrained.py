"""Parameters that a loss alone holds: no optimizer of the model trains them, no checkpoint keeps them."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lossledger.errors import InputError
from lossledger.losses import LinearCrossentropy
from lossledger.losses.loss import Loss
from lossledger.objective import Objective


def refuse_untrained(objective: Objective, net: nn.Module, optimizer: Optimizer) -> None:
    """No loss holds a trainable parameter that is none of the model's.

    Raises:
        InputError: one that does.
    """
    known = {id(p) for p in net.parameters()}
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for plan in objective.terms:
        # This loss gives its own matrix a gradient, so an optimizer that holds it trains it.
        trained = known | stepped if isinstance(plan.loss, LinearCrossentropy) else known
        own = [f"{name} {tuple(p.shape)}" for name, p in _held(plan.loss, "", set()) if id(p) not in trained]
        if own:
            raise InputError(
                f"loss {plan.name!r}: expected a loss without trainable parameters of its own, received one with "
                f"{', '.join(own[:5])}{', …' if len(own) > 5 else ''}, which are none of the model's: no rank, "
                "checkpoint or gate of the training knows them. Let the model hold them (net.criterion = criterion, "
                "before the optimizer is made), or freeze them by requires_grad_(False) (docs/training.md, 'Losses "
                "that learn')."
            )


def _held(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The trainable leaves that a loss or a function holds, each once, by name."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.is_leaf and value.requires_grad:
            yield name, value
        return
    for part, inner in _parts(value):
        yield from _held(inner, f"{name}.{part}" if name and part else name or part, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds, as far as a call of it can use it."""
    if isinstance(value, nn.Module):
        # A network in eval mode is read, as a teacher or the measure of a perceptual loss is, not trained.
        for name, module in value.named_modules():
            held = [*module._parameters.items(), *module._buffers.items()] if module.training else []
            yield from ((f"{name}.{part}" if name else part, found) for part, found in held)
    elif isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple | set):
        yield from ((str(index), part) for index, part in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("", part) for part in (value.func, *value.args))
        yield from value.keywords.items()
    elif inspect.ismethod(value):
        yield "", value.__self__
    elif inspect.isfunction(value):
        yield from _named_in(value)
    elif isinstance(value, Loss) or callable(value):
        # The function of a loss has no name of its own here.
        yield from (("" if key == "fn" else key, part) for key, part in getattr(value, "__dict__", {}).items())


def _named_in(function: Any) -> Iterator[tuple[str, Any]]:
    """What the code of a function names: everything in its closure, and the globals that can hold parameters."""
    inner = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    yield from ((name, cell.cell_contents) for name, cell in inner if _is_filled(cell))
    read = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
    for name in sorted(read & function.__globals__.keys()):
        if isinstance(found := function.__globals__[name], Tensor | nn.Module | Loss):
            yield name, found


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
