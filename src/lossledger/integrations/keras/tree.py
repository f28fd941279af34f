"""The layers and variables of a module that is a Keras model, or holds some."""

from __future__ import annotations

import re
from typing import Any

import keras
from torch import Tensor, nn

from lossledger.errors import InputError


def roots(net: nn.Module, prefix: str = "") -> list[tuple[str, Any]]:
    """The outermost layers of Keras, with the names of the modules that they are in the net."""
    if isinstance(net, keras.layers.Layer):
        return [(prefix, net)]
    found = []
    for name, child in net.named_children():
        found += roots(child, f"{prefix}.{name}" if prefix else name)
    return found


def layers(net: nn.Module) -> list[Any]:
    """All layers of Keras, each once."""
    found = {id(layer): layer for _, root in roots(net) for layer in root._flatten_layers()}
    return list(found.values())


def variables(net: nn.Module) -> dict[str, Any]:
    """All variables of Keras by their paths, each once; a path that is used twice is numbered."""
    seen: dict[int, Any] = {}
    found: dict[str, Any] = {}
    for prefix, root in roots(net):
        for variable in root.variables:
            if id(variable) not in seen:
                seen[id(variable)] = variable
                found[_free(f"{prefix}.{variable.path}" if prefix else variable.path, found)] = variable
    return found


def _free(name: str, taken: dict[str, Any]) -> str:
    number, found = 0, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters: of Keras by the paths of their variables, others by their names in the module."""
    found = {path: variable.value for path, variable in variables(net).items() if variable.value.requires_grad}
    known = {id(parameter) for parameter in found.values()}
    return found | {n: p for n, p in net.named_parameters() if p.requires_grad and id(p) not in known}


def buffers(root: Any) -> list[tuple[str, Tensor]]:
    """The buffers of the torch modules inside a layer; a functional model does not register its layers as modules."""
    found = {id(buffer): (name, buffer) for layer in root._flatten_layers() for name, buffer in layer.named_buffers()}
    return list(found.values())


def state(net: nn.Module) -> dict[str, Tensor]:
    """Weights, running statistics, seeds and buffers, by names that another instance of the architecture has too.

    Keras numbers layers through the whole session (`dense_7`), so its own names fit one instance only. Here a variable
    is named by its position in `variables` and its own name (`00003.kernel`), without a number at its end, which may be
    such a count too.
    """
    found: dict[str, Tensor] = {}
    for prefix, root in roots(net):
        start = f"{prefix}." if prefix else ""
        for position, variable in enumerate(root.variables):
            name = re.sub(r"_\d+$", "", variable.name)
            found[f"{start}{position:05d}.{name}"] = variable.value
        for position, (name, buffer) in enumerate(buffers(root)):
            found[f"{start}buffer.{position:05d}.{name.rpartition('.')[2]}"] = buffer
    for name, module in _others(net):
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found |= {f"{name}.{key}" if name else key: value for key, value in own}
    return found


def parts(net: nn.Module) -> list[tuple[str, str, list[nn.Parameter]]]:
    """The parts that hold parameters: name, kind, and the parameters."""
    found = []
    for prefix, root in roots(net):
        for layer in root._flatten_layers():
            own = [v.value for v in (*layer._trainable_variables, *layer._non_trainable_variables)]
            name = layer.path or layer.name
            found.append((f"{prefix}.{name}" if prefix else name, type(layer).__name__, own))
    found += [(name, type(m).__name__, list(m.parameters(recurse=False))) for name, m in _others(net)]
    return [part for part in found if part[2]]


def _others(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of torch around the layers of Keras."""
    inside = {id(module) for _, root in roots(net) for module in root.modules()}
    return [(name, module) for name, module in net.named_modules() if id(module) not in inside]


def refuse_sharded(net: nn.Module) -> None:
    """FSDP2 replaces the parameters of a module; the variables of Keras would keep the old ones.

    Raises:
        InputError: a module that `fully_shard` has changed.
    """
    sharded = any(base.__name__ == "FSDPModule" for module in net.modules() for base in type(module).__mro__)
    if sharded or any(type(p.data).__name__ == "DTensor" for p in net.parameters()):
        raise InputError(
            "Model: expected a Keras model that is not sharded, received one after fully_shard (FSDP2). It replaces "
            "the parameters of the module, but the variables of Keras keep the old ones: those would get the "
            "gradients, and the optimizer would train nothing. Use DistributedDataParallel."
        )
