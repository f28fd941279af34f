"""The algebra of losses: weighted sums whose parts stay named terms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lossledger.errors import InputError, InputTypeError
from lossledger.losses.arguments import check_made, check_order
from lossledger.values import is_number

if TYPE_CHECKING:
    from lossledger.losses.loss import Loss


def check_loss(loss: Loss) -> None:
    """A loss of somebody's own called `super().__init__()`, and its `call` takes the targets first.

    Raises:
        InputTypeError: it did not.
        InputError: the arguments of `call` are named in torch's order.
    """
    check_made(loss, "Loss", "name", "reduction", "_dtype")
    check_order(loss.call, f"{type(loss).__name__}.call")


class Expression:
    """A weighted sum of losses on one output, each a named term: `0.5 * BinaryCrossentropy() + Dice()`.

    Args:
        terms: pairs of a coefficient and a loss.

    Raises:
        InputTypeError: a loss of your own that did not call `super().__init__()`.
        InputError: two terms of one name, or terms that read the output in different spaces (logits, probabilities).

    Example:
        >>> import lossledger as ll
        >>> loss = 0.5 * ll.losses.MeanSquaredError() + ll.losses.MeanAbsoluteError()
        >>> [(coefficient, part.name) for coefficient, part in loss.terms]
        [(0.5, 'mean_squared_error'), (1.0, 'mean_absolute_error')]
        >>> float(loss([[0.0]], [[2.0]]))
        4.0
    """

    def __init__(self, terms: tuple[tuple[float, Loss], ...]) -> None:
        for _, loss in terms:
            check_loss(loss)
        self.terms = terms
        names = [loss.name for _, loss in terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"Each term of a loss needs its own name; received {twice[0]!r} more than once. "
                "Give one of them another: for example Dice(name='dice_per_image')."
            )
        spaces = {loss.space: loss.name for _, loss in terms if loss.space is not None}
        if len(spaces) > 1:
            raise InputError(
                "The terms of one output read it in different spaces: "
                + ", ".join(f"{name!r} expects {space}" for space, name in spaces.items())
                + ". Give all of them from_logits, or none."
            )

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None) -> Tensor:
        """The sum of the terms, left to right."""
        values = [c * loss(y_true, y_pred, sample_weight, mask) for c, loss in self.terms]
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    def __iter__(self) -> Iterator[tuple[float, Loss]]:
        return iter(self.terms)

    def __mul__(self, factor: float) -> Expression:
        return Expression(tuple((factor_of(factor) * c, loss) for c, loss in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Expression:
        return Expression(tuple((c / divisor_of(divisor), loss) for c, loss in self.terms))

    def __add__(self, other: Loss | Expression) -> Expression:
        if isinstance(other, Expression):
            return Expression((*self.terms, *other.terms))
        # A loss knows by itself how to be added to an expression of one term.
        return self + 1.0 * other if hasattr(other, "tally") else NotImplemented

    def __radd__(self, other: object) -> Expression:
        return self if other == 0 and isinstance(other, int) else NotImplemented

    def __repr__(self) -> str:
        return " + ".join(repr(loss) if c == 1 else f"{_shown(c)} * {loss!r}" for c, loss in self.terms)


def _shown(coefficient: float) -> str:
    """A coefficient with all of its digits, and no more: reading it back gives the same number."""
    short = f"{coefficient:g}"
    return short if float(short) == coefficient else repr(coefficient)


def factor_of(factor: Any) -> float:
    """The coefficient of a term; only a finite number can multiply a loss.

    Raises:
        InputTypeError: no number.
        InputError: NaN or infinity.
    """
    if not is_number(factor):
        raise InputTypeError(
            f"A loss can be multiplied by a number only; received {type(factor).__name__}. "
            "To weigh samples, pass sample_weight in the call."
        )
    if not math.isfinite(factor):
        raise InputError(f"The factor of a loss: expected a finite number, received {float(factor)}.")
    return float(factor)


def divisor_of(divisor: Any) -> float:
    """What a loss can be divided by: a finite number but 0.

    Raises:
        InputTypeError: no number.
        InputError: 0, NaN or infinity.
    """
    number = factor_of(divisor)
    if number == 0:
        raise InputError("A loss cannot be divided by 0; expected another number, received 0.")
    return number
