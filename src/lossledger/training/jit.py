"""`compile(jit=True)`: which steps run as one compiled program, and which as they are, with the reason."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils import _pytree as pytree

from lossledger.batch import Batch
from lossledger.distributed import Share
from lossledger.errors import InputError
from lossledger.forward import run_forward
from lossledger.training import updates
from lossledger.training.data import ArrayData, Data
from lossledger.training.gap import undisturbed
from lossledger.training.packed import Packed, UnfitError
from lossledger.training.step import Observe, StepPlan, StepResult

if TYPE_CHECKING:
    from lossledger.training.program import Layout, Program

# A program for each size and structure of batches; beyond so many, further ones run as they are.
MOST_PROGRAMS = 8
# Class weights make another objective; programs of the last ones are kept.
MOST_OBJECTIVES = 3
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """What the steps of a pass have in common.

    Args:
        data: of the pass; `None` for a single batch.
        batch_size: samples of a batch of arrays.
        steps: batches of the pass, if not all.
        windows: whether steps may be of several batches or ranks.
        observed: whether the outputs of every step are asked for.
        packs: whether the sums of steps may stay in rows: nobody asks for those of single steps.
        say: takes a line for the user.
    """

    data: Data | None = None
    batch_size: int = 0
    steps: int | None = None
    windows: bool = False
    observed: bool = False
    packs: bool = False
    say: Callable[[str], object] = str


@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """The tensors that steps read and change, as they are now.

    Args:
        layout: which is which.
        tensors: the tensors; those of the module without their graph.
        numbers: those of the optimizer, in the tensor of numbers.
        kind: what a program depends on beside the batch.
    """

    layout: Layout
    tensors: tuple[Tensor, ...]
    numbers: Tensor
    kind: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """How batches of one kind run.

    Args:
        program: the program; `None` where they run as they are.
        size: samples that the program takes, `None` if it takes batches as they are.
        every: marks all samples of a batch as there, if the program asks which are.
    """

    program: Program | None
    size: int | None = None
    every: Tensor | None = None


_AS_IT_IS = _Choice(None)


class Jit:
    """The compiled steps of one model.

    Args:
        reason: why there are none, if that is known from the start.
    """

    def __init__(self, reason: str | None = None) -> None:
        self._reason = reason
        self._told: set[str] = set()
        self._programs: dict[tuple[Any, ...], Program | None] = {}
        self._bound: _Bound | None = None
        self._read: Callable[[dict[str, Any]], tuple[Any, ...]] = operator.itemgetter("lr")
        self._written: list[tuple[Any, ...]] | None = None
        self._counts: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._last: tuple[Any, ...] | None = None
        self._choice = _AS_IT_IS
        self._sizes: tuple[int, ...] = ()
        self._course = Course()

    def __reduce__(self) -> tuple[Any, ...]:
        # Programs belong to the tensors of one model: a copy makes its own.
        return Jit, (self._reason,)

    def begin(self, plan: StepPlan, course: Course) -> None:
        """A pass begins: what the last one knew of weights and optimizer may have changed.

        Raises:
            InputError: arrays whose last batch is smaller, in a model with batch norm.
        """
        self._bound, self._last, self._course, self._sizes = None, None, course, ()
        data, size = course.data, course.batch_size
        if self._reason is None and isinstance(data, ArrayData) and not course.windows:
            rest = data.length % size
            if rest and data.length > size and (course.steps is None or course.steps * size > data.length):
                _check_padding(plan.net, rest, size)
                self._sizes = (size, rest)

    def step(
        self,
        plan: StepPlan,
        batches: Sequence[Batch],
        by: str | None,
        checked: bool,
        observe: Observe | None,
        share: Share,
    ) -> StepResult | None:
        """The step by a program; `None` where it has to run as it is.

        Raises:
            InputError: a smaller batch in a model with batch norm; targets that do not fit the loss.
        """
        if self._reason is not None or self._course.windows or len(batches) != 1 or share.group.size > 1:
            self._tell(self._reason or "a step of several batches or ranks is a window")
            return None
        if self._bound is None and not self._bind(plan):
            return None
        values = list(map(self._read, plan.optimizer.param_groups))
        if values != self._written and not self._write(plan, values):
            return None
        bound, batch, course = self._bound, batches[0], self._course
        assert bound is not None
        x, y = batch.x, batch.y
        if type(x) is Tensor and type(y) is Tensor and batch.sample_weight is None and batch.mask is None:
            leaves: list[Tensor] = [x, y]
            seen: Any = (x.shape, x.stride(), x.dtype, y.shape, y.stride(), y.dtype)
        else:
            leaves, seen = _flattened(batch)
        key = (plan.objective, by, seen)
        if key != self._last:
            self._choice, self._last = self._chosen(plan, bound, key, batch), key
        program = self._choice.program
        if program is None:
            return None
        if not checked:
            plan.objective.check_data(batch.y, program.likes, batch.sample_weight, batch.mask, batch.size)
        if self._choice.every is not None:
            leaves = _filled(leaves, batch, self._choice)
        if observe is not None and not course.observed:
            _show(plan, batch, observe)
        row, *rest = program.call([*bound.tensors, *leaves])
        if observe is not None and course.observed:
            observe(batch, program.outputs(rest, batch.size))
        bad, sums = rest[0] if program.gated else None, Packed(program.forms, row)
        return StepResult({}, bad, None, sums) if course.packs else StepResult(sums.tallies(), bad)

    # --- programs ----------------------------------------------------------------------------------------------

    def _chosen(self, plan: StepPlan, bound: _Bound, key: tuple[Any, ...], batch: Batch) -> _Choice:
        """How a batch runs, compiled if need be."""
        if key[-1] is None:
            self._tell("batches hold other things than tensors")
            return _AS_IT_IS
        size = batch.size
        whole = max(self._sizes, default=size)
        if self._course.data is not None and size <= whole and (len(self._sizes) > 1 or size < whole):
            if size < whole:
                _check_padding(plan.net, size, whole)
            program = self._program(plan, bound, key, batch, whole)
            if program is not None:
                every = torch.ones(whole, dtype=torch.bool, device=bound.tensors[0].device)
                return _Choice(program, whole, every)
            if size < whole:
                return _AS_IT_IS
        self._sizes = self._sizes or (size,)
        return _Choice(self._program(plan, bound, key, batch, None))

    def _program(
        self, plan: StepPlan, bound: _Bound, key: tuple[Any, ...], batch: Batch, size: int | None
    ) -> Program | None:
        from lossledger.training import program

        if size is not None and batch.size < size:
            batch = program.filled(batch, size)
        objective, by, _ = key
        observed, padded = self._course.observed, size is not None
        made_of = (objective, by, observed, _flattened(batch)[1], padded, bound.kind)
        if made_of in self._programs:
            return self._programs[made_of]
        objectives = list(dict.fromkeys(known[0] for known in self._programs))
        if [known[0] for known in self._programs].count(objective) >= MOST_PROGRAMS:
            self._tell(f"there are programs for {MOST_PROGRAMS} kinds of batches already")
            return None
        if objective not in objectives and len(objectives) >= MOST_OBJECTIVES:
            self._programs = {known: p for known, p in self._programs.items() if known[0] is not objectives[0]}
        self._course.say("compiling the training step, which takes some seconds to a minute …")
        found = None
        try:
            groups = None if by is None else str(by)
            found = program.made(plan, bound.layout, bound.tensors, batch, groups, padded, observed)
        except UnfitError as error:
            self._tell(str(error), "batches that are smaller than others" if padded else "steps")
        self._programs[made_of] = found
        return found

    def _tell(self, reason: str, what: str = "steps") -> None:
        """Say once why steps run as they are."""
        if reason in self._told:
            return
        self._told.add(reason)
        warnings.warn(
            f"compile(jit=True): {what} run without compilation, since {reason}. Results are the same.", stacklevel=2
        )

    # --- tensors -----------------------------------------------------------------------------------------------

    def _write(self, plan: StepPlan, values: list[tuple[Any, ...]]) -> bool:
        """Tell programs the numbers of the optimizer; one that comes to be 0, or no longer is, may ask for another."""
        assert self._bound is not None
        rules = tuple(updates.rule_of(plan.optimizer, group) for group in plan.optimizer.param_groups)
        if rules != self._bound.layout.rules and not self._bind(plan):
            return False
        rows = torch.tensor([updates.flat_numbers(row) for row in values], dtype=torch.float64)
        self._bound.numbers.copy_(rows, non_blocking=True)
        self._written = values
        return True

    def _bind(self, plan: StepPlan) -> bool:
        """Find the tensors that steps change; not before the optimizer has made its state, in a step as it is."""
        optimizer = plan.optimizer
        self._bound = self._last = None
        try:
            _check(plan)
            found = _tensors(plan, self._counts)
        except UnfitError as error:
            self._reason = str(error)
            self._tell(self._reason)
            return False
        if found is None:
            return False
        if "step" in vars(optimizer):
            # torch's schedulers ask whether there was a step.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        layout, tensors, fresh = found
        if fresh and plan.gate is not None:
            plan.gate.forget()
        names = updates.names_of_numbers(optimizer)
        assert names is not None
        self._read, self._written = operator.itemgetter(*names), None
        modes = tuple(module.training for module in plan.net.modules())
        metas = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        kind = (layout.names, layout.trained, layout.entries, layout.rules, layout.even, modes, metas)
        self._bound = _Bound(layout, tuple(tensors), tensors[layout.numbers], kind)
        return True


def _flattened(batch: Batch) -> tuple[list[Tensor], Any]:
    """The tensors of a batch, and their structure and shapes; `None` in the place of those if it holds other things."""
    leaves, structure = pytree.tree_flatten((batch.x, batch.y, batch.sample_weight, batch.mask))
    if any(leaf is not None and not isinstance(leaf, Tensor) for leaf in leaves):
        return [], None
    seen = tuple(None if leaf is None else (leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves)
    return [leaf for leaf in leaves if leaf is not None], (str(structure), seen)


def _filled(leaves: list[Tensor], batch: Batch, choice: _Choice) -> list[Tensor]:
    """The tensors of a batch, filled up to the size of the program, and which samples are there."""
    from lossledger.training import program

    assert choice.size is not None and choice.every is not None
    size = batch.size
    if size == choice.size:
        return [*leaves, choice.every]
    there = choice.every.clone()
    there[size:] = False
    return [*_flattened(program.filled(batch, choice.size))[0], there]


def _show(plan: StepPlan, batch: Batch, observe: Observe) -> None:
    """Show a batch whose outputs the program does not give: checks, and callbacks, look at few of them."""
    device = plan.parameters[0].device
    with undisturbed(plan.net, device), torch.no_grad():
        outputs = run_forward(plan.forward, batch.x, plan.autocast, device.type)
    observe(batch, outputs)


def _check_padding(net: nn.Module, size: int, whole: int) -> None:
    """Samples that are not there must reach nothing.

    Raises:
        InputError: a module that normalizes over the samples of the batch.
    """
    kind: Any = nn.modules.batchnorm._BatchNorm
    for name, module in net.named_modules():
        if isinstance(module, kind) and module.training:
            raise InputError(
                f"compile(jit=True): {name!r} normalizes over the samples of a batch, so a batch of {size} cannot be "
                f"filled up to the {whole} of the compiled step; expected batches of one size, received a smaller one. "
                "Choose a batch_size that divides the samples, drop the last batch (steps_per_epoch, or drop_last in a "
                "DataLoader), put the normalization into eval mode, or compile with jit=False."
            )


def _check(plan: StepPlan) -> None:
    """Nothing is known to be in the way of one compiled program.

    Raises:
        UnfitError: something is.
    """
    optimizer: Any = plan.optimizer
    if plan.objective.reproducible:
        raise UnfitError("reproducible totals are made from a grid")
    if updates.names_of_numbers(optimizer) is None:
        raise UnfitError(f"{type(optimizer).__name__} is none of the optimizers {list(updates.supported())} of torch")
    for group in optimizer.param_groups:
        if any(isinstance(v, Tensor) for v in (group["lr"], *group.get("betas", ()))) or group.get("differentiable"):
            raise UnfitError("the optimizer has tensors as rates, or is differentiable")
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    if any(hooks) or ("step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched")):
        raise UnfitError("the optimizer has hooks, or a step of somebody else")
    if any(isinstance(module, nn.RNNBase) for module in plan.net.modules()):
        raise UnfitError("recurrent layers of torch have kernels that cannot be traced")
    for term in plan.objective.terms:
        if term.loss.reaches:
            raise UnfitError(f"the loss {term.name!r} reads parameters itself")
    parameters = list(plan.net.parameters())
    if len({p.device for p in parameters}) > 1 or parameters[0].device.type not in _DEVICES:
        raise UnfitError(f"the parameters are not all on one device of the kinds {list(_DEVICES)}")
    if any(type(p) is not nn.Parameter for p in parameters):
        raise UnfitError("parameters are of a kind of their own")
    kept = (v for p in parameters for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor))
    if any(value.device != parameters[0].device for value in kept):
        raise UnfitError(
            f"{type(optimizer).__name__} keeps state on another device than that of the parameters (one made with "
            "fused=True or capturable=True does not)"
        )


def _tensors(
    plan: StepPlan, packed: dict[int, tuple[Tensor, list[Tensor]]]
) -> tuple[Layout, list[Tensor], bool] | None:
    """What a step changes, in one list, and whether counts of steps were put into new tensors.

    Counts of steps become parts of one tensor a group, since a program would need an operation for each otherwise.
    `None` before the optimizer has made its state.
    """
    from lossledger.training.program import Entry, Layout

    optimizer = plan.optimizer
    named = dict(plan.net.named_parameters())
    buffers = dict(plan.net.named_buffers())
    trained = {id(p) for p in plan.parameters}
    place_of = {id(p): place for place, p in enumerate(named.values())}
    tensors = [t.detach() for t in (*named.values(), *buffers.values())]
    entries, rules, counts, even = [], [], [], []
    fresh = ready = False
    for number, group in enumerate(optimizer.param_groups):
        rule = updates.rule_of(optimizer, group)
        steps: list[Tensor] = []
        holders: list[dict[str, Any]] = []
        for parameter in group["params"]:
            if id(parameter) not in place_of:
                continue
            state = optimizer.state.get(parameter, {})
            slots = [state.get(slot) for slot in rule.slots]
            has = all(isinstance(slot, Tensor) for slot in slots) and (not rule.counts or "step" in state)
            ready = ready or has
            places = tuple(range(len(tensors), len(tensors) + len(slots))) if has else ()
            tensors += [slot for slot in slots if slot is not None] if has else []
            count = None
            if has and rule.counts:
                count = len(steps)
                steps.append(state["step"])
                holders.append(state)
            entries.append(Entry(place_of[id(parameter)], number, places, count))
        rules.append(rule)
        counts.append(len(tensors) if steps else None)
        even.append(True)
        if steps:
            vector, parts = packed.get(number, (None, []))
            if len(parts) != len(steps) or any(a is not b for a, b in zip(parts, steps, strict=True)):
                vector = torch.stack(steps)
                parts = list(vector.unbind())
                for state, part in zip(holders, parts, strict=True):
                    state["step"] = part
                packed[number], fresh = (vector, parts), True
            assert vector is not None
            tensors.append(vector)
            even[-1] = bool((vector == vector[0]).all())
    if not ready:
        return None
    numbers = updates.names_of_numbers(optimizer)
    assert numbers is not None
    width = len(updates.flat_numbers(tuple(optimizer.param_groups[0][name] for name in numbers)))
    tensors.append(torch.zeros(len(rules), width, dtype=torch.float64, device=tensors[0].device))
    layout = Layout(
        tuple([*named, *buffers]),
        tuple(place for place, p in enumerate(named.values()) if id(p) in trained),
        tuple(range(len(named), len(named) + len(buffers))),
        tuple(entries),
        tuple(rules),
        tuple(counts),
        tuple(even),
        len(tensors) - 1,
    )
    return layout, tensors, fresh
