"""`check`: every rule on a loss and its arrays."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from lossledger.errors import InputError, UnknownNameError
from lossledger.explain.checks.case import Case, understand
from lossledger.explain.checks.epochs import Epochs
from lossledger.explain.checks.finding import Finding
from lossledger.explain.checks.registry import CODES, FAMILIES, RULES
from lossledger.objective import Objective


def check(
    loss_or_objective: Any,
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
    mask: Any = None,
    ignore: Iterable[str] = (),
    logged: float | None = None,
    accumulate: int = 1,
    end_of_sequence: int | None = None,
) -> list[Finding]:
    """What looks wrong about a loss, its data and its weights.

    Args:
        loss_or_objective: a loss in any form that `fit` takes, or an `Objective`.
        y_true: targets, as the loss is called with; best the arrays of a whole validation.
        y_pred: predictions; attached to their graph, the last operation of the model is seen too.
        sample_weight: as in a call.
        mask: as in a call.
        ignore: codes to leave out, or families of them, such as `"CLS"`.
        logged: the loss that another program printed for these arrays.
        accumulate: number of micro-batches that a loop would split these arrays into.
        end_of_sequence: the class that ends a sequence, to be told where it is never a target.

    Returns:
        findings in the order of the catalogue; none where nothing looks wrong. Each code has a page in
        `docs/checks`.

    Raises:
        UnknownNameError: a code to ignore that does not exist.
        InputError: the loss cannot be computed, for a reason that no rule explains.

    Example:
        >>> import torch
        >>> probabilities = torch.softmax(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), -1)
        >>> for finding in check(torch.nn.CrossEntropyLoss(), torch.tensor([0, 1]), probabilities):
        ...     print(finding.code, round(finding.data["floor"], 4))
        SPACE1 0.3133
    """
    ignored = known_codes(ignore)
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise InputError(f"accumulate: expected a whole number from 1, received {accumulate!r}.")
    objective = loss_or_objective if isinstance(loss_or_objective, Objective) else Objective(loss_or_objective)
    case = understand(objective, y_true, y_pred, sample_weight, mask, logged, accumulate, end=end_of_sequence)
    found = findings(case, ("batch", "arrays"), ())
    explained = {finding.data.get("term") for finding in found if finding.severity == "error"}
    for term in case.terms:
        if term.error is not None and term.name not in explained:
            raise term.error
    return [finding for finding in found if finding.code not in ignored]


def findings(subject: Case | Epochs, runs: Collection[str], ignore: Collection[str]) -> list[Finding]:
    """What the rules of a kind find.

    Args:
        subject: a case, or the epochs of a training.
        runs: which rules.
        ignore: codes to leave out.
    """
    return [
        finding for rule in RULES if rule.runs in runs and rule.code not in ignore for finding in rule.find(subject)
    ]


def known_codes(codes: Iterable[str]) -> frozenset[str]:
    """Codes, each of which exists; a family stands for all of its codes.

    Raises:
        UnknownNameError: one that does not.
    """
    given = (codes,) if isinstance(codes, str) else tuple(codes)
    for code in given:
        if code not in CODES and code not in FAMILIES:
            raise UnknownNameError("code of a check", code, (*CODES, *FAMILIES))
    if not given:
        return frozenset()
    return frozenset(rule.code for rule in RULES if rule.code in given or rule.family in given)
