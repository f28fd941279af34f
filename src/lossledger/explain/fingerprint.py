"""`fingerprint`: what an unknown loss function reduces to, measured by calling it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossledger.explain import probes
from lossledger.explain.evidence import Fingerprint
from lossledger.explain.inquiry import SEED, Inquiry
from lossledger.explain.probes import Order


def fingerprint(fn: Any, y_true: Any, y_pred: Any, mask: Any = None, *, order: Order | None = None) -> Fingerprint:
    """What a loss function reduces to, found by calling it on pieces of a batch; nothing is trained or changed.

    Args:
        fn: a function of `(y_true, y_pred)` or, as in torch, `(input, target)`; a loss of this library, of torch.nn or
            of Keras. Sample weights and a mask are passed by name if it has arguments `sample_weight` and `mask`.
        y_true: targets, the batch on the first axis.
        y_pred: predictions, the same.
        mask: `(B,)` or `(B, T)`, which entries count. A function without an argument `mask` must find them in the
            targets (`ignore_index`); the mask then only tells how many there are.
        order: `"y_true, y_pred"` or `"input, target"`; found from the type and the argument names if not given.

    Returns:
        the name of the reduction with the measured evidence. Probes that the function cannot take are listed.

    Raises:
        InputTypeError: not callable.
        InputError: fewer than four samples, or arrays of other lengths.

    Example:
        >>> import lossledger as ll, torch
        >>> y_true, y_pred = torch.randn(8), torch.randn(8, 1)
        >>> ll.fingerprint(lambda y_true, y_pred: ((y_true - y_pred) ** 2).mean(), y_true, y_pred).name
        'all-pairs broadcast'
        >>> ll.fingerprint(lambda y_true, y_pred: ((y_true[:, None] - y_pred) ** 2).mean(), y_true, y_pred).name
        'mean'
    """
    devices = [y_pred.device] if isinstance(y_pred, Tensor) and y_pred.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        caller = probes.caller_of(fn, order)
        caller, data = probes.widened(caller, probes.batch_of(y_true, y_pred, mask))
        return Inquiry(caller, data).conclude()
