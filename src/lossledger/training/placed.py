"""A module where it is: its device and dtype, the ranks it shares data with, its weights on disk."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossledger.distributed import Group, joined, together
from lossledger.forward import Forward
from lossledger.training import weights
from lossledger.training.summary import summary_table


def device_of(net: nn.Module) -> torch.device:
    """Where a module is: its parameters, or the buffers of one that has none."""
    # Every call asks: most have a parameter, and need no more than that one.
    first = next(net.parameters(), None)
    return next((buffer.device for buffer in net.buffers()), torch.device("cpu")) if first is None else first.device


class Placed:
    """What a `Model` knows and does without a loss.

    Args:
        net: the module.
        forward: of the module.
        process_group: the ranks that share the data.
    """

    def __init__(self, net: nn.Module, forward: Forward, process_group: Any) -> None:
        self.net, self._forward, self._process_group = net, forward, process_group

    def save_weights(self, path: str | Path) -> None:
        """Write the weights and buffers as safetensors, to a temporary file first, so that no half file is left.

        Args:
            path: path of the file, which rank 0 replaces once the new one is complete; all ranks call.
        """
        state = weights.whole(self._forward)
        together(self._group(), lambda: weights.save(state, path) if self.writes else None)

    def load_weights(self, path: str | Path) -> None:
        """Read weights that `save_weights` wrote.

        Raises:
            InputError: no such file, or weights of another model.
        """
        weights.load(self._forward, path)

    def summary(self, print_fn: Any = None) -> None:
        """Print the modules with parameters, their shapes and sizes."""
        (print if print_fn is None else print_fn)(self._forward.summary() or summary_table(self._forward))

    # --- inside ------------------------------------------------------------------------------------------------

    def _dtype(self) -> torch.dtype:
        """The dtype that floating NumPy arrays take: that of the parameters, or of buffers."""
        tensors = chain(self.net.parameters(), self.net.buffers())
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())

    def _device(self) -> torch.device:
        return device_of(self.net)

    @property
    def writes(self) -> bool:
        """Whether this process writes files: rank 0 does, where several share the data."""
        return self._group().rank == 0

    def _group(self) -> Group:
        return joined(self._process_group, self._device())
