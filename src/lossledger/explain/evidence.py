"""What `fingerprint` returns: the name of a reduction, what it means, and the evidence."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

WIDTH = 80

NAMES = {
    "mean": "the mean over the samples (all of one size: over samples and over entries is the same)",
    "token mean": "the mean over all valid entries of the batch: a long sample counts more than a short one",
    "sequence mean": "each sample over its own valid entries, then the mean over samples: all samples count the same",
    "mean over masked entries too": "masked entries add nothing, and divide all the same: padding makes the loss small",
    "sum": "a sum: twice the data is twice the loss",
    "mean × batch size": "a mean times the number of samples (the sum of their means): it grows with the batch alone",
    "sum / batch size": "a sum over what a sample holds, and the mean over samples: it grows with the size of a sample",
    "mean / batch size": "a mean that is divided by the number of samples once more",
    "weighted mean": "a mean with weights that also divide",
    "class-weighted mean": "a mean with weights by class that also divide",
    "batch-coupled": "the loss of a sample depends on the samples beside it: parts of a batch do not add up to it",
    "all-pairs broadcast": "every target is compared with every prediction: the shapes were broadcast to N × N",
    "stochastic": "the same batch gives another number each time",
    "rounded": "the value moves in steps, and no step has a gradient",
    "unreduced": "not one number, but one value for each sample or entry",
    "undetermined": "this batch does not tell",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one probe measured.

    Args:
        probe: what was done: `"split"`, `"duplicate"`, `"permute"`, `"pad"`, …
        text: what was found, in a line.
        measured: the number, where there is one.
    """

    probe: str
    text: str
    measured: float | None = None


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a function reduces to; prints with its evidence.

    Args:
        name: one of `evidence.NAMES`.
        meaning: the name in words.
        value: what the function says of the probed samples; `None` if that is not one number.
        samples: how many samples were probed.
        tolerance: relative difference up to which two numbers were taken as equal.
        evidence: what the probes measured.
        warnings: what is wrong whatever the reduction: no gradient, masked entries that reach the value.
        failed: probes that the function cannot take, with its error.
        weights: relative weight by class, of a class-weighted mean.
    """

    name: str
    meaning: str
    value: float | None
    samples: int
    tolerance: float
    evidence: tuple[Evidence, ...]
    warnings: tuple[str, ...] = ()
    failed: tuple[Evidence, ...] = ()
    weights: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = textwrap.wrap(f"{self.name}: {self.meaning}.", WIDTH)
        for kind, text in self._lines():
            lines += textwrap.wrap(f"  {kind}: {text}", WIDTH, subsequent_indent="    ")
        return "\n".join(lines)

    __repr__ = __str__

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield from (("warning", text) for text in self.warnings)
        yield from ((found.probe, found.text) for found in self.evidence)
        yield from ((found.probe, f"cannot be probed: {found.text}") for found in self.failed)

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th scope="row" style="text-align:left">{html.escape(kind)}</th>'
            f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            for kind, text in self._lines()
        )
        return (
            f"<p><b>{html.escape(self.name)}</b>: {html.escape(self.meaning)}.</p><table><tbody>{rows}</tbody></table>"
        )
