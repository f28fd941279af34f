"""Ranks that are threads: a group of `lossledger.distributed` in one process, for thousands of cases in a minute."""

from __future__ import annotations

import contextlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from unittest import mock

import torch

import lossledger.distributed
import lossledger.window.window as window_module
from lossledger.errors import RankError

LIMIT = 60


class Meeting:
    """Where the threads of one window meet: each leaves what it has, and takes what all have left."""

    def __init__(self, size):
        self.size, self.left, self.why = size, [None] * size, None
        self._barrier = threading.Barrier(size, timeout=LIMIT)

    def exchange(self, rank, call, value):
        self.left[rank] = (call, value)
        self._wait()
        found = list(self.left)
        # Nobody leaves anything new before all have looked.
        self._wait()
        calls = {one for one, _ in found}
        assert len(calls) == 1, f"the ranks are in different calls: {sorted(map(str, calls))}"
        return [one for _, one in found]

    def leave(self, why):
        self.why = self.why or why
        self._barrier.abort()

    def _wait(self):
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise RankError(self.why or "a rank did not come") from None


class ThreadGroup:
    """The rank of one thread."""

    def __init__(self, meeting, rank):
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def sum_(self, flat):
        found = self.meeting.exchange(self.rank, ("sum", flat.shape, flat.dtype), flat.clone())
        return flat.copy_(torch.stack(found).sum(0))

    def agree(self, *numbers):
        return self.meeting.exchange(self.rank, ("agree", len(numbers)), list(numbers))

    def gather(self, value):
        # As between processes, nothing is the same object afterwards.
        return [pickle.loads(one) for one in self.meeting.exchange(self.rank, "gather", pickle.dumps(value))]

    def broadcast_(self, tensors):
        tensors = list(tensors)
        found = self.meeting.exchange(self.rank, ("broadcast", len(tensors)), [t.detach().clone() for t in tensors])
        with torch.no_grad():
            for tensor, first in zip(tensors, found[0], strict=True):
                tensor.copy_(first)

    def fail(self, error):
        self.meeting.leave(f"rank {self.rank} failed with {type(error).__name__}: {error}")


_threads = ThreadPoolExecutor(8, "rank", initializer=torch.set_num_threads, initargs=(1,))


def on_threads(size, work):
    """What `work(group)` returns on each of the ranks; the first error of a rank that was not told of another's."""
    meeting = Meeting(size)

    def run(rank):
        group = ThreadGroup(meeting, rank)
        try:
            return work(group)
        except BaseException as error:
            group.fail(error)
            raise

    jobs = [_threads.submit(run, rank) for rank in range(size)]
    wait(jobs)
    errors = [error for job in jobs if (error := job.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, RankError)), errors[0])
    return [job.result() for job in jobs]


@contextlib.contextmanager
def windows_take_threads():
    """`process_group=` of a window may be a group of threads meanwhile."""

    def joined(given=None, device=None):
        return given if isinstance(given, ThreadGroup) else lossledger.distributed.joined(given, device)

    with mock.patch.object(window_module, "joined", joined):
        yield
