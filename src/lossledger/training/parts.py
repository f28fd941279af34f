"""A checkpoint of several ranks: what rank 0 has, and of the others only what differs from it.

Weights, optimizer and history are the same on all ranks. Random states, the place in the data, the sums of the epoch so
far, buffers, and the states of callbacks may be each rank's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
from torch import Tensor

from lossledger.distributed import Group
from lossledger.errors import CheckpointError
from lossledger.training.checkpoint import Checkpoint, decode, encode
from lossledger.training.data import Data, IterableData
from lossledger.training.intervals import added_up
from lossledger.training.running import added

# What a rank has for itself, beside entries of "callbacks" and "weights".
_OWN = ("recipe", "random", "stopped", "epoch", "data", "validation")

# By place in the state, then by name.
Parts = dict[str, dict[str, Any]]


def collected(group: Group, state: dict[str, Any], buffers: Sequence[str]) -> dict[str, Any]:
    """The state of rank 0 with what the others have of their own, on rank 0; all ranks call.

    Args:
        group: the ranks.
        state: of this rank.
        buffers: names of the weights that may differ by rank.
    """
    if group.size == 1:
        return state
    mine = _own(state, buffers)
    packed: dict[str, Any] = {f"{place}/{name}": _packed(value) for place, part in mine.items() for name, value in part}
    first = group.first({key: digest for key, (digest, *_) in packed.items()})
    differing = {key: rest for key, (digest, *rest) in packed.items() if group.rank and first.get(key) != digest}
    found = []
    for sent in group.gather(differing)[1:]:
        parts: Parts = {}
        for key, (content, tensors) in sent.items():
            place, _, name = key.partition("/")
            parts.setdefault(place, {})[name] = decode(content, safetensors.torch.load(tensors))
        found.append(parts)
    return {**state, "ranks": found}


def _own(state: Mapping[str, Any], buffers: Sequence[str]) -> dict[str, list[tuple[str, Any]]]:
    return {
        "": [(name, state[name]) for name in _OWN],
        "callbacks": [(str(index), one) for index, one in enumerate(state["callbacks"])],
        "weights": [(name, state["weights"][name]) for name in buffers],
    }


def _packed(value: Any) -> tuple[str, Any, bytes]:
    """A value as a checkpoint holds it, after a digest of its content. Not every tensor can be pickled."""
    tensors: dict[str, Tensor] = {}
    content = encode(value, "", tensors)
    data = safetensors.torch.save(tensors)
    return hashlib.blake2b(json.dumps(content).encode() + data).hexdigest(), content, data


def of_first(group: Group, found: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint of rank 0, on all ranks."""
    if group.size == 1:
        return found
    sent = None if found is None else (found.number, *_packed(found.state)[1:])
    sent = group.first(sent)
    if sent is None or group.rank == 0:
        return found
    number, content, data = sent
    return Checkpoint(number, decode(content, safetensors.torch.load(data)))


def of_rank(found: Checkpoint, group: Group) -> Checkpoint:
    """The checkpoint as this rank goes on from it.

    With another number of ranks than wrote it, rank 0 takes the sums so far of all of them.
    """
    state = dict(found.state)
    others: list[Parts] = state.pop("ranks", [])
    states = [state, *(_overlaid(state, parts) for parts in others)]
    if len(states) == group.size:
        return Checkpoint(found.number, states[group.rank])
    mine = states[group.rank] if group.rank < len(states) else {**state, "random": None}
    if mine["epoch"] is not None:
        mine = {**mine, "epoch": {**mine["epoch"], "pass": _all_in_one([s["epoch"]["pass"] for s in states], group)}}
    return Checkpoint(found.number, mine)


def _overlaid(state: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    own = parts.get("callbacks", {})
    callbacks = [own.get(str(index), one) for index, one in enumerate(state["callbacks"])]
    weights = {**state["weights"], **parts.get("weights", {})}
    return {**state, **parts.get("", {}), "callbacks": callbacks, "weights": weights}


def _all_in_one(passes: Sequence[Mapping[str, Any]], group: Group) -> dict[str, Any]:
    """The sums of all ranks for the first of the new ones, none for the others."""
    first = passes[0]
    intervals = first["intervals"]
    if group.rank:
        if intervals is not None:
            intervals = {"closed": [(step, {}) for step, _ in intervals["closed"]], "open": added([])}
        nothing = {"sums": {}, "own": first["measures"]["own"]}
        sums_of_none = {"running": added([]), "intervals": intervals, "measures": nothing, "groups": None}
        return {"steps": first["steps"], **sums_of_none}
    sums: dict[str, Tensor] = {}
    for one in passes:
        for name, value in one["measures"]["sums"].items():
            sums[name] = sums[name] + value if name in sums else value
    return {
        "steps": first["steps"],
        "running": added([one["running"] for one in passes]),
        "intervals": None if intervals is None else added_up([one["intervals"] for one in passes]),
        "measures": {"sums": sums, "own": first["measures"]["own"]},
        "groups": None,
        # Only one process lets tallies wait.
        "waiting": first.get("waiting"),
        "packed": first.get("packed"),
    }


def check_ranks(written: Checkpoint, group: Group, *given: Data | None) -> None:
    """A run can go on with this number of ranks.

    Args:
        written: the checkpoint, of all ranks that wrote it.
        group: the ranks now.
        given: data to train and to validate on.

    Raises:
        CheckpointError: another number of ranks than the run had, and something that is each rank's own.
    """
    wrote = 1 + len(written.state.get("ranks", ()))
    if wrote == group.size:
        return
    said = f"resume: the run had {wrote} ranks, and goes on with {group.size}, but "
    if any(isinstance(data, IterableData) for data in given):
        raise CheckpointError(
            f"{said}its batches come from an iterable of each rank, which nobody can divide anew. Go on with {wrote} "
            "ranks; or begin a run on arrays, whose order does not depend on the ranks."
        )
    if written.state["epoch"] is None:
        return
    so_far = written.state["epoch"]["pass"]
    own = [f"the metric {name!r} keeps" for name in so_far["measures"]["own"]]
    own += ["named groups of samples keep"] * (so_far["groups"] is not None) + ["samples=True keeps"] * (
        "samples" in so_far
    )
    own += ["spread=True keeps"] * (so_far.get("spread") is not None)
    if own:
        raise CheckpointError(
            f"{said}{own[0]} a state of its own on each rank, in the middle of an epoch. Go on with {wrote} ranks "
            "until the epoch has ended."
        )
