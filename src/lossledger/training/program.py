"""A training step as one compiled program: traced once from the code of the plain step, then without Python in it.

Tracing runs the plain step on tensors without data and writes down the operations: forward, tallies and gradients in
closed form, backward, gate and update. What the step reads or changes are inputs of the program (weights, buffers, the
batch, state and numbers of the optimizer), so nothing that may change later is part of it.
"""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from lossledger.batch import Batch
from lossledger.forward import run_forward
from lossledger.objective import Objective, Outputs, unpacked
from lossledger.tally import Tally
from lossledger.training import randomness, updates
from lossledger.training.gate import bad_elements
from lossledger.training.packed import Form, UnfitError, packed
from lossledger.training.step import StepPlan
from lossledger.values import not_finite
from lossledger.weighting import both
from lossledger.window import NO_GRADIENT, propagate


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter that the optimizer holds.

    Args:
        place: of the parameter among the tensors of the module.
        group: number of its group.
        state: places of its state among all tensors.
        count: its place in the counts of the group, if it has one.
    """

    place: int
    group: int
    state: tuple[int, ...]
    count: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which of the tensors is what; the batch follows them.

    Args:
        names: of the tensors of the module, which come first.
        trained: places of the trainable parameters.
        buffers: places of the buffers.
        entries: what the optimizer holds.
        rules: by group.
        counts: by group the place of the counts of steps, if any.
        even: by group, whether all counts are the same.
        numbers: place of the numbers of the optimizer, a row a group.
    """

    names: tuple[str, ...]
    trained: tuple[int, ...]
    buffers: tuple[int, ...]
    entries: tuple[Entry, ...]
    rules: tuple[updates.Rule, ...]
    counts: tuple[int | None, ...]
    even: tuple[bool, ...]
    numbers: int


class _Whole(nn.Module):
    """Does work while the tensors of a module are others, for `functional_call`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A compiled step.

    Args:
        call: takes the tensors of the layout and those of a batch, in one list; returns the row of sums, whether the
            step was left out, if it is gated, and the leaves of the outputs, if they were asked for.
        forms: of the tallies.
        structure: of the outputs, `None` if they were not asked for.
        gated: whether steps can be left out.
        likes: by output, a number in the shape of one sample.
    """

    call: Callable[[list[Tensor]], Sequence[Tensor]]
    forms: tuple[Form, ...]
    structure: Any
    gated: bool
    likes: Mapping[str, Tensor]

    def outputs(self, leaves: Sequence[Tensor], size: int) -> Any:
        """The outputs of the samples that are there."""
        parts = leaves[1:] if self.gated else leaves
        cut = [part[:size] if part.ndim else part for part in parts]
        return Outputs(*pytree.tree_unflatten(cut, self.structure))


def made(
    plan: StepPlan,
    layout: Layout,
    tensors: Sequence[Tensor],
    batch: Batch,
    by: str | None,
    padded: bool,
    outputs: bool,
) -> Program:
    """Trace and compile the step of a plan.

    Args:
        plan: of the step.
        layout: of the tensors.
        tensors: those that the program will be called with.
        batch: one of the size and the structure of those to come.
        by: groups of the tallies.
        padded: the last input tells which samples of a batch are there.
        outputs: return the outputs of the model.

    Raises:
        UnfitError: what cannot be traced or compiled, with the reason.
    """
    leaves, structure = pytree.tree_flatten((batch.x, batch.y, batch.sample_weight, batch.mask))
    places = [i for i, leaf in enumerate(leaves) if leaf is not None]
    # Tensors of their own: two inputs that happen to be one now may be two later.
    examples = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in leaves if t is not None
    ]
    if padded:
        examples.append(torch.ones(batch.size, dtype=torch.bool, device=examples[0].device))
    kept: dict[str, Any] = {}
    count = len(tensors)

    def step(*given: Tensor) -> list[Tensor]:
        values: list[Any] = [None] * len(leaves)
        for place, tensor in zip(places, given[count:], strict=False):
            values[place] = tensor
        x, y, weight, mask = pytree.tree_unflatten(values, structure)
        valid = given[-1] if padded else None
        if valid is not None:
            mask = _masked(mask, valid, plan.objective)
        done = _step(plan, layout, given[:count], Batch(x, y, weight, mask), by, valid)
        kept["forms"] = done.forms
        alone, auxiliary = unpacked(done.outputs)
        if padded and auxiliary:
            raise UnfitError("auxiliary losses would count the samples that fill up a smaller batch")
        kept["likes"] = {
            name: (tuple(output.shape[1:]), output.dtype)
            for name, output in plan.objective.split(alone, "y_pred").items()
        }
        found = [done.row] if done.bad is None else [done.row, done.bad]
        if outputs:
            flat, kept["structure"] = pytree.tree_flatten((alone, auxiliary))
            if any(not isinstance(leaf, Tensor) for leaf in flat):
                raise UnfitError("the outputs of the model are not tensors alone, and metrics or samples ask for them")
            found += [leaf.detach() for leaf in flat]
        return found

    inputs = [*tensors, *examples]
    with warnings.catch_warnings(), torch.random.fork_rng(_cuda(tensors)), torch.no_grad():
        warnings.simplefilter("ignore")
        with _attributes_kept(plan.net), _vectors_kept(plan.objective):
            graph = _traced(step, inputs)
        _check_constants(graph, tensors)
        call = _compiled(graph, inputs, [*tensors, *(t for t in leaves if t is not None), *examples[len(places) :]])
    likes = {name: torch.full((1, *shape), 0.5, dtype=dtype) for name, (shape, dtype) in kept["likes"].items()}
    return Program(call, kept["forms"], kept.get("structure"), plan.gate is not None, likes)


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    row: Tensor
    forms: tuple[Form, ...]
    bad: Tensor | None
    outputs: Any


def _step(
    plan: StepPlan,
    layout: Layout,
    tensors: Sequence[Tensor],
    batch: Batch,
    by: str | None,
    valid: Tensor | None,
) -> _Done:
    """What `train_step` does with one batch, on tensors that are given."""
    trained = set(layout.trained)
    named = {
        name: tensor.detach().requires_grad_() if place in trained else tensor
        for place, (name, tensor) in enumerate(zip(layout.names, tensors, strict=False))
    }
    before = {place: tensors[place].clone() for place in layout.buffers if tensors[place].is_floating_point()}

    def work() -> tuple[dict[str, Tally], Any]:
        outputs = run_forward(plan.forward, batch.x, plan.autocast, tensors[0].device.type)
        found = plan.objective.backprop(batch.y, outputs, batch.sample_weight, batch.mask, by, True)
        trainable = {name: named[name] for place, name in enumerate(layout.names) if place in trained}
        if not propagate(found, plan.objective.bound(trainable)):  # type: ignore[arg-type]
            raise UnfitError(NO_GRADIENT)
        for place in layout.buffers:
            name = layout.names[place]
            now = plan.net.get_buffer(name)
            if now is not named[name]:
                tensors[place].copy_(now)
        return found.tallies, outputs

    with torch.enable_grad():
        whole = {f"net.{name}": tensor for name, tensor in named.items()}
        tallies, outputs = torch.func.functional_call(_Whole(plan.net), whole, (work,))
    gradients = {place: named[layout.names[place]].grad for place in layout.trained}
    found = {place: gradient for place, gradient in gradients.items() if gradient is not None}
    bad = _updated(plan, layout, tensors, found, tallies)
    if bad is not None:
        for place, kept in before.items():
            tensors[place].copy_(torch.where(bad, kept, tensors[place]))
    row, forms = packed(tallies if valid is None else _shown(plan.objective, tallies, valid))
    return _Done(row, forms, bad, outputs)


def _updated(
    plan: StepPlan,
    layout: Layout,
    tensors: Sequence[Tensor],
    gradients: dict[int, Tensor],
    tallies: dict[str, Tally],
) -> Tensor | None:
    """Clip, gate, step."""
    if any(gradient.is_sparse for gradient in gradients.values()):
        raise UnfitError("a module of the model makes sparse gradients")
    bad = None
    if plan.clip_norm is not None:
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        factor = (plan.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients = {place: gradient * factor.to(gradient.dtype) for place, gradient in gradients.items()}
        wrong = not_finite(norm)
    else:
        wrong = torch.stack([not_finite(gradient).any() for gradient in gradients.values()]).any()
    if plan.gate is not None:
        bad = (bad_elements(tallies) > 0) | wrong
    counts: dict[int, Tensor] = {}
    for group, place in enumerate(layout.counts):
        if place is not None:
            mine = [entry for entry in layout.entries if entry.group == group and entry.count is not None]
            more = [float(entry.place in gradients) for entry in mine]
            steps = tensors[place]
            after = steps + (1.0 if all(more) else torch.tensor(more, device=steps.device))
            counts[group] = after
            steps.copy_(after if bad is None else torch.where(bad, steps, after))
    numbers = tensors[layout.numbers]
    for entry in layout.entries:
        gradient = gradients.get(entry.place)
        if gradient is None:
            continue
        rule = layout.rules[entry.group]
        if len(entry.state) != len(rule.slots) or (rule.counts and entry.count is None):
            raise UnfitError(f"{layout.names[entry.place]!r} has a gradient, but no state in the optimizer")
        count = None
        if rule.counts:
            even = layout.even[entry.group]
            first = next(e.count for e in layout.entries if e.group == entry.group and e.place in gradients)
            count = counts[entry.group][first if even else entry.count]
        row = numbers[entry.group]
        state = [tensors[place] for place in entry.state]
        updates.update(rule, tensors[entry.place], gradient, state, count, row, bad)
    return bad


def _shown(objective: Objective, tallies: Mapping[str, Tally], valid: Tensor) -> dict[str, Tally]:
    """The tallies with the number of elements that the samples have which are there."""
    data = {plan.name for plan in objective.terms}
    there, found = valid.sum(), {}
    for name, tally in tallies.items():
        if name in data and tally.shown is not None:
            each, rest = divmod(tally.shown, len(valid))
            if rest:
                raise UnfitError(f"the elements of {name!r} are none of single samples")
            tally = replace(tally, shown=each * there)
        found[name] = tally
    return found


def _masked(mask: Any, valid: Tensor, objective: Objective) -> Any:
    """The mask of a batch of which not all samples are there."""
    if mask is None:
        return valid
    if isinstance(mask, Tensor):
        return both(mask, valid, "mask")
    given = objective.split_optional(mask, "mask")
    return {name: valid if given.get(name) is None else both(given[name], valid, "mask") for name in objective.outputs}


def _traced(step: Callable[..., list[Tensor]], inputs: list[Tensor]) -> torch.fx.GraphModule:
    try:
        return make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except UnfitError:
        raise
    except Exception as error:
        raise UnfitError(f"the step cannot be traced ({_first_line(error)})") from error


def _check_constants(graph: torch.fx.GraphModule, tensors: Sequence[Tensor]) -> None:
    """No weight is part of the program, where its later values would not be seen."""
    inside = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target)
        if isinstance(value, nn.Parameter) or (
            isinstance(value, Tensor) and value.untyped_storage().data_ptr() in inside and value.numel()
        ):
            raise UnfitError("the step reads a parameter that is none of the module's own")


def _compiled(
    graph: torch.fx.GraphModule, inputs: list[Tensor], values: list[Tensor]
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """A function of a list of tensors, which it empties; `values` are such as it will be called with."""
    try:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        inside: list[Any] = []

        def inner(*args: Any, **kwargs: Any) -> Any:
            inside.append(compile_fx_inner(*args, **kwargs))
            return inside[-1]

        # Not every version of torch has them all.
        patches = {name: value for name, value in _CONFIG.items() if hasattr(config, name)}
        made: Any = compile_fx(graph, inputs, inner_compile=inner, config_patches=patches)
        alone = getattr(inside[0], "current_callable", None) if len(inside) == 1 else None
        if alone is not None and sum(t.numel() for t in values) <= _SMALL:
            # Constants, such as class weights, come first.
            constants = [*graph.parameters(), *graph.buffers()]
            direct = (lambda given: alone([*constants, *given])) if constants else alone
            if _agree(made, direct, values):
                return direct  # type: ignore[no-any-return]
    except Exception as error:
        compiler = "Compiler" in type(error).__name__ or "compiler" in str(error).lower()
        what = "no C++ compiler was found; install g++ or name one in CXX" if compiler else "torch cannot compile it"
        raise UnfitError(f"{what} ({_first_line(error)})") from error
    return lambda given: made(*given)


# Numbers that a step reads: of more than so many, the calls around a program cost nothing in comparison.
_SMALL = 2**22
# Dropout and the like draw from torch's own generator, as in the plain step. Shapes are known before a program is
# called, and need not be compared in it.
_CONFIG = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}


def _agree(whole: Callable[..., Any], alone: Callable[[list[Tensor]], Any], values: list[Tensor]) -> bool:
    """Whether the compiled code does by itself what it does inside of torch's preparations for any graph.

    These cost more than the step of a small model, and prepare nothing where inputs are plain tensors.
    """
    device = values[0].device
    state, results = randomness.capture(device), []
    try:
        for call in (lambda given: whole(*given), alone):
            randomness.restore(state, device)
            given = [value.clone() for value in values]
            results.append([*call(list(given)), *given])
    except (TypeError, ValueError):
        # The code takes other arguments than those it was written for.
        return False
    mine, other = results
    pairs = zip(mine, other, strict=False)
    return len(mine) == len(other) and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {textwrap.shorten(text[0], 200)}" if text else type(error).__name__


def _cuda(tensors: Sequence[Tensor]) -> list[int]:
    return [t.device.index or 0 for t in tensors[:1] if t.device.type == "cuda"]


@contextlib.contextmanager
def _attributes_kept(net: nn.Module) -> Iterator[None]:
    """Attributes of modules that a traced forward writes to are put back.

    Raises:
        UnfitError: there are such attributes, which a program would not write to.
    """
    before = [(module, dict(vars(module))) for module in net.modules()]
    written = []
    try:
        yield
    finally:
        for module, known in before:
            now = vars(module)
            for name in {*known, *now}:
                if name not in known or name not in now or now[name] is not known[name]:
                    written.append(f"the forward of {type(module).__name__} writes to its attribute {name!r}")
            now.clear()
            now.update(known)
    if written:
        raise UnfitError(min(written))


@contextlib.contextmanager
def _vectors_kept(objective: Objective) -> Iterator[None]:
    """Class weights that the objective makes while it is traced are no numbers, and must not be found later."""
    before = dict(objective._vectors)
    try:
        yield
    finally:
        objective._vectors.clear()
        objective._vectors.update(before)


def filled(batch: Batch, size: int) -> Batch:
    """The batch with its first sample repeated up to the size."""
    missing = size - batch.size

    def longer(tensor: Any) -> Any:
        return None if tensor is None else torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])])

    x, y, weight, mask = pytree.tree_map(longer, (batch.x, batch.y, batch.sample_weight, batch.mask))
    return replace(batch, x=x, y=y, sample_weight=weight, mask=mask)
