"""The checks of a training: the cheap ones on its first batch, the statistical ones at the end of its epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor

from lossledger.batch import Batch, map_structure
from lossledger.distributed import ALONE, Group
from lossledger.errors import CheckError, UnknownNameError
from lossledger.explain.checks.case import understand
from lossledger.explain.checks.epochs import Epochs
from lossledger.explain.checks.finding import Finding
from lossledger.explain.checks.run import findings, known_codes
from lossledger.ledger import Ledger
from lossledger.objective import Objective, Outputs, unpacked
from lossledger.tally import Tally
from lossledger.training.progress import Show
from lossledger.training.step import Observe
from lossledger.weighting import carried_mask

POLICIES = ("warn", "error", "off")
# Numbers of an output that the checks of the first batch read: enough to see, too few to wait for.
SEEN = 2**18


class Checking:
    """What was found so far in one call of `fit`; each finding is said once.

    Args:
        policy: `"warn"` prints warnings and errors, `"error"` raises them; notes are only recorded.
        ignore: codes to leave out.
        objective: of the training.
        ledger: where findings are recorded, as `ledger.info["findings"]`.
        show: prints.
        group: the ranks that share the data: each looks at its own part of the first batch.
    """

    def __init__(
        self,
        policy: str,
        ignore: Iterable[str],
        objective: Objective,
        ledger: Ledger,
        show: Show,
        group: Group = ALONE,
    ) -> None:
        self._raises = policy == "error"
        self._ignore = known_codes(ignore)
        self._objective = objective
        self._ledger = ledger
        self._show = show
        self._training: list[Mapping[str, Tally]] = []
        # A resumed run has said these.
        before = ledger.info.get("findings", ())
        self._known: set[tuple[str, Any]] = {(f["code"], f["data"].get("term")) for f in before}
        self._first = True
        self._group = group
        self._own: list[Finding] | None = [] if group.size > 1 else None

    def with_first(self, observe: Observe | None) -> Observe | None:
        """What sees the batches of a step: the checks too, where none has been seen."""
        if not self._first:
            return observe

        def both(batch: Batch, outputs: Any) -> None:
            if observe is not None:
                observe(batch, outputs)
            if self._first:
                self._first = False
                self._batch(batch, outputs)

        return both

    def _batch(self, batch: Batch, outputs: Any) -> None:
        batch, outputs = _some(batch, outputs)
        case = understand(self._objective, batch.y, outputs, batch.sample_weight, batch.mask, again=True)
        found = findings(case, ("batch",), self._ignore)
        if self._own is not None:
            self._own.extend(found)
        self._say(found)

    def epoch(
        self, training: Mapping[str, Tally], validation: Mapping[str, Tally] | None, weighted: bool = False
    ) -> None:
        """The end of an epoch: tallies that the host has read anyway, and whether validation data came with weights.

        Raises:
            CheckError: a finding, where they are errors.
        """
        self._training.append(training)
        if self._own is not None:
            # Once, at a point that all ranks come to: what is wrong with the part of another rank is said by rank 0.
            for rank, own in enumerate(self._group.gather(self._own)):
                self._say([replace(finding, data={**finding.data, "rank": rank}) for finding in own])
            self._own = None
        self._say(findings(Epochs(self._objective, self._training, validation, weighted), ("epoch",), self._ignore))

    def _say(self, found: list[Finding]) -> None:
        new = []
        for finding in found:
            key = (finding.code, finding.data.get("term"))
            if key not in self._known:
                self._known.add(key)
                new.append(finding)
        if not new:
            return
        self._ledger.info.setdefault("findings", []).extend(finding.to_dict() for finding in new)
        loud = [finding for finding in new if finding.severity != "note"]
        if loud and self._raises:
            raise CheckError(
                "\n".join(str(finding) for finding in loud)
                + "\nchecks='warn' goes on all the same; ignore_checks leaves codes out."
            )
        for finding in loud:
            self._show.say(str(finding))


def checking(
    policy: Any, ignore: Iterable[str], objective: Objective, ledger: Ledger, show: Show, group: Group = ALONE
) -> Checking | None:
    """The checks of a call of `fit`; `None` where they are off.

    Raises:
        UnknownNameError: a policy or a code that does not exist.
    """
    if not isinstance(policy, str) or policy not in POLICIES:
        raise UnknownNameError("checks", policy, POLICIES)
    known_codes(ignore)
    return None if policy == "off" else Checking(policy, ignore, objective, ledger, show, group)


def _some(batch: Batch, outputs: Any) -> tuple[Batch, Any]:
    """The first samples of a large batch, and of what the model made of it."""
    alone, auxiliary = unpacked(outputs)
    largest, samples = 0, 0

    def measure(value: Any) -> Any:
        nonlocal largest, samples
        if isinstance(value, Tensor) and value.ndim:
            largest, samples = max(largest, prod(value.shape)), max(samples, value.shape[0])
        return value

    map_structure(measure, alone)
    kept = max(2, samples * SEEN // largest) if largest > SEEN else samples

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != samples:
            return value
        part, carried = value[:kept], carried_mask(value)
        if carried is not None:
            part._keras_mask = carried[:kept]  # type: ignore[attr-defined]
        return part

    if kept >= samples:
        return batch, outputs
    smaller = replace(
        batch,
        y=map_structure(cut, batch.y),
        sample_weight=map_structure(cut, batch.sample_weight),
        mask=map_structure(cut, batch.mask),
    )
    return smaller, Outputs(map_structure(cut, alone), auxiliary)
