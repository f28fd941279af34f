"""What a row of the loss suites declares, and the mistakes that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import inputs
from lossledger.errors import InputError, InputTypeError, LossledgerError, UnknownNameError
from lossledger.losses.elementwise import ElementLoss

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Mistake:
    """A call that a loss must refuse.

    Args:
        name: of the mistake.
        make: makes it from a loss and good targets and predictions, as tensors.
        error: class of the error.
        words: what the message must contain.
    """

    name: str
    make: Callable[[Any, torch.Tensor, torch.Tensor], Any]
    error: type[LossledgerError]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """A loss under test.

    Args:
        name: of the row.
        make: makes the loss from a reduction.
        inputs: from a generator and entry shape (B, d…) to (y_true, y_pred) in float64.
        elements: oracle of the elements, [B, d…, C] (C = 1 where the loss has no class axis); `None` where a loss is no
            mean of elements of their own, and `whole` says its value.
        closed: whether the gradient has a closed form of its own.
        kinds: groups that the tally can divide into.
        whole: oracle of the value, from targets, predictions, a weight and a mask for each entry.
        per_sample: whether an entry is a whole sample, also where the inputs have more axes.
        refused: arguments that the class must refuse, each with a value.
        mistakes: calls to refuse beside those that follow from the inputs.
        one_graph: whether `torch.compile` makes one graph of a call.
        batched: whether torch can vectorise all of the operations for `vmap`.
    """

    name: str
    make: Callable[..., Any]
    inputs: Callable[[np.random.Generator, tuple[int, ...]], Arrays]
    elements: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    closed: bool = True
    kinds: tuple[str, ...] = ("class", "sample", "column")
    whole: Callable[..., float] | None = None
    per_sample: bool = False
    refused: tuple[tuple[str, Any], ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    one_graph: bool = True
    batched: bool = True

    def all_mistakes(self) -> list[Mistake]:
        """What every loss refuses, what follows from the kind of the inputs, and what the row adds."""
        loss = self.make()
        found = [*EVERYWHERE, *self.mistakes]
        if getattr(loss, "space", None) == "probabilities":
            found += probabilities("from_logits" if "from_logits" in loss.get_config() else "takes no logits")
        # A loss of the caller's own judges by itself which shapes and values go together.
        if isinstance(loss, ElementLoss):
            found += [*OUTPUTS, *BY_TARGET.get(inputs.TARGETS.get(self.inputs), ())]
        return found


def with_first(values: torch.Tensor, value: float) -> torch.Tensor:
    """A copy whose first number is another."""
    changed = values.clone() if values.is_floating_point() or float(value).is_integer() else values.double()
    changed.view(-1)[0] = value
    return changed


def with_weight(shape: Callable[[int], tuple[int, ...]]) -> Callable[..., Any]:
    return lambda loss, y, p: loss(y, p, torch.ones(shape(len(p))))


EVERYWHERE = (
    Mistake("fewer-targets", lambda loss, y, p: loss(y[1:], p), InputError, ("y_true", "y_pred")),
    Mistake("more-targets", lambda loss, y, p: loss(torch.cat((y, y)), p), InputError, ("y_true", "y_pred")),
    Mistake("target-is-none", lambda loss, y, p: loss(None, p), InputTypeError, ("y_true", "NoneType")),
    Mistake("target-is-text", lambda loss, y, p: loss(np.array(["a"]), p), InputTypeError, ("y_true", "numbers")),
    Mistake("output-is-ragged", lambda loss, y, p: loss(y, [[1.0], [1.0, 2.0]]), InputTypeError, ("y_pred",)),
    Mistake("output-is-complex", lambda loss, y, p: loss(y, p + 0j), InputTypeError, ("y_pred", "real")),
    Mistake("target-is-complex", lambda loss, y, p: loss(y + 0j, p), InputTypeError, ("y_true", "real")),
    Mistake("swapped", lambda loss, y, p: loss(y.double().requires_grad_(), p), InputError, ("y_true", "Swap")),
    Mistake("longer-weight", with_weight(lambda samples: (samples + 1,)), InputError, ("sample_weight", "received (")),
    Mistake("weight-of-one", with_weight(lambda samples: (1,)), InputError, ("sample_weight", "received (")),
    Mistake("weight-of-rank-5", with_weight(lambda samples: (samples, 1, 1, 1, 1)), InputError, ("sample_weight",)),
    Mistake(
        "complex-weight", lambda loss, y, p: loss(y, p, np.ones(len(p)) + 1j), InputTypeError, ("sample_weight", "real")
    ),
    Mistake("weight-is-text", lambda loss, y, p: loss(y, p, "ones"), InputTypeError, ("sample_weight", "str")),
    Mistake(
        "longer-mask", lambda loss, y, p: loss(y, p, mask=torch.ones(len(p) + 1)), InputError, ("mask", "received (")
    ),
    Mistake(
        "mask-is-a-weight",
        lambda loss, y, p: loss(y, p, mask=torch.full((len(p),), 0.5)),
        InputError,
        ("mask", "0 and 1"),
    ),
    Mistake("group", lambda loss, y, p: loss.tally(y, p, by="clas"), InputError, ("'clas'", "by")),
    Mistake(
        "reduction",
        lambda loss, y, p: type(loss)(**{**loss.get_config(), "reduction": "men"}),
        UnknownNameError,
        ("Invalid value for argument `reduction`", "Did you mean 'mean'"),
    ),
    Mistake(
        "dtype",
        lambda loss, y, p: type(loss)(**{**loss.get_config(), "dtype": "float33"}),
        InputTypeError,
        ("dtype", "float33"),
    ),
)
"""What every loss refuses."""

OUTPUTS = (
    Mistake("no-class", lambda loss, y, p: loss(y, p[..., :0]), InputError, ("y_pred",)),
    Mistake("scalars", lambda loss, y, p: loss(1.0, 0.5), InputError, ("batch",)),
)


def probabilities(remedy: str) -> list[Mistake]:
    """What a loss of probabilities refuses, with the remedy that this loss has for logits."""
    return [
        Mistake("above-1", lambda loss, y, p: loss(y, with_first(p, 3)), InputError, ("[0, 1]", "3", remedy)),
        Mistake("below-0", lambda loss, y, p: loss(y, with_first(p, -1)), InputError, ("[0, 1]", "-1", remedy)),
    ]


POSITIONS = Mistake("fewer-positions", lambda loss, y, p: loss(y[:, :-1], p), InputError, ("y_true", "same shape"))

COLUMNS = (
    POSITIONS,
    Mistake("fewer-columns", lambda loss, y, p: loss(y[..., :-1], p), InputError, ("must have the same shape",)),
    Mistake("one-column", lambda loss, y, p: loss(y[..., :1], p), InputError, ("must have the same shape",)),
    Mistake(
        "class-axis-first", lambda loss, y, p: loss(y, p.movedim(-1, 1)), InputError, ("must have the same shape",)
    ),
)

SHARES = (
    *COLUMNS,
    Mistake("target-above-1", lambda loss, y, p: loss(with_first(y, 2), p), InputError, ("received 2",)),
    Mistake("target-is-nan", lambda loss, y, p: loss(with_first(y, np.nan), p), InputError, ("received nan",)),
)

BY_TARGET: dict[str | None, tuple[Mistake, ...]] = {
    "real": COLUMNS,
    "shares": SHARES,
    "signs": (
        *COLUMNS,
        Mistake("label-2", lambda loss, y, p: loss(with_first(y, 2), p), InputError, ("0 and 1", "received 2")),
    ),
    "labels": (
        POSITIONS,
        Mistake("label-too-big", lambda loss, y, p: loss(with_first(y, 3), p), InputError, ("0 to 2", "3 at")),
        Mistake("label-too-small", lambda loss, y, p: loss(with_first(y, -1), p), InputError, ("0 to 2", "-1 at")),
        Mistake("label-is-fraction", lambda loss, y, p: loss(with_first(y, 0.5), p), InputError, ("integers", "0.5")),
        Mistake("label-is-nan", lambda loss, y, p: loss(with_first(y, np.nan), p), InputError, ("integers", "nan")),
        Mistake("label-is-bool", lambda loss, y, p: loss(y > 0, p), InputTypeError, ("integer", "torch.bool")),
        Mistake(
            "one-hot", lambda loss, y, p: loss(torch.nn.functional.one_hot(y, 3), p), InputError, ("one-hot", "argmax")
        ),
        Mistake(
            "class-axis-first",
            lambda loss, y, p: loss(y, p.movedim(-1, 1)),
            InputError,
            ("must have the same shape up until the last dimension", "axis=1"),
        ),
    ),
}
