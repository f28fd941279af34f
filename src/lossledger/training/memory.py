"""Large buffers stay with the process while a pass runs, instead of being mapped and cleared anew in every step.

glibc maps each large block from the kernel and unmaps it when it is freed. The kernel hands out pages filled with
zeros, one page fault at a time, so a step on the CPU pays for all of its activations and gradients again and again.
While a pass of `fit`, `evaluate` or `predict` runs, blocks come from the heap and the heap is not trimmed; after it,
what is free goes back to the kernel. `LOSSLEDGER_KEEP_MEMORY=0` in the environment leaves the allocator alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lossledger.errors import InputError

SWITCH = "LOSSLEDGER_KEEP_MEMORY"
# Of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# What somebody who tunes the allocator has chosen; other variables of glibc do not speak of the same.
_OF_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
_TUNABLES = tuple(f"glibc.malloc.{name}=" for name in ("trim_threshold", "mmap_threshold", "mmap_max", "top_pad"))
# After a pass the process may keep this much: short passes in a row would otherwise fault it in again each time.
_STAYS = 128 << 20
# After four steps the process holds what its steps need, up to a few large blocks. Blocks that stay behind from every
# step can keep the next step from using the room beside them: memory that goes on growing is let go.
_SETTLED, _GROWTH, _SPARE = 4, 2, 64 << 20


@contextlib.contextmanager
def kept(device: torch.device, batches: int | None = None) -> Iterator[None]:
    """Freed memory stays with the process meanwhile, for the next step to use.

    Args:
        device: of the model; only the CPU's memory is meant.
        batches: how many there will be, if known; a single one has no next step.

    Raises:
        InputError: the environment variable is neither 0 nor 1.
    """
    allocator = None if device.type != "cpu" or batches == 1 or not wanted(os.environ) else _allocator()
    if allocator is None:
        yield
        return
    _keeping.begin(allocator)
    try:
        yield
    finally:
        _keeping.end()


def watch(steps: int) -> None:
    """At a log point, after so many steps of a pass: let memory go that keeps growing."""
    _keeping.watch(steps)


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the allocator may be set: nobody said no, and nobody has set it otherwise.

    Raises:
        InputError: the switch is neither 0 nor 1.
    """
    switch = environment.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise InputError(f"{SWITCH}: expected 0 or 1, received {switch!r}. Set 0 to leave the allocator alone.")
    tunables = environment.get("GLIBC_TUNABLES", "")
    chosen = any(name in environment for name in _OF_USERS) or any(name in tunables for name in _TUNABLES)
    return switch == "1" and not chosen


class _Keeping:
    """What the process keeps: passes in threads, or within each other, share it until the last one ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passes, self._keeps = 0, False
        self._allocator: Any = None
        self._faults = self._resident = self._limit = 0

    def begin(self, allocator: Any) -> None:
        with self._lock:
            self._passes += 1
            if self._passes > 1:
                return
            self._allocator, self._keeps, self._limit = allocator, True, 0
            self._faults, self._resident = _faults(), _resident()
            # A high threshold does not do: glibc takes none above 32 MiB.
            allocator.mallopt(_MMAP_MAX, 0)
            allocator.mallopt(_TRIM_THRESHOLD, -1)

    def watch(self, steps: int) -> None:
        with self._lock:
            if not self._keeps or steps < _SETTLED:
                return
            growth = _resident() - self._resident
            if not self._limit:
                self._limit = _GROWTH * growth + _SPARE
            elif growth > self._limit:
                self._let_go()

    def end(self) -> None:
        with self._lock:
            self._passes -= 1
            if not self._passes:
                self._let_go()

    def _let_go(self) -> None:
        """Set what glibc itself comes to after it has freed a block of 32 MiB, and give back what is free.

        What was set before cannot be read. Its own thresholds move up as blocks are freed; these are where they end,
        but that it would trim at 64 MiB.
        """
        self._keeps = False
        self._allocator.mallopt(_MMAP_MAX, 65536)
        self._allocator.mallopt(_MMAP_THRESHOLD, 32 << 20)
        self._allocator.mallopt(_TRIM_THRESHOLD, _STAYS)
        if (_faults() - self._faults) * os.sysconf("SC_PAGE_SIZE") >= _STAYS:
            self._allocator.malloc_trim(0)


_keeping = _Keeping()


def _faults() -> int:
    # There is no such module on Windows.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _allocator() -> Any:
    """The C library, if it is glibc and what gives out the memory of tensors; `None` elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim", "dladdr")):
        return None
    # Another allocator may have been put before it (LD_PRELOAD): then its functions are found first.
    home = _file_of(library, "gnu_get_libc_version")
    return library if {_file_of(library, name) for name in ("malloc", "posix_memalign", "free")} == {home} else None


class _Place(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(library: Any, function: str) -> bytes | None:
    """The file that a function of the process comes from."""
    place = _Place()
    address = ctypes.cast(getattr(library, function), ctypes.c_void_p)
    found: bytes | None = place.file if library.dladdr(address, ctypes.byref(place)) else None
    return found
