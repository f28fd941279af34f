"""Where the data of a run stand: what a checkpoint keeps of it, and how the rest of an epoch is found again.

Arrays need the number of batches only: their order is a function of the seed and the epoch. An iterable with
`state_dict` and `load_state_dict` is asked for its state. Any other is opened again with the random states that it was
opened with, and the batches that were seen are passed over; its first batch must be the one that the run saw.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lossledger.batch import Batch, leaves
from lossledger.errors import CheckpointError
from lossledger.training import randomness
from lossledger.training.data import ArrayData, Data, IterableData


def generators(data: Data | None) -> list[torch.Generator]:
    """The generators of a DataLoader and of its samplers, each once."""
    source = data.source if isinstance(data, IterableData) else None
    batches = getattr(source, "batch_sampler", None)
    owners = (source, getattr(source, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def state_of(data: Data | None, opened: bool) -> dict[str, Any]:
    """What a checkpoint keeps of data.

    Args:
        data: the data.
        opened: whether the run has taken batches from them: before that, a loader's state is that of a new one.
    """
    tells = opened and isinstance(data, IterableData) and data.has_state
    own = data.source.state_dict() if tells else None  # type: ignore[union-attr]
    return {"own": own, "generators": [g.get_state() for g in generators(data)]}


def restore(data: Data | None, state: dict[str, Any]) -> None:
    """Put data back to a state that `state_of` told."""
    if isinstance(data, IterableData) and state["own"] is not None:
        data.source.load_state_dict(state["own"])  # type: ignore[attr-defined]
    restore_generators(data, state["generators"])


def restore_generators(data: Data | None, states: list[Tensor]) -> None:
    """Put the generators of a loader back."""
    for generator, state in zip(generators(data), states, strict=True):
        generator.set_state(state)


def check_resumable(data: Data, name: str, steps: int | None) -> None:
    """A run on these data can be resumed.

    Raises:
        CheckpointError: data that can be passed over once only, or whose state does not say where an epoch starts.
    """
    if not isinstance(data, IterableData):
        return
    once = isinstance(data.source, Iterator)
    if once and not data.has_state:
        raise CheckpointError(
            f"resume: {name} is a {type(data.source).__name__}, which gives its batches once and cannot be put back to "
            "where it was. Pass arrays, a list, a DataLoader, or an iterable with state_dict and load_state_dict."
        )
    available = data.steps(1)
    if data.has_state and not once and steps is not None and steps != available:
        raise CheckpointError(
            f"resume: {name} keeps a state of its own, and steps_per_epoch={steps} ends epochs before it does, so its "
            "state does not say that an epoch starts over. Leave steps_per_epoch out."
        )


def rest_of_epoch(
    data: IterableData,
    taken: int,
    opening: dict[str, Any] | None,
    device: torch.device,
) -> Iterator[Batch]:
    """The batches of an interrupted epoch that an iterable has not given yet.

    Args:
        data: the data.
        taken: how many batches the run had taken.
        opening: without a state of its own: what `seen_from` noted when the epoch began.
        device: of the model.

    Raises:
        CheckpointError: the iterable does not give the batches that it gave.
    """
    if data.has_state or opening is None:
        return data.read(data.opened(), taken)
    randomness.restore(opening["random"], device)
    restore_generators(data, opening["generators"])
    items = iter(data.source)
    _pass_over(data, items, taken, opening["first"])
    return data.read(items, taken)


def _pass_over(data: IterableData, items: Iterator[Any], taken: int, first: int) -> None:
    for position in range(taken):
        item = next(items, None)
        if item is None:
            raise CheckpointError(
                f"resume: x gave {position} batches of the interrupted epoch; the run had taken {taken}. Pass the data "
                "of the run, or start in another run_dir."
            )
        if position == 0 and checksum(next(data.read([item], 0))) != first:
            raise CheckpointError(
                "resume: the first batch of the interrupted epoch is not the one that the run saw, so x is other data, "
                "or its order does not follow from the random states of torch, NumPy and Python. Pass the data of the "
                "run; or arrays, which fit shuffles; or an iterable with state_dict and load_state_dict."
            )


def opening_of(data: Data, device: torch.device) -> dict[str, Any] | None:
    """What must be known to open an iterable again as it is about to be opened; `None` where nothing must."""
    if isinstance(data, ArrayData) or data.has_state:
        return None
    return {
        "random": randomness.capture(device),
        "generators": [g.get_state() for g in generators(data)],
        "first": 0,
    }


def seen_from(batches: Iterable[Batch | None], opening: dict[str, Any]) -> Iterator[Batch | None]:
    """The batches; the checksum of the first one is noted in `opening`."""
    for index, batch in enumerate(batches):
        if index == 0 and batch is not None:
            opening["first"] = checksum(batch)
        yield batch


def checksum(batch: Batch) -> int:
    """A number that tells batches of different content apart."""
    found = 0
    for tensor in leaves([batch.x, batch.y, batch.sample_weight, batch.mask, batch.groups]):
        plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        values = plain.cpu().contiguous().reshape(-1)
        found = zlib.crc32(values.view(torch.uint8).numpy().tobytes(), found)
    return found
