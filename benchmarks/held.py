"""Memory by count: the storages that a piece of code makes, and the most that were alive at once."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """The most bytes of storages made inside that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in (t for t in tree_leaves(found) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            pointer, size = storage.data_ptr(), storage.nbytes()
            if pointer and pointer not in given and pointer not in self._known:
                self._known.add(pointer)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, pointer, size)
        return found

    def _gone(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size
