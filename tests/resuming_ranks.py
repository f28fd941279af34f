"""Runs of several ranks that are killed and started again: jobs and scripts of test_resume_ranks."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import lossledger as ll
from killing import Noisy
from lossledger.distributed import gathered
from spawning import free_port

N, SIZE, EPOCHS = 24, 5, 3


class Stateful:
    """A loader in the manner of torchdata's: it tells what it has given, and whether it has come to its end."""

    def __init__(self, x, y):
        self.x, self.y, self.epoch, self.given, self.going_on = x, y, -1, 0, False

    def __len__(self):
        return -(-len(self.x) // SIZE)

    def __iter__(self):
        if not self.going_on:
            self.epoch, self.given = self.epoch + 1, 0
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch))
        self.going_on = True
        for ids in order.split(SIZE)[self.given :]:
            self.given += 1
            yield self.x[ids], self.y[ids]
        self.going_on = False

    def state_dict(self):
        return {"epoch": self.epoch, "given": self.given, "going_on": self.going_on}

    def load_state_dict(self, state):
        self.epoch, self.given, self.going_on = state["epoch"], state["given"], state["going_on"]


class Own(ll.callbacks.Callback):
    """A callback whose state is that of its rank."""

    def on_train_begin(self, logs):
        self.seen = []

    def on_train_batch_end(self, batch, logs):
        self.seen.append(float(torch.rand(())))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Seen(torch.nn.Module):
    """Counts what its rank has seen, in a buffer that `state_dict` leaves out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.count += x.shape[0]
        return x


def samples():
    g = torch.Generator().manual_seed(5)
    return torch.randn(N, 3, generator=g).double(), (torch.randn(N, 2, generator=g) > 0).double()


def data_of(kind, rank):
    x, y = samples()
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": SIZE, "seed": 3}
    # Other lengths on other ranks.
    mine = slice(0, 14) if rank == 0 else slice(14, N)
    if kind == "loader":
        return {"x": DataLoader(Noisy(x[mine].float(), y[mine].float()), SIZE, shuffle=True), "seed": 3}
    return {"x": Stateful(x[mine], y[mine]), "seed": 3}


@contextlib.contextmanager
def beginning():
    """What torch says before `fit` when the other rank was killed: only `fit` says it of ranks."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise ll.errors.RankError(str(error)) from error


def trained(folder, rank, kind, save_freq, every_step=None, **options):
    """A run from where it is to its end, and what it came to on this rank."""
    warnings.filterwarnings("ignore", ".*normalizes over the samples of one rank", UserWarning)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7 + rank)
    dropout = 0.5 if options.pop("dropout", True) else 0.0
    layers = [torch.nn.Linear(3, 8), torch.nn.Dropout(dropout), Seen(), torch.nn.Linear(8, 2)]
    if options.pop("normalized", True):
        layers.insert(1, torch.nn.BatchNorm1d(8))
    net = torch.nn.Sequential(*layers)
    net = net if kind == "loader" else net.double()
    wrapped, sharded = options.pop("wrapped", False), options.pop("sharded", False)
    with beginning():
        if sharded:
            # Parts of one model: fit does not make them so.
            for value in net.parameters():
                dist.broadcast(value.detach(), 0)
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for part in (net[0], net[-1], net):
                fully_shard(part, mesh=mesh)
        model = ll.Model(DistributedDataParallel(net) if wrapped else net)
    loss = ll.losses.BinaryCrossentropy(from_logits=True) + ll.losses.Dice(axis=0, from_logits="sigmoid")
    model.compile("adam", loss, metrics=["binary_accuracy"], ema=0.9, regularizers={"0.weight": "l2"})
    C = ll.callbacks
    own = Own()
    callbacks = [own, C.CSVLogger(folder.with_suffix(".csv")), C.LearningRateScheduler(lambda epoch, rate: rate * 0.9)]
    callbacks += [C.EarlyStopping("loss", patience=99, restore_best_weights=True)]
    callbacks += [] if save_freq is None else [C.BackupAndRestore(save_freq)]
    callbacks += [] if every_step is None else [C.LambdaCallback(on_train_batch_end=every_step)]
    x, y = samples()
    held = (x[:9].to(net[0].weight.dtype), y[:9].to(net[0].weight.dtype))
    given = {**data_of(kind, rank), "epochs": EPOCHS, "verbose": 0, "validation_data": held, "checks": "off", **options}
    history = model.fit(**given, callbacks=callbacks, run_dir=folder, resume=True)
    return {
        "weights": {name: value.tolist() for name, value in gathered(net.state_dict(), True).items()},
        "seen": float(net[-2].count),
        "optimizer": repr(gathered(model.optimizer.state_dict(), True)),
        "history": history.history,
        "epochs": history.epoch,
        "rows": [repr(row) for row in history.ledger.rows],
        "metrics": [repr(row) for row in history.ledger.metrics],
        "callback": own.seen,
        "next": [float(torch.rand(())), float(np.random.rand()), random.random()],
    }


def written(folder, name, rank, found):
    """The outcome of a rank; that of rank 0 holds the files too."""
    if rank == 0:
        book = ll.Ledger.open(folder / name)
        assert [repr(row) for row in book.rows] == found["rows"] and not book.balance()
        assert [repr(row) for row in book.metrics] == found["metrics"]
        found["csv"] = (folder / f"{name}.csv").read_text()
    (folder / f"{name}.{rank}.json").write_text(json.dumps(found))


def _attempt(rank, size, port, folder, name, arguments, die):
    """One process of one attempt. `die` is the step (of all, from 1) after which this rank ends itself, if it does."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            dist.init_process_group("gloo", rank=rank, world_size=size)
        except RuntimeError:
            # The other was killed before both had begun.
            os._exit(3)
    steps = 0

    def every_step(batch, logs):
        nonlocal steps
        steps += 1
        if steps == die:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        written(folder, name, rank, trained(folder / name, rank, every_step=every_step, **arguments))
    except ll.errors.RankError:
        os._exit(3)
    except BaseException:
        print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)
    if size > 1:
        dist.destroy_process_group()
    os._exit(0)


def attempt(size, folder, name, die=None, after=None, who=None, **arguments):
    """Start ranks; kill those of `who` after some seconds, or let each end itself at its step of `die`.

    Returns:
        whether the run came to its end.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [
        context.Process(target=_attempt, args=(rank, size, port, folder, name, arguments, (die or {}).get(rank)))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    timer = None
    if after is not None:

        def kill():
            for rank in who:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(processes[rank].pid, signal.SIGKILL)

        timer = threading.Timer(after, kill)
        timer.start()
    end = time.monotonic() + 90
    while any(process.is_alive() for process in processes):
        if after is not None and any(process.exitcode == -signal.SIGKILL for process in processes):
            # As torchrun does: ranks that were about to connect to the one that is gone would wait long.
            end = min(end, time.monotonic() + 5)
            after = None
        if time.monotonic() > end:
            for process in processes:
                process.kill()
            assert timer is not None, "a rank hung"
        time.sleep(0.01)
    for process in processes:
        process.join()
    if timer is not None:
        timer.cancel()
    codes = [process.exitcode for process in processes]
    # 3: another rank was gone; 1: an error of its own.
    assert all(code in (0, 3, -signal.SIGKILL) for code in codes), codes
    return codes == [0] * size


def different(folder, one, two, size, leave_out=()):
    found = []
    for rank in range(size):
        a, b = (json.loads((folder / f"{name}.{rank}.json").read_text()) for name in (one, two))
        found += [f"rank {rank}: {key}" for key in a if key not in leave_out and a[key] != b[key]]
    return found


def at_steps(folder, cases):
    """Runs that end at given steps, once or twice, and are started again; what differs from the whole run."""
    wrong = []
    for number, (arguments, deaths) in enumerate(cases):
        want = f"whole-{number}"
        assert attempt(2, folder, want, **arguments)
        for index, die in enumerate(deaths):
            name = f"cut-{number}-{index}"
            assert not attempt(2, folder, name, die=die, **arguments), "it was to end at that step"
            assert attempt(2, folder, name, **arguments)
            wrong += [f"{arguments} {die} {what}" for what in different(folder, want, name, 2)]
    return wrong


def at_random(folder, kills, seed):
    """Runs killed after random times, one rank or all of them, until they end; how often, and what differs."""
    rng = random.Random(seed)
    cases = [
        {"kind": "arrays", "save_freq": 3, "wrapped": True},
        {"kind": "loader", "save_freq": 2},
        {"kind": "stateful", "save_freq": 1},
        {"kind": "arrays", "save_freq": None, "accumulate": 2},
    ]
    done, runs, wrong, seconds = 0, 0, [], {}
    while done < kills:
        arguments = {**cases[runs % len(cases)], "epochs": 12}
        want, name = f"whole-{runs % len(cases)}", f"killed-{runs}"
        if want not in seconds:
            started = time.perf_counter()
            assert attempt(2, folder, want, **arguments)
            seconds[want] = time.perf_counter() - started
        longest, tries = seconds[want], 0
        while True:
            who = rng.choice([(0,), (1,), (0, 1)])
            if attempt(2, folder, name, after=rng.random() * longest * (1 + tries / 20), who=who, **arguments):
                break
            done, tries = done + 1, tries + 1
        runs += 1
        wrong += different(folder, want, name, 2)
    return {"kills": done, "runs": runs, "wrong": wrong}


def at_sizes(folder, cases, sharded):
    """Runs that end in the middle of an epoch, and go on with another number of ranks."""
    plain = {"kind": "arrays", "dropout": False, "normalized": False, "save_freq": 2, "ledger_steps": 2}
    plain |= {"sharded": True} if sharded else {}
    assert attempt(2, folder, "whole", **plain)
    for before, after in cases:
        name = f"from-{before}-to-{after}"
        assert not attempt(before, folder, name, die={0: 8}, **plain)
        assert attempt(after, folder, name, **plain)


STEPS = [
    ({"kind": "arrays", "save_freq": 2, "wrapped": True, "ledger_steps": 2}, [{0: 7}]),
    # Rank 1 has two batches, rank 0 has three.
    ({"kind": "stateful", "save_freq": 1}, [{0: 7}]),
]
SHARDED_STEPS = [
    ({"kind": "arrays", "save_freq": 2, "sharded": True, "normalized": False, "ledger_steps": 2}, [{0: 7}]),
    # Rank 1 has two batches of three: it goes on without one to forward beside rank 0.
    ({"kind": "stateful", "save_freq": 1, "sharded": True, "normalized": False}, [{0: 5}]),
]
MORE_STEPS = [
    ({"kind": "arrays", "save_freq": 1, "sharded": True, "normalized": False, "accumulate": 2}, [{0: 1}, {1: 5}]),
    ({"kind": "stateful", "save_freq": 1, "sharded": True, "normalized": False}, [{1: n} for n in range(1, 9)]),
    ({"kind": "arrays", "save_freq": 1, "accumulate": 2}, [{0: 1}, {1: 5, 0: 5}, {1: 6}, {0: 9}]),
    ({"kind": "loader", "save_freq": 1}, [{1: step} for step in range(1, 9)]),
    ({"kind": "stateful", "save_freq": 1}, [{step % 2: step} for step in range(1, 10)]),
]


def restarted():
    """A script of torchrun: in the first attempt rank 1 ends itself."""
    folder, rank = Path(sys.argv[2]), int(os.environ["RANK"])
    dies = rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    steps = []

    def every_step(batch, logs):
        steps.append(batch)
        if dies and len(steps) == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    (folder / f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}.{rank}").write_text("")
    written(folder, "restarted", rank, trained(folder / "restarted", rank, "arrays", 2, every_step))


def main():
    if sys.argv[1] == "restarted":
        restarted()
        return
    what, place = sys.argv[1], Path(sys.argv[2])
    # Imported here once, so that no fork has to.
    for name in ("torch._dynamo", "duckdb"):
        importlib.import_module(name)
    if what == "steps":
        print(json.dumps(at_steps(place, {"few": STEPS, "more": MORE_STEPS, "sharded": SHARDED_STEPS}[sys.argv[3]])))
    elif what in ("sizes", "sharded-sizes"):
        cases = [tuple(map(int, pair.split("-"))) for pair in sys.argv[3:]]
        print(json.dumps(at_sizes(place, cases, what != "sizes")))
    elif what == "whole":
        assert attempt(2, place, "whole", kind="arrays", save_freq=2)
        print("{}")
    else:
        print(json.dumps(at_random(place, int(sys.argv[3]), int(sys.argv[4]))))


if __name__ == "__main__":
    main()
