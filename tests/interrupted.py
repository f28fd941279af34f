"""Ends a call of `fit` in the middle, as a kill would, while the process lives on."""

from __future__ import annotations

import lossledger as ll


class Killed(BaseException):
    """Nothing of the library catches it."""


class _Counting(ll.callbacks.Callback):
    def __init__(self, moment):
        self.left = moment

    def _count(self, *_):
        self.left -= 1
        if self.left == 0:
            raise Killed


class Kill(_Counting):
    """Raises at the n-th of the moments at which a run can be killed: in steps, and at the ends of epochs."""

    on_train_batch_begin = on_train_batch_end = on_epoch_end = on_epoch_begin = _Counting._count


class KillBefore(_Counting):
    """Raises before the n-th step."""

    on_train_batch_begin = _Counting._count


class KillAfter(_Counting):
    """Raises after the n-th step."""

    on_train_batch_end = _Counting._count
