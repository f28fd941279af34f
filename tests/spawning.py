"""Real processes for the tests of ranks: started together, each runs every case, none outlives its time."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(rank, size, port, timeout, target, arguments, out):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # torch's own, of the way it calls itself.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout))
    try:
        target(rank, size, *arguments, out=out)
    except BaseException:
        Path(out, f"error-{rank}").write_text(traceback.format_exc())
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def run_ranks(target, size, *arguments, limit=120, timeout=30, out=None, gone=()):
    """Run `target(rank, size, *arguments, out=folder)` in processes; return the folder and the exit codes.

    A process that lives longer than `limit` seconds is killed, and its code is "hung"; so is one of the ranks `gone`
    that lives on when the others have ended.
    """
    folder = out or tempfile.mkdtemp()
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes = [
        context.Process(target=_work, args=(rank, size, port, timeout, target, arguments, str(folder)))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    codes = {}
    for rank in sorted(range(size), key=lambda rank: rank in gone):
        process = processes[rank]
        process.join(0.1 if rank in gone else max(0.1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
            codes[rank] = "hung"
        else:
            codes[rank] = process.exitcode
    return Path(folder), [codes[rank] for rank in range(size)]


def run_cases(rank, size, module, out):
    """Every case of a module in turn; what each raised goes to a file. A case in which a rank failed ends the run."""
    import importlib

    found = importlib.import_module(module)
    solo = [dist.new_group([r]) for r in range(size)][rank]
    for name, case in found.CASES.items():
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            case(found.World(rank, size, solo, Path(out)))
            said = "passed"
        except BaseException:
            said = traceback.format_exc()
        Path(out, f"{name}.{rank}").write_text(said)
        Path(out, f"{name}.{rank}.seconds").write_text(f"{time.monotonic() - start:.2f}")
        # Nobody goes on to the next case after one that left the ranks in different places.
        states = [None] * size
        dist.all_gather_object(states, said == "passed")
