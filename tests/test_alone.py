"""Two processes do not write to one run folder."""

import subprocess
import sys

import pytest
import torch

import lossledger as ll
from lossledger.errors import CheckpointError

HOLD = """
import sys
from pathlib import Path
from lossledger.training.alone import Alone
held = Alone(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def fit(folder, epochs=2, **more):
    torch.manual_seed(0)
    model = ll.Model(torch.nn.Linear(2, 1))
    model.compile("sgd", "mse")
    given = {"epochs": epochs, "run_dir": folder, "resume": True, "verbose": 0, "seed": 0}
    return model.fit(torch.ones(8, 2), torch.ones(8, 1), 4, **(given | more))


@pytest.fixture
def other(tmp_path):
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind")
@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_another_process_writes_to_is_refused(tmp_path, begun, request):
    if begun:
        fit(tmp_path / "run")
    kept = [(path, path.read_bytes()) for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()]
    other = request.getfixturevalue("other")
    with pytest.raises(CheckpointError, match="another process is training now"):
        fit(tmp_path / "run", 4)
    found = [(path, path.read_bytes()) for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()]
    assert [one for one in found if one[0].name != "lock"] == [one for one in kept if one[0].name != "lock"]
    # One that was killed holds nothing.
    other.kill()
    other.wait()
    history = fit(tmp_path / "run", 4)
    assert history.epoch == [0, 1, 2, 3]
    assert len(history.ledger.table(by="epoch", split="training")) == 4


def test_a_process_leaves_its_folder_however_the_call_ends(tmp_path):
    class Stop(ll.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise KeyboardInterrupt

    for more in ({"callbacks": [Stop()]}, {"checks": "unknown"}):
        with pytest.raises((KeyboardInterrupt, ll.errors.LossledgerError)):
            fit(tmp_path / "run", **more)
    fit(tmp_path / "run")
    result = subprocess.run(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], input="", capture_output=True, text=True
    )
    assert result.stdout == "held\n", result.stderr
