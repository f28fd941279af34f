"""A group of torch.distributed: the ranks among which data are divided."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import pickle
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lossledger.distributed.group import ALONE, Group
from lossledger.errors import InputTypeError, RankError

# Parameters that are broadcast or summed in one call.
BUCKET_BYTES = 25 * 2**20


class Ranks:
    """The ranks of a process group.

    What lies on a CPU goes through a gloo group of its own: a rank that fails closes it, and whoever waits for that
    rank hears of it at once. What lies on a device goes through the group that was given.

    Args:
        process_group: of torch, initialized.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.size, self.rank = process_group.size(), process_group.rank()
        self._first = dist.get_process_group_ranks(process_group)[0]
        self._name = ""
        self._host: Any = self._connected(_timeout(process_group))

    def _connected(self, timeout: datetime.timedelta) -> Any:
        # Not dist.new_group: all processes would have to call it, and it names a part of them as it named the last.
        try:
            # A name that was never used: the store still has the addresses of groups that failed.
            name = [uuid.uuid4().hex]
            dist.broadcast_object_list(name, src=self._first, group=self.process_group)
            self._name = f"lossledger/{name[0]}"
            store = dist.distributed_c10d.PrefixStore(self._name, _store())
            host: Any = dist.ProcessGroupGloo(store, self.rank, self.size, timeout)
            # A rank is connected before those that it is connected with have heard of it. One that closed now, as an
            # error at once makes it, would be a lost connection to them: none goes on before all are through.
            if store.add("connected", 1) == self.size:
                store.set("all connected", "1")
            store.wait(["all connected"], timeout)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size} could not connect to the others: {str(error).splitlines()[0][:300]}"
            ) from error
        return host

    @property
    def failed(self) -> bool:
        """Whether this rank has left the group with an error."""
        return self._host is None

    def sum_(self, flat: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        with self._waiting():
            if flat.device.type == "cpu":
                self._open().allreduce([flat]).wait()
            else:
                dist.all_reduce(flat, group=self.process_group)
        return flat

    def agree(self, *numbers: int) -> list[list[int]]:
        """The whole numbers of every rank."""
        return [row.tolist() for row in self._gathered(torch.tensor(numbers, dtype=torch.int64))]

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives; it is pickled."""
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [size for (size,) in self.agree(mine.numel())]
        padded = mine.new_zeros(max(sizes))
        padded[: mine.numel()] = mine
        found = self._gathered(padded)
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(found, sizes, strict=True)]

    def first(self, value: Any) -> Any:
        """What the first rank gives; it is pickled."""
        flat = torch.frombuffer(bytearray(pickle.dumps(value if self.rank == 0 else None)), dtype=torch.uint8)
        size = self.agree(flat.numel())[0][0]
        flat = flat if self.rank == 0 else flat.new_empty(size)
        with self._waiting():
            self._open().broadcast([flat], dist.BroadcastOptions()).wait()
        return value if self.rank == 0 else pickle.loads(flat.numpy().data)

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        """Tensors of one shape on the host, one of each rank."""
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._waiting():
            self._open().allgather([found], [mine]).wait()
        return found

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Fill tensors with those of the first rank."""
        with self._waiting(), torch.no_grad():
            for bucket in buckets(tensors):
                flat = torch.cat([t.detach().reshape(-1) for t in bucket])
                if flat.device.type == "cpu":
                    self._open().broadcast([flat], dist.BroadcastOptions()).wait()
                else:
                    dist.broadcast(flat, self._first, group=self.process_group)
                for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def close(self) -> None:
        """Leave the group; the last reference goes, and its connections close."""
        self._host = None

    def fail(self, error: BaseException) -> None:
        """Say why, and leave: whoever waits for this rank is told by the closed connection."""
        if self._host is None:
            return
        if not isinstance(error, RankError):
            with contextlib.suppress(Exception):
                text = f"rank {self.rank} failed with {type(error).__name__}: {error}"
                _store().set(self._key, text)
        self.close()

    @property
    def _key(self) -> str:
        return f"{self._name}/failed"

    def _open(self) -> Any:
        if self._host is None:
            raise RankError("This rank has left the group after an error; start the training anew on all ranks.")
        return self._host

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """What the network says, said of ranks."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            failed = self.understood(error)
            self.fail(failed)
            raise failed from error

    def understood(self, error: BaseException) -> RankError:
        """What the network says, said of ranks."""
        said = str(error).splitlines()[0]
        return RankError(f"{self._reason()} Stopped at rank {self.rank} of {self.size}; torch says: {said[:300]}")

    def _reason(self) -> str:
        # The rank that failed writes before it closes; a killed one writes nothing.
        with contextlib.suppress(Exception):
            store = _store()
            if store.check([self._key]):
                return f"{store.get(self._key).decode()}."
        return (
            "Another rank did not answer: expected all ranks to take part in every step; one was killed, lost its "
            "connection, or took longer than the timeout of the process group. Look at the output of the others."
        )


def buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device, together up to a size, in an order that all ranks share."""
    kinds: dict[Any, list[list[Tensor]]] = {}
    filled: dict[Any, int] = {}
    for tensor in tensors:
        kind, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        if kind not in kinds or filled[kind] + size > BUCKET_BYTES:
            kinds.setdefault(kind, []).append([])
            filled[kind] = 0
        kinds[kind][-1].append(tensor)
        filled[kind] += size
    return [bucket for found in kinds.values() for bucket in found]


_known: list[Ranks] = []


@atexit.register
def _close() -> None:
    # A thread of gloo that lets go of its last tensor while the interpreter is taken down ends the process with an
    # abort, whoever closed the user's group before.
    for ranks in _known:
        ranks.close()


def joined(given: Any = None, device: torch.device | None = None) -> Group:
    """The ranks that this process divides its data with; alone where there are no others.

    Under `torchrun` the default group is initialized if the script has not done it.

    Args:
        given: a process group, or a `DeviceMesh` of one dimension, over which data are divided (data × context
            parallel, never tensor parallel); `None`: all processes.
        device: of the model.
    """
    if not dist.is_available():
        return ALONE
    if given is None and not dist.is_initialized() and dist.is_torchelastic_launched():
        _initialize(device)
    if not dist.is_initialized():
        return ALONE
    process_group = dist.group.WORLD if given is None else _process_group(given)
    if process_group is None or process_group.size() == 1:
        return ALONE
    _known[:] = [ranks for ranks in _known if not ranks.failed]
    for ranks in _known:
        if ranks.process_group is process_group:
            return ranks
    _known.append(Ranks(process_group))
    return _known[-1]


def _process_group(given: Any) -> dist.ProcessGroup:
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(given, dist.ProcessGroup):
        return given
    if isinstance(given, DeviceMesh) and given.ndim == 1:
        return given.get_group()
    raise InputTypeError(
        f"process_group: expected a process group of torch or a DeviceMesh of one dimension, received {given!r}. "
        "Flatten the dimensions that divide data: mesh['dp', 'cp']._flatten()."
    )


def _initialize(device: torch.device | None) -> None:
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    on_cuda = device is not None and device.type == "cuda"
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    store = dist.distributed_c10d.PrefixStore(_start(store, rank, size), store)
    dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size)
    atexit.register(_leave)


def _start(store: Any, rank: int, size: int) -> str:
    """A name that the ranks of this start share, and those of no other.

    The store of torchrun outlives a restart, with the addresses of processes that are gone. Its count of restarts may
    differ between hosts, so rank 0 answers each rank, which has a name of its own that nobody else answers to.
    """
    mine, where, limit = uuid.uuid4().hex, "lossledger/start", dist.constants.default_pg_timeout
    if rank:
        store.set(f"{where}/{rank}", mine)
        store.wait([f"{where}/{mine}"], limit)
        name = str(store.get(f"{where}/{mine}").decode())
        store.set(f"{where}/{name}/{rank}", "")
        return name
    missing, end = set(range(1, size)), time.monotonic() + limit.total_seconds()
    while missing:
        for other in missing:
            # May be that of a process that is gone; the one that is there overwrites it.
            if store.check([f"{where}/{other}"]):
                store.set(f"{where}/{store.get(f'{where}/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"{where}/{mine}/{other}"])}
        if time.monotonic() > end:
            raise RankError(f"rank {min(missing)} of {size} did not start; look at the output of the others.")
        time.sleep(0.01 * bool(missing))
    return mine


def _leave() -> None:
    _close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _timeout(process_group: dist.ProcessGroup) -> datetime.timedelta:
    """How long the user's group waits; torch's default where it does not tell."""
    for kind in ("cpu", "cuda"):
        with contextlib.suppress(Exception):
            return process_group._get_backend(torch.device(kind)).options._timeout  # type: ignore[no-any-return]
    return dist.constants.default_pg_timeout


@contextlib.contextmanager
def sharing_fate(group: Group) -> Iterator[None]:
    """What fails here fails on every rank: none waits for one that is gone."""
    try:
        yield
    except BaseException as error:
        if isinstance(group, Ranks) and _of_network(error):
            # A forward of fully_shard or SyncBatchNorm talks to other ranks by itself.
            failed = group.understood(error)
            group.fail(failed)
            raise failed from error
        group.fail(error)
        raise


def _of_network(error: BaseException) -> bool:
    """Whether torch says that another rank did not answer; gloo has no error of its own."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return type(error) is RuntimeError and "gloo" in str(error)


def together(group: Group, act: Callable[[], Any]) -> Any:
    """Do something that may fail on some ranks only, and go on where it did not fail on any.

    Raises:
        RankError: it failed on another rank.
    """
    error: Exception | None = None
    result = None
    try:
        result = act()
    except Exception as found:
        error = found
    said = group.gather(None if error is None else f"{type(error).__name__}: {error}") if group.size > 1 else []
    if error is not None:
        raise error
    for rank, text in enumerate(said):
        if text is not None:
            raise RankError(f"rank {rank} failed with {text}")
    return result
