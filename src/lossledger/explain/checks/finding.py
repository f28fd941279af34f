"""What a rule says, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["note", "warning", "error"]
"""How sure and how bad: a fact worth knowing, a number that probably is not what was meant, a wrong number."""

Runs = Literal["batch", "arrays", "epoch"]
"""When a rule runs: on any batch; only where all the data is at hand (`check`); at the end of an epoch of `fit`."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that looks wrong, with the number that says so.

    Args:
        code: of the rule, such as `"SPACE1"`; its page is `docs/checks/CODE.md`.
        severity: `"note"`, `"warning"` or `"error"`.
        message: what was found, with the offending number, and the samples where there are some.
        remedy: what to do about it.
        data: the same numbers by name, and the `term`.

    Example:
        >>> print(Finding("W2", "error", "a scalar with weights.", "Return one value a sample."))
        W2 error: a scalar with weights. Return one value a sample.
    """

    code: str
    severity: Severity
    message: str
    remedy: str
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.code} {self.severity}: {self.message} {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """The finding as values that JSON can hold."""
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "remedy": self.remedy,
            "data": dict(self.data),
        }


@dataclass(frozen=True, slots=True)
class Rule:
    """A pure function from what was understood to what it finds.

    Args:
        code: stable; never given to another rule.
        title: what it looks for, in a few words.
        runs: on what it is called.
        find: takes a `Case`, or the `Epochs` of a training where `runs` is `"epoch"`.
    """

    code: str
    title: str
    runs: Runs
    find: Callable[[Any], Iterator[Finding]]

    @property
    def family(self) -> str:
        """The code without its number."""
        return self.code.rstrip("0123456789")
