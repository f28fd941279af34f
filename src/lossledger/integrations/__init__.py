"""Models of other frameworks, each as a `Forward`; a framework is looked at only when one of its models is given."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from lossledger.errors import InputError, InputTypeError
from lossledger.forward import Forward
from lossledger.frameworks import comes_from, refuse_tensorflow


def forward_of(net: Any) -> Forward:
    """How a model is called, built and saved.

    Args:
        net: a torch module, also one that is a Keras 3 model on the torch backend or holds layers of Keras.

    Raises:
        InputTypeError: no torch module; a model of Keras on another backend, or of tf_keras.

    Example:
        >>> type(forward_of(nn.Linear(1, 1))).__name__
        'Forward'
    """
    if not isinstance(net, nn.Module):
        raise _not_a_module(net)
    layer = _keras_layer()
    if layer is None or not any(isinstance(module, layer) for module in net.modules()):
        return Forward(net)
    made: Forward = importlib.import_module("lossledger.integrations.keras.forward").KerasForward(net)
    return made


def compiled_arguments(net: Any, targets: Any = None) -> dict[str, Any]:
    """The arguments of `compile` out of a model that its own framework compiled.

    Args:
        net: a compiled Keras model.
        targets: some targets, where the loss depends on their shape.

    Raises:
        InputError: a model that was not compiled, or something that has no counterpart.
    """
    if _keras_layer() is None:
        raise InputError(f"from_compiled: expected a compiled Keras model, received {type(net).__name__}.")
    found: dict[str, Any] = importlib.import_module("lossledger.integrations.keras.compiled").arguments(net, targets)
    return found


def _keras_layer() -> Any:
    """Keras's class of layers, if someone has imported Keras and it runs on torch."""
    keras = sys.modules.get("keras")
    layers = getattr(keras, "layers", None)
    layer = getattr(layers, "Layer", None)
    return layer if isinstance(layer, type) and issubclass(layer, nn.Module) else None


def _not_a_module(net: Any) -> InputTypeError:
    if isinstance(net, type):
        return InputTypeError(
            f"Model: expected a torch.nn.Module, received {type(net).__name__}. Make an instance of it first."
        )
    if comes_from(net, "keras"):
        backend = sys.modules["keras"].backend.backend()
        return InputTypeError(
            f"Model: expected a Keras 3 model on the torch backend, received {type(net).__name__} on the {backend!r} "
            "backend, which has no gradient for torch. Set KERAS_BACKEND=torch before keras is imported; weights and "
            "configuration of the model load there."
        )
    refuse_tensorflow(net, "Model")
    return InputTypeError(
        f"Model: expected a torch.nn.Module, received {type(net).__name__}. Call it in the forward of a module."
    )
