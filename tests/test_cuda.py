"""What only a GPU can show: numbers of CUDA beside those of the processor, nothing waited for, bfloat16, memory, nccl.

All of it is skipped where there is none; `pytest -rs tests/test_cuda.py` says so. What can be seen without one is in
`test_device.py`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import lossledger as ll
from checks import case, close, tensors
from declarations import MATRIX
from lossledger.demo.scenes import make_scenes
from lossledger.demo.unet import UNet
from on_device import FITS, alike, between_log_points, of_loss, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is needed: torch sees no CUDA device")

# Sums in another order than those of the processor, over two epochs of updates.
TOLERANCE = 2e-3


def on_gpu(value):
    return tree_map(lambda one: one.cuda() if isinstance(one, torch.Tensor) else one, value)


def on_host(value):
    return tree_map(lambda one: one.detach().cpu() if isinstance(one, torch.Tensor) else one, value)


def forbid(strict):
    torch.cuda.set_sync_debug_mode("error" if strict else "default")


@contextlib.contextmanager
def unread():
    forbid(True)
    try:
        yield
    finally:
        forbid(False)


@pytest.fixture(autouse=True)
def _exact():
    """Products in float32 are float32, as on the processor; and the next test may read."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    forbid(False)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in MATRIX])
@pytest.mark.parametrize("weights", [False, True])
def test_a_loss_is_that_of_the_processor_and_nothing_waits(row, weights):
    given = tensors(case(row, 7, samples=9, weights=weights, masks=weights))
    for by in (None, *row.kinds):
        expected = of_loss(row.make(), given, by, contextlib.nullcontext)(lambda value: value)
        # Once before: libraries that a first call loads may wait.
        of_loss(row.make(), given, by, contextlib.nullcontext)(on_gpu)
        found = of_loss(row.make(), given, by, unread)(on_gpu)
        for mine, other in zip(on_host(found), expected, strict=True):
            assert close(mine, other, 1e-4)


@pytest.mark.parametrize("name", FITS)
def test_fit_is_that_of_the_processor_and_waits_at_log_points_only(name, monkeypatch):
    expected, rows = trained(FITS[name])
    trained(FITS[name], nn.Module.cuda, on_host)
    points = between_log_points(monkeypatch, forbid)
    found, on_device = trained(FITS[name], nn.Module.cuda, on_host)
    assert points["batches"] >= 10
    alike(found, expected, TOLERANCE)
    assert [row[:-1] for row in on_device] == [row[:-1] for row in rows]
    alike([row[-1] for row in on_device], [row[-1] for row in rows], TOLERANCE)


def unet_history(place, **compiled):
    """Losses of three epochs of the demo's network on its scenes, and predictions."""
    scenes = make_scenes(32, 32)
    torch.manual_seed(0)
    model = ll.Model(place(UNet()))
    loss = ll.losses.BinaryCrossentropy(from_logits=True) + ll.losses.Dice(axis=(0, 1, 2), from_logits="sigmoid")
    model.compile(lambda p: torch.optim.SGD(p, 0.05), loss, **compiled)
    x, y = torch.from_numpy(scenes.images), torch.from_numpy(scenes.masks)
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0, seed=0, checks="off").history["loss"]
    return history, model.evaluate(x, y, batch_size=8, verbose=0), torch.from_numpy(model.predict(x, batch_size=8))


def test_a_network_trains_as_on_the_processor():
    history, tested, predicted = unet_history(lambda net: net)
    found = unet_history(nn.Module.cuda)
    assert found[0] == pytest.approx(history, rel=1e-3) and found[1] == pytest.approx(tested, rel=1e-3)
    assert float((found[2] - predicted).norm() / predicted.norm()) < 1e-2


def test_bfloat16_trains_close_to_float32():
    history, tested, _ = unet_history(nn.Module.cuda)
    found = unet_history(nn.Module.cuda, precision="bfloat16")
    assert found[0] == pytest.approx(history, rel=0.05) and found[1] == pytest.approx(tested, rel=0.05)


def test_a_compiled_step_gives_the_numbers_of_the_plain_one():
    pytest.importorskip("triton")
    x, y = torch.randn(64, 3), torch.randn(64, 2)

    def history(jit):
        torch.manual_seed(0)
        model = ll.Model(nn.Linear(3, 2).cuda())
        model.compile("adam", "mse", jit=jit)
        with warnings.catch_warnings():
            # The compiler advises other precisions. A step that cannot be compiled runs plainly, and prints why.
            warnings.simplefilter("ignore")
            return model.fit(x, y, 8, 3, verbose=0, seed=0, checks="off").history["loss"]

    assert history(True) == pytest.approx(history(False), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_big_vocabulary_takes_little_memory(dtype):
    """Beside inputs and gradients at most 64 MiB, and a float32 copy of the gradient of 16-bit weights."""
    head = nn.Linear(256, 128_000, bias=False).to("cuda", dtype)
    hidden = torch.randn(4096, 256, device="cuda", dtype=dtype)
    labels = torch.randint(128_000, (4096,), device="cuda")
    loss = ll.losses.LinearCrossentropy(head)
    batch = loss.align(labels, hidden, checked=True)
    gradients = (head.weight.numel() + hidden.numel()) * dtype.itemsize
    copy = 0 if dtype == torch.float32 else head.weight.numel() * 4
    for measured in (False, True):
        head.weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss.backprop_aligned(batch, None, 1.0)
        torch.cuda.synchronize()
        # The first run loads libraries, which keep memory.
        assert not measured or torch.cuda.max_memory_allocated() - before <= gradients + copy + (64 << 20)


def test_ranks_on_nccl_add_up_to_one():
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2:
        pytest.skip(f"two GPUs are needed: nccl takes one a rank, and torch sees {gpus}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    check = ["-m", "lossledger.check_distributed", "--device", "cuda"]
    done = subprocess.run([*launch, *check], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nccl, cuda" in done.stdout and "The ranks add up to one." in done.stdout
