"""The breakdown of one batch into terms, and what a batch leaves for the training step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.loss import Loss
from lossledger.tally import Tally


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One term of a breakdown: λ × value.

    Args:
        name: name of the term, `"output/loss"` when there are several outputs.
        role: `"data"`, `"regularizer"` or `"auxiliary"`.
        weight: λ.
        tally: its additive statistics.
    """

    name: str
    role: str
    weight: float
    tally: Tally
    _loss: Loss | None = None
    _batch: Aligned | None = None
    _dtype: torch.dtype | None = None

    @property
    def value(self) -> Tensor:
        """The value of the loss, detached."""
        return self._total.detach()

    @property
    def _total(self) -> Tensor:
        """The value in the dtype of the arithmetic: sums may be wider."""
        value = torch.as_tensor(self.tally.value)
        return value if self._dtype is None else value.to(self._dtype)

    @property
    def contribution(self) -> Tensor:
        """λ × value, detached: what the term adds to the total."""
        return self.weight * self.value

    def by(self, kind: str) -> dict[Hashable, Tensor]:
        """The contribution of each group, detached 0-d tensors; they sum to `contribution`.

        Args:
            kind: `"class"`, `"label"`, `"sample"` or `"column"`.

        Returns:
            by the index of the class, column or sample; for losses that split classes by presence, by
            `(index, "present")` and `(index, "absent")`.
        """
        tally = self.grouped(kind)
        shares = self.weight * tally.contributions()
        keys = tally.groups.keys if tally.groups is not None else None
        names: Sequence[Hashable] = range(len(shares))
        if keys is not None:
            names = [name if presence == "" else (name, presence) for name, presence in keys]
        return dict(zip(names, shares.unbind(), strict=True))

    def grouped(self, kind: str) -> Tally:
        """The tally of the term, divided over groups."""
        known = self.tally.groups
        if known is not None and known.kind == kind:
            return self.tally
        if self._loss is None or self._batch is None:
            if self.role == "data":
                raise InputError(
                    f"{self.name}: expected the groups that the window was opened with, "
                    f"{None if known is None else known.kind!r}; received {kind!r}. Open it with by={kind!r}."
                )
            raise InputError(f"{self.name}: a {self.role} term cannot be divided by {kind!r}; it has one value.")
        with torch.no_grad():
            return self._loss.tally_aligned(self._batch, kind)


@dataclass(frozen=True, slots=True, eq=False)
class Breakdown:
    """The loss of one batch with its terms: `sum(t.contribution for t in terms.values()) == total`.

    Args:
        total: differentiable scalar, the contributions summed from left to right.
        terms: by name, in the order of the sum.
    """

    total: Tensor
    terms: dict[str, Term]

    @classmethod
    def of(cls, terms: dict[str, Term]) -> Breakdown:
        """The sum of the terms, from left to right."""
        contributions = [term.weight * term._total for term in terms.values()]
        total = contributions[0]
        for contribution in contributions[1:]:
            total = total + contribution
        return cls(total, terms)

    @property
    def value(self) -> float:
        """The total as a float."""
        return float(self.total.detach())

    def backward(self) -> None:
        """Back-propagate the total."""
        torch.autograd.backward(self.total)

    def __str__(self) -> str:
        width = max([len(name) for name in self.terms] + [5])
        lines = [f"{'term':<{width}}  {'λ':>8}  {'value':>12}  {'contribution':>12}"]
        for name, term in self.terms.items():
            lines.append(
                f"{name:<{width}}  {term.weight:>8.4g}  {float(term.value):>12.6g}  {float(term.contribution):>12.6g}"
            )
        return "\n".join([*lines, f"{'total':<{width}}  {'':>8}  {'':>12}  {self.value:>12.6g}"])


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """What divides in every micro-batch of a window.

    Args:
        tallies: by data term, the divisor of the window; of a ratio its numerator too.
        samples: number of samples of the window, which divides auxiliary losses.
    """

    tallies: Mapping[str, Tally]
    samples: Tensor | int


@dataclass(frozen=True, slots=True, eq=False)
class Backprop:
    """What one batch leaves for the step: tallies by term, and what to back-propagate.

    Args:
        tallies: by term name, detached.
        roots: tensors of the graph, outputs and auxiliary values.
        gradients: the gradient of the window's loss with respect to each root.
    """

    tallies: dict[str, Tally]
    roots: list[Tensor]
    gradients: list[Tensor]
