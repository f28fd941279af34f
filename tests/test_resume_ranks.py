"""Runs of several ranks that were killed and started again are, bit for bit, the runs that were not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lossledger as ll
import resuming_ranks
from lossledger.errors import CheckpointError, RankError
from lossledger.training import checkpoint
from spawning import free_port, run_ranks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks that are killed are forked")
SCRIPT = Path(resuming_ranks.__file__)


def launched(*command, limit=1500):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ll.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=limit, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def outcome(*arguments):
    return json.loads(launched(SCRIPT, *arguments).splitlines()[-1])


# --- the same number of ranks --------------------------------------------------------------------------------------


def test_one_rank_or_all_end_at_a_step_and_nothing_differs(tmp_path):
    """Weights, buffers, optimizer, history, ledger, files, callbacks and the next random numbers of every rank."""
    assert outcome("steps", tmp_path, "few") == []
    folder = tmp_path / "cut-0-0" / "checkpoints"
    assert sorted({path.suffix for path in folder.iterdir()}) == [".json", ".safetensors"]
    assert len(checkpoint.newest(folder).state["ranks"]) == 1
    # Rows of the epoch that was cut off were written once, or moved aside: bit for bit the same, so never twice.
    assert ll.Ledger.open(tmp_path / "cut-0-0").rows == ll.Ledger.open(tmp_path / "whole-0").rows


def test_a_sharded_run_is_written_whole_and_goes_on_bit_for_bit(tmp_path):
    """Weights, averages, optimizer and best weights of `fully_shard`, in one file that holds no shard."""
    assert outcome("steps", tmp_path, "sharded") == []
    state = checkpoint.newest(tmp_path / "cut-0-0" / "checkpoints").state
    shapes = {"0.weight": (8, 3), "0.bias": (8,), "3.weight": (2, 8), "3.bias": (2,)}
    assert {name: tuple(state["weights"][name].shape) for name in shapes} == shapes
    assert [tuple(one.shape) for one in state["average"]] == list(shapes.values())
    moments = state["optimizer"]["state"]
    assert [tuple(moments[i]["exp_avg"].shape) for i in range(4)] == list(shapes.values())
    (best,) = (one["best_weights"] for one in state["callbacks"] if "best_weights" in one)
    assert tuple(best["3.weight"].shape) == (2, 8)
    # Of the other rank only what is its own: no weights.
    (other,) = state["ranks"]
    assert set(other.get("weights", {})) <= {"2.count"} and "best_weights" not in str(other)


@pytest.mark.slow
def test_one_rank_or_all_end_at_other_steps_and_nothing_differs(tmp_path):
    assert outcome("steps", tmp_path, "more") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_killed_at_random_moments_lose_nothing_and_count_nothing_twice(tmp_path, seed):
    found = outcome("random", tmp_path, 20, seed)
    assert found["kills"] >= 20 and found["runs"] >= 2 and found["wrong"] == []


def test_torchrun_restarts_the_ranks_and_the_run_goes_on(tmp_path):
    outcome("whole", tmp_path)
    where = ["--master-addr", "127.0.0.1", "--master-port", free_port(), "--nproc-per-node", 2, "--max-restarts", 2]
    launched("-m", "torch.distributed.run", *where, SCRIPT, "restarted", tmp_path)
    attempts = sorted(path.name for path in tmp_path.glob("attempt-*"))
    assert attempts == ["attempt-0.0", "attempt-0.1", "attempt-1.0", "attempt-1.1"]
    assert resuming_ranks.different(tmp_path, "whole", "restarted", 2) == []


# --- another number of ranks ---------------------------------------------------------------------------------------

SIZES = [(2, 1), (1, 2), (2, 3)]


def close(a, b):
    assert type(a) is type(b), (a, b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            close(a[name], b[name])
    elif isinstance(a, list) and a and not isinstance(a[0], float | list):
        assert a == b
    else:
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """The order of the samples is that of the run, so values are too, up to the order of sums."""
    outcome("sizes", tmp_path, *(f"{before}-{after}" for before, after in SIZES))
    compare_sizes(tmp_path, SIZES)


@pytest.mark.slow
def test_shards_are_divided_anew_over_another_number_of_ranks(tmp_path):
    """More ranks than rows of the last layer, so one of them has an empty part; and fewer."""
    sizes = [(2, 3), (3, 2)]
    outcome("sharded-sizes", tmp_path, *(f"{before}-{after}" for before, after in sizes))
    compare_sizes(tmp_path, sizes)


def compare_sizes(tmp_path, sizes):
    whole = json.loads((tmp_path / "whole.0.json").read_text())
    book = ll.Ledger.open(tmp_path / "whole")
    for before, after in sizes:
        name = f"from-{before}-to-{after}"
        for rank in range(after):
            found = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
            close(found["weights"], whole["weights"])
            close(found["history"], whole["history"])
        rows = ll.Ledger.open(tmp_path / name).rows
        assert len(rows) == len(book.rows) and any(row.step for row in rows)
        for row, other in zip(rows, book.rows, strict=True):
            for field in row.__dataclass_fields__:
                mine, theirs = getattr(row, field), getattr(other, field)
                if isinstance(theirs, float):
                    np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12, err_msg=f"{name}: {row}")
                else:
                    assert mine == theirs, (name, row, other)


def other_sizes(rank, size, out):
    """What each rank has for itself cannot be divided anew."""
    torchmetrics = pytest.importorskip("torchmetrics")
    x, y = (part.float() for part in resuming_ranks.samples())
    alone = [torch.distributed.new_group([r]) for r in range(size)][rank]

    class Cut(ll.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            if batch == 2:
                raise KeyboardInterrupt

    def fit(name, group, data, cut, **compiling):
        model = ll.Model(torch.nn.Linear(3, 2), process_group=group)
        model.compile("sgd", "mse", **compiling)
        calls = [ll.callbacks.BackupAndRestore(1), *([Cut()] if cut else [])]
        given = {"samples": True} if name == "samples" else {}
        given |= {"groups": {"site": ["a", "b"] * 12}} if name == "groups" else {}
        options = {**given, "callbacks": calls, "run_dir": Path(out, name), "resume": True, "seed": 0, "verbose": 0}
        return model.fit(*data, **({} if len(data) == 1 else {"batch_size": 4}), checks="off", **options)

    batches = list(zip(x.split(4), y.split(4), strict=True))
    for name, data, compiling in (
        ("list", (batches,), {}),
        ("metric", (x, y), {"metrics": [torchmetrics.MeanAbsoluteError()]}),
        ("samples", (x, y), {}),
        ("groups", (x, y), {}),
    ):
        with pytest.raises(KeyboardInterrupt):
            fit(name, None, data, True, **compiling)
        if rank == 0:
            said = {"list": "batches come from an iterable", "metric": "'mean_absolute_error' keeps a state"}.get(
                name, name
            )
            with pytest.raises(CheckpointError, match=f"had 2 ranks, and goes on with 1.*{said}"):
                fit(name, alone, data, False, **compiling)
        torch.distributed.barrier()
        fit(name, None, data, False, **compiling)
    # One recipe for all: a rank with another one ends them all, and says so.
    model = ll.Model(torch.nn.Linear(3, 2))
    model.compile("sgd", "mse" if rank == 0 else "mae")
    with pytest.raises(RankError if rank == 0 else CheckpointError, match=r"recipe mean_absolute_error: expected"):
        model.fit(batches, run_dir=Path(out, "list"), resume=True, seed=0, verbose=0)


def test_what_is_each_ranks_own_is_refused_with_the_reason(tmp_path):
    folder, codes = run_ranks(other_sizes, 2, out=tmp_path)
    assert codes == [0, 0], [path.read_text() for path in folder.glob("error-*")]
