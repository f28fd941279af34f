"""The layout of segmentation frameworks: `(N, C, …)`, made from the plain arrays of a case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions.common import tensor


def channels_first(y_pred: Any) -> Tensor:
    """Predictions `(N, C, H, W)`; rows become one image of one channel and one line each."""
    p = tensor(y_pred)
    return p.reshape(p.shape[0], 1, 1, -1) if p.ndim == 2 else p


def one_hot(y_true: Any, like: Tensor) -> Tensor:
    """Targets in the shape of the predictions; integer maps `(N, H, W)` become one channel a class."""
    y = torch.as_tensor(y_true)
    if y.ndim == 2 and like.ndim == 4 and like.shape[1:3] == (1, 1):
        return y.to(like.dtype).reshape(like.shape)
    if y.ndim == like.ndim - 1:
        y = y.unsqueeze(1)
    if y.shape[1] == 1 and like.shape[1] > 1:
        classes = like.shape[1]
        labels = y[:, 0].long()
        outside = (labels < 0) | (labels >= classes)
        hot = F.one_hot(labels.masked_fill(outside, 0), classes).masked_fill(outside.unsqueeze(-1), 0)
        y = hot.movedim(-1, 1)
    return y.to(like.dtype)


def space(values: Tensor) -> list[int]:
    """The axes after batch and channel."""
    return list(range(2, values.ndim))
