"""Means of means: plain accumulation, Lightning, and data-parallel ranks.

The model of the gradient cases is y = w·x at w = 1, so that predictions are the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions import hf
from lossledger.conventions.common import NotSupported, tensor

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "mseloss": F.mse_loss,
    "l1loss": F.l1_loss,
    "huberloss": F.huber_loss,
    "smoothl1loss": F.smooth_l1_loss,
}


def _value_and_gradient(name: str, y: Tensor, x: Tensor) -> tuple[float, float]:
    plain = name.removeprefix("F.").replace("_", "").lower()
    if plain not in _LOSSES:
        raise NotSupported(f"no loss {name!r} of y = w x")
    w = torch.ones((), requires_grad=True)
    loss = _LOSSES[plain](w * x, y)
    (gradient,) = torch.autograd.grad(loss, w)
    return float(loss.detach()), float(gradient)


def naive(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any) -> float:
    """The mean of the means of micro-batches, whatever each of them holds.

    Example:
        >>> naive("mse_loss", {"micro_batch": 2}, [[0.0]] * 3, [[1.0], [1.0], [3.0]])
        5.0
    """
    micro = int(options.get("micro_batch", 1))
    means = []
    for start in range(0, len(y_pred), micro):
        part = slice(start, start + micro)
        if name in (hf.CAUSAL, hf.MASKED):
            total, count = hf.tokens(name, y_true[part], y_pred[part])
            means.append(float(total / count))
        else:
            means.append(_value_and_gradient(name, tensor(y_true[part]), tensor(y_pred[part]))[0])
    return sum(means) / len(means)


def lightning(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any) -> dict[str, Any]:
    """An epoch of Lightning: the logged loss by batch size, and the gradient of each step.

    Every batch counts 1/k, also in the last window when it is short.

    Example:
        >>> options = {"batch_size": 1, "accumulate_grad_batches": 2}
        >>> lightning("mse_loss", options, [[0.0]] * 3, [[1.0], [2.0], [3.0]])["grad_at_each_step"]
        [5.0, 9.0]
    """
    x, y = tensor(y_pred), tensor(y_true)
    size, k = int(options.get("batch_size", len(x))), int(options.get("accumulate_grad_batches", 1))
    batches = [slice(i, i + size) for i in range(0, len(x), size)]
    found = [_value_and_gradient(name, y[part], x[part]) for part in batches]
    sizes = [len(x[part]) for part in batches]
    logged = sum(n * value for n, (value, _) in zip(sizes, found, strict=True)) / sum(sizes)
    steps = [sum(g for _, g in found[i : i + k]) / k for i in range(0, len(found), k)]
    return {"loss": logged, "grad_at_each_step": steps}


def ddp(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any) -> dict[str, float]:
    """A step of DistributedDataParallel: the mean of the gradients of ranks, next to that of all samples.

    Example:
        >>> ddp("mse_loss", {"rank_batches": [2, 1]}, [[0.0]] * 3, [[1.0], [1.0], [3.0]])["grad"]
        10.0
    """
    x, y = tensor(y_pred), tensor(y_true)
    sizes: Sequence[int] = options.get("rank_batches") or _even(len(x), int(options.get("world_size", 1)))
    gradients, start = [], 0
    for size in sizes:
        gradients.append(_value_and_gradient(name, y[start : start + size], x[start : start + size])[1])
        start += size
    return {"grad": sum(gradients) / len(gradients), "global_mean_grad": _value_and_gradient(name, y, x)[1]}


def _even(count: int, ranks: int) -> list[int]:
    return [len(range(rank, count, ranks)) for rank in range(ranks)]
