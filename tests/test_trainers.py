"""The benchmark of trainers: its contenders train the same network on the same data, and who cannot is named."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import numpy as np
import pytest
from speed import contenders, nets, race
from speed.racer import NotOfferedError, Task
from speed.workloads import WORKLOADS, scenes

# Those that need nothing beyond what the tests need.
HERE = ("torch_plain", "torch_tuned", "ours", "keras_fit")
TINY = {
    "dense": (WORKLOADS["dense"].rows, 32, 160),
    "mlp": (WORKLOADS["mlp"].rows, 32, 160),
    "unet": (scenes(32), 4, 12),
    "language": (WORKLOADS["language"].rows, 4, 12),
}


def task(net):
    rows, batch, count = TINY[net]
    arrays = rows(count)
    weights = {
        name: [tensor.numpy() for tensor in tensors] for name, tensors in nets.keras_weights(nets.make(net)).items()
    }
    return Task(net, batch, "float32", arrays["x"], arrays["y"], weights, folder="")


def racers(net):
    return {name: importlib.import_module(f"speed.{name}").make(task(net)) for name in HERE}


# Of Keras on torch, in `predict`.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("net", TINY)
def test_contenders_compute_the_same_from_the_same_weights_and_train(net):
    made = racers(net)
    before = {name: racer.loss() for name, racer in made.items()}
    assert before == pytest.approx(dict.fromkeys(made, before["torch_plain"]), rel=1e-5)
    outputs = {name: racer.predict() for name, racer in made.items()}
    counted = task(net).y != 0 if net == "language" else ...
    for found in outputs.values():
        np.testing.assert_allclose(found[counted], outputs["torch_plain"][counted], rtol=1e-4, atol=1e-5)
    for name, racer in made.items():
        for _ in range(3):
            racer.prepare("train")()
        assert racer.loss() < 0.999 * before[name], name


@pytest.mark.parametrize("net", ["dense", "mlp", "unet"])
def test_evaluation_is_that_of_all_samples(net):
    found = {name: racer.evaluate() for name, racer in racers(net).items()}
    assert found == pytest.approx(dict.fromkeys(found, found["torch_tuned"]), rel=1e-5)


def test_an_option_that_this_version_does_not_have_is_said():
    given = dataclasses.replace(task("dense"), options={"compile": {"no_such_option": True}})
    with pytest.raises(NotOfferedError, match=r"Model\.compile has no no_such_option"):
        importlib.import_module("speed.ours").make(given)


def test_another_loss_is_found():
    losses = {"a": 1.0, "b": 1.0005, "c": 1.01, "d": 1.01, "e": float("nan")}
    precisions = dict.fromkeys(losses, "float32") | {"d": "bfloat16"}
    assert set(race.disagreeing(losses, precisions)) == {"c", "e"}


def test_who_computes_another_loss_is_not_timed(monkeypatch):
    monkeypatch.setattr(race, "disagreeing", lambda losses, precisions: {"ours": f"{len(losses)} losses"})
    here = {"here": sys.executable}
    found = race.run(WORKLOADS["call"], ["tuned", "ours"], ["float32"], ["train"], 1, None, 1, here)
    assert found["left_out"] == {"ours": "2 losses"}
    assert [row["contender"] for row in found["rows"]] == ["tuned"]


def test_contenders_run_in_turn_and_who_cannot_is_named(monkeypatch, capsys):
    added = contenders.Contender("absent", "one that is not here", "no_such_trainer")
    monkeypatch.setitem(race.CONTENDERS, "absent", added)
    names = ["tuned", "absent", "ours"]
    precisions, here = ["float32", "bfloat16"], {"here": sys.executable}
    found = race.run(WORKLOADS["dense"], names, precisions, ["train"], 2, 3, 1, here)
    assert [row["contender"] for row in found["rows"]] == ["tuned", "ours"]
    assert found["left_out"] == {"absent": "speed.no_such_trainer is not installed"}
    assert "absent is left out" in capsys.readouterr().err
    assert (found["steps"], found["samples"]) == (3, 96)
    for row in found["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["last_loss"] < row["first_loss"]
        assert row["peak"] >= row["before"] > 0
    ours = found["rows"][1]
    assert ours["ours"]["ratio"] == 1.0
    ratios = [a / b for a, b in zip(ours["seconds"], found["rows"][0]["seconds"], strict=True)]
    assert (ours["tuned"]["ratio_low"], ours["tuned"]["ratio_high"]) == (min(ratios), max(ratios))
