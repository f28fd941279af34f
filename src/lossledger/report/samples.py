"""What a report says of single samples: the worst, and how sure the model was of each while it trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lossledger.ledger import Ledger

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_SAMPLES = 15
MOST_DOTS = 500


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A sample of an epoch: its loss, and of a loss that tells classes apart what was true and what was said."""

    sample: int
    loss: float
    share: float | None
    label: str
    predicted: str
    confidence: float | None
    correct: float | None


@dataclass(frozen=True, slots=True)
class SampleTable:
    """The worst samples of a split in its last epoch, out of `count`."""

    split: str
    epoch: int
    count: int
    rows: tuple[SampleRow, ...]


@dataclass(frozen=True, slots=True)
class Dot:
    """A sample over the epochs: mean and standard deviation of its confidence, and how often it was right."""

    sample: int
    confidence: float
    variability: float
    correct: float


@dataclass(frozen=True, slots=True)
class Cartography:
    """Confidence against variability of the samples of a split, by a term, over `epochs` epochs.

    `dots` are those least sure of and an even choice of the others, out of `count`.
    """

    split: str
    term: str
    epochs: int
    count: int
    dots: tuple[Dot, ...]


def sample_tables(ledger: Ledger, class_names: object, most: int = MOST_SAMPLES) -> Iterator[SampleTable]:
    """The worst samples of each split that has samples.

    Args:
        ledger: of one run.
        class_names: a list, by which labels are named.
        most: samples a split.
    """
    samples = ledger.samples
    names = [str(name) for name in class_names] if isinstance(class_names, list | tuple) else []
    # A single name is that of a column, which is present or not: its labels are 0 and 1.
    names = names if len(names) > 1 else []
    for split in samples.names("split") if len(samples) else ():
        own = samples.where(split=split)
        epoch = own.names("epoch")[-1]
        found = ledger.top_losses(most, split=split, epoch=epoch).rows
        whole = math.fsum(own.where(epoch=epoch)["contribution"].tolist())
        rows = tuple(_row(line, whole, names) for line in found)
        yield SampleTable(split, epoch, len(own.where(epoch=epoch).names("sample")), rows)


def _row(line: dict[str, Any], whole: float, names: list[str]) -> SampleRow:
    share = line["contribution"] / whole if whole and math.isfinite(whole) else None
    label, predicted = (_named(line[key], names) for key in ("label", "predicted"))
    return SampleRow(line["sample"], line["loss"], share, label, predicted, line["confidence"], line["correct"])


def _named(index: int | None, names: list[str]) -> str:
    if index is None:
        return ""
    return names[index] if 0 <= index < len(names) else str(index)


def cartography(ledger: Ledger, most: int = MOST_DOTS) -> Cartography | None:
    """Confidence against variability of the samples, of the training where it has them over two epochs or more.

    Args:
        ledger: of one run.
        most: dots to draw.
    """
    import numpy as np

    samples = ledger.samples
    splits = samples.names("split") if len(samples) else []
    for split in sorted(splits, key=lambda name: name != "training"):
        own = samples.where(split=split)
        for term in own.names("term"):
            part = own.where(term=term)
            known = np.isfinite(part["confidence"])
            epochs = len(np.unique(part["epoch"][known]))
            if epochs < 2:
                continue
            ids, at = np.unique(part["sample"][known], return_inverse=True)
            mean, deviation = _moments(at, part["confidence"][known], len(ids))
            correct, _ = _moments(at, part["correct"][known], len(ids))
            dots = (
                Dot(int(ids[i]), float(mean[i]), float(deviation[i]), float(correct[i])) for i in _chosen(mean, most)
            )
            return Cartography(split, term, epochs, len(ids), tuple(dots))
    return None


def _moments(at: NDArray[np.intp], values: NDArray[Any], size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and standard deviation of the values of each sample."""
    import numpy as np

    times = np.bincount(at, minlength=size)
    mean = np.bincount(at, values, size) / times
    # About the mean, not from squares, which would cancel where a sample hardly moves.
    return mean, np.sqrt(np.bincount(at, (values - mean[at]) ** 2, size) / times)


def _chosen(confidence: NDArray[Any], most: int) -> list[int]:
    """A quarter of the dots for the lowest confidence, the rest evenly."""
    import numpy as np

    if len(confidence) <= most:
        return list(range(len(confidence)))
    order = np.argsort(confidence, kind="stable")
    lowest, rest = order[: most // 4], np.sort(order[most // 4 :])
    even = rest[np.linspace(0, len(rest) - 1, most - len(lowest)).astype(np.intp)]
    return sorted({*lowest.tolist(), *even.tolist()})
