"""Hugging Face's Trainer: tokens of a whole accumulation window divide, where the model passes that number on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions.common import NotSupported, Reduced, scalar, tensor

IGNORED = -100
CAUSAL, MASKED = "ForCausalLMLoss", "ForMaskedLMLoss"


def tokens(name: str, labels: Any, logits: Any) -> tuple[Tensor, Tensor]:
    """Sum of the losses of labelled tokens, and their number; causal models predict the next token."""
    p, y = tensor(logits), torch.as_tensor(labels).long()
    if name == CAUSAL:
        p, y = p[..., :-1, :], y[..., 1:]
    p, y = p.reshape(-1, p.shape[-1]), y.reshape(-1)
    total = F.cross_entropy(p, y, ignore_index=IGNORED, reduction="sum")
    return total, (y != IGNORED).sum().to(p.dtype)


def loss(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any) -> Reduced:
    """A token loss: over the labelled tokens, or over `num_items_in_batch` if given."""
    if name not in (CAUSAL, MASKED):
        raise NotSupported(f"hf: no loss {name!r}")
    total, count = tokens(name, y_true, y_pred)
    items = options.get("num_items_in_batch")
    divisor = count if items is None else scalar(float(items), total)
    return Reduced(total / divisor, total, divisor)


def _head(name: str, y: Any, p: Any) -> Tensor:
    """The mean of a classification head, which drops the number of items."""
    text = name.lower()
    if "regression" in text or "mse" in text:
        return F.mse_loss(tensor(p).reshape(-1), tensor(y).reshape(-1))
    if "multi" in text:
        return F.binary_cross_entropy_with_logits(tensor(p), tensor(y))
    if "single" in text or "classification" in text:
        return F.cross_entropy(tensor(p), torch.as_tensor(y).long().reshape(-1))
    raise NotSupported(f"hf: no loss {name!r}")


def windows(count: int, micro: int, steps: int) -> list[list[slice]]:
    """The micro-batches of each accumulation window; the last window may be short."""
    parts = [slice(i, min(i + micro, count)) for i in range(0, count, micro)]
    return [parts[i : i + steps] for i in range(0, len(parts), steps)]


def step(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any) -> Any:
    """The loss of one optimizer step over a window of micro-batches.

    Token losses add up to the mean over the tokens of the window. Heads that drop the number of items add up the
    means of micro-batches, so the loss grows with the number of micro-batches.

    Example:
        >>> options = {"gradient_accumulation_steps": 2, "micro_batch": 1}
        >>> step("regression", options, [[1.0], [3.0]], [[0.0], [0.0]])
        {'loss': 10.0}
    """
    micro = int(options.get("micro_batch", len(y_pred)))
    parts = windows(len(y_pred), micro, int(options.get("gradient_accumulation_steps", 1)))
    if name in (CAUSAL, MASKED):
        losses = []
        for window in parts:
            sums = [tokens(name, y_true[part], y_pred[part]) for part in window]
            losses.append(torch.stack([s for s, _ in sums]).sum() / torch.stack([n for _, n in sums]).sum())
        return torch.stack(losses).mean()
    heads = [torch.stack([_head(name, y_true[part], y_pred[part]) for part in window]).sum() for window in parts]
    return {"loss": float(torch.stack(heads).mean())}
