"""The arguments of `Model.compile` out of a Keras model that was compiled by Keras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from lossledger.errors import InputError
from lossledger.integrations.keras import outputs as named

# What Keras's fit calls and a subclass may replace.
_REPLACEABLE = (
    "train_step",
    "test_step",
    "compute_loss",
    "compute_metrics",
    "losses",
    "metrics",
)


def arguments(net: Any, targets: Any = None) -> dict[str, Any]:
    """Loss, weights, metrics and optimizer of a compiled model.

    How a step runs (`run_eagerly`, `jit_compile`, `steps_per_execution`) is not taken over: it changes no number.

    Args:
        net: the compiled model.
        targets: some targets, in the structure of the outputs; only their shapes are read, where the loss is
            "crossentropy".

    Raises:
        InputError: a model that was not compiled, or something that has no counterpart, by its name.
    """
    if not isinstance(net, keras.Model) or not net.compiled:
        raise InputError(
            "from_compiled: expected a Keras model after its compile, received "
            f"{'one that was not compiled' if isinstance(net, keras.Model) else type(net).__name__}. "
            "Use Model(net), and its own compile."
        )
    _refuse_own_training(net)
    loss = None if net._compile_loss is None else net._compile_loss._user_loss
    if loss is None:
        raise InputError(
            "from_compiled: the model was compiled without a loss, so it trains its add_loss only; expected a loss for "
            "an output at least. Use Model(net).compile(loss=…)."
        )
    metrics = net._compile_metrics
    optimizer, ema = _optimizer(net.optimizer)
    return {
        "optimizer": optimizer,
        "loss": _loss(loss, net, targets),
        "loss_weights": net._compile_loss._user_loss_weights,
        "metrics": None if metrics is None else metrics._user_metrics,
        "weighted_metrics": None if metrics is None else metrics._user_weighted_metrics,
        "ema": ema,
    }


def _refuse_own_training(net: Any) -> None:
    for name in _REPLACEABLE:
        owner = next(base for base in type(net).__mro__ if name in vars(base))
        if not owner.__module__.startswith("keras."):
            raise InputError(
                f"from_compiled: {owner.__name__} replaces Keras's {name!r}, so its training is not what it was "
                "compiled with; expected Keras's own. Use Model(net).compile(loss=…), and add_loss for what it adds."
            )
    own = [metric.name for layer in net._flatten_layers() for metric in layer._metrics]
    if own:
        raise InputError(
            f"from_compiled: the metric {own[0]!r} is updated by a layer itself, which lossledger does not read; "
            "expected metrics that compile was given. Remove it, or use Model(net).compile(…)."
        )


def _optimizer(optimizer: Any) -> tuple[Any, float | None]:
    """The optimizer, and the decay of the averaged weights, which `fit` does itself."""
    if optimizer is None:
        raise InputError("from_compiled: the model was compiled without an optimizer; expected one.")
    if not optimizer.use_ema:
        return optimizer, None
    if optimizer.ema_overwrite_frequency is not None:
        raise InputError(
            "from_compiled: ema_overwrite_frequency puts the averaged weights in place during training; expected None, "
            f"received {optimizer.ema_overwrite_frequency}. The average is put in place when fit ends."
        )
    if int(optimizer.iterations):
        raise InputError(
            "from_compiled: the optimizer has begun an average of the weights (use_ema), which cannot be continued; "
            "expected one that has made no step. Compile the model again."
        )
    config = {**optimizer.get_config(), "use_ema": False}
    return type(optimizer).from_config(config), float(optimizer.ema_momentum)


def _loss(loss: Any, net: Any, targets: Any) -> Any:
    """The loss by output, with "crossentropy" chosen by the targets."""
    outputs = named.outputs_of(net)
    if outputs.structure == "one" and isinstance(loss, list | tuple) and len(loss) > 1:
        raise InputError(
            f"from_compiled: the model has one output and {len(loss)} losses, of which Keras trains the first only; "
            "expected one. Add them: a + b."
        )
    if targets is None or outputs.structure == "unknown":
        return loss
    shapes = _shapes(targets, outputs)
    ranks = {name: len(tensor.shape) for name, tensor in zip(outputs.names or ("",), net.outputs, strict=False)}
    lasts = dict(zip(outputs.names or ("",), outputs.lasts, strict=True))

    def chosen(name: str, one: Any) -> Any:
        key = name if name in lasts else dict(zip(outputs.layers, outputs.names, strict=True)).get(name, name)
        return named.crossentropy(one, lasts.get(key), shapes.get(key), ranks.get(key, 0))

    if isinstance(loss, Mapping):
        return {name: chosen(name, one) for name, one in loss.items()}
    if isinstance(loss, list | tuple):
        return [chosen(name, one) for name, one in zip(outputs.names or ("",), loss, strict=True)]
    if outputs.structure == "one":
        return chosen((outputs.names or ("",))[0], loss)
    each = {name: chosen(name, loss) for name in outputs.names}
    return each if outputs.structure == "dict" else list(each.values())


def _shapes(targets: Any, outputs: named.Outputs) -> dict[str, tuple[int, ...]]:
    names = outputs.names or ("",)
    if isinstance(targets, Mapping):
        return {name: tuple(target.shape) for name, target in targets.items()}
    parts = targets if isinstance(targets, list | tuple) else [targets]
    return {name: tuple(part.shape) for name, part in zip(names, parts, strict=False)}
