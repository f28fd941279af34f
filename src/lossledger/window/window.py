"""The window of an optimizer step: the gradient of one big batch from micro-batches, one graph in memory at a time.

What divides must be known before the first backward:

* *linear* terms are divided by a function of masks, weights and labels. It is summed over the window from the targets,
  as soon as the first forward has shown the shape of the outputs: one round.
* *ratio* terms (Dice over the batch) are divided by a function of the predictions, and a mask may come from the model.
  Then the loop goes round twice. The first round sums the statistics without gradients; the second repeats the random
  state and the running statistics, and back-propagates with the sums of the first as constants.

Targets of other lengths than those of the first micro-batch do not show the shape of their outputs: two rounds as well.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lossledger.batch import Batch, as_batches, leaves, map_structure, to_device, to_tensor
from lossledger.distributed import (
    LONE_SHARE,
    Share,
    at_rest,
    in_lockstep,
    joined,
    place_gradients,
    sharing_fate,
    sum_gradients,
    summing,
)
from lossledger.errors import EmptyDataError, InputError, ReplayError
from lossledger.losses.loss import By
from lossledger.objective import (
    Backprop,
    Breakdown,
    Objective,
    Penalty,
    Term,
    Whole,
    collecting,
    unpacked,
    with_added,
)
from lossledger.tally import Tally
from lossledger.weighting import both, carried_mask
from lossledger.window.ranks import merged, numbered, of_all, padded, pull_nothing, summed, zeroed
from lossledger.window.state import Gradients, Replay, modules_of, still

NO_GRADIENT = (
    "The loss does not depend on any trainable parameter: expected outputs that require a gradient, received "
    "detached ones. Look for .detach(), torch.no_grad() or NumPy in the model's forward."
)


def propagate(found: Backprop, penalties: Sequence[Penalty] = ()) -> bool:
    """Back-propagate a batch together with penalties, whose tallies join those of the batch.

    Args:
        found: what the batch left.
        penalties: the regularizers, once a window.

    Returns:
        whether anything depends on a parameter.
    """
    roots, gradients = found.roots, found.gradients
    for penalty in penalties:
        tally = penalty.tally()
        roots.append(tally.numerator)
        gradients.append(torch.ones_like(tally.numerator))
        found.tallies[penalty.name] = replace(tally, numerator=tally.numerator.detach())
    if not roots:
        return False
    torch.autograd.backward(roots, gradients)
    return True


class Window:
    """The micro-batches of one optimizer step; `Objective.window` opens one.

    Args:
        objective: what is minimized.
        batches: the micro-batches, as tensors on the device of the model.
        model: see `Objective.window`.
        penalties: the regularizers with their parameters.
        by: groups of the tallies.
        checked: values were checked at the data boundary.
        share: the part of this process, where several share the window.
        spare: a batch whose first row is forwarded when others have data and this process has none.

    `blank` is set while such a row is at hand, `counting` in a first round that only counts, `replaying` in the second,
    which repeats it with gradients.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Sequence[Batch],
        model: nn.Module | None,
        penalties: Sequence[Penalty],
        by: str | None,
        checked: bool,
        share: Share = LONE_SHARE,
        spare: Batch | None = None,
    ) -> None:
        self.replaying = self.blank = False
        self.tallies: dict[str, Tally] = {}
        self.differs: Tensor | None = None
        self._ranks = share.group.size > 1
        if self._ranks and model is None:
            raise InputError("window: expected the model, whose gradients are summed over ranks. Pass model=net.")
        self._lockstep = self._ranks and model is not None and in_lockstep(model)
        self._own, self.net, self.share = len(batches), model, share
        if self._lockstep and model is not None:
            batches = padded(batches, share, True, spare, next((p.device for p in model.parameters()), None))
        self._objective, self._batches, self._penalties = objective, batches, penalties
        self._by, self._checked = by, checked
        self._sizes = [_samples(batch) if i < self._own else 0 for i, batch in enumerate(batches)]
        self._shared = len(batches) > 1 or self._ranks
        self.counting = len(batches) > 1 and _likely_ratio(objective, batches[0])
        self._whole: Whole | None = None
        self._first: list[dict[str, Tally]] = []
        self._masked = False
        self._like: Any = None
        self._position, self._waiting, self._done = 0, False, False
        self._dtype: torch.dtype | None = None
        self._added: dict[str, Tensor] = {}
        modules = modules_of(model)
        self._replay, self._gradients = Replay(modules), Gradients(modules)
        self._rounds = self._run()

    # --- the loop ----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        return self._rounds

    def _run(self) -> Iterator[Batch]:
        yield from self._round()
        if not self._batches:
            self._summed({})
        if self.counting:
            self._whole = self._summed(merged(self._first))
            self.counting, self.replaying = False, True
            self._replay.statistics()
            yield from self._round()
        self._done = True

    def _round(self) -> Iterator[Batch]:
        for position, batch in enumerate(self._batches):
            self._position, self.blank = position, position >= self._own
            if self.replaying:
                self._replay.random(position)
            elif self.counting or (self._shared and position == 0):
                self._replay.keep_random()
            self._waiting = True
            # Of the first round nothing is kept but sums.
            without = torch.no_grad() if self.counting else contextlib.nullcontext()
            with without, still(self.net if self.blank else None), collecting() as self._added:
                yield batch
            if self._waiting:
                raise InputError(
                    f"window: expected one call of window.backward(outputs) for each micro-batch, received none for "
                    f"micro-batch {position}. Call it inside the loop, in both rounds."
                )

    # --- one micro-batch ---------------------------------------------------------------------------------------

    def backward(self, outputs: Any, mask: Any = None) -> None:
        """Take the outputs of the current micro-batch: count them, or back-propagate them.

        Args:
            outputs: what the model returned.
            mask: a mask that only the model knows, for all outputs or by output; it joins that of the batch. Give it
                for every micro-batch of a window, or for none.

        Raises:
            InputError: called outside of the loop or twice; a loss whose parts do not add up; outputs that do not fit.
        """
        if not self._waiting:
            raise InputError(
                "window.backward: expected one call for each micro-batch, inside `for batch in window`; received "
                "another. Give all outputs of a micro-batch at once."
            )
        self._waiting = False
        batch = self._batches[self._position]
        if self._added:
            outputs = with_added(outputs, self._added)
        mask = self._joined(mask, self._carried(outputs))
        batch = replace(batch, mask=self._joined(batch.mask, mask))
        if self._position == 0 and not self.replaying and self._shared:
            self._decide(batch, outputs, mask is not None)
        elif len(self._batches) > 1 and (mask is not None) != self._masked:
            raise InputError(
                f"window.backward: mask: expected one for every micro-batch of the window or for none; micro-batch "
                f"{self._position} differs from the first. Pass a mask of ones where all counts."
            )
        if self.counting:
            self._first.append(self._statistics(batch, outputs))
        elif self.blank:
            pull_nothing(outputs)
        else:
            self._pull(batch, outputs)

    def _statistics(self, batch: Batch, outputs: Any) -> dict[str, Tally]:
        with torch.no_grad():
            found = self._objective.tallies(
                batch.y, outputs, batch.sample_weight, batch.mask, None, self._checked, reported=False
            )
        tallies = {plan.name: found[plan.name] for plan in self._objective.terms}
        return zeroed(tallies) if self.blank else tallies

    def _decide(self, batch: Batch, outputs: Any, masked: bool) -> None:
        """With the first outputs: what divides, or that another round must tell."""
        objective, several = self._objective, len(self._batches) > 1
        with torch.no_grad():
            # Shapes alone decide; values are checked with the statistics or the gradient.
            aligned, _, _ = objective.align(batch.y, outputs, batch.sample_weight, batch.mask, True)
        objective.check_parts(aligned)
        ranks = {plan.name: len(a.weighting.shape) for plan, a in zip(objective.terms, aligned, strict=True)}
        late = masked or objective.is_ratio(ranks) or not self._alike()
        if self._lockstep and several:
            # All ranks forward once, or all twice.
            late = any(found for (found,) in self.share.group.agree(int(late)))
        self._masked = masked
        self.counting = several and (self.counting or late)
        if self.counting:
            return
        if late:
            # The only micro-batch of this process: its statistics are at hand.
            self._whole = self._summed(self._statistics(batch, outputs))
            return
        self._like = map_structure(_outline, unpacked(outputs)[0])
        parts = [
            objective.divisors(b.y, self._like, b.sample_weight, b.mask, _samples(b))
            for b in self._batches[: max(self._own, 1)]
        ]
        self._whole = self._summed(zeroed(parts[0]) if self.blank else merged(parts))

    def _alike(self) -> bool:
        """Whether the targets of all micro-batches have one shape beside the batch axis."""
        shapes = [[tuple(y.shape[1:]) for y in leaves(batch.y)] for batch in self._batches]
        return all(shape == shapes[0] for shape in shapes)

    def _pull(self, batch: Batch, outputs: Any) -> None:
        objective, whole = self._objective, self._whole
        if self._like is not None:
            self._check_shapes(batch, outputs)
        by: By = batch.groups if self._by == "group" else self._by
        checked = self._checked or self.replaying
        found = objective.backprop(batch.y, outputs, batch.sample_weight, batch.mask, by, checked, whole)
        if self.replaying:
            self._compare(found.tallies, outputs)
        penalties = self._penalties if self._position == 0 and not self._ranks else ()
        if not propagate(found, penalties):
            raise InputError(NO_GRADIENT)
        self._dtype = functools.reduce(torch.promote_types, (g.dtype for g in found.gradients), torch.float32)
        self.tallies = merged([self.tallies, numbered(found.tallies, sum(self._sizes[: self._position]))])

    def _check_shapes(self, batch: Batch, outputs: Any) -> None:
        """The outputs have the shape that the divisors were counted for."""
        objective = self._objective
        here = objective.split(map_structure(_outline, unpacked(outputs)[0]), "y_pred")
        known = objective.split(self._like, "y_pred")
        for plan in objective.terms:
            now, then = here[plan.output].shape[1:], known[plan.output].shape[1:]
            if now == then:
                continue
            size = self._sizes[self._position]
            ways = [
                objective.divisors(batch.y, like, batch.sample_weight, batch.mask, size)[plan.name]
                for like in (self._like, outputs)
            ]
            known_alike = all(isinstance(t.divisor, int) for t in ways)
            if not known_alike or (ways[0].divisor, ways[0].offset) != (ways[1].divisor, ways[1].offset):
                raise InputError(
                    f"{plan.name}: expected outputs {tuple(then)} beside the batch axis, as in the first micro-batch, "
                    f"whose targets have the same shape; received {tuple(now)} in micro-batch {self._position}. "
                    "Pad the outputs of a window to one shape, or give a mask with window.backward(outputs, mask=…)."
                )

    def _carried(self, outputs: Any) -> Any:
        """The masks that layers left on the outputs, as `mask` takes them."""
        preds = self._objective.split(unpacked(outputs)[0], "y_pred")
        found = {name: mask for name, pred in preds.items() if (mask := carried_mask(pred)) is not None}
        return found.get("") if self._objective.structure == "one" else found or None

    def _joined(self, mask: Any, other: Any) -> Any:
        """The mask of the data and the mask of the model, by output."""
        if other is None or mask is None:
            return mask if other is None else other
        split = self._objective.split_optional
        mine, theirs = split(mask, "mask"), split(other, "mask")
        found = {**mine, **theirs} | {n: both(mine[n], theirs[n], "mask") for n in mine if n in theirs}
        return found[""] if self._objective.structure == "one" else found

    # --- sums --------------------------------------------------------------------------------------------------

    def _summed(self, tallies: Mapping[str, Tally]) -> Whole | None:
        """What divides in the whole window, over all processes."""
        found = next(leaves(self._batches[0].y), None) if self._batches else None
        device = torch.device("cpu") if found is None else found.device
        if found is None and self.net is not None:
            device = next((p.device for p in self.net.parameters()), device)
        return summed(self.share, tallies, sum(self._sizes), device, self._lockstep)

    def _compare(self, second: Mapping[str, Tally], outputs: Any) -> None:
        """Note whether the second round differs from the first; nothing is read."""
        first = self._first[self._position]
        preds = self._objective.split(unpacked(outputs)[0], "y_pred")
        for plan in self._objective.terms:
            before, after = first[plan.name], second[plan.name]
            # What kernels may differ by, and far less than another dropout mask makes.
            slack = torch.finfo(preds[plan.output].dtype).eps ** 0.5
            scale = abs(before.numerator) + abs(before.divisor)
            gap = abs(after.numerator - before.numerator) + abs(after.divisor - before.divisor)
            found = torch.as_tensor(gap > slack * scale).any()
            self.differs = found if self.differs is None else self.differs | found

    # --- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The loop is over: check that it went to its end, and add up the gradients.

        Raises:
            InputError: a loop that was left early, or an auxiliary loss that some micro-batches did not have.
        """
        if not self._done and not self._finished():
            raise InputError(
                f"window: the loop was left at micro-batch {self._position} of {len(self._batches)}"
                f"{', in its first round' if self.counting else ''}; expected it to run to its end. Loop over the "
                "window: for batch in window: window.backward(net(batch.x))."
            )
        samples = sum(self._sizes)
        for name, tally in self.tallies.items():
            if self._objective.role(name) == "auxiliary" and tally.count != samples:
                raise InputError(
                    f"auxiliary loss {name!r}: expected it in every micro-batch of the window, received it for "
                    f"{tally.count} of {samples} samples. Add it in every forward, 0 where there is none."
                )
        if self._ranks:
            self._sum_over_ranks()
        self._gradients.add()

    def _sum_over_ranks(self) -> None:
        """The gradients of all ranks; what enters once a window comes after the sum, on every rank alike."""
        assert self.net is not None
        sum_gradients(self.share.group, self.net)
        found = Backprop({}, [], [])
        # Apart from those of the data, beside which they may have to be divided first.
        data = Gradients(modules_of(self.net))
        propagate(found, self._penalties)
        place_gradients(self.net)
        data.add()
        if self.share.leads:
            self.tallies |= found.tallies

    def _finished(self) -> bool:
        """Whether the last micro-batch was back-propagated, by a loop that did not ask for one more."""
        return not (self.counting or self._waiting) and self._position == len(self._batches) - 1 and bool(self.tallies)

    def undo(self) -> None:
        """Leave gradients and running statistics as they were before the window."""
        self._gradients.put_back()
        self._replay.statistics()

    def leave(self) -> None:
        """End the loop, so that the mode of gradients is that of the caller again."""
        self._rounds.close()  # type: ignore[attr-defined]

    @property
    def breakdown(self) -> Breakdown:
        """The terms of the window, detached; over several ranks, to be asked for on every one of them.

        Raises:
            InputError: the window is not complete.
        """
        if not self._done and not self._finished():
            raise InputError("window.breakdown: expected a complete window; it is known after the loop.")
        objective, tallies = self._objective, of_all(self.share, self.tallies, sum(self._sizes))
        first = [t.name for t in objective.terms] + [p.name for p in objective.penalties]
        names = [*first, *(name for name in tallies if name not in first)]
        return Breakdown.of(
            {n: Term(n, objective.role(n), objective.coefficient(n), tallies[n], _dtype=self._dtype) for n in names}
        )


@contextlib.contextmanager
def running(window: Window) -> Iterator[Window]:
    """The window while its loop runs; when something fails it leaves no half of itself behind."""
    with sharing_fate(window.share.group), summing(window.net):
        try:
            try:
                yield window
            finally:
                window.leave()
            window.close()
        except BaseException:
            window.undo()
            raise


@contextlib.contextmanager
def opened(
    objective: Objective,
    batches: Iterable[Any],
    model: nn.Module | None,
    by: str | None = "class",
    process_group: Any = None,
) -> Iterator[Window]:
    """A window over what a caller gives; see `Objective.window`."""
    parameter = None if model is None else next((p for p in model.parameters() if p.is_floating_point()), None)
    found = [_converted(batch, parameter) for batch in as_batches(batches)]
    if model is not None:
        at_rest(model)
    group = joined(process_group, None if parameter is None else parameter.device)
    share = Share.agreed(group, len(found))
    if not any(share.counts):
        raise EmptyDataError("window: expected at least one micro-batch, received none. Leave out steps without data.")
    # To look at the values of targets on a device is to wait for it.
    checked = parameter is not None and parameter.device.type != "cpu"
    with running(Window(objective, found, model, objective.bound(model), by, checked, share=share)) as window:
        yield window
        window.leave()
        if window.differs is not None:
            check_replay(window.differs)


def check_replay(differs: Tensor) -> None:
    """The second round was the first again; reads a value.

    Raises:
        ReplayError: it was not.
    """
    if bool(differs):
        raise ReplayError(
            "window: the second round gives other statistics than the first, so its gradient would be wrong; expected "
            "the same outputs for the same weights, data and random state of torch. Look for randomness from NumPy, "
            "Python or a generator of your own, for state that the forward changes (pass the model to the window), and "
            "for an optimizer step inside the loop."
        )


def _converted(batch: Batch, parameter: Tensor | None) -> Batch:
    """Arrays as tensors, in the dtype and on the device of the model; inputs of other kinds are its own business."""
    dtype = torch.get_default_dtype() if parameter is None else parameter.dtype

    def convert(what: str) -> Any:
        return lambda value: to_tensor(value, what, dtype)

    def convert_input(value: Any) -> Any:
        return to_tensor(value, "x", dtype) if hasattr(value, "__array__") else value

    tensors = Batch(
        map_structure(convert_input, batch.x),
        map_structure(convert("y"), batch.y),
        map_structure(convert("sample_weight"), batch.sample_weight),
        map_structure(convert("mask"), batch.mask),
        map_structure(convert("groups"), batch.groups),
        batch.ids,
    )
    return tensors if parameter is None else to_device(tensors, parameter.device)


def _samples(batch: Batch) -> int:
    """Number of samples of a batch, by its targets: inputs may be anything."""
    first = next(leaves(batch.y), None)
    if first is None or first.ndim == 0:
        raise InputError("window: expected targets with the samples on the first axis, received none. Pass (x, y).")
    return int(first.shape[0])


def _likely_ratio(objective: Objective, batch: Batch) -> bool:
    """Whether a ratio is to be expected, judged by the axes of the targets; the first outputs decide."""
    trues = objective.split(batch.y, "y_true", frozenset(plan.output for plan in objective.terms))
    ranks = {plan.name: trues[plan.output].ndim for plan in objective.terms}
    try:
        return objective.is_ratio(ranks)
    except InputError:
        # Targets of fewer axes than the outputs: an axis of the loss does not exist in them.
        return False


def _outline(value: Any) -> Any:
    """A tensor of the same shape, without memory."""
    return value.detach().new_empty(()).expand(value.shape) if isinstance(value, Tensor) else value
