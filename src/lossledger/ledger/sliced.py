"""The groups of the samples of a run, kept once, and the slices of the samples that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lossledger.errors import InputError
from lossledger.ledger.columns import INTEGER, TEXT, Column, Columns
from lossledger.ledger.samples import SampleBook, Samples, one_epoch, top_losses
from lossledger.ledger.slices import Slices, worst_slices

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GROUP_COLUMNS = {"split": TEXT, "sample": INTEGER, "kind": TEXT, "group": TEXT}
# The group of a sample that has none of a kind that others have.
NO_GROUP = "(none)"


class GroupBook(SampleBook):
    """Which group of each kind each sample of a run is in; a sample is kept once.

    Args:
        run: folder of the run that holds them already, if any.
    """

    _folder, _kinds, _optional = "groups", GROUP_COLUMNS, frozenset[str]()

    def add(self, split: str, samples: NDArray[np.int64], groups: Mapping[str, Sequence[str]]) -> None:
        """Add the groups of samples; those of samples that are known are left as they are.

        Args:
            split: "training", "validation" or "test".
            samples: [N] their numbers.
            groups: by kind, [N] the name of each one's group.
        """
        import numpy as np

        known = self.columns()
        of_split = known["sample"].values[known["split"].among((split,))]
        numbers, first = np.unique(samples, return_index=True)
        first = first[~np.isin(numbers, of_split)]
        for kind, names in groups.items() if len(first) else ():
            distinct, codes = np.unique(np.asarray(names, dtype=str)[first], return_inverse=True)
            same = np.zeros(len(first), np.int64)
            self.append(
                {
                    "split": Column(TEXT, same, (split,)),
                    "sample": Column(INTEGER, samples[first]),
                    "kind": Column(TEXT, same, (kind,)),
                    "group": Column(TEXT, codes.reshape(-1).astype(np.int64), tuple(distinct.tolist())),
                }
            )


class Sliced:
    """What a ledger says of the groups of samples."""

    @property
    def samples(self) -> Samples:
        """What each sample brought to each term."""
        raise NotImplementedError

    def _groups(self) -> GroupBook:
        """The groups of the samples of one run."""
        raise NotImplementedError

    def append_groups(self, split: str, samples: Any, groups: Mapping[str, Sequence[str]]) -> None:
        """Add the groups of samples; those of samples that are known stay as they are.

        Args:
            split: "training", "validation" or "test".
            samples: [N] their numbers.
            groups: by kind, [N] the name of each one's group.

        Raises:
            InputError: the ledger holds several runs.
        """
        self._groups().add(split, samples, groups)

    def worst_slices(
        self,
        k: int = 10,
        split: str | None = None,
        epoch: int | None = None,
        minimum_count: int = 30,
        term: str | None = None,
        groups: Mapping[str, Mapping[int, str]] | None = None,
        depth: int = 2,
        level: float = 0.05,
    ) -> Slices:
        """The groups, and conjunctions of groups, whose samples are worse than the rest, see `ledger.worst_slices`.

        Args:
            k: how many.
            split: "training", "validation" or "test"; the first of these that has samples.
            epoch: the last of the split if not given.
            minimum_count: fewest samples with which a slice is tested.
            term: whose loss; all terms together, each times its λ, if not given.
            groups: by kind, the group of each sample by its number; those of `fit(groups=…)` if not given.
            depth: how many kinds a slice may join, from 1 to 3.
            level: the chance of a false finding that is accepted.

        Raises:
            InputError: no samples, no groups of them, no such split or epoch, or several runs.
            UnknownNameError: no such term.
        """
        import numpy as np

        samples = self.samples
        _, split, epoch = one_epoch(samples, split, epoch, "worst_slices")
        rows = top_losses(samples, len(samples), split, epoch, term).rows
        ids = np.array([row["sample"] for row in rows], np.int64)
        known = _given(groups, ids) if groups is not None else _kept(self._groups().columns(), split, ids)
        if not known:
            raise InputError(
                f"worst_slices: the ledger has no groups of the samples of {split!r}; expected some. Pass "
                "fit(…, samples=True, groups={'site': ids}), or worst_slices(groups=…)."
            )
        return worst_slices([row["loss"] for row in rows], known, k, minimum_count, depth, level)


def _given(groups: Mapping[str, Mapping[int, str]], ids: NDArray[np.int64]) -> dict[str, list[Any]]:
    return {kind: [of.get(sample, NO_GROUP) for sample in ids.tolist()] for kind, of in sorted(groups.items())}


def _kept(columns: Columns, split: str, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The groups that a run keeps, by kind, in the order of `ids`."""
    import numpy as np

    found: dict[str, NDArray[Any]] = {}
    of_split = columns["split"].among((split,))
    for kind in sorted(columns["kind"].names):
        index = (of_split & columns["kind"].among((kind,))).nonzero()[0]
        if not len(index):
            continue
        samples, names = columns["sample"].values[index], columns["group"].taken(index).objects()
        order = np.argsort(samples, kind="stable")
        place = np.minimum(np.searchsorted(samples[order], ids), len(order) - 1)
        there = samples[order][place] == ids
        found[kind] = np.where(there, names[order][place], NO_GROUP)
    return found
