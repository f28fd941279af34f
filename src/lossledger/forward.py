"""How a model is called, built, saved and described: the little that training must know of a framework."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossledger.batch import leaves, map_structure
from lossledger.errors import InputError, LossledgerError
from lossledger.objective import Objective, collecting, with_added
from lossledger.values import shape_of

Call = Callable[[Any], Any]
"""Calls a model with the inputs of a batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What `compile` was given about the numbers, kept so that `fit` can add class weights to it.

    Args:
        loss: as in `compile`.
        loss_weights: as in `compile`.
        metrics: as in `compile`.
        weighted_metrics: as in `compile`.
        regularizers: as in `compile`.
        class_names: as in `compile`.
        output_names: names of the outputs of a list.
        reproducible: as in `compile`.
    """

    loss: Any
    loss_weights: Any
    metrics: Any
    weighted_metrics: Any
    regularizers: Any
    class_names: Sequence[str] | None
    output_names: Sequence[str] | None
    reproducible: bool = False

    def objective(self, class_weight: Any = None) -> Objective:
        """The objective, with class weights if there are any."""
        return Objective(
            self.loss,
            self.loss_weights,
            self.regularizers,
            class_weight,
            self.output_names,
            self.class_names,
            self.reproducible,
        )


class Forward:
    """A torch module, as training uses it; a model of another framework overrides what is different there.

    Args:
        net: the module.

    Example:
        >>> import torch
        >>> forward = Forward(nn.Bilinear(1, 1, 1))
        >>> forward.call((torch.ones(2, 1), torch.ones(2, 1))).shape
        torch.Size([2, 1])
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.call: Call = self._caller()

    def _caller(self) -> Call:
        """Calls the module with the inputs of a batch; its mode says whether it trains."""
        return calling(self.net)

    # --- before training ---------------------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        """Whether the parameters exist."""
        return True

    def build(self, x: Any) -> None:
        """Make the parameters, from the inputs of a batch."""

    def understood(self, recipe: Recipe) -> Recipe:
        """The recipe in the words of the library: losses and metrics by the names of the outputs."""
        return recipe

    def optimizer(self, given: Any) -> Any:
        """An optimizer of the model's framework as one of torch; anything else as it is."""
        return given

    def check(self, precision: str) -> None:
        """Settings that the model cannot have are refused.

        Raises:
            InputError: such a setting.
        """

    # --- the tensors -------------------------------------------------------------------------------------------

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable parameters by the names that patterns of regularizers match."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def running(self) -> list[Tensor]:
        """What the forward pass itself changes in training: floating running statistics."""
        return [b for b in self.net.buffers() if b.is_floating_point()]

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by names that another instance of the same architecture has too."""
        return {_uncompiled(name): value for name, value in self.net.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put such a state in place.

        Raises:
            InputError: the state of another model.
        """
        try:
            self.net.load_state_dict(renamed(state, self.net.state_dict()))
        except RuntimeError as error:
            raise InputError(str(error)) from None

    def everything(self) -> dict[str, Tensor]:
        """The state, and what a forward changes beside it: also the buffers that `state_dict` leaves out."""
        # Of the same names as in a state that is saved: a run may go on with or without torch.compile.
        kept = self.net.state_dict()
        found = {**kept, **{name: buffer for name, buffer in self.net.named_buffers() if name not in kept}}
        return {_uncompiled(name): value for name, value in found.items()}

    def put_back(self, everything: Mapping[str, Tensor]) -> None:
        """Put back what `everything` told.

        Raises:
            RuntimeError: weights of another model.
        """
        kept = self.net.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.net.named_buffers() if name not in kept}
        everything = renamed(everything, [*kept, *buffers])
        self.net.load_state_dict({name: value for name, value in everything.items() if name not in buffers})
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.net.get_submodule(owner), leaf, everything[name].to(buffer.device, copy=True))

    def parts(self) -> list[tuple[str, str, list[nn.Parameter]]]:
        """The parts that hold parameters: name, kind, and the parameters."""
        parts = [(n, type(m).__name__, list(m.parameters(recurse=False))) for n, m in self.net.named_modules()]
        return [part for part in parts if part[2]]

    def summary(self) -> str | None:
        """The framework's own table of the model, if it has one."""
        return None

    # --- after a step ------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> None:
        """Have done after each step of the optimizer what the model asks for, such as constraints."""


def renamed(state: Mapping[str, Tensor], known: Iterable[str]) -> dict[str, Tensor]:
    """A state by the names of a network that is compiled where another was not, or the other way round.

    >>> renamed({"weight": torch.zeros(1)}, ["_orig_mod.weight"])
    {'_orig_mod.weight': tensor([0.])}
    """
    names = {_uncompiled(name): name for name in known}
    return {names.get(_uncompiled(name), name): value for name, value in state.items()}


def _uncompiled(name: str) -> str:
    """The name of a weight without what torch.compile puts before it.

    >>> _uncompiled("_orig_mod.0._orig_mod.weight")
    '0.weight'
    """
    return name.replace("_orig_mod.", "")


def calling(net: nn.Module) -> Call:
    """How a torch module takes its inputs: a dict by keyword where forward names the keys, a tuple by position."""
    parameters = inspect.signature(net.forward).parameters
    names = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    any_position = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    # No function inside this one: in a copy of a model it would still call the module that was copied.
    return functools.partial(_called, net, names, any_keyword, len(positional), any_position)


def _called(net: nn.Module, names: set[str], any_keyword: bool, positions: int, any_position: bool, x: Any) -> Any:
    if type(x) is Tensor:
        return net(x)
    if isinstance(x, Mapping) and (any_keyword or names >= set(x)):
        return net(**x)
    if isinstance(x, list | tuple) and (any_position or positions >= len(x) > 0):
        return net(*x)
    return net(x)


def run_forward(call: Call, x: Any, autocast: torch.dtype | None, device: str) -> Any:
    """What the model returns, with the losses that its modules added."""
    context = torch.autocast(device, autocast) if autocast is not None else contextlib.nullcontext()
    with collecting() as added, context:
        try:
            outputs = call(x)
        except Exception as error:
            if not isinstance(error, LossledgerError):
                error.add_note(_note(error, x))
            raise
    return with_added(outputs, added) if added else outputs


def _note(error: Exception, x: Any) -> str:
    """What a model was called with that failed, for the end of its own traceback."""
    given = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
    sentences = [f"This is an error of the model, which lossledger called with {map_structure(_form, x)}."]
    if any(leaf.shape[:1] == (2,) for leaf in given):
        sentences.append("What its outputs look like is asked once, with two samples.")
    if any(leaf.shape[:1] == (1,) for leaf in given) and "more than 1 value per channel" in str(error):
        sentences.append("Batch norm cannot train on one sample: choose a batch_size that leaves another last batch.")
    if "type" in str(error) and not all(leaf.is_floating_point() for leaf in given):
        sentences.append("Whole numbers stay what they are: convert those to calculate with to float32.")
    elif "type" in str(error):
        sentences.append("Tensors keep their dtype; floating NumPy arrays take that of the model.")
    return " ".join(sentences)


def _form(leaf: Any) -> str:
    return f"{leaf.dtype} {shape_of(leaf)}" if isinstance(leaf, Tensor) else type(leaf).__name__
