"""TERM: terms that are lost in the sum, or that are measured in other units."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import torch

from lossledger import reduction as reductions
from lossledger.explain.checks.case import Case, TermCase
from lossledger.explain.checks.finding import Finding

LEAST, MOST = 0.01, 0.95
_DIVERGENCE = re.compile(r"(^|[^a-z])kl(d|_|$|[^a-z])|kullback|divergence")


def value_share(case: Case) -> Iterator[Finding]:
    """TERM1: a data term below 1 % of the loss, or above 95 %."""
    contributions = [(term.name, term.coefficient * term.value) for term in case.understood]
    yield from share_findings(contributions, "TERM1", "loss", "")


def share_findings(parts: Sequence[tuple[str, float]], code: str, of: str, when: str) -> Iterator[Finding]:
    """Findings about the shares of named parts in the sum of their sizes.

    Args:
        parts: name and contribution of each data term.
        code: of the rule.
        of: what they are shares of.
        when: added to the message.
    """
    whole = math.fsum(abs(value) for _, value in parts)
    if len(parts) < 2 or not math.isfinite(whole) or whole == 0:
        return
    shares = {name: abs(value) / whole for name, value in parts}
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    if shares[most] <= MOST and shares[least] >= LEAST:
        return
    listed = " + ".join(f"{name} {value:.4g}" for name, value in parts)
    yield Finding(
        code,
        "warning",
        f"{most} is {shares[most]:.1%} of the {of} and {least} {shares[least]:.2%}{when} ({listed}).",
        "Weigh the terms (loss_weights, or factors in the sum) so that each has a say; ignore the finding if the small "
        "one is meant to be small.",
        {"most": most, "least": least, "shares": shares},
    )


def gradient_share(case: Case) -> Iterator[Finding]:
    """TERM2: the same for the gradients of terms that read one output."""
    by_output: dict[str, list[TermCase]] = {}
    for term in case.understood:
        by_output.setdefault(term.output, []).append(term)
    for terms in by_output.values():
        if len(terms) < 2 or any(t.batch is None or not t.probeable or t.tally is None for t in terms):
            continue
        norms = []
        for term in terms:
            norms.append((term.name, float(term.gradient(term.coefficient).double().norm())))
        if all(math.isfinite(norm) for _, norm in norms):
            yield from share_findings(norms, "TERM2", "gradient at the output", "")


def units(case: Case) -> Iterator[Finding]:
    """TERM3: a sum beside a mean, or a divergence per latent beside an error per pixel."""
    linear = [t for t in case.understood if t.tally is not None and t.tally.form == "linear" and t.entries() > 0]
    sums = [t for t in linear if t.loss.reduction.statistic is None and t.loss.reduction is not reductions.NONE]
    means = [t for t in linear if t not in sums]
    if sums and means:
        total, mean = sums[0], means[0]
        yield Finding(
            "TERM3",
            "warning",
            f"{total.name} is a sum over {total.entries():,.0f} entries, {mean.name} a mean over "
            f"{mean.entries():,.0f}: their balance changes with the size of the batch.",
            "Give both the same reduction, and weigh them.",
            {"sum": total.name, "mean": mean.name, "entries": total.entries()},
        )
        return
    for divergence in means:
        if not _DIVERGENCE.search(divergence.name.lower()):
            continue
        for other in means:
            if other.output == divergence.output or other.samples != divergence.samples or not other.samples:
                continue
            latents, pixels = _per_sample(divergence), _per_sample(other)
            beta = divergence.coefficient / other.coefficient * pixels / latents if other.coefficient else math.inf
            if pixels / latents >= 2 and not 0.9 < beta < 1.1:
                yield Finding(
                    "TERM3",
                    "warning",
                    f"{other.name} is a mean over {pixels:,.0f} numbers a sample, {divergence.name} over "
                    f"{latents:,.0f}: with these weights the sum equals that of a beta-VAE with beta = {beta:.4g}.",
                    f"Sum both over a sample, or weigh {divergence.name} by {latents / pixels:.4g}, or ignore the "
                    "finding if that beta is meant.",
                    {"divergence": divergence.name, "other": other.name, "beta": beta},
                )
                return


def _per_sample(term: TermCase) -> float:
    """Elements that a mean runs over, for each sample."""
    assert term.tally is not None
    return max(float(torch.as_tensor(term.tally.divisor)) / term.samples, 1.0)
