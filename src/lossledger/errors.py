"""The errors of the library, one tree.

```
LossledgerError
├── InputError (ValueError)      a value, shape or range that cannot be right
│   ├── EmptyDataError           nothing to compute a loss from
│   ├── CheckError               what the checks of `fit` found, where findings are errors
│   ├── UnknownNameError         a name that nobody declared, with a suggestion
│   └── OutputNameError (KeyError)   an output that the model does not have
├── InputTypeError (TypeError, ValueError)   the wrong kind of object or dtype
├── ReplayError (RuntimeError)    the second round of a window is not the first again
├── RankError (RuntimeError)      another rank of a training failed or did not answer
├── NonFiniteError (ArithmeticError)   a NaN or an infinity, with the term and the samples it came from
├── LedgerError (ValueError)     a run folder or segment that cannot be read
├── CheckpointError (ValueError) a run that cannot be resumed, with what is damaged or differs
└── ExtraError (ImportError)     a package of an extra is not installed
```

Each message says what was expected, what was received, where (output, term, argument), and what to do about it.

Where Keras raises an error for the same mistake, ours is of its class too and holds its key words, so that code that
matches on them works. Keras raises a ValueError also for objects of the wrong kind, so `InputTypeError` is one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class LossledgerError(Exception):
    """Base of every error that lossledger raises on purpose."""


class InputError(LossledgerError, ValueError):
    """A value, shape or range that cannot be right."""


class EmptyDataError(InputError):
    """There is nothing to compute a loss from."""


class CheckError(InputError):
    """What the checks of `fit` found, where `checks="error"` makes findings errors."""


class InputTypeError(LossledgerError, TypeError, ValueError):
    """An object of the wrong kind, or a dtype that a loss cannot take."""


class NonFiniteError(LossledgerError, ArithmeticError):
    """A NaN or an infinity in the loss, with the term and the samples that it came from.

    Args:
        message: what happened.
        record: the same by name, as values that JSON can hold: `step`, `rank`, `terms`, `classes`, `samples`,
            `already_bad`.
    """

    def __init__(self, message: str, record: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.record: dict[str, Any] = dict(record or {})


class ReplayError(LossledgerError, RuntimeError):
    """The second round of a window gives other statistics than the first: the model is not the same function."""


class RankError(LossledgerError, RuntimeError):
    """Another rank of a distributed training failed, was killed or did not answer in time."""


class LedgerError(LossledgerError, ValueError):
    """A run folder or a ledger segment that cannot be read."""


class CheckpointError(LossledgerError, ValueError):
    """A checkpoint that cannot be written or read, or that belongs to another recipe."""


class ExtraError(LossledgerError, ImportError):
    """What was asked for needs a package of an extra that is not installed."""


# So many names are read; of more, the nearest are shown.
READABLE = 40


class UnknownNameError(InputError):
    """A name that nobody declared; the message suggests the nearest one.

    Args:
        what: kind of name.
        name: the one received.
        known: those that were declared.
        keras: how the message starts, where it is to be as in Keras, or to name a place.
        meant: what the name may mean, in a sentence, where that is known better than by its letters.
    """

    def __init__(
        self, what: str, name: object, known: Iterable[object], keras: str | None = None, meant: str = ""
    ) -> None:
        names = sorted(str(k) for k in known)
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
        suggestion = f" {meant}" if meant else f" Did you mean {near[0]!r}?" if near else ""
        shown = names if len(names) <= READABLE else difflib.get_close_matches(str(name), names, n=5, cutoff=0.3)
        rest = f" and {len(names) - len(shown)} others" if len(shown) < len(names) else ""
        listed = ", ".join(repr(n) for n in shown) + rest if shown else f"{len(names)} names" if names else "none"
        super().__init__(f"{keras or f'Unknown {what}'}: expected one of {listed}; received {name!r}.{suggestion}")


class OutputNameError(InputError, KeyError):
    """An output that has a loss and that the model does not give."""

    # A KeyError shows its message quoted, as if it were a key.
    __str__ = Exception.__str__
