"""What every report says in sentences, in numbers as `display` shows them."""

from __future__ import annotations

from lossledger.ledger import Slices
from lossledger.ledger.table import DASH
from lossledger.report.gap import GapView
from lossledger.report.groups import PlaceMap
from lossledger.report.numbers import display
from lossledger.report.samples import Cartography
from lossledger.report.view import Against, FindingView, Verdict


def verdict_sentences(verdict: Verdict) -> list[str]:
    """The verdict in sentences: the loss, what it hides, what was not finite, whether the books balance.

    Args:
        verdict: of a run.
    """
    said = (headline(verdict), hidden_sentence(verdict), nonfinite_sentence(verdict), balance_sentence(verdict))
    return [sentence for sentence in said if sentence]


def headline(verdict: Verdict) -> str:
    """The printed loss, over what it was taken.

    Args:
        verdict: of a run.
    """
    when = f"after epoch {verdict.epoch}" if verdict.epoch else "as evaluated"
    others = [f"{split} {display(value, digits=4)}" for split, value in verdict.losses if split != verdict.split]
    aside = f" (last {', '.join(others)})" if others else ""
    over = f", over {display(verdict.count, 'count')} entries" if verdict.count else ""
    value = display(verdict.loss, digits=4)
    return f"{verdict.split.capitalize()} loss {'is not a number' if value == DASH else value} {when}{aside}{over}."


def hidden_sentence(verdict: Verdict) -> str:
    """What the printed number hides: the class whose own loss is far above it; "" without classes to tell apart.

    Args:
        verdict: of a run.
    """
    hidden = verdict.hidden
    if hidden is None:
        return ""
    row = hidden.row
    name = f"own {hidden.term}" if hidden.term else "own loss"
    reference = (
        f"the mean of {display(hidden.reference)}" if hidden.term else f"the printed {display(hidden.reference)}"
    )
    factor = display(hidden.factor, "times").removesuffix("×")
    if not hidden.rare:
        return (
            f"No rare class hides behind the mean: the highest {name} where present is that of {row.name}, "
            f"{display(row.mean_present)}, {factor} times {reference}."
        )
    measured = zip(hidden.metrics, row.metrics, strict=True)
    metric = next((f", and its {m} is {display(value)}" for m, value in measured if display(value) != DASH), "")
    return (
        f"Class {row.name} is present in {display(row.entries, 'percent')} of the entries; its {name} there is "
        f"{display(row.mean_present)}, {factor} times {reference}{metric}."
    )


def nonfinite_sentence(verdict: Verdict) -> str:
    """How many elements were NaN or infinite; "" if none.

    Args:
        verdict: of a run.
    """
    if not verdict.nonfinite:
        return ""
    return f"{display(verdict.nonfinite, 'count')} unmasked elements were NaN or infinite over the run."


def balance_sentence(verdict: Verdict) -> str:
    """Whether the entries by group add up to the printed loss.

    Args:
        verdict: of a run.
    """
    unchecked = ""
    if verdict.unchecked:
        of_them = f"{verdict.unchecked:,} {'sum is' if verdict.unchecked == 1 else 'sums are'}"
        unchecked = f"{of_them} NaN or infinite and cannot be checked."
    if not verdict.sums:
        return unchecked or "There are no entries by group to check against the loss."
    rest = f" {unchecked}" if unchecked else ""
    sums = f"{verdict.sums:,} {'sum' if verdict.sums == 1 else 'sums'}"
    if not verdict.imbalances:
        return f"The books balance: the entries by group add up to the printed loss in each of {sums}.{rest}"
    first = verdict.imbalances[0]
    where = f"{first.split} epoch {first.epoch}" + (f", step {first.step}" if first.step is not None else "")
    return (
        f"The books do not balance in {len(verdict.imbalances):,} of {sums}: in {where}, the entries of {first.term} "
        f"by {first.kind} differ from its contribution by {display(first.difference)}.{rest}"
    )


def cartography_sentence(found: Cartography) -> str:
    """What the confidence in the samples says in numbers.

    Args:
        found: of a run.
    """
    never = sum(dot.correct == 0 for dot in found.dots)
    drawn = "" if len(found.dots) == found.count else f" {len(found.dots):,} are shown, the least sure among them."
    missed = f" {never:,} of them were never right." if never else ""
    return (
        f"Mean and deviation of the confidence in the true class, of each of {found.count:,} {found.split} samples "
        f"over {found.epochs} epochs, by {found.term}.{drawn}{missed} Low confidence with little variability is where "
        "labels are wrong or samples too hard; high variability is where the model learned most."
    )


def worst_sentence(found: Slices) -> str:
    """How many slices were tested, and how many of them are worse than the rest by more than chance.

    Args:
        found: of a run.
    """
    return (
        f"{found.tested:,} groups of samples, and conjunctions of two, were compared with the rest of "
        f"{found.samples:,} samples; {found.significant:,} {'is' if found.significant == 1 else 'are'} worse by more "
        f"than chance. The p-values pay for every test (Holm, level {found.level:g})."
    )


def place_sentence(found: PlaceMap) -> str:
    """Where the mean loss is highest and lowest.

    Args:
        found: of a term.
    """
    worst, best = (pick(found.places, key=lambda place: place.mean) for pick in (max, min))
    high, low = (
        f"at row {place.row}, column {place.column}" if found.image else f"at position {place.column}"
        for place in (worst, best)
    )
    return f"The mean loss is highest {high} ({display(worst.mean)}) and lowest {low} ({display(best.mean)})."


def against_sentence(against: Against) -> str:
    """What moved the loss since the other run, or why that cannot be said.

    Args:
        against: of a run.
    """
    diff = against.diff
    if diff is None:
        return f"The losses cannot be compared. {against.refused}"
    return (
        f"{diff.first}: {display(diff.before, digits=4)}; {diff.second}: {display(diff.after, digits=4)}. "
        f"Of the difference of {display(diff.difference)}, {display(diff.mix)} is mix (what share of the divisor the "
        f"groups have) and {display(diff.rate)} is rate (the own mean of the groups)."
    )


def finding_sentence(finding: FindingView) -> str:
    """What a check found, with its code.

    Args:
        finding: of a run.
    """
    return " ".join(part for part in (f"{finding.code} {finding.severity}:", finding.message, finding.remedy) if part)


def gap_sentence(gap: GapView) -> str:
    """Where the way starts and ends.

    Args:
        gap: of a run.
    """
    return (
        f"After epoch {gap.epoch} the training loss is {display(gap.loss, digits=4)}, the validation loss "
        f"{display(gap.val_loss, digits=4)}. " + " ".join(gap.notes)
    ).strip()
