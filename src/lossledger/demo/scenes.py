"""Small segmentation scenes made of real data: handwritten digits pasted on photographs.

Both sources are installed with scikit-learn, so nothing is downloaded.

* The digits are the 8x8 images of `sklearn.datasets.load_digits`: the test part of "Optical Recognition of Handwritten
  Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49).
* `china.jpg` is by danielbuechele (https://www.flickr.com/photos/danielbuechele/6061409035), licence CC BY 2.0.
* `flower.jpg` is at https://www.flickr.com/photos/vultilion/6056698931, licence CC BY 2.0. The notes that come with
  scikit-learn name danielbuechele as its author too, but the address that they give belongs to the account vultilion.

Both photographs are changed here: cropped, scaled, mirrored and darkened.

A scene is a random crop of a photograph with one to three digits from 0 to 3; about one scene of 25 also has a small
digit 4.
The masks are independent: where two digits overlap, the pixel belongs to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lossledger.errors import InputError, InputTypeError, UnknownNameError

Split = Literal["training", "validation"]
FloatArray = NDArray[np.float32]
Region = tuple[FloatArray, ...]

CLASS_NAMES = ("digit 0", "digit 1", "digit 2", "digit 3", "digit 4")
RARE_CLASS = 4
RARE_SHARE = 1 / 25
SMALLEST_SIZE = 32
LARGEST_SIZE = 192

# A cut by position and not a random choice, which would put the hand of the same writer on both sides. A new writer
# seems to start at 1287: https://inria.github.io/scikit-learn-mooc/python_scripts/cross_validation_grouping.html.
FIRST_VALIDATION_DIGIT = 1287
# Training crops end before this share of the photograph's width and validation crops start there.
PHOTOGRAPH_CUT = 0.6

# Edge of the square that holds a digit, as a share of the scene's edge.
COMMON_EDGE = (24 / 64, 40 / 64)
RARE_EDGE = (16 / 64, 22 / 64)
MOST_COMMON_DIGITS = 3
PHOTOGRAPH_BRIGHTNESS = 0.45
DARKEST_COLOUR = 0.55
LOWEST_OPACITY = 0.85
# Ink of the 8x8 images goes from 0 to 16; half ink is the edge of a stroke.
FULL_INK = 16.0
STROKE_EDGE = 0.5


@dataclass(frozen=True)
class Scenes:
    """Images and masks of one split.

    Args:
        images: float32 of shape [N, 3, size, size], red, green and blue from 0 to 1.
        masks: float32 of shape [N, size, size, 5], 0 or 1; the last axis follows `class_names`.
        digit_ids: for each scene, the positions in `sklearn.datasets.load_digits` of its digits, in order of pasting.
        class_names: the name of each mask.

    Example:
        >>> scenes = make_scenes(scenes=2, size=32)
        >>> scenes.images.shape, scenes.masks.shape, len(scenes.digit_ids)
        ((2, 3, 32, 32), (2, 32, 32, 5), 2)

    Source: the data described at the top of this module.
    """

    images: FloatArray
    masks: FloatArray
    digit_ids: tuple[tuple[int, ...], ...]
    class_names: tuple[str, ...] = CLASS_NAMES


@dataclass(frozen=True)
class _Material:
    """What the scenes of one split may be made of."""

    ink: FloatArray
    ids_of_class: tuple[NDArray[np.int64], ...]
    photographs: Region


def make_scenes(scenes: int = 1536, size: int = 64, seed: int = 0, split: Split = "training") -> Scenes:
    """Make scenes of digits on photographs, the same bytes for the same arguments.

    The first scenes do not depend on how many are asked for. The two splits share no digit image and no part of a
    photograph.

    Args:
        scenes: number of scenes, 1 or more.
        size: edge of the square scenes in pixels, 32 to 192.
        seed: 0 or more; each split has its own sequence for the same seed.
        split: `"training"` or `"validation"`.

    Returns:
        The scenes; images as [N, 3, size, size], masks as [N, size, size, 5].

    Raises:
        InputTypeError: a number is not an integer.
        InputError: a number is out of its range.
        UnknownNameError: the split is neither of the two.

    Example:
        >>> validation = make_scenes(scenes=3, size=48, split="validation")
        >>> validation.images.shape
        (3, 3, 48, 48)
        >>> validation.class_names[4]
        'digit 4'

    Source: scikit-learn's `load_digits` and `load_sample_images`; credits at the top of this module.
    """
    _require_integer("scenes", scenes, 1, None)
    _require_integer("size", size, SMALLEST_SIZE, LARGEST_SIZE)
    _require_integer("seed", seed, 0, None)
    if split not in ("training", "validation"):
        raise UnknownNameError("split", split, ("training", "validation"))
    material = _load_material(split)
    random = np.random.default_rng([seed, 0 if split == "training" else 1])
    images = np.empty((scenes, 3, size, size), dtype=np.float32)
    masks = np.zeros((scenes, size, size, len(CLASS_NAMES)), dtype=np.float32)
    digit_ids = []
    for index in range(scenes):
        picture = _draw_background(material.photographs, size, random)
        digit_ids.append(_paste_digits(picture, masks[index], material, random))
        images[index] = picture.transpose(2, 0, 1)
    return Scenes(images=images, masks=masks, digit_ids=tuple(digit_ids))


def _require_integer(name: str, value: object, lowest: int, highest: int | None) -> None:
    """Raise unless the argument is an integer from `lowest` to `highest`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputTypeError(f"make_scenes: {name} must be an integer; received {value!r}. Pass a whole number.")
    if value < lowest or (highest is not None and value > highest):
        expected = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
        raise InputError(f"make_scenes: {name} must be {expected}; received {value}. Choose a value in this range.")


def _load_material(split: Split) -> _Material:
    """Read the digits and the parts of the photographs that belong to the split."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    position = np.arange(len(digits.target))
    belongs = (position < FIRST_VALIDATION_DIGIT) == (split == "training")
    ids = tuple(np.flatnonzero(belongs & (digits.target == label)) for label in range(len(CLASS_NAMES)))
    photographs = []
    for photograph in load_sample_images().images:
        cut = int(photograph.shape[1] * PHOTOGRAPH_CUT)
        part = photograph[:, :cut] if split == "training" else photograph[:, cut:]
        photographs.append((part / 255.0).astype(np.float32))
    return _Material((digits.images / FULL_INK).astype(np.float32), ids, tuple(photographs))


def _draw_background(photographs: Region, size: int, random: np.random.Generator) -> FloatArray:
    """Crop a photograph at a random place and scale, mirror it at random, darken it; [size, size, 3]."""
    photograph = photographs[random.integers(len(photographs))]
    height, width = photograph.shape[:2]
    edge = int(random.integers(size, min(2 * size, height, width) + 1))
    top = int(random.integers(height - edge + 1))
    left = int(random.integers(width - edge + 1))
    crop = photograph[top : top + edge, left : left + edge]
    channels = [_resize(crop[:, :, channel], size, size) for channel in range(3)]
    picture = np.stack(channels, axis=2) * np.float32(PHOTOGRAPH_BRIGHTNESS)
    return np.ascontiguousarray(picture[:, ::-1] if random.random() < 0.5 else picture)


def _resize(plane: FloatArray, height: int, width: int) -> FloatArray:
    """Scale one channel with bilinear interpolation."""
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


def _paste_digits(
    picture: FloatArray, mask: FloatArray, material: _Material, random: np.random.Generator
) -> tuple[int, ...]:
    """Draw the digits of one scene into its picture and its masks; return their positions in the data."""
    count = int(random.integers(1, MOST_COMMON_DIGITS + 1))
    labels = [int(label) for label in random.integers(RARE_CLASS, size=count)]
    if random.random() < RARE_SHARE:
        # Anywhere in the order, so that the rare digit is not always the one on top.
        labels.insert(int(random.integers(count + 1)), RARE_CLASS)
    pasted = []
    for label in labels:
        digit_id = int(random.choice(material.ids_of_class[label]))
        _paste_digit(picture, mask[:, :, label], material.ink[digit_id], label, random)
        pasted.append(digit_id)
    return tuple(pasted)


def _paste_digit(
    picture: FloatArray, mask: FloatArray, ink: FloatArray, label: int, random: np.random.Generator
) -> None:
    """Draw one digit at a random place, scale and colour, and set its pixels in the mask of its class."""
    size = picture.shape[0]
    smallest, largest = RARE_EDGE if label == RARE_CLASS else COMMON_EDGE
    edge = int(random.integers(round(smallest * size), round(largest * size) + 1))
    top, left = (int(corner) for corner in random.integers(size - edge + 1, size=2))
    colour = random.uniform(DARKEST_COLOUR, 1.0, size=3).astype(np.float32)
    opacity = np.float32(random.uniform(LOWEST_OPACITY, 1.0))
    stroke = _resize(ink, edge, edge)
    # The transition is centred on the edge of the mask, so that a stroke fades out half inside and half outside.
    cover = opacity * np.clip((stroke - STROKE_EDGE) * 2 + 0.5, 0, 1)[:, :, None]
    window = picture[top : top + edge, left : left + edge]
    window[...] = window * (1 - cover) + colour * cover
    mask[top : top + edge, left : left + edge][stroke >= STROKE_EDGE] = 1.0
