"""What runs on a device as it does on the processor: the step of a loss, and calls of `fit`.

For a pretended device and for a real one, whichever is at hand.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import nn

import lossledger as ll
from lossledger.training import loop, sums, waiting
from lossledger.training.intervals import Intervals

L = ll.losses
# torch's own CTC takes the lengths of its sequences from the host.
READING = ("ctc",)


def of_loss(loss, given, by, forbidding):
    """The tally, the gradient, and that of a part of a window, of checked values: what a step does with a batch.

    Args:
        loss: the loss.
        given: targets, outputs, weights and masks.
        by: groups of the tally.
        forbidding: a context in which nothing may wait for the device.
    """

    def run(move):
        y, p, w, m = move(given)
        p = p.float()
        with contextlib.nullcontext() if loss.name in READING else forbidding():
            batch = loss.align(y, p, w, m, checked=True)
            tally, gradient = loss.backprop_aligned(batch, None, 1.0, by)
            _, part = loss.backprop_aligned(batch, tally, 2.0, by)
            if not loss.is_ratio(p.ndim):
                loss.divisor_aligned(batch)
            found = [tally.value, tally.count, tally.nonfinite, loss.restore(gradient, p), part]
        return found if tally.groups is None else [*found, tally.groups.numerator, tally.groups.count]

    return run


def between_log_points(patch, forbid):
    """Forbid to wait for the device from each batch on until the next log point.

    Args:
        patch: pytest's `monkeypatch`.
        forbid: takes whether it is forbidden from here on.

    Returns:
        how many batches were so, and the tallies of how many of them waited for later.
    """
    seen = {"batches": 0, "waited": 0, "reading": 0}

    def forbidding(*given):
        seen["batches"] += not seen["reading"]
        forbid(not seen["reading"])
        return to_device(*given)

    def allowing(function):
        def call(*given, **named):
            forbid(False)
            seen["reading"] += 1
            try:
                return function(*given, **named)
            finally:
                seen["reading"] -= 1

        return call

    def pulling(*given):
        found = pull(*given)
        seen["waited"] += found is not None
        return found

    to_device, pull = loop.to_device, waiting.Waiting.pull
    patch.setattr(sums, "LOG_SECONDS", 1e9)
    patch.setattr(loop, "to_device", forbidding)
    patch.setattr(waiting.Waiting, "pull", pulling)
    # A single batch has its targets checked, and is a log point as a whole; so is each interval of `ledger_steps`.
    for owner, names in (
        (sums.Pass, ("log", "check_replays", "result")),
        (loop, ("stop_if_bad", "_explain_bad", "train_single")),
        (Intervals, ("add",)),
    ):
        for name in names:
            patch.setattr(owner, name, allowing(getattr(owner, name)))
    return seen


class ByPixel(nn.Module):
    """Logits of each pixel, classes last."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))

    def forward(self, x):
        return self.body(x).movedim(1, -1)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 1)

    def forward(self, x):
        a = self.a(x)
        ll.add_loss("size", 0.1 * a.square().mean())
        return {"a": a, "b": self.b(x)}


def columns():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


SAMPLES, BATCH = 40, 8
rng = np.random.default_rng(0)
X = rng.normal(size=(SAMPLES, 3)).astype("float32")
Y = (rng.random((SAMPLES, 2)) < 0.4).astype("float32")
LABELS = rng.integers(0, 2, SAMPLES)
PICTURES = rng.normal(size=(SAMPLES, 1, 8, 8)).astype("float32")
MASKS = (rng.random((SAMPLES, 8, 8, 3)) < 0.4).astype("float32")
WEIGHT = rng.uniform(0.5, 2, SAMPLES).astype("float32")
VALID = rng.random(SAMPLES) < 0.8
SITES = {"site": list("abcd" * 10)}
BAD = np.where(np.arange(SAMPLES)[:, None] == 5, np.nan, X)
BCE = L.BinaryCrossentropy(from_logits=True)
DICE = L.Dice(from_logits="sigmoid", axis=(0, 1, 2)) + BCE


def plain(loss=BCE, data=(X, Y), net=columns, compiled=None, **given):
    return net, {"loss": loss, **(compiled or {})}, data, given


METRICS = {"metrics": ["BinaryAccuracy", "MAE", "IoU", "DiceScore"], "weighted_metrics": ["MSE"]}
FITS = {
    "plain": plain(),
    "weights": plain(sample_weight=WEIGHT, mask=VALID),
    "class weights": plain(class_weight={0: 2.0}, sample_weight=WEIGHT),
    "labels": plain(L.SparseCategoricalCrossentropy(from_logits=True), (X, LABELS), class_weight={0: 2.0}),
    "metrics": plain(compiled=METRICS, sample_weight=WEIGHT),
    "samples": plain(samples=True, sample_weight=WEIGHT),
    "groups": plain(groups=SITES),
    "spread": plain(spread=True, groups=SITES, samples=True),
    "accumulate": plain(accumulate=2, sample_weight=WEIGHT, mask=VALID),
    "intervals": plain(ledger_steps=2),
    "clip": plain(compiled={"clip_norm": 0.1}),
    "average": plain(compiled={"ema": 0.9}),
    "skip": plain(data=(BAD, Y), compiled={"on_nonfinite": "skip", "metrics": ["MAE"]}, samples=True),
    "record": plain(compiled={"on_nonfinite": "record"}),
    "reproducible": plain(compiled={"reproducible": True}),
    "regularizers": plain(compiled={"regularizers": {"*.weight": "l2"}}),
    "validation": plain(validation_split=0.2),
    "batches": plain(data=([(X[i : i + BATCH], Y[i : i + BATCH], WEIGHT[i : i + BATCH]) for i in range(0, 40, 8)],)),
    "two outputs": plain(
        {"a": BCE, "b": "mse"}, (X, {"a": Y, "b": X[:, :1]}), TwoOutputs, {"loss_weights": {"b": 0.5, "size": 2.0}}
    ),
    "pictures": plain(DICE, (PICTURES, MASKS), ByPixel, class_weight=[1.0, 2.0, 3.0], samples=True, spread=True),
    "window of pictures": plain(DICE, (PICTURES, MASKS), ByPixel, accumulate=2),
    **{name: plain(compiled={"optimizer": name}) for name in ("sgd", "adamw", "rmsprop", "nadam", "adamax")},
    "adadelta": plain(compiled={"optimizer": "adadelta"}),
}


def trained(fit, place=lambda net: net, to_host=lambda values: values):
    """History, evaluation, predictions and weights of a fit, and the rows of its ledger.

    Args:
        fit: one of `FITS`.
        place: puts a module where it is trained.
        to_host: takes numbers from there.
    """
    make, compiled, data, given = fit
    torch.manual_seed(3)
    net = place(make())
    model = ll.Model(net)
    model.compile(**{"optimizer": "adam", **compiled})
    sized = {"batch_size": BATCH} if len(data) == 2 else {}
    history = model.fit(*data, epochs=2, verbose=0, seed=1, checks="off", **sized, **given).history
    tested = model.evaluate(*data, verbose=0, return_dict=True, **sized)
    predicted = model.predict(data[0], **sized)
    rows = [(row.split, row.term, row.kind, row.group, row.count, row.contribution) for row in model.ledger.rows]
    single = model.train_on_batch(*data, return_dict=True) if len(data) == 2 else {}
    return [history, tested, predicted, single, to_host(dict(net.state_dict()))], rows


def alike(found, expected, tolerance=2e-5):
    """The numbers of two structures are the same."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            alike(mine, other, tolerance)
    else:
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=tolerance)
