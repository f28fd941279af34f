"""The outputs of a Keras model: their names, and what `compile` is given for them in the words of Keras."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from torch import nn

from lossledger import metrics as own_metrics
from lossledger.errors import InputError, UnknownNameError
from lossledger.forward import Recipe

_CROSSENTROPY = ("crossentropy", "ce")
_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Outputs:
    """How a model returns its outputs.

    Args:
        structure: `"one"`, `"list"`, `"dict"`, or `"unknown"` for a model that is not a graph of layers.
        names: the names that the terms have: keys of a dict, else names of layers, in the order of Keras.
        layers: the names of the layers, in the same order.
        lasts: length of the last axis of each, `None` where it is not fixed.
    """

    structure: str
    names: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    lasts: tuple[int | None, ...] = ()


def outputs_of(net: nn.Module) -> Outputs:
    """The outputs of a functional model (or of a sequential one, which has one)."""
    symbolic = _symbolic(net)
    # A sequential model leaves its names to the functional one inside it.
    named = getattr(net, "_functional", None) if isinstance(net, keras.Sequential) else net
    layers = tuple(getattr(named, "output_names", None) or ())
    if symbolic is None:
        return Outputs(_UNKNOWN)
    if isinstance(symbolic, Mapping):
        # Keras takes the values of a dict in the order of its sorted keys.
        keys = tuple(sorted(symbolic))
        parts = [symbolic[key] for key in keys]
        return Outputs("dict", keys, layers, _lasts(parts)) if _flat(parts) else Outputs(_UNKNOWN)
    if isinstance(symbolic, list | tuple):
        return Outputs("list", layers, layers, _lasts(symbolic)) if _flat(symbolic) else Outputs(_UNKNOWN)
    return Outputs("one", layers, layers, _lasts([symbolic]))


def _symbolic(net: nn.Module) -> Any:
    if isinstance(net, keras.Sequential):
        return net.outputs[0] if net.built and net.outputs else None
    return net._outputs_struct if hasattr(net, "_outputs_struct") else None


def _flat(parts: Sequence[Any]) -> bool:
    return all(isinstance(part, keras.KerasTensor) for part in parts)


def _lasts(parts: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(part.shape[-1] if part.shape else None for part in parts)


def understood(recipe: Recipe, net: nn.Module, regularizers: Mapping[str, Any]) -> Recipe:
    """The recipe by the names of the outputs, with the regularizers of the variables.

    Args:
        recipe: what `compile` was given.
        net: the model.
        regularizers: those of the variables, by their paths.

    Raises:
        UnknownNameError: an output that does not exist.
        InputError: a loss that Keras chooses by the targets, or a regularizer for a variable that has one.
    """
    outputs = outputs_of(net) if recipe.output_names is None else Outputs(_UNKNOWN)
    given = dict(recipe.regularizers or {})
    for path in given:
        if path in regularizers:
            raise InputError(
                f"regularizers: the variable {path!r} has a regularizer of its own, {regularizers[path]!r}; expected a "
                "pattern for others. Remove one of the two."
            )
    return replace(
        recipe,
        loss=_losses(_by_output(recipe.loss, outputs, "loss"), outputs),
        loss_weights=_by_output(recipe.loss_weights, outputs, "loss_weights"),
        metrics=_metrics(_by_output(recipe.metrics, outputs, "metrics")),
        weighted_metrics=_metrics(_by_output(recipe.weighted_metrics, outputs, "weighted_metrics")),
        regularizers={**regularizers, **given} or None,
        output_names=outputs.names if outputs.structure == "list" else recipe.output_names,
    )


def _by_output(value: Any, outputs: Outputs, what: str) -> Any:
    """A value for the outputs, as the library takes it: a dict by key, a list in order, or one value."""
    if value is None or outputs.structure == _UNKNOWN or _is_config(value):
        return value
    renamed = _renamed(value, outputs, what) if isinstance(value, Mapping) else value
    if outputs.structure == "one":
        if isinstance(renamed, Mapping) and set(renamed) <= set(outputs.names):
            return next(iter(renamed.values()), None)
        if what in ("loss", "loss_weights") and isinstance(renamed, list | tuple) and len(renamed) == 1:
            return renamed[0]
        return renamed
    if what == "loss" and not isinstance(renamed, Mapping | list | tuple):
        renamed = [renamed] * len(outputs.names)
    if outputs.structure == "dict" and isinstance(renamed, list | tuple) and len(renamed) == len(outputs.names):
        return dict(zip(outputs.names, renamed, strict=True))
    if outputs.structure == "list" and what == "loss" and isinstance(renamed, Mapping):
        return [renamed.get(name) for name in outputs.names]
    return renamed


def _renamed(value: Mapping[str, Any], outputs: Outputs, what: str) -> dict[str, Any]:
    """By the keys of the outputs, where the names of the layers were used."""
    keys = dict(zip(outputs.layers, outputs.names, strict=True))
    found = {key if key in outputs.names else keys.get(key, key): part for key, part in value.items()}
    unknown = [key for key in found if key not in outputs.names]
    # Other names among the weights are those of auxiliary losses, which are known when the model has run.
    if unknown and what != "loss_weights" and outputs.names:
        raise UnknownNameError(f"output in {what}", unknown[0], [*outputs.names, *outputs.layers])
    return found


def _is_config(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) >= {"class_name", "config"}


def _losses(loss: Any, outputs: Outputs) -> Any:
    """Losses with "crossentropy" resolved where the output alone decides."""
    if isinstance(loss, Mapping) and not _is_config(loss):
        lasts = dict(zip(outputs.names, outputs.lasts, strict=True))
        return {name: crossentropy(one, lasts.get(name)) for name, one in loss.items()}
    if isinstance(loss, list | tuple):
        lasts_in_order = outputs.lasts if len(outputs.lasts) == len(loss) else (None,) * len(loss)
        return [crossentropy(one, last) for one, last in zip(loss, lasts_in_order, strict=True)]
    return crossentropy(loss, outputs.lasts[0] if len(outputs.lasts) == 1 else None)


def crossentropy(loss: Any, last: int | None, target: tuple[int, ...] | None = None, rank: int = 0) -> Any:
    """The loss that Keras means by "crossentropy"; any other loss as it is.

    Args:
        loss: a loss.
        last: length of the last axis of the output, if it is fixed.
        target: shape of the targets, if they are known.
        rank: number of axes of the output.

    Raises:
        InputError: the targets decide, and are not known.
    """
    if not isinstance(loss, str) or loss.lower() not in _CROSSENTROPY:
        return loss
    if last == 1:
        return "binary_crossentropy"
    if target is not None and last is not None:
        sparse = len(target) < rank or target[-1] == 1
        return "sparse_categorical_crossentropy" if sparse else "categorical_crossentropy"
    raise InputError(
        f"loss: Keras chooses what {loss!r} means by the shape of the targets, which compile does not see; expected "
        "'sparse_categorical_crossentropy' (labels), 'categorical_crossentropy' (one-hot) or 'binary_crossentropy'. "
        "Name one; Model.from_compiled(model, targets=y) chooses as Keras does."
    )


def _metrics(value: Any) -> Any:
    """Names that only Keras knows become its metrics."""
    return _mapped(_metric, value)


def _mapped(fn: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(fn, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(fn, part) for part in value]
    return fn(value)


def _metric(identifier: Any) -> Any:
    if not isinstance(identifier, str) or own_metrics.known(identifier):
        return identifier
    try:
        found = keras.metrics.get(identifier)
    except ValueError:
        # The library's own error names what there is.
        return identifier
    if not isinstance(found, keras.metrics.Metric):
        found = keras.metrics.MeanMetricWrapper(found, name=identifier)
    return own_metrics.KerasMetric(found, identifier)
