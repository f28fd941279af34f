"""What `compile` was given, and what it became: resolved at once, or with the first batch that makes the parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lossledger.batch import to_device
from lossledger.distributed import Group
from lossledger.errors import InputError
from lossledger.forward import Forward, Recipe
from lossledger.objective import Objective
from lossledger.training import boundary, measure, optimizers
from lossledger.training.data import Data
from lossledger.training.gate import Gate
from lossledger.training.jit import Jit
from lossledger.training.known import Known
from lossledger.training.modes import evaluating
from lossledger.training.step import StepPlan
from lossledger.training.untrained import refuse_untrained


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """What `compile` was given.

    Args:
        recipe: losses, weights, metrics, regularizers, names.
        optimizer: a name, an optimizer or a function of the parameters.
        autocast: dtype of the forward pass, or `None`.
        clip_norm: largest norm of the gradient, or `None`.
        ema: decay of averaged weights, or `None`.
        on_nonfinite: "raise", "skip" or "record".
        jit: compile the step.
    """

    recipe: Recipe
    optimizer: Any
    autocast: torch.dtype | None
    clip_norm: float | None
    ema: float | None
    on_nonfinite: str
    jit: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """What the settings became for a model with parameters.

    Args:
        recipe: in the words of the library.
        plan: of a step.
        metrics: of every pass.
        known: what the model returns, by the form of its inputs.
        objectives: by class weights, where steps are compiled.
    """

    recipe: Recipe
    plan: StepPlan
    metrics: tuple[measure.MetricPlan, ...]
    known: Known = field(default_factory=dict)
    objectives: dict[str, Objective] = field(default_factory=dict)

    def known_to(self, group: Group) -> Known | None:
        """What is known, where one process asks and a step shows its outputs.

        Several ranks ask anew, all of them or none; a compiled program goes by what the model was.
        """
        return self.known if group.size == 1 and self.plan.jit is None else None

    def weighted(self, class_weight: Any) -> StepPlan:
        """The plan with class weights, if there are any."""
        if class_weight is None:
            return self.plan
        if self.plan.jit is None or not _is_plain(class_weight):
            return replace(self.plan, objective=self.recipe.objective(class_weight))
        # Compiled steps are those of one objective.
        text = repr(class_weight)
        if text not in self.objectives:
            self.objectives[text] = self.recipe.objective(class_weight)
        return replace(self.plan, objective=self.objectives[text])


def _is_plain(class_weight: Any) -> bool:
    """Whether class weights are written as they are: dicts and lists of names and numbers."""
    try:
        json.dumps(class_weight)
    except (TypeError, ValueError):
        return False
    return True


def resolved(forward: Forward, settings: Settings) -> Compiled:
    """Objective, optimizer and metrics of a model.

    Raises:
        InputError: the model has no parameters yet, or a loss has some that no step would train.
    """
    if not forward.built:
        raise InputError(
            "The model has no parameters before it has seen a batch; expected a built one. fit, evaluate and "
            "train_on_batch build it, and so does one call of it."
        )
    recipe = forward.understood(settings.recipe)
    objective = recipe.objective()
    named = forward.named_parameters()
    trainable = tuple(named.values())
    if trainable:
        made = optimizers.make(forward.optimizer(settings.optimizer), forward.net)
    else:
        made = optimizers.idle(settings.optimizer)
    refuse_untrained(objective, forward.net, made)
    forward.attach(made)
    gate = None
    if trainable and settings.on_nonfinite != "record":
        gate = Gate(forward.net, made, trainable, forward.running())
    plan = StepPlan(
        forward.net,
        forward.call,
        objective,
        made,
        trainable,
        objective.bound(named),
        settings.autocast,
        settings.clip_norm,
        gate,
        _jit(forward) if trainable and settings.jit else None,
    )
    return Compiled(recipe, plan, measure.plan(objective, recipe.metrics, recipe.weighted_metrics))


def _jit(forward: Forward) -> Jit:
    return Jit(None if type(forward) is Forward else "the model is none of torch itself")


def built(forward: Forward, data: Data, device: torch.device) -> Data:
    """The data, after its first batch has made the parameters of a model that has none yet."""
    batch, data = boundary.first_batch(data)
    with evaluating(forward.net):
        forward.build(to_device(batch, device).x)
    return data
