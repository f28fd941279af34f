"""The scenes and the network of the demonstration."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lossledger.demo.scenes import CLASS_NAMES, RARE_EDGE, Scenes, make_scenes
from lossledger.demo.unet import UNet
from lossledger.errors import InputError, InputTypeError, UnknownNameError


@pytest.fixture(scope="module")
def training() -> Scenes:
    return make_scenes(scenes=1536)


@pytest.fixture(scope="module")
def validation() -> Scenes:
    return make_scenes(scenes=384, split="validation")


def test_shapes_and_ranges(training: Scenes) -> None:
    assert training.images.shape == (1536, 3, 64, 64)
    assert training.masks.shape == (1536, 64, 64, 5)
    assert training.images.dtype == training.masks.dtype == np.float32
    assert training.images.min() >= 0 and training.images.max() <= 1
    assert training.class_names == CLASS_NAMES == ("digit 0", "digit 1", "digit 2", "digit 3", "digit 4")
    assert len(training.digit_ids) == 1536


def test_masks_are_binary(training: Scenes, validation: Scenes) -> None:
    for scenes in (training, validation):
        assert np.all((scenes.masks == 0) | (scenes.masks == 1))


def test_same_arguments_give_the_same_bytes() -> None:
    first, second = (make_scenes(scenes=20, seed=3) for _ in range(2))
    assert first.images.tobytes() == second.images.tobytes()
    assert first.masks.tobytes() == second.masks.tobytes()
    assert first.digit_ids == second.digit_ids


def test_the_first_scenes_do_not_depend_on_the_number(training: Scenes) -> None:
    few = make_scenes(scenes=10)
    assert np.array_equal(few.images, training.images[:10])
    assert few.digit_ids == training.digit_ids[:10]


def test_global_random_state_is_neither_read_nor_changed(training: Scenes) -> None:
    np.random.seed(7)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    few = make_scenes(scenes=3)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]
    assert np.array_equal(few.images, training.images[:3])


def test_another_seed_and_another_split_give_other_scenes(training: Scenes, validation: Scenes) -> None:
    assert not np.array_equal(make_scenes(scenes=4, seed=1).masks, training.masks[:4])
    assert not np.array_equal(validation.masks[:4], training.masks[:4])


def test_splits_share_no_digit(training: Scenes, validation: Scenes) -> None:
    used = [{digit for scene in scenes.digit_ids for digit in scene} for scenes in (training, validation)]
    assert used[0] and used[1] and not used[0] & used[1]


def test_masks_follow_the_labels_of_the_digits(validation: Scenes) -> None:
    labels = load_digits().target
    for ids, mask in zip(validation.digit_ids, validation.masks, strict=True):
        present = {label for label in range(5) if mask[:, :, label].any()}
        assert present == {int(labels[digit]) for digit in ids}
        assert 1 <= len(ids) <= 4


def test_digit_4_is_rare_and_small(training: Scenes) -> None:
    with_rare = training.masks[..., 4].any(axis=(1, 2))
    assert 0.025 < with_rare.mean() < 0.055
    for mask in training.masks[with_rare, :, :, 4]:
        rows, columns = np.nonzero(mask)
        assert max(np.ptp(rows), np.ptp(columns)) < RARE_EDGE[1] * 64


def test_digits_are_brighter_than_the_photograph(training: Scenes) -> None:
    covered = training.masks.any(axis=3)
    brightness = training.images.mean(axis=1)
    assert brightness[covered].mean() > 2 * brightness[~covered].mean()


@pytest.mark.parametrize("size", [32, 50, 192])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_other_sizes(size: int, split: Any) -> None:
    scenes = make_scenes(scenes=3, size=size, split=split)
    assert scenes.images.shape == (3, 3, size, size)
    assert scenes.masks.shape == (3, size, size, 5)
    assert scenes.masks.any(axis=(1, 2, 3)).all()


def test_scenes_are_frozen(training: Scenes) -> None:
    with pytest.raises(FrozenInstanceError):
        training.class_names = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scenes": 0}, "scenes must be 1 or more; received 0"),
        ({"size": 16}, "size must be 32 to 192; received 16"),
        ({"size": 400}, "size must be 32 to 192; received 400"),
        ({"seed": -1}, "seed must be 0 or more; received -1"),
    ],
)
def test_a_number_out_of_range_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_scenes(**arguments)


@pytest.mark.parametrize("arguments", [{"scenes": 2.0}, {"size": "64"}, {"seed": None}, {"scenes": True}])
def test_the_wrong_type_is_an_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputTypeError, match="must be an integer"):
        make_scenes(**arguments)


@pytest.mark.parametrize(("split", "suggestion"), [("valid", "Did you mean 'validation'"), (3, "received 3")])
def test_an_unknown_split_is_an_error(split: Any, suggestion: str) -> None:
    with pytest.raises(UnknownNameError, match=suggestion):
        make_scenes(scenes=1, split=split)


def test_network_gives_the_class_axis_last(validation: Scenes) -> None:
    torch.manual_seed(0)
    network = UNet()
    logits = network(torch.from_numpy(validation.images[:2]))
    assert logits.shape == (2, 64, 64, 5)
    assert logits.dtype == torch.float32
    # Logits and not probabilities.
    assert (logits < 0).any()
    logits.mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_network_accepts_rectangles_and_other_filters() -> None:
    assert UNet()(torch.zeros(1, 3, 16, 48)).shape == (1, 16, 48, 5)
    assert UNet(classes=2, filters=(4, 8))(torch.zeros(3, 3, 6, 10)).shape == (3, 6, 10, 2)


def test_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in UNet().parameters()) == 485_853


def test_network_is_the_same_after_the_same_seed() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(UNet().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_initialization_keeps_the_scale_of_the_logits(validation: Scenes) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        logits = UNet()(torch.from_numpy(validation.images[:8]))
    assert 0.05 < logits.std() < 5


@pytest.mark.parametrize("shape", [(1, 3, 40, 64), (1, 3, 64, 40), (1, 3, 0, 16)])
def test_an_image_that_cannot_be_halved_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="divisible by 16"):
        UNet()(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 64, 64, 3)])
def test_an_image_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\[N, 3, H, W\]"):
        UNet()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"classes": 0}, "classes"), ({"filters": (8,)}, "filters"), ({"filters": (8, 0)}, "filters")],
)
def test_a_network_that_cannot_be_built_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNet(**arguments)
