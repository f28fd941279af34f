"""Named groups of samples: source, site, language, length. Their names become numbers once, at the data boundary."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossledger.errors import CheckpointError, InputError, InputTypeError
from lossledger.ledger.table import GROUP_KINDS, KEPT, MEASURES, ROW_DIMENSIONS

RESERVED = frozenset((*ROW_DIMENSIONS, *GROUP_KINDS, *MEASURES, *KEPT, "group", "kind"))


class Names:
    """The names of the groups of each kind, in the order in which they were met; it only grows.

    Example:
        >>> names = Names()
        >>> names.codes({"site": ["north", "south", "north"]}, 3)["site"]
        tensor([0, 1, 0])
        >>> names.of("site")
        ('north', 'south')
    """

    def __init__(self) -> None:
        self._codes: dict[str, dict[str, int]] = {}

    def of(self, kind: str) -> tuple[str, ...]:
        """The names of a kind."""
        return tuple(self._codes[kind])

    def number(self, kind: str) -> int:
        """How many names a kind has."""
        return len(self._codes[kind])

    def codes(self, groups: Mapping[str, Any], size: int, where: str = "") -> dict[str, Tensor]:
        """The number of each sample's group, by kind, each `[size]`.

        Args:
            groups: by kind, a name or whole number for each sample.
            size: number of samples.
            where: the batch, for messages.

        Raises:
            InputError: another length, or a kind that the ledger uses itself.
            InputTypeError: something else than text and whole numbers.
        """
        found = {}
        for kind, given in groups.items():
            _check_kind(kind, where)
            known = self._codes.setdefault(kind, {})
            texts, inverse = _distinct(given, f"{where}groups[{kind!r}]", size)
            table = np.array([known.setdefault(text, len(known)) for text in texts], np.int64)
            found[kind] = torch.from_numpy(table[inverse])
        return found

    def state_dict(self) -> dict[str, list[str]]:
        """The names by kind."""
        return {kind: list(known) for kind, known in self._codes.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[str]]) -> None:
        """Go on from names that `state_dict` told.

        Raises:
            CheckpointError: samples have had other names by now.
        """
        for kind, names in state.items():
            known = self._codes.setdefault(kind, {})
            if list(known) != list(names)[: len(known)]:
                raise CheckpointError(
                    f"resume: groups[{kind!r}]: expected the groups of the run, {list(names)[:10]}, received "
                    f"{list(known)[:10]}. Pass the groups that the run had, or start in another run_dir."
                )
            known.update({name: code for code, name in enumerate(names)})


def _check_kind(kind: Any, where: str) -> None:
    if not isinstance(kind, str) or not kind or kind in RESERVED:
        taken = "the ledger uses it itself" if kind in RESERVED else "it is no text"
        raise InputError(f"{where}groups: expected a name for each kind of groups, received {kind!r}; {taken}.")


def _distinct(given: Any, where: str, size: int) -> tuple[list[str], NDArray[np.intp]]:
    """The names that occur, and which of them each sample has."""
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if array.shape != (size,):
        raise InputError(f"{where}: expected one group for each of {size} samples, received shape {array.shape}.")
    if array.dtype.kind == "O":
        wrong = next((i for i, v in enumerate(array) if not isinstance(v, str | numbers.Integral)), None)
        if wrong is not None:
            raise InputTypeError(
                f"{where}: expected text or whole numbers, received {array[wrong]!r} at sample {wrong}. Give samples "
                'without a group one of their own, such as "unknown".'
            )
        array = array.astype(str)
    elif array.dtype.kind not in "Uiub":
        raise InputTypeError(f"{where}: expected text or whole numbers, received dtype {array.dtype}.")
    distinct, inverse = np.unique(array, return_inverse=True)
    return [str(name) for name in distinct.tolist()], inverse.reshape(-1)
