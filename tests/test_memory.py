"""Large buffers are kept while a pass runs: fewer page faults, the same bits, and the memory is given back."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

import lossledger as ll
from lossledger.training import memory

GLIBC = memory._allocator() is not None
needs_glibc = pytest.mark.skipif(not GLIBC, reason="another C library, or another allocator, gives out the memory")

# Blocks of 48 MiB; whether a larger one was mapped is told by mallinfo2, where there is one.
SCRIPT = """
import ctypes, json, os, resource, sys
import torch, lossledger as ll
from lossledger.training import memory, model, sums

library = ctypes.CDLL(None)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Info = type("Info", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in names]})
if hasattr(library, "mallinfo2"):
    library.mallinfo2.restype = Info

def mapped(halves=5):
    before = library.mallinfo2().hblks if hasattr(library, "mallinfo2") else 0
    block = torch.empty(halves << 29, dtype=torch.uint8)
    return (library.mallinfo2().hblks - before) == 1 if hasattr(library, "mallinfo2") else None

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

class Look(ll.callbacks.Callback):
    def __init__(self):
        self.faults, self.mapped, self.resident = [], set(), []
    def on_train_batch_end(self, batch, logs):
        self.faults.append(faults())
        self.resident.append(resident())
    def on_epoch_end(self, epoch, logs):
        self.mapped.add(mapped(2))
        self.model.evaluate(x[:64], y[:64], batch_size=32, verbose=0)
        self.mapped.add(mapped(2))

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 2048), torch.nn.Tanh(), torch.nn.Linear(2048, 1))
x, y = torch.rand(6144 * 16, 8), torch.rand(6144 * 16, 1)
trained = ll.Model(net)
trained.compile(lambda p: torch.optim.SGD(p, lr=1e-6), "mse")
look, before = Look(), (mapped(), resident())
history = trained.fit(x, y, 64 if "short" in sys.argv else 6144, epochs=1, verbose=0, seed=0, callbacks=[look])
after = (mapped(), resident())
found = {"before": before, "within": sorted(map(str, look.mapped)), "after": after}
if "short" in sys.argv:
    print(json.dumps(found))
    sys.exit()

seen = []
hook = net.register_forward_hook(lambda m, i, output: seen.append(faults()) and None)
trained.evaluate(x.repeat(2, 1), y.repeat(2, 1), batch_size=6144, verbose=0)
evaluated = seen
hook.remove()
seen = []
hook = net.register_forward_hook(lambda m, i, output: seen.append(faults()) and None)
prediction = trained.predict(x, batch_size=6144)
predicted = seen
hook.remove()

# Something of every batch stays: behind it no large block fits again, and nothing is saved. Every batch is a log point,
# so that the test does not depend on the speed of the machine.
seen, sums.LOG_SECONDS = [], 0.0
hook = net.register_forward_hook(lambda m, i, output: seen.append((output, resident())) and None)
trained.evaluate(x.repeat(2, 1), y.repeat(2, 1), batch_size=6144, verbose=0)
hook.remove()
staying = [r for _, r in seen]

seen = []
hook = net.register_forward_hook(lambda m, i, output: seen.append(mapped()) and None)
trained.predict_on_batch(x[:64])
trained.test_on_batch(x[:64], y[:64])
trained.train_on_batch(x[:64], y[:64])
alone = sorted(set(map(str, seen)))

def steps(found):
    later = found[len(found) // 2:]
    return (later[-1] - later[0]) / (len(later) - 1)

print(json.dumps({
    **found, "resident": look.resident,
    "steps": steps(look.faults), "loss": history.history["loss"], "weights": float(net[0].weight.double().sum()),
    "evaluated": steps(evaluated), "predicted": steps(predicted),
    "single": alone, "staying": staying, "prediction": float(prediction.astype("float64").sum()),
}))
"""


def run(*words, **environment):
    unset = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", memory.SWITCH))}
    given = unset | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], env=given, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return {"on": run(), "off": run(LOSSLEDGER_KEEP_MEMORY="0"), "own": run("short", MALLOC_MMAP_THRESHOLD_="131072")}


def tells(mapped):
    """What the script says of a block, where the C library counts its mappings."""
    return mapped if hasattr(ctypes.CDLL(None), "mallinfo2") else None


@needs_glibc
def test_a_step_of_fit_touches_few_new_pages(found):
    assert 4 * found["on"]["steps"] < found["off"]["steps"] > 40_000


@needs_glibc
@pytest.mark.parametrize("which", ["evaluated", "predicted"])
def test_nor_does_a_batch_of_evaluate_or_predict(found, which):
    assert 2 * found["on"][which] < found["off"][which] > 20_000


@needs_glibc
def test_blocks_are_mapped_before_and_after_but_not_within(found):
    # Before: the package and its training were imported, and a model was compiled.
    on = found["on"]
    assert (on["before"][0], on["within"], on["after"][0]) == (tells(True), [str(tells(False))], tells(True))
    assert on["single"] == [str(tells(True))]


@needs_glibc
def test_memory_is_bounded_and_given_back_at_the_end_of_fit(found):
    on, half = found["on"], len(found["on"]["resident"]) // 2
    assert max(on["resident"]) - on["after"][1] > 80
    assert on["after"][1] - on["before"][1] < 40
    # What is kept is what a step needs: a block more with every step would be 384.
    assert max(on["resident"]) - max(on["resident"][:half]) < 150


@needs_glibc
def test_memory_that_cannot_be_used_again_is_let_go(found):
    # A block of 48 MiB that stays unused behind every batch would be 32 blocks.
    assert max(found["on"]["staying"]) - found["on"]["staying"][0] < 16 * 48


@needs_glibc
def test_values_are_the_same_bit_for_bit(found):
    for what in ("loss", "weights", "prediction"):
        assert found["on"][what] == found["off"][what]


@needs_glibc
@pytest.mark.parametrize("other", ["off", "own"])
def test_who_says_no_or_chose_otherwise_is_left_alone(found, other):
    told = found[other]
    assert told["within"] == [str(tells(True))] and told["before"][0] == told["after"][0] == tells(True)


@pytest.mark.parametrize(
    "environment",
    [
        {"LOSSLEDGER_KEEP_MEMORY": "0"},
        {"MALLOC_TRIM_THRESHOLD_": "1"},
        {"MALLOC_MMAP_MAX_": "0"},
        {"MALLOC_TOP_PAD_": "1"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=5"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=5", "LOSSLEDGER_KEEP_MEMORY": "1"},
    ],
)
def test_choices_of_others(environment):
    assert not memory.wanted(environment)


@pytest.mark.parametrize(
    "environment",
    [{}, {"LOSSLEDGER_KEEP_MEMORY": "1"}, {"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}],
)
def test_choices_that_speak_of_something_else(environment):
    assert memory.wanted(environment)


def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv(memory.SWITCH, "off")
    model = ll.Model(torch.nn.Linear(1, 1))
    model.compile("sgd", "mse")
    with pytest.raises(ll.errors.InputError, match=r"LOSSLEDGER_KEEP_MEMORY: expected 0 or 1, received 'off'"):
        model.fit(torch.ones(2, 1), torch.ones(2, 1), verbose=0)


class Fake:
    """Records what the allocator is told."""

    def __init__(self):
        self.told = []

    def mallopt(self, name, value):
        self.told.append((name, value))

    def malloc_trim(self, pad):
        self.told.append("trim")


@pytest.fixture
def fake(monkeypatch):
    for name in (memory.SWITCH, *memory._OF_USERS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    made = Fake()
    monkeypatch.setattr(memory, "_allocator", lambda: made)
    return made


def test_passes_inside_a_pass_change_nothing(fake, monkeypatch):
    monkeypatch.setattr(memory, "_faults", iter([0, 10**6]).__next__)
    cpu = torch.device("cpu")
    with memory.kept(cpu):
        began = list(fake.told)
        with memory.kept(cpu, 5):
            pass
        assert fake.told == began == [(-4, 0), (-1, -1)]
    assert fake.told[2:] == [(-4, 65536), (-3, 32 << 20), (-1, memory._STAYS), "trim"]


def test_growth_after_some_log_points_ends_it(fake, monkeypatch):
    block = 1 << 30
    resident = iter([0, 2 * block, 4 * block, 4 * block + (65 << 20)])
    monkeypatch.setattr(memory, "_resident", resident.__next__)
    monkeypatch.setattr(memory, "_faults", iter([0, 10**6, 2 * 10**6]).__next__)
    memory.watch(5)
    with memory.kept(torch.device("cpu")):
        for steps in (1, 3, 4, 9):
            memory.watch(steps)
        assert len(fake.told) == 2
        memory.watch(12)
        assert fake.told[2:] == [(-4, 65536), (-3, 32 << 20), (-1, memory._STAYS), "trim"]
        memory.watch(15)
    # What was used since then is given back too.
    assert fake.told[-1] == "trim" and len(fake.told) == 10
    memory.watch(18)


def test_an_error_ends_it_too_and_little_memory_is_not_worth_a_walk(fake, monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 4096)
    monkeypatch.setattr(memory, "_faults", iter([0, (memory._STAYS >> 12) - 1]).__next__)
    with pytest.raises(KeyError), memory.kept(torch.device("cpu")):
        raise KeyError
    assert len(fake.told) == 5 and "trim" not in fake.told


@pytest.mark.parametrize(("device", "batches"), [("cuda", None), ("cpu", 1)])
def test_other_devices_and_single_batches_leave_it_alone(fake, device, batches):
    with memory.kept(torch.device(device), batches):
        assert not fake.told
    assert not fake.told


def test_other_platforms_have_none(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "win32")
    assert memory._allocator.__wrapped__() is None


@needs_glibc
def test_another_allocator_before_glibc_is_noticed(tmp_path):
    source = tmp_path / "other.c"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    library = tmp_path / "other.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no C compiler")
    code = "from lossledger.training import memory; assert memory._allocator() is None"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"LD_PRELOAD": str(library)}, check=True)
