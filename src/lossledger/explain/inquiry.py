"""The questions that `fingerprint` asks of a function, in their order, and what follows from the answers.

Let `l_i` be what the function says of sample `i` alone, and `n` the number of samples of a batch. Whatever the function
computes inside, how it reduces a batch is seen in how its value follows from the `l_i`:

    value = n^k · Σ_i ω_i l_i / Σ_i ω_i

`k = 0` is a mean and `k = 1` a sum. The weights follow from pairs: of samples 0 and `i`, with `v` the value of the pair
over `2^k`, `ω_i / ω_0 = (l_0 − v) / (v − l_i)`. They are then tested on batches that were not used to find them. Equal
weights are a mean over samples; weights in proportion to the number of valid entries a mean over entries; weights that
follow the labels class weights. Where no weights fit, samples are not judged one by one: the loss is batch-coupled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lossledger.explain import probes, rules
from lossledger.explain.evidence import NAMES, Evidence, Fingerprint
from lossledger.explain.probes import Caller, Data, ProbeFailed
from lossledger.explain.rules import Fit
from lossledger.report.numbers import display

SEED = 20_250


class Inquiry:
    """One run through the probes; collects evidence as it goes."""

    def __init__(self, caller: Caller, data: Data) -> None:
        self.caller = caller
        self.data = data
        self.evidence: list[Evidence] = []
        self.failed: list[Evidence] = []
        self.warnings: list[str] = []
        self.value: float | None = None
        self.tolerance = 0.0
        self.scale = 0.0
        self.largest = 0
        self.by_class: tuple[tuple[int, float], ...] = ()

    def conclude(self) -> Fingerprint:
        """All probes in their order, and the name that they leave."""
        name = self._name()
        return Fingerprint(
            name,
            NAMES[name],
            self.value,
            len(self.data),
            self.tolerance,
            tuple(self.evidence),
            tuple(self.warnings),
            tuple(self.failed),
            self.by_class,
        )

    # --- small words -------------------------------------------------------------------------------------------

    def _found(self, probe: str, text: str, measured: float | None = None) -> None:
        self.evidence.append(Evidence(probe, text, measured))

    def _ask(self, probe: str, data: Data) -> float | None:
        """The value of a probe's batch; a probe that the function cannot take is noted once."""
        try:
            return self.caller.value(data)
        except ProbeFailed as error:
            if all(other.probe != probe for other in self.failed):
                self.failed.append(Evidence(probe, str(error)))
            return None

    def _same(self, a: float | None, b: float | None, slack: float = 1.0) -> bool:
        if a is None or b is None:
            return False
        return abs(a - b) <= slack * self.tolerance * max(abs(a), abs(b), self.scale)

    # --- the order of the questions ----------------------------------------------------------------------------

    def _name(self) -> str:
        try:
            first = self.caller.raw(self.data)
        except ProbeFailed as error:
            self.failed.append(Evidence("call", str(error)))
            return "undetermined"
        epsilon = torch.finfo(first.dtype).eps if first.is_floating_point() else torch.finfo(torch.float64).eps
        # Rounding of a sum of some hundred terms, with room.
        self.tolerance = max(1000 * epsilon, 1e-10)
        if first.numel() != 1:
            return self._unreduced(first)
        self.value = self._ask("call", self.data)
        if self.value is None:
            return "undetermined"
        again = [self._ask("repeat", self.data) for _ in range(3)]
        self.scale = max([abs(self.value), *(abs(v) for v in again if v is not None)])
        if not all(self._same(self.value, other) for other in again):
            return self._stochastic()
        flat = self._gradient()
        if self._all_pairs():
            return "all-pairs broadcast"
        self._shift()
        ordered = self._permute()
        singles = self._singles()
        self._duplicate()
        if singles is not None and max(singles) - min(singles) <= self.tolerance * self.scale:
            if any(self._same(self.value, singles[0] * len(singles) ** power) for power in (0, 1, -1)):
                text = "every sample alone has the same loss; targets and predictions must vary to tell more"
                self._found("single samples", text)
                return "undetermined"
            return self._unexplained(flat, singles)
        fit = self._fit(singles, flat) if singles is not None and ordered else None
        if fit is None and singles is None and ordered:
            fit = self._fit_parts()
        if fit is None:
            return self._unexplained(flat, singles)
        return self._reduction(fit)

    # --- one probe each ----------------------------------------------------------------------------------------

    def _unreduced(self, values: Tensor) -> str:
        shape, samples = tuple(values.shape), len(self.data)
        self._found("call", f"the function returned shape {shape} for {samples} samples")
        if shape[:1] != (samples,):
            self.warnings.append(f"the first axis of what it returned is not the batch: {shape} for {samples} samples")
            return "unreduced"
        half = list(range(samples // 2))
        try:
            part = self.caller.raw(self.data.rows(half))
        except ProbeFailed as error:
            self.failed.append(Evidence("split", str(error)))
            return "unreduced"
        whole = values.detach()[: len(half)].double()
        close = part.shape == whole.shape and bool(
            torch.isclose(part.detach().double(), whole, self.tolerance, self.tolerance).all()
        )
        if close:
            self._found("split", "the first half alone gives the same values → each sample is judged on its own")
            return "unreduced"
        self._found("split", "the first half alone gives other values → samples depend on each other")
        return "batch-coupled"

    def _stochastic(self) -> str:
        def seeded() -> float | None:
            torch.manual_seed(SEED)
            return self._ask("seed", self.data)

        values = [value for value in (self._ask("repeat", self.data) for _ in range(16)) if value is not None]
        if values:
            spread = max(values) - min(values)
            text = f"the same batch {len(values)} times: from {min(values):.4g} to {max(values):.4g}"
            self._found("repeat", text, spread)
        if self._same(seeded(), seeded()):
            self._found("seed", "the same seed gives the same value → torch's random numbers (dropout, sampling)")
        else:
            self._found(
                "seed", "the same seed of torch gives another value → random numbers of another source, or state"
            )
        return "stochastic"

    def _gradient(self) -> bool:
        """Whether nothing differentiable leads from the predictions to the value."""
        leaf = self.data.y_pred.clone()
        if not leaf.is_floating_point():
            return False
        leaf.requires_grad_()

        def through(y_true: Tensor, y_pred: Tensor, **named: Any) -> Any:
            return self.caller.fn(y_true, leaf, **named)

        def through_swapped(y_pred: Tensor, y_true: Tensor, **named: Any) -> Any:
            return self.caller.fn(leaf, y_true, **named)

        fn = through if self.caller.order == "y_true, y_pred" else through_swapped
        gradient: Tensor | None = None
        try:
            with torch.enable_grad():
                result = replace(self.caller, fn=fn).raw(self.data)
                if result.requires_grad:
                    (gradient,) = torch.autograd.grad(result.sum(), leaf, allow_unused=True)
        except (ProbeFailed, RuntimeError) as error:
            self.warnings.append(f"no gradient reaches y_pred: {str(error).splitlines()[0]}")
            return True
        if gradient is None:
            self.warnings.append("no gradient reaches y_pred: look for .detach(), .item(), NumPy or rounding")
            return True
        if not bool(gradient.any()):
            self.warnings.append("the gradient with respect to y_pred is 0 everywhere")
            return True
        if not bool(torch.isfinite(gradient).all()):
            self.warnings.append("the gradient with respect to y_pred is not finite everywhere")
        return False

    def _all_pairs(self) -> bool:
        """Whether every target is compared with every prediction: then it does not matter which target is whose."""
        count = len(self.data)
        turned = replace(self.data, y_true=self.data.y_true.roll(count // 2 or 1, 0).flip(0))
        if torch.equal(turned.y_true, self.data.y_true):
            return False
        shuffled = self._ask("permute", turned)
        if not self._same(shuffled, self.value):
            return False
        constant = replace(self.data, y_true=self.data.y_true[:1].expand_as(self.data.y_true).clone())
        if self._same(self._ask("permute", constant), self.value):
            self._found("permute", "other targets give the same value → y_true is not read, or does not matter here")
            return False
        self._found("permute", "targets in another order give the same value → no target belongs to a prediction", 1.0)
        rows = list(range(count))
        pairs = [
            self._ask("pairs", replace(self.data.rows([j]), y_true=self.data.y_true[i : i + 1]))
            for i in rows
            for j in rows
        ]
        known = [value for value in pairs if value is not None]
        if len(known) < len(pairs):
            return False
        total = math.fsum(known)
        for divisor, word in ((len(known), "mean"), (1, "sum")):
            if self._same(total / divisor, self.value):
                text = f"the {word} over all {count} × {count} pairs of a target and a prediction is the value"
                self._found("pairs", f"{text} {_shown(self.value)}", total / divisor)
                return True
        return False

    def _shift(self) -> None:
        if self.data.y_pred.is_floating_point():
            moved = self._ask("shift", replace(self.data, y_pred=self.data.y_pred + 0.25))
            if moved is not None and self._same(moved, self.value):
                self._found(
                    "shift", "0.25 more everywhere in y_pred changes nothing → only differences count (softmax)"
                )

    def _permute(self) -> bool:
        """Whether the order of the samples is free."""
        order = list(range(len(self.data)))
        turned = self._ask("order", self.data.rows(order[1::2] + order[::2]))
        if turned is None or self._same(turned, self.value):
            return True
        self._found("order", f"samples in another order: {_ratio(turned, self.value)} → the order matters", turned)
        return False

    def _singles(self) -> list[float] | None:
        values = [self._ask("single samples", self.data.rows([row])) for row in range(len(self.data))]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        self.scale = max(self.scale, *(abs(value) for value in known))
        self.largest = max(range(len(known)), key=lambda row: known[row])
        return known

    def _duplicate(self) -> None:
        rows = list(range(len(self.data)))
        twice = self._ask("duplicate", self.data.rows(rows + rows))
        if twice is None or self.value is None or self.value == 0:
            return
        ratio = twice / self.value
        meaning = {1: "a mean over samples, or a ratio", 2: "a sum over samples"}
        verdict = next((word for times, word in meaning.items() if self._same(twice, times * self.value)), None)
        self._found("duplicate", f"every sample twice: {ratio:.4g} × → {verdict or 'neither a mean nor a sum'}", ratio)

    # --- the rule over samples ---------------------------------------------------------------------------------

    def _groups(self) -> list[list[int]]:
        """Batches of unequal size on which a rule is tested."""
        rows = list(range(len(self.data)))
        third = max(2, len(rows) // 3)
        return [rows, rows[:third], rows[third:], rows[::2], rows[1::3] + rows[:1]]

    def _fit(self, singles: Sequence[float], flat: bool) -> Fit | None:
        batches = self._groups()
        values = [self._ask("split", self.data.rows(batch)) for batch in batches]
        pairs = [(batch, value) for batch, value in zip(batches, values, strict=True) if value is not None]
        if len(pairs) < len(batches):
            return None
        ones = (1.0,) * len(singles)
        for power in (0, 1, -1):
            if rules.holds(Fit(power, ones, True), singles, pairs, self.tolerance, self.scale):
                return Fit(power, ones, True)
        if flat and all(value == round(value) for value in (*singles, *(value for _, value in pairs))):
            # Rounded values hide the small differences that weights would be read from.
            return None
        for power in (0, 1, -1):
            weights = self._pair_weights(singles, power)
            if weights is None:
                continue
            fit = Fit(power, weights, False)
            if rules.holds(fit, singles, pairs, rules.loose(self.tolerance), self.scale):
                return fit
        return None

    def _pair_weights(self, singles: Sequence[float], power: int) -> tuple[float, ...] | None:
        """ω_i / ω_0 from pairs; sample 0 is the one that is easiest to tell from the others."""
        rows = range(len(singles))
        anchor = max(rows, key=lambda row: min(abs(singles[row] - singles[i]) for i in rows if i != row))
        weights = []
        for row in rows:
            if row == anchor:
                weights.append(1.0)
                continue
            pair = self._ask("split", self.data.rows([anchor, row]))
            if pair is None:
                return None
            value = pair / 2**power
            below, above = singles[anchor] - value, value - singles[row]
            if above == 0 or below / above <= 0 or not math.isfinite(below / above):
                return None
            weights.append(below / above)
        return tuple(weights)

    def _fit_parts(self) -> Fit | None:
        """The rule, for a function that takes no single samples: from the values of two parts of unequal size."""
        rows, valid = list(range(len(self.data))), self.data.valid()
        cut = max(2, len(rows) // 3)
        parts = [rows[:cut], rows[cut:]]
        values = [self._ask("split", self.data.rows(part)) for part in parts]
        if self.value is None or values[0] is None or values[1] is None:
            return None
        for weights, equal in (([1.0] * len(rows), True), ([float(v) for v in valid], len(set(valid)) == 1)):
            sizes = [math.fsum(weights[row] for row in part) for part in parts]
            for power in (0, 1, -1):
                means = [
                    value / len(part) ** power for value, part in zip(values, parts, strict=True) if value is not None
                ]
                whole = math.fsum(m * s for m, s in zip(means, sizes, strict=True)) / math.fsum(sizes)
                if self._same(whole * len(rows) ** power, self.value):
                    return Fit(power, tuple(weights), equal)
        return None

    # --- the name ----------------------------------------------------------------------------------------------

    def _unexplained(self, flat: bool, singles: Sequence[float] | None) -> str:
        rows = list(range(len(self.data)))
        cut = max(2, len(rows) // 3)
        first, second = (self._ask("split", self.data.rows(part)) for part in (rows[:cut], rows[cut:]))
        if first is None or second is None or self.value is None:
            return "batch-coupled" if any(e.probe == "order" for e in self.evidence) else "undetermined"
        if flat and all(value == round(value) for value in (first, second, self.value)):
            self._found("round", f"whole numbers only ({first:g}, {second:g}, {self.value:g}), and no gradient")
            return "rounded"
        mean = (cut * first + (len(rows) - cut) * second) / len(rows)
        text = f"parts of {cut} and {len(rows) - cut} samples give {_shown(first)} and {_shown(second)}: their mean is "
        self._found(
            "split", f"{text}{_shown(mean)}, their sum {_shown(first + second)}, the whole {_shown(self.value)}"
        )
        squares = (cut * first**2 + (len(rows) - cut) * second**2) / len(rows)
        if self._same(squares, self.value**2, 2.0):
            self._found("square", "the squares add up as means do → the root of a mean (RMSE)", squares)
        if singles is not None and self._same(max(map(abs, singles)), 0.0):
            self._found("single samples", "a sample alone has the loss 0 → samples are compared with each other")
        return "batch-coupled"

    def _reduction(self, fit: Fit) -> str:
        self._split_evidence(fit)
        within = self._within()
        if fit.equal:
            return self._equal(fit.power, within)
        valid = self.data.valid()
        if len(set(valid)) > 1 and rules.proportional(fit.weights, valid, self.tolerance):
            self._found("weights", "samples weigh as the number of their valid entries")
            self._mask_reaches()
            return {0: "token mean", 1: "mean × batch size", -1: "mean / batch size"}[fit.power]
        if self._weights_follow_predictions(fit):
            return "batch-coupled"
        self.by_class = rules.class_weights(fit.weights, probes.class_counts(self.data), self.tolerance)
        if not self.by_class:
            return "weighted mean"
        shown = ", ".join(f"{name}: {weight:.4g}" for name, weight in self.by_class)
        self._found("weights", f"samples weigh by the classes they hold, up to a factor {{{shown}}}")
        return "class-weighted mean"

    def _weights_follow_predictions(self, fit: Fit) -> bool:
        """Whether the weights are others once each sample has the predictions of its neighbour: a ratio of two sums."""
        moved = Inquiry(self.caller, replace(self.data, y_pred=self.data.y_pred.roll(1, 0)))
        singles = moved._singles()
        weights = None if singles is None else moved._pair_weights(singles, fit.power)
        if weights is None:
            return False
        if rules.proportional(fit.weights, weights, self.tolerance):
            return False
        self._found("weights", "other predictions weigh samples otherwise → a ratio of two sums over the batch (Dice)")
        return True

    def _equal(self, power: int, within: int | None) -> str:
        if power == -1:
            return "mean / batch size"
        if power == 1:
            return "mean × batch size" if within == 1 else "sum"
        self._mask_reaches()
        if within == 2:
            return "sum / batch size"
        weighted = self._rescale()
        if self.data.mask is not None and len(set(self.data.valid())) > 1:
            return self._padding()
        return "weighted mean" if weighted else "mean"

    def _split_evidence(self, fit: Fit) -> None:
        rule = {0: "the mean", 1: "the sum", -1: "the mean, divided by the number of samples,"}[fit.power]
        if not fit.equal:
            rule = {0: "a weighted mean", 1: "a weighted mean × the number of samples", -1: rule}[fit.power]
        self._found(
            "split", f"{rule} of the {len(self.data)} samples alone is the value {_shown(self.value)}", self.value
        )

    def _within(self) -> int | None:
        """What happens to the positions of a sample: 1 for a mean, 2 for a sum, `None` where that cannot be seen."""
        for axes in probes.positions(self.data):
            twice = self._ask("repeat positions", probes.repeated(self.data, axes))
            if twice is None or self.value is None:
                continue
            for times, word in ((1, "a mean"), (2, "a sum")):
                if self._same(twice, times * self.value):
                    text = f"every position of axis {axes[1]} twice: {times} × → {word} over what a sample holds"
                    self._found("repeat positions", text, twice / self.value if self.value else None)
                    return times
        return None

    def _padding(self) -> str:
        for axes in probes.positions(self.data):
            batch = probes.padded(self.data, axes, 3)
            value = None if batch is None else self._ask("pad", batch)
            if value is None or self.value is None or self.value == 0:
                continue
            if self._same(value, self.value):
                self._found("pad", "three more masked positions change nothing → they do not divide", 1.0)
                return "sequence mean"
            steps = self.data.y_true.shape[axes[0]]
            text = f"three more masked positions: {_ratio(value, self.value)}"
            if self._same(value * (steps + 3), self.value * steps):
                self._found(
                    "pad", f"{text} = {steps}/{steps + 3} → masked entries are in the divisor", value / self.value
                )
                return "mean over masked entries too"
            self._found("pad", f"{text} → the mask is not respected", value / self.value)
        return "mean"

    def _mask_reaches(self) -> None:
        for axes in probes.positions(self.data):
            batch = probes.disturbed(self.data, axes)
            value = None if batch is None else self._ask("mask", batch)
            if value is not None:
                if not self._same(value, self.value):
                    self.warnings.append("predictions at masked positions reach the value")
                return

    def _rescale(self) -> bool:
        """Whether sample weights divide, for a function that takes them."""
        if self.caller.weight_name is None:
            return False
        # The sample with the largest loss counts more: that must show, or the weights are not read.
        weight = torch.ones(len(self.data)).to(self.data.y_pred)
        weight[self.largest] = 5.0
        shape = (-1, *(1,) * (self.data.y_pred.ndim - 1))
        for form in (weight, weight.reshape(shape)):
            plain = self._ask("weights", replace(self.data, weight=form))
            twice = self._ask("weights", replace(self.data, weight=2 * form))
            if plain is None or twice is None or plain == 0:
                continue
            self.failed = [other for other in self.failed if other.probe != "weights"]
            if self._same(twice, plain):
                self._found("weights", "all sample weights × 2: 1 × → the weights divide", 1.0)
                return not self._same(plain, self.value)
            self._found(
                "weights", f"all sample weights × 2: {twice / plain:.4g} × → the weights do not divide", twice / plain
            )
            return False
        return False


def _shown(value: float | None) -> str:
    return display(value, digits=6)


def _ratio(value: float, whole: float | None) -> str:
    return f"{value / whole:.4g} ×" if whole else f"{_shown(value)} instead of {_shown(whole)}"
