"""What the loss suites share: random cases of a row, value and gradient, closeness."""

from __future__ import annotations

import numpy as np
import torch


def case(row, seed, samples=None, weights=True, masks=True, zeros=False):
    """Random inputs [B, 4, …] with a weight and a mask for each entry; unequal valid lengths."""
    rng = np.random.default_rng(seed)
    shape = (samples or int(rng.integers(2, 8)), 4)
    y, p = row.inputs(rng, shape)
    entries = shape[:1] if row.per_sample else shape
    w = rng.uniform(0.2, 3, entries) if weights else None
    if zeros and w is not None:
        w = w * (rng.random(entries) < 0.6)
    m = rng.random(entries) < 0.7 if masks else None
    return y, p, w, m


def as_tensor(a):
    return None if a is None else torch.as_tensor(a)


def tensors(arrays):
    return [as_tensor(a) for a in arrays]


def value_and_gradient(loss, y, p, w, m, window=None):
    prediction = torch.as_tensor(p).clone().requires_grad_()
    tally = loss.tally(torch.as_tensor(y), prediction, as_tensor(w), as_tensor(m))
    (gradient,) = torch.autograd.grad(tally.value, prediction)
    return tally, gradient


def close(a, b, tolerance=1e-11):
    a, b = torch.as_tensor(a).detach(), torch.as_tensor(b).detach()
    scale = max(float(b.abs().max()) if b.numel() else 0, 1)
    return a.shape == b.shape and (not a.numel() or float((a - b).abs().max()) <= tolerance * scale)
