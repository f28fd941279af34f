"""What a window puts back: random state and running statistics for its second round, gradients when it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def modules_of(model: nn.Module | None) -> list[nn.Module]:
    """A model and the modules inside it, each once."""
    if model is None:
        return []
    # `Module.modules` asks a generator for each module and each level that it is nested.
    found, waiting = {model: None}, [model]
    while waiting:
        inside = [m for m in waiting.pop()._modules.values() if m is not None and m not in found]
        found.update(dict.fromkeys(inside))
        waiting += inside
    return list(found)


def moving(modules: Iterable[nn.Module]) -> list[Tensor]:
    """What a forward in train mode changes by itself: buffers, and the variables that Keras layers do not train."""
    found: dict[int, Tensor] = {}
    for module in modules:
        held = list(module._buffers.values())
        # Keras keeps running statistics and seeds in parameters without a gradient. Modules of torch have nothing of
        # that name, which to ask for would take longer than all else here.
        if not type(module).__module__.startswith("torch."):
            held += [getattr(v, "value", v) for v in getattr(module, "non_trainable_variables", ())]
        if held:
            found |= {id(tensor): tensor for tensor in held if isinstance(tensor, Tensor)}
    return list(found.values())


@contextlib.contextmanager
def still(model: nn.Module | None) -> Iterator[None]:
    """In eval mode meanwhile: a forward moves no random numbers, and its row is in no statistics.

    Layers that normalize over all ranks still take part in what they exchange.
    """
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    joining = [m.register_forward_hook(_joined) for m, mode in modes if mode and isinstance(m, nn.SyncBatchNorm)]
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for hook in joining:
            hook.remove()
        for module, mode in modes:
            module.training = mode


def _joined(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A row after the layer has run on no sample: others wait for it, in the forward and in the backward.

    The row is cut off from the statistics, which the run has moved, but not from the layers before this one.
    """
    module.training = True
    try:
        nothing: Tensor = module.forward(inputs[0][:0])
    finally:
        module.training = False
    return output.detach() + nothing.sum() + 0 * inputs[0].sum()


class Replay:
    """The first round of a window, to be repeated: random state of torch, and running statistics.

    Args:
        modules: whose running statistics are kept; without any only the random state is.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._moving = [(tensor, tensor.detach().clone()) for tensor in moving(modules)]
        self._random: list[tuple[Tensor, list[Tensor]]] = []

    def keep_random(self) -> None:
        """Keep the random state that the next micro-batch starts from."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._random.append((torch.get_rng_state(), cuda))

    def random(self, position: int) -> None:
        """Go back to the random state that a micro-batch started from."""
        cpu, cuda = self._random[position]
        torch.set_rng_state(cpu)
        for device, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, device)

    def statistics(self) -> None:
        """Go back to the running statistics that the window started from."""
        with torch.no_grad():
            for tensor, kept in self._moving:
                tensor.copy_(kept)


class Gradients:
    """Gradients that were there before a window, set aside so that a window which fails leaves them as they were.

    Args:
        modules: whose gradients they are.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        held = {p: None for module in modules for p in module._parameters.values() if p is not None}
        self._kept = [(p, p.grad) for p in held]
        for parameter, _ in self._kept:
            parameter.grad = None

    def add(self) -> None:
        """Add those of the window to them, as `backward` does."""
        for parameter, before in self._kept:
            if before is None:
                continue
            after = parameter.grad
            if after is not None:
                # In place where it can be, so that whoever holds the tensor sees the sum.
                plain = before.layout == after.layout == torch.strided
                before = before.add_(after) if plain else before + after
            parameter.grad = before

    def put_back(self) -> None:
        """Leave them as they were."""
        for parameter, before in self._kept:
            parameter.grad = before
