"""Ranks: real processes over gloo whose values, gradients, weights, histories and ledgers are those of one process.

nccl needs a GPU for each rank and is not tested here.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import distributed_cases
import lossledger as ll
from lossledger.check_distributed import report
from lossledger.distributed.group import any_of, bits
from lossledger.errors import RankError
from spawning import free_port, run_cases, run_ranks


@functools.cache
def outcome(size):
    return run_ranks(run_cases, size, "distributed_cases", limit=300)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", distributed_cases.CASES)
def test_ranks_are_one_process(name, size):
    folder, codes = outcome(size)
    for rank in range(size):
        said = folder / f"{name}.{rank}"
        assert said.exists(), f"rank {rank} did not get to this case; the processes ended with {codes}"
        assert said.read_text() == "passed", f"rank {rank}: {said.read_text()}"


def test_flags_travel_as_numbers():
    for length in (1, 61, 62, 63, 200):
        rows = [[(i * 7 + rank) % 5 == 0 for i in range(length)] for rank in range(3)]
        assert any_of([bits(row) for row in rows], length) == [any(column) for column in zip(*rows, strict=True)]


def test_connections_close_before_the_interpreter_is_taken_down(tmp_path):
    # Else a thread of gloo that still has a tensor then aborts the process, one time in some.
    script = f"""
        import atexit
        atexit.register(lambda: print("closed", found.failed))
        import torch.distributed as dist
        from lossledger.distributed import ranks
        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
        found = ranks.Ranks(dist.group.WORLD)
        ranks._known.append(found)
        print("open", found.failed)
        dist.destroy_process_group()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["open", "False", "closed", "True"]), done.stderr


# --- ranks that are gone -------------------------------------------------------------------------------------------


def leave(rank, size, how, out):
    """Rank 1 leaves in the second epoch, in the middle of a step; what the others say goes to a file."""
    x, y = distributed_cases.pairs()
    steps = []

    class Fragile(nn.Linear):
        def forward(self, x):
            steps.append(1)
            if rank == 1 and self.training and len(steps) == 7:
                os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            return super().forward(x)

    model = ll.Model(Fragile(3, 2).double())
    model.compile("sgd", "mse")
    started = time.monotonic()
    try:
        model.fit(x, y, batch_size=6, epochs=9, seed=0, verbose=0, run_dir=Path(out, "run"))
    except RankError as error:
        Path(out, f"said-{rank}").write_text(f"{time.monotonic() - started}\n{error}")
    # Without the rank that is gone nothing of torch.distributed can be taken down in order.
    os._exit(0)


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_is_an_error_of_the_others_and_the_ledger_is_whole(how, tmp_path):
    """A killed process closes its connections; a stopped one is noticed by the timeout of the group."""
    _, codes = run_ranks(leave, 3, how, out=tmp_path, limit=120, timeout=5, gone=(1,))
    assert codes[1] == (-signal.SIGKILL if how == "killed" else "hung")
    for rank in (0, 2):
        seconds, said = (tmp_path / f"said-{rank}").read_text().split("\n", 1)
        assert "Another rank did not answer" in said
        assert float(seconds) < 20
    book = ll.Ledger.open(tmp_path / "run")
    assert {row.epoch for row in book.rows} == {1}
    assert book.balance() == []


# --- torchrun ------------------------------------------------------------------------------------------------------


def torchrun(*arguments, nodes=(), count=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", *nodes]
    if not nodes:
        launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    source = str(Path(ll.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    command = [*launcher, "--nproc-per-node", str(count), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)


SCRIPT = """
import sys, torch, lossledger as ll
torch.manual_seed(0)
x, y = torch.randn(23, 3).double(), torch.randn(23, 2).double()
model = ll.Model(torch.nn.Linear(3, 2).double())
model.compile("sgd", ll.losses.MeanSquaredError() + ll.losses.Dice(from_logits="sigmoid"))
history = model.fit(x, (y > 0).double(), batch_size=5, epochs=3, seed=0, verbose=2, run_dir=sys.argv[1])
model.save_weights(sys.argv[1] + "/end.safetensors")
"""


def test_a_script_needs_torchrun_and_nothing_else(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    many = torchrun(str(script), str(tmp_path / "many"))
    assert many.returncode == 0, many.stderr
    assert many.stdout.count("epoch 3/3") == 1
    one = subprocess.run([sys.executable, str(script), str(tmp_path / "one")], capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    nets = [ll.Model(nn.Linear(3, 2).double()) for _ in range(2)]
    for model, name in zip(nets, ("one", "many"), strict=True):
        model.load_weights(tmp_path / name / "end.safetensors")
    for p, q in zip(nets[0].net.parameters(), nets[1].net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    books = [ll.Ledger.open(tmp_path / name) for name in ("one", "many")]
    assert books[0].loss("training", 3) == pytest.approx(books[1].loss("training", 3), rel=1e-12)


ROW = re.compile(r"^(plain|DDP|FSDP2) .* ok$", re.MULTILINE)


def test_the_check_of_a_cluster_passes_and_can_fail():
    good = torchrun("-m", "lossledger.check_distributed")
    assert good.returncode == 0, good.stderr
    assert {found.group(1) for found in ROW.finditer(good.stdout)} == {"plain", "DDP", "FSDP2"}
    assert "The ranks add up to one." in good.stdout
    strict = torchrun("-m", "lossledger.check_distributed", "--tolerance", "1e-30")
    assert strict.returncode != 0
    assert "WRONG" in strict.stdout
    assert "rows are wrong" in strict.stdout


@pytest.mark.parametrize(
    ("changed", "good"),
    [
        ({}, True),
        ({"divisor": 9.0}, False),
        ({"value error": 1e-3}, False),
        ({"gradient error": 0.5}, False),
        ({"gradient error": float("nan")}, False),
    ],
)
def test_a_row_of_the_check_is_wrong_where_a_number_is(changed, good):
    row = {"wrapper": "DDP", "samples": 3, "micro-batches": 1, "divisor": 4.0, "expected": 4.0, "value": 1.0}
    text, said = report({**row, "value error": 0.0, "gradient error": 0.0, **changed}, 1e-9)
    assert said is good
    assert text.endswith("ok" if good else "WRONG")


def test_the_check_of_one_rank_says_what_to_run():
    done = subprocess.run(
        [sys.executable, "-m", "lossledger.check_distributed"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode != 0
    assert "torchrun" in done.stderr


# --- two hosts -----------------------------------------------------------------------------------------------------


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable (veth) of 2 ms, as two machines have it."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts were NOT tested: the program `ip` (iproute2) is missing")
    names = [f"ll{os.getpid()}{side}" for side in "ab"]
    made = ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"two hosts were NOT tested: network namespaces are not allowed here ({made.stderr.strip()})")
    try:
        commands = [
            ("netns", "add", names[1]),
            ("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1]),
        ]
        for name, device, address in zip(names, ("va", "vb"), ("10.77.0.1", "10.77.0.2"), strict=True):
            commands += [
                ("-n", name, "addr", "add", f"{address}/24", "dev", device),
                ("-n", name, "link", "set", device, "up"),
                ("-n", name, "link", "set", "lo", "up"),
            ]
        for command in commands:
            done = ip(*command)
            if done.returncode:
                pytest.skip(f"two hosts were NOT tested: ip {' '.join(command)}: {done.stderr.strip()}")
        delays = [
            ip("netns", "exec", name, "tc", "qdisc", "add", "dev", device, "root", "netem", "delay", "2ms")
            for name, device in zip(names, ("va", "vb"), strict=True)
        ]
        yield names, all(done.returncode == 0 for done in delays)
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_two_hosts_add_up_to_one(two_hosts):
    names, delayed = two_hosts
    source = str(Path(ll.__file__).parents[1])
    running = []
    for node, (name, device) in enumerate(zip(names, ("va", "vb"), strict=True)):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "GLOO_SOCKET_IFNAME": device}
        launch = ["torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
        where = ["--master-addr", "10.77.0.1", "--master-port", "29517", "-m", "lossledger.check_distributed"]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", *launch, *where]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    try:
        said = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    assert "2 ranks" in said[0][0]
    assert "The ranks add up to one." in said[0][0]
    if not delayed:
        pytest.skip("two hosts add up, but WITHOUT delay: this kernel has no netem")
