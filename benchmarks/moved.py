"""Memory traffic by count: the operations that a piece of code runs, and the bytes that they read and write."""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Moved(TorchDispatchMode):
    """Operations that compute, and what they read and write; views and empty buffers move nothing.

    A tensor counts with its elements, as often as they are in memory: repeated ones (`expand`) count once. What an
    operation does inside, a copy of its own or a second look, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0
        self.by_name: Counter[str] = Counter()
        self.bytes_by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        # Of no storage of its own: a view.
        if func.is_view or name in ("empty", "empty_like", "new_empty", "empty_strided", "detach"):
            return found
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        moved = sum(size(t) for t in given) + sum(size(t) for t in made if not any(t is one for one in given))
        if name.endswith("_") and made:
            moved += size(made[0])
        self.calls += 1
        self.bytes += moved
        self.by_name[name] += 1
        self.bytes_by_name[name] += moved
        return found


def size(tensor: Tensor) -> int:
    """Bytes of the different elements of a tensor."""
    different = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        different *= length if stride else min(length, 1)
    return different * tensor.element_size()
