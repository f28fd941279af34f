"""A pretended CUDA device: tensors that say that they lie on it, with numbers that the processor calculates.

What goes wrong on a real one goes wrong here: tensors of two devices in one call, NumPy asked for numbers of the
device, and, within `unread`, whatever makes the host wait for the device. Kernels, streams and the order of additions
are those of the processor: nothing here says that a kernel exists, is right or is fast on a GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda:0")
HOST = torch.device("cpu")
aten = torch.ops.aten


class WaitError(AssertionError):
    """The host waits for the device where it must not."""


class MixedError(RuntimeError):
    """Tensors of two devices in one call."""


_STATE = threading.local()


class OnDevice(Tensor):
    """A tensor of the pretended device.

    Args:
        inner: the tensor of the processor that holds its numbers.
    """

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=HOST,
        )
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **options: Any) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in tree_flatten((args, kwargs or {}))[0] if isinstance(a, Tensor)]
        _check(function, args, kwargs or {}, given)
        outer = {id(a.inner): a for a in given if isinstance(a, OnDevice)}
        args, kwargs = tree_map(_inner, (args, kwargs or {}))
        found = function(*args, **kwargs)
        # What is written in place stays the tensor that it was.
        return tree_map(lambda one: _outer(one, outer), found)


def _outer(value: Any, known: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else OnDevice(value)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def waits(what: str) -> None:
    """The host waits for the device here.

    Raises:
        WaitError: within `unread`.
    """
    if getattr(_STATE, "unread", False):
        raise WaitError(f"the host waits for the device: {what}")


# Whose results have a size that only the device knows, or are numbers of Python.
_READ = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten._ctc_loss.Tensor,
}
_COPIES = {aten.copy_.default, aten._to_copy.default}
_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def _check(function: Any, args: Any, kwargs: Any, given: list[Tensor]) -> None:
    """The devices of a call fit each other, and nobody waits who must not."""
    strange = [t for t in given if not isinstance(t, OnDevice)]
    if function in _COPIES:
        if strange and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            waits(f"{function} between devices")
        return
    if function in _INDEX:
        indices = [i for i in args[1] if i is not None]
        for index in indices:
            if not isinstance(index, OnDevice):
                waits(f"{function} with an index of the host")
        choice = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        # One number goes where a mask says without anybody knowing how often.
        if choice and (function is aten.index.Tensor or args[2].numel() != 1):
            waits(f"{function} with a mask")
        strange = [t for t in strange if not any(t is i for i in indices)]
        if not isinstance(args[0], OnDevice):
            raise MixedError(f"{function}: an index of the device into a tensor of the host")
    if function in _READ:
        waits(str(function))
    if not strange:
        return
    if any(t.ndim for t in strange) or not _takes_numbers(function):
        shapes = [(tuple(t.shape), str(t.device)) for t in given]
        raise MixedError(f"{function}: expected all tensors on one device, received {shapes}")
    if function is aten.where.self and not all(hasattr(t, _NUMBER) for t in strange):
        waits(f"{function} with a number of the host")


def _takes_numbers(function: Any) -> bool:
    """Whether a tensor of the host without axes counts as a number."""
    name = function._schema.name
    return torch.Tag.pointwise in function.tags or "_foreach_" in name or name in ("aten::fill_", "aten::index_put_")


_NUMBER = "_number_of_python"


class _Numbers(TorchDispatchMode):
    """Tells what torch makes of a number of Python, on the device if need be, from a tensor of the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is aten.scalar_tensor.default:
            setattr(found, _NUMBER, True)
        return found


class Device(TorchFunctionMode):
    """Makes tensors where `device` says, and moves them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (Tensor.cpu, Tensor.cuda):
            place = HOST if function is Tensor.cpu else DEVICE
            return _moved(args[0], place, function, kwargs)
        if function is Tensor.to:
            return _to(args, kwargs)
        if function in _OF_HOST and isinstance(args[0], OnDevice):
            return _of_host(function, args, kwargs)
        if function is Tensor.is_pinned or kwargs.get("device") is None:
            return function(*args, **kwargs)
        device = torch.device(kwargs["device"])
        source = args[0] if args else kwargs.get("data")
        if function is torch.as_tensor and isinstance(source, Tensor):
            return _to((source,), {"device": device, "dtype": kwargs.get("dtype")})
        kwargs["device"] = HOST
        made = function(*args, **kwargs)
        if device.type == "cuda" and not isinstance(made, OnDevice):
            if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
                waits(f"{function} copies numbers of the host")
            return OnDevice(made)
        if device.type == "cpu" and isinstance(made, OnDevice):
            return made.inner
        return made


# What torch makes in C++ where it believes the tensor to be, and what it refuses of tensors of other classes.
_OF_HOST = (Tensor.tolist, Tensor.new_tensor, torch.nn.functional.one_hot)


def _of_host(function: Any, args: Any, kwargs: Any) -> Any:
    if function is not torch.nn.functional.one_hot or len(args) + len(kwargs) < 2:
        waits(str(function))
    found = function(args[0].inner, *args[1:], **kwargs)
    return OnDevice(found) if isinstance(found, Tensor) else found


def _to(args: Any, kwargs: Any) -> Tensor:
    """`Tensor.to`, in all of its forms."""
    tensor, *rest = args
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    flags = ["non_blocking", "copy"]
    for value in rest:
        if isinstance(value, bool):
            kwargs[flags.pop(0)] = value
        elif isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif value is not None:
            device = value
    other = kwargs.pop("other", None)
    if other is not None:
        device, dtype = other.device, other.dtype
    device = tensor.device if device is None else torch.device(device)
    if device.type == tensor.device.type:
        return tensor.to(dtype=dtype, **kwargs)
    return _moved(tensor if dtype is None else tensor.to(dtype), device, Tensor.to, kwargs)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        return OnDevice(tensor.detach().clone()) if device.type == "cuda" else tensor.inner.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Move.apply(gradient, HOST if isinstance(gradient, OnDevice) else DEVICE), None


def _moved(tensor: Tensor, device: torch.device, function: Any, kwargs: Any) -> Tensor:
    if tensor.device.type == device.type:
        return tensor
    # Numbers that come without anybody waiting for them may be read before they are there.
    if device.type == "cpu" or not kwargs.get("non_blocking"):
        waits(f"{function} between devices")
    return _Move.apply(tensor, device)


def _grouped(of: Any) -> Any:
    """What optimizers group tensors by is read in C++, which knows the processor alone."""

    def group(lists: Any, *rest: Any) -> Any:
        found = {}
        for (_, dtype), (values, index) in of(lists, *rest).items():
            found[next(t for t in values[0] if t is not None).device, dtype] = (values, index)
        return found

    return group


@contextlib.contextmanager
def device() -> Iterator[torch.device]:
    """The pretended device is there, for the process and this thread."""
    of = torch._C._group_tensors_by_device_and_dtype
    with (
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped(of)),
        # Random numbers are those of the processor.
        mock.patch.object(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        mock.patch.object(torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)),
        of_thread(),
    ):
        yield DEVICE


@contextlib.contextmanager
def of_thread() -> Iterator[None]:
    """A further thread sees the device that is there for the process: patches of several would undo each other."""
    with _Numbers(), Device():
        yield


def set_unread(strict: bool) -> bool:
    """Whether waiting raises from here on, as `torch.cuda.set_sync_debug_mode("error")`; what was set before."""
    before = getattr(_STATE, "unread", False)
    _STATE.unread = strict
    return before


@contextlib.contextmanager
def unread(strict: bool = True) -> Iterator[None]:
    """Waiting raises meanwhile."""
    before = set_unread(strict)
    try:
        yield
    finally:
        set_unread(before)


def moved(value: Any) -> Any:
    """A structure of tensors on the device; leaves stay leaves."""

    def one(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        return OnDevice(tensor.detach().clone()).requires_grad_(tensor.requires_grad)

    return tree_map(one, value)


def placed(net: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the device, as `net.to(device)`."""
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnDevice(parameter.detach().clone()), parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer.detach().clone())
    return net


def host(value: Any) -> Any:
    """The numbers of a structure, on the processor."""
    return tree_map(lambda one: one.detach().inner if isinstance(one, OnDevice) else one, value)
