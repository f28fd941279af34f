"""The objective: what a batch goes through, by the plan.

A term is λ × value, and the total is the sum of the contributions from left to right: data terms, regularizers,
auxiliary losses.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lossledger.errors import EmptyDataError, InputError, LossledgerError, UnknownNameError
from lossledger.losses.aligned import Aligned, detached
from lossledger.losses.loss import By
from lossledger.losses.parts import check_part
from lossledger.losses.reproducible import check_reproducible, reproducible_tally
from lossledger.objective import plan as planning
from lossledger.objective import structure
from lossledger.objective.auxiliary import auxiliary_tally, unpacked
from lossledger.objective.breakdown import Backprop, Breakdown, Term, Whole
from lossledger.objective.plan import Penalty, TermPlan
from lossledger.tally import Tally
from lossledger.weighting import ClassWeight, carried_mask, class_vector

if TYPE_CHECKING:
    from lossledger.window import Window

# Elements whose targets are checked together: bounds the memory of the check, and its calls where samples are small.
CHECKED_AT_ONCE = 2**22


class Objective:
    """What training minimizes: a named sum of terms.

    Args:
        loss: one loss (name, `Loss`, expression, function, torch loss), a list by output, or a dict by output name;
            `None` skips an output.
        loss_weights: λ: a number, or by output name, in a list by output, or by auxiliary name; a missing one is 1.
        regularizers: by pattern of parameter names (`fnmatch`), for example `{"*.weight": "l2"}`.
        class_weight: by class, for one output; or by output name, then by class.
        output_names: names of the outputs when `loss` is a list; `output_0`, … if not given.
        class_names: names of the classes, in order, for `class_weight` by name.
        reproducible: totals that have the same bits for any split of the data and any number of ranks, given the same
            predictions; see docs/windows.md.

    Raises:
        UnknownNameError: a loss, output, class or pattern that does not exist.
        InputError: two terms of one name, or lists of other lengths than the outputs; reproducible totals of a loss
            that compares the samples of a batch.

    Example:
        >>> import lossledger as ll, torch
        >>> objective = ll.Objective({"price": "mse", "volume": "mae"}, loss_weights={"volume": 0.5})
        >>> y_true = {"price": torch.zeros(2, 1), "volume": torch.zeros(2, 1)}
        >>> y_pred = {"price": torch.ones(2, 1), "volume": torch.ones(2, 1)}
        >>> b = objective(y_true, y_pred)
        >>> b.value, float(b.terms["volume/mean_absolute_error"].contribution)
        (1.5, 0.5)
    """

    def __init__(
        self,
        loss: Any,
        loss_weights: Any = None,
        regularizers: Mapping[str, Any] | None = None,
        class_weight: Any = None,
        output_names: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        reproducible: bool = False,
    ) -> None:
        self.class_names = planning.class_names(class_names)
        by_output, self.structure = planning.by_output(loss, output_names)
        self.outputs = tuple(by_output)
        weights, self._auxiliary_weights = planning.loss_weights(loss_weights, self.outputs, self.structure)
        classes = planning.class_weights(class_weight, self.outputs, self.structure)
        self.terms = planning.terms(by_output, weights, classes, self.structure, self.class_names)
        self._vectors: dict[tuple[str, int, torch.device], Tensor] = {}
        self.penalties = planning.penalties(regularizers)
        self.reproducible = reproducible
        if reproducible:
            for plan in self.terms:
                check_reproducible(plan.loss, plan.name)
        if not self.terms:
            raise EmptyDataError("The objective has no term: every output has the loss None. Give at least one a loss.")

    # --- a call, with autograd --------------------------------------------------------------------------------

    def __call__(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None, model: nn.Module | None = None
    ) -> Breakdown:
        """The breakdown of a batch, differentiable.

        Args:
            y_true: targets, in the structure of the outputs.
            y_pred: what the model returned.
            sample_weight: for all outputs, or by output.
            mask: for all outputs, or by output.
            model: holds the parameters that the regularizers read.
        """
        batches, auxiliary, samples = self.align(y_true, y_pred, sample_weight, mask)
        self._check_auxiliary_weights(auxiliary)
        terms: dict[str, Term] = {}
        for plan, batch in zip(self.terms, batches, strict=True):
            tally = plan.loss.tally_aligned(batch)
            terms[plan.name] = Term(
                plan.name, "data", plan.coefficient, tally, plan.loss, batch, batch.prediction.raw.dtype
            )
        for penalty in self.bound(model):
            terms[penalty.name] = Term(penalty.name, "regularizer", 1.0, penalty.tally())
        for name, value in auxiliary.items():
            terms[name] = Term(name, "auxiliary", self.auxiliary_weight(name), auxiliary_tally(name, value, samples))
        return Breakdown.of(terms)

    # --- a window of micro-batches -----------------------------------------------------------------------------

    def step(
        self, batches: Iterable[Any], net: nn.Module, by: str | None = "class", process_group: Any = None
    ) -> Breakdown:
        """Forward and backward of a whole accumulation window: the gradient of one big batch.

        Gradients are added to `.grad`, as `backward` does; the optimizer is yours.

        Args:
            batches: `Batch`es, `(x, y)` or `(x, y, sample_weight)`, of any sizes.
            net: the model; its inputs go as in `Model`: a dict by keyword, a tuple by position.
            by: groups of the breakdown, see `window`.
            process_group: see `window`.

        Returns:
            the breakdown of the window, detached.

        Raises:
            InputError: as `window`.

        Example:
            >>> import lossledger as ll, torch
            >>> net = torch.nn.Linear(1, 1)
            >>> x, y = torch.ones(3, 1), torch.ones(3, 1)
            >>> b = ll.Objective("mse").step([(x[:1], y[:1]), (x[1:], y[1:])], net)
            >>> bool(torch.isclose(b.total, (net(x) - y).square().mean()))
            True
        """
        # Rooms above this one are entered when somebody asks for a window.
        unwrapped = importlib.import_module("lossledger.distributed").unwrapped
        call = importlib.import_module("lossledger.integrations").forward_of(unwrapped(net)).call
        with self.window(batches, net, by, process_group) as window:
            for batch in window:
                window.backward(call(batch.x))
        return window.breakdown

    def window(
        self,
        batches: Iterable[Any],
        model: nn.Module | None = None,
        by: str | None = "class",
        process_group: Any = None,
    ) -> AbstractContextManager[Window]:
        """The open form of `step`: a window of micro-batches whose gradient is that of one big batch.

        Loop over it and call `window.backward(outputs)` once for each micro-batch. Where the loss needs statistics of
        the whole window first (ratios over the batch, masks that only the model knows) the loop goes round twice:
        first without gradients, then, with `window.replaying` set, with them.

        Args:
            batches: `Batch`es, `(x, y)` or `(x, y, sample_weight)`, of any sizes.
            model: its regularized parameters are read, its running statistics are updated once, and its gradients are
                put back when something fails. Not needed for plain modules without regularizers.
            by: groups of the breakdown: `"class"`, `"sample"`, `"column"`, `"label"`, `"group"` (the ids that the
                batches carry) or `None`.
            process_group: the ranks that share the window, where torch.distributed runs: each gives micro-batches of
                its own, any number of them, or none. A process group or a mesh of one dimension; all ranks if `None`.

        Raises:
            EmptyDataError: no batch.
            InputError: a loss whose parts do not add up (pairs of samples, an undeclared scalar), in more than one
                micro-batch; a loop that was left early.
            ReplayError: the second round is not the first again.

        Example:
            >>> import lossledger as ll, torch
            >>> net, dice = torch.nn.Linear(1, 1), ll.losses.Dice(from_logits="sigmoid")
            >>> x, y = torch.ones(3, 1), torch.ones(3, 1)
            >>> with ll.Objective(dice).window([(x[:1], y[:1]), (x[1:], y[1:])], net) as window:
            ...     for batch in window:
            ...         window.backward(net(batch.x))
            >>> bool(torch.isclose(window.breakdown.total, dice(y, net(x))))
            True
        """
        return importlib.import_module("lossledger.window").opened(self, batches, model, by, process_group)  # type: ignore[no-any-return]

    def align(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None, checked: bool = False
    ) -> tuple[list[Aligned], dict[str, Tensor], int]:
        """Aligned batches, one a term, with the auxiliary losses and the number of samples."""
        outputs, auxiliary = unpacked(y_pred)
        self._check_auxiliary(auxiliary)
        batches = self._align(y_true, self.split(outputs, "y_pred"), sample_weight, mask, checked)
        return batches, auxiliary, _samples(batches)

    def _align(
        self, y_true: Any, preds: Mapping[str, Any], sample_weight: Any, mask: Any, checked: bool
    ) -> list[Aligned]:
        trues = self.split(y_true, "y_true", required=frozenset(plan.output for plan in self.terms))
        weights = self.split_optional(sample_weight, "sample_weight")
        masks = self.split_optional(mask, "mask")
        batches: list[Aligned] = []
        for plan in self.terms:
            key = plan.output
            classes = self._class_weight(plan, preds[key])
            batch = plan.loss.align(
                trues[key], preds[key], weights.get(key), masks.get(key), classes, plan.name, checked
            )
            batches.append(planning.shared(batch, batches))
        return batches

    def _class_weight(self, plan: TermPlan, y_pred: Any) -> ClassWeight | None:
        """The class weights of a term as a vector, made and checked once for each number of classes."""
        if plan.class_weight is None or not isinstance(y_pred, Tensor):
            return plan.class_weight
        key = (plan.name, plan.loss.class_count(y_pred, plan.class_weight), y_pred.device)
        if key not in self._vectors and plan.loss.classes_are in ("column", "label"):
            vector = class_vector(plan.class_weight, key[1], where=plan.name)
            self._vectors[key] = vector.to(key[2], non_blocking=True)
        return self._vectors.get(key, plan.class_weight)

    # --- the step: closed forms, gradient of the window -------------------------------------------------------

    def backprop(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        mask: Any = None,
        by: By = "class",
        checked: bool = True,
        whole: Whole | None = None,
    ) -> Backprop:
        """Tallies and gradients of a batch: a whole window, or a part of one.

        Args:
            y_true: targets.
            y_pred: what the model returned, attached to its graph.
            sample_weight: as in a call.
            mask: as in a call.
            by: groups of the tallies, for terms that have them.
            checked: values were checked at the data boundary, and are not read here.
            whole: what divides in the window that the batch is a part of; `None`: the batch is the window.
        """
        outputs, auxiliary = unpacked(y_pred)
        self._check_auxiliary(auxiliary)
        self._check_auxiliary_weights(auxiliary)
        preds = self.split(outputs, "y_pred")
        leaves = {name: detached(pred) for name, pred in preds.items()}
        batches = self._align(y_true, leaves, sample_weight, mask, checked)
        tallies: dict[str, Tally] = {}
        gradients: dict[str, Tensor] = {}
        for plan, batch in zip(self.terms, batches, strict=True):
            groups = None if plan.loss.classes_are is None and by == "class" else by
            window = None if whole is None else whole.tallies[plan.name]
            tally, gradient = plan.loss.backprop_aligned(batch, window, plan.coefficient, groups)
            tallies[plan.name] = reproducible_tally(plan.loss, batch, groups) if self.reproducible else tally
            gradient = plan.loss.restore(gradient, preds[plan.output])
            known = gradients.get(plan.output)
            gradients[plan.output] = gradient if known is None else known.add_(gradient)
        roots = [preds[name] for name in gradients]
        pulls = list(gradients.values())
        for name, value in auxiliary.items():
            tally = auxiliary_tally(name, value, _samples(batches))
            tallies[name] = replace(tally, numerator=tally.numerator.detach())
            part = tally if whole is None else replace(tally, divisor=whole.samples)
            roots.append(torch.as_tensor(part.value))
            pulls.append(torch.full_like(roots[-1], self.auxiliary_weight(name)))
        # A frozen output or a constant auxiliary loss has nothing to back-propagate.
        pairs = [(root, pull) for root, pull in zip(roots, pulls, strict=True) if root.requires_grad]
        return Backprop(tallies, [root for root, _ in pairs], [pull for _, pull in pairs])

    def tallies(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        mask: Any = None,
        by: str | None = "class",
        checked: bool = True,
        reported: bool = True,
    ) -> dict[str, Tally]:
        """Tallies of a batch by term, for evaluation; regularizers are not among them.

        Those that nobody reports, but a gradient needs, are the plain ones in any case.
        """
        batches, auxiliary, samples = self.align(y_true, y_pred, sample_weight, mask, checked)
        found: dict[str, Tally] = {}
        for plan, batch in zip(self.terms, batches, strict=True):
            groups = by if plan.loss.classes_are is not None else None
            if self.reproducible and reported:
                found[plan.name] = reproducible_tally(plan.loss, batch, groups)
            else:
                found[plan.name] = plan.loss.tally_aligned(batch, groups)
        for name, value in auxiliary.items():
            found[name] = auxiliary_tally(name, value, samples)
        return found

    def tallies_of(
        self, y_true: Tensor, outline: Tensor, sample_weight: Any, elements: Sequence[Tensor], by: str | None
    ) -> dict[str, Tally]:
        """As `tallies`, of a batch without masks whose elements are known.

        Args:
            y_true: targets, checked.
            outline: an output of that shape, with anything in it.
            sample_weight: as in a call.
            elements: of each term.
            by: groups of the tallies.
        """
        batches, _, _ = self.align(y_true, outline, sample_weight, None, True)
        return {
            plan.name: plan.loss._tally_elements(batch, one, by if plan.loss.classes_are is not None else None)
            for plan, batch, one in zip(self.terms, batches, elements, strict=True)
        }

    def by_sample(self, plan: TermPlan, batch: Aligned) -> Tally:
        """The tally of a term with a row for each sample, for a ratio one for each of its cells."""
        return (reproducible_tally if self.reproducible else type(plan.loss).tally_aligned)(plan.loss, batch, "sample")

    def check_parts(self, batches: Sequence[Aligned]) -> None:
        """Every loss adds up over parts of a window.

        Raises:
            InputError: one that does not, with the reason.
        """
        for plan, batch in zip(self.terms, batches, strict=True):
            check_part(plan.loss, batch)

    def is_ratio(self, ranks: Mapping[str, int]) -> bool:
        """Whether a divisor depends on the predictions, by the number of axes that each term reads."""
        return any(plan.loss.is_ratio(ranks[plan.name]) for plan in self.terms)

    def divisors(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None, samples: int = 0
    ) -> dict[str, Tally]:
        """What divides linear terms in a batch, before the model has run on it.

        Args:
            y_true: targets of the batch.
            y_pred: what the model returned for another one; only shapes and dtypes matter.
            sample_weight: of the batch.
            mask: of the batch.
            samples: number of samples of the batch.
        """
        found = self.split(unpacked(y_pred)[0], "y_pred")
        # One harmless number, repeated without memory.
        like = {
            name: found[name].new_full((), 0.5).expand(samples, *found[name].shape[1:])
            for name in dict.fromkeys(plan.output for plan in self.terms)
        }
        batches = self._align(y_true, like, sample_weight, mask, checked=True)
        return {p.name: p.loss.divisor_aligned(b) for p, b in zip(self.terms, batches, strict=True)}

    def check_data(self, y: Any, preds: Mapping[str, Tensor], sample_weight: Any, mask: Any, length: int) -> None:
        """All targets of a data set, once, against the shape of the outputs of a few samples.

        Args:
            y: targets of the data set.
            preds: by output, what the model returned for a few samples.
            sample_weight: of the data set.
            mask: of the data set.
            length: number of samples.

        Raises:
            InputError: shapes that do not fit, labels out of range, probabilities outside [0, 1].
        """
        trues = self.split(y, "y_true", required=frozenset(plan.output for plan in self.terms))
        weights = self.split_optional(sample_weight, "sample_weight")
        masks = self.split_optional(mask, "mask")
        self._check_class_names(preds)
        for plan in self.terms:
            key = plan.output
            # One prediction, repeated without memory: only its shape matters for the targets.
            shape = preds[key].shape
            # A mask makes the repeated prediction real.
            many = max(1, CHECKED_AT_ONCE // max(1, prod(shape[1:]), prod(trues[key].shape[1:])))
            for start in range(0, length, many):
                stop = min(start + many, length)
                parts = [
                    None if value is None else value[start:stop]
                    for value in (trues[key], weights.get(key), masks.get(key))
                ]
                like = preds[key][:1].detach().cpu().expand(stop - start, *shape[1:])
                if carried_mask(preds[key]) is not None:  # What it will mask is not known: only shapes can be judged.
                    parts[2] = torch.zeros(stop - start, dtype=torch.bool)
                try:
                    plan.loss.align(parts[0], like, parts[1], parts[2], plan.class_weight, plan.name)
                except LossledgerError as error:
                    error.args = (f"{error}{f' Positions count from sample {start}.' if start else ''}",)
                    raise

    def _check_auxiliary(self, auxiliary: Mapping[str, Tensor]) -> None:
        """Names of auxiliary losses are their own: no term, no number of the history has them."""
        if not auxiliary:
            return
        taken = {"loss", "last", *(t.name for t in self.terms), *(p.name for p in self.penalties)}
        for name in auxiliary:
            if name in taken:
                raise InputError(
                    f"auxiliary loss {name!r}: the name is taken; expected one beside {sorted(taken)}. Give it another."
                )

    def _check_auxiliary_weights(self, auxiliary: Mapping[str, Tensor]) -> None:
        """Weights of names that are no output belong to auxiliary losses, and those must be there."""
        unknown = set(self._auxiliary_weights) - set(auxiliary)
        if unknown:
            known = {*(name for name in self.outputs if name), *auxiliary}
            raise UnknownNameError("output or auxiliary loss in loss_weights", min(unknown), known)

    def _check_class_names(self, preds: Mapping[str, Tensor]) -> None:
        """As many names as classes, on one output at least.

        Raises:
            InputError: another number.
        """
        if self.class_names is None:
            return
        shapes = [(t.loss, preds[t.output].shape) for t in self.terms if preds[t.output].ndim > 1]
        lengths = {shape[axis] for loss, shape in shapes for axis in planning.class_axes(loss)}
        if lengths and len(self.class_names) not in lengths:
            raise InputError(
                f"class_names: expected {' or '.join(map(str, sorted(lengths)))} names, as many as the output has "
                f"classes; received {len(self.class_names)}: {list(self.class_names)}."
            )

    # --- the plan ----------------------------------------------------------------------------------------------

    def bound(self, model: nn.Module | Mapping[str, nn.Parameter] | None) -> tuple[Penalty, ...]:
        """The regularizers with the trainable parameters that their patterns name, of a model or by name.

        Raises:
            InputError: there are regularizers, and no model.
            UnknownNameError: a pattern matches no parameter.
        """
        if not self.penalties:
            return ()
        if model is None:
            raise InputError(
                "The objective has regularizers but no model to read parameters from. "
                "Pass it: objective(y_true, y_pred, model=net)."
            )
        named = model if isinstance(model, Mapping) else {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = []
        for plan in self.penalties:
            matched = tuple(p for name, p in named.items() if fnmatch.fnmatchcase(name, plan.pattern))
            if not matched:
                raise UnknownNameError("parameter pattern in regularizers", plan.pattern, named)
            found.append(Penalty(plan.name, plan.regularizer, matched))
        return tuple(found)

    def role(self, name: str) -> str:
        """The role of a term by its name."""
        if any(plan.name == name for plan in self.terms):
            return "data"
        return "regularizer" if any(penalty.name == name for penalty in self.penalties) else "auxiliary"

    def coefficient(self, name: str) -> float:
        """λ of a term by its name."""
        for plan in self.terms:
            if plan.name == name:
                return plan.coefficient
        return 1.0 if self.role(name) == "regularizer" else self.auxiliary_weight(name)

    def group_name(self, index: object, groups: int) -> str:
        """The name of a class where there are as many names as groups, else its index as text."""
        names = self.class_names
        if names is not None and len(names) == groups and isinstance(index, int):
            return names[index]
        return str(index)

    def auxiliary_weight(self, name: str) -> float:
        """λ of an auxiliary loss."""
        return self._auxiliary_weights.get(name, 1.0)

    def split(self, value: Any, what: str, required: frozenset[str] | None = None) -> dict[str, Any]:
        """A value for each output; see `lossledger.objective.structure.split`."""
        return structure.split(value, what, self.outputs, self.structure, required)

    def split_optional(self, value: Any, what: str) -> dict[str, Any]:
        """A weight or mask for each output; a single one is for all of them."""
        return structure.split_optional(value, what, self.outputs, self.structure)


def _samples(batches: list[Aligned]) -> int:
    """Number of samples of a batch."""
    first = batches[0].prediction.raw
    return int(first.shape[0]) if first.ndim else 1
