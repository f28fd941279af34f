"""Overlap losses: Dice, Jaccard, Tversky, and curves of them."""

from __future__ import annotations

import torch

from lossledger.errors import InputError
from lossledger.losses.links import Curve, LogCosh, Power
from lossledger.losses.ratio import EPSILON, Overlap, Policies
from lossledger.reduction import Reduction


class Dice(Overlap):
    """Dice loss: `1 − (2 Σ y·p + s_n) / (Σ y + Σ p + s_d)`.

    Args:
        axis: axes of the sums. `None`: all, also the batch (Keras's default): one number. `(1, 2)` on `[B, H, W, C]`:
            a loss for each sample and column, then their mean. `(0, 1, 2)`: one for each column over the whole batch.
        from_logits: `False` for probabilities, `"sigmoid"` or `"softmax"` for logits.
        smooth: s_d > 0, added to the divisor.
        grouping: in place of `axis`: one ratio for `"all"`, for each `"sample"`, each `"class"` over the whole batch,
            or each `"sample_class"`.
        smooth_numerator: s_n from 0 to s_d, added to the score's numerator. `None` is s_d: where target and
            prediction are empty the score is 1. With 0 it is 0 there (Keras).
        include_background: `False` leaves class 0 out of sums and mean; a softmax still reads its output.
        squared: `True` puts `Σ y² + Σ p²` into the divisor.
        absent: what a cell without target does: `"keep"` the formula, `"zero"` costs nothing and stays in the mean,
            `"skip"` leaves the mean. What is absent is decided over the whole window, not over its parts.
        reduction: of the kept cells; `sum` adds them, the others take their mean.
        name: name of the term.
        dtype: dtype of the result.

    Weights: on reduced axes they enter the sums (a sample of weight 2 counts twice), on kept axes they multiply.

    Divides by: Σ y + Σ p of each cell, then the number of cells.

    Raises:
        InputError: shapes that differ, probabilities or targets outside [0, 1], both axis and grouping.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.Dice()([[1.0, 0.0]], [[0.5, 0.5]])), 4)
        0.5
        >>> round(float(ll.losses.Dice(grouping="class", absent="skip")([[1.0, 0.0]], [[0.5, 0.5]])), 4)
        0.3333

    Source: Milletari et al. 2016 (with squares); keras.losses.Dice 3.15 (s_n = 0); monai.losses.DiceLoss 1.6
        (`smooth_nr`, `include_background`, `squared_pred`, `batch`); segmentation_models.pytorch 0.6 (absent: zero).
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "dice",
        axis: int | tuple[int, ...] | None = None,
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
        *,
        grouping: str | None = None,
        smooth_numerator: float | None = None,
        include_background: bool = True,
        squared: bool = False,
        absent: str = "keep",
    ) -> None:
        policies = Policies(grouping, smooth_numerator, include_background, squared, absent)
        super().__init__((2.0, 1.0, 1.0), axis, from_logits, smooth, name, reduction, dtype, policies)


class LogCoshDice(Dice):
    """`log cosh` of the Dice loss of each cell: a smooth curve, about ½x² for a small loss x.

    Args:
        axis: axes of the sums, as for `Dice`.
        from_logits: `False`, `"sigmoid"` or `"softmax"`.
        smooth: as for `Dice`, as all further arguments.
        grouping: see `Dice`.
        smooth_numerator: see `Dice`.
        include_background: see `Dice`.
        squared: see `Dice`.
        absent: see `Dice`.
        reduction: of the kept cells.
        name: name of the term.
        dtype: dtype of the result.

    Divides by: as `Dice`; the curve is applied to each cell, over the whole window.

    Raises:
        InputError: as `Dice`.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.LogCoshDice()([[1.0, 0.0]], [[0.5, 0.5]])), 4)
        0.1201

    Source: Jadon 2020.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "log_cosh_dice",
        axis: int | tuple[int, ...] | None = None,
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
        *,
        grouping: str | None = None,
        smooth_numerator: float | None = None,
        include_background: bool = True,
        squared: bool = False,
        absent: str = "keep",
    ) -> None:
        super().__init__(
            reduction,
            name,
            axis,
            dtype,
            from_logits,
            smooth,
            grouping=grouping,
            smooth_numerator=smooth_numerator,
            include_background=include_background,
            squared=squared,
            absent=absent,
        )

    @property
    def _curve(self) -> Curve | None:
        return LogCosh()


class Jaccard(Overlap):
    """Jaccard (intersection over union) loss: `1 − (Σ y·p + s_n) / (Σ y + Σ p − Σ y·p + s_d)`.

    Args:
        axis: axes of the sums, as for `Dice`.
        from_logits: `False`, `"sigmoid"` or `"softmax"`.
        smooth: s_d > 0, added to the divisor.
        grouping: see `Dice`.
        smooth_numerator: see `Dice`.
        include_background: see `Dice`.
        squared: `True` puts `Σ y² + Σ p² − Σ y·p` into the divisor.
        absent: see `Dice`.
        reduction: of the kept cells.
        name: name of the term.
        dtype: dtype of the result.

    Divides by: the union of each cell, then the number of cells.

    Raises:
        InputError: as `Dice`.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.Jaccard()([[1.0, 0.0]], [[0.5, 0.5]])), 4)
        0.6667

    Source: Jaccard 1912; soft form as in segmentation_models.pytorch 0.6.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "jaccard",
        axis: int | tuple[int, ...] | None = None,
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
        *,
        grouping: str | None = None,
        smooth_numerator: float | None = None,
        include_background: bool = True,
        squared: bool = False,
        absent: str = "keep",
    ) -> None:
        policies = Policies(grouping, smooth_numerator, include_background, squared, absent)
        super().__init__((1.0, 1.0, 1.0), axis, from_logits, smooth, name, reduction, dtype, policies)


class Tversky(Overlap):
    """Tversky loss: `1 − (TP + s_n) / (TP + α·FP + β·FN + s_d)`.

    Args:
        alpha: α ≥ 0, the weight of false positives.
        beta: β ≥ 0, the weight of false negatives. Above α it favours recall.
        axis: axes of the sums, as for `Dice`.
        from_logits: `False`, `"sigmoid"` or `"softmax"`.
        smooth: s_d > 0, added to the divisor.
        grouping: see `Dice`.
        smooth_numerator: see `Dice`.
        include_background: see `Dice`.
        squared: FP is `Σ p² − y·p` and FN `Σ y² − y·p`; for α = β only, since else the score could pass 1.
        absent: see `Dice`.
        reduction: of the kept cells.
        name: name of the term.
        dtype: dtype of the result.

    Divides by: TP + α·FP + β·FN of each cell, then the number of cells.

    Raises:
        InputError: as `Dice`; a negative weight; squares with α ≠ β.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.Tversky(alpha=0.3, beta=0.7)([[1.0, 0.0]], [[0.5, 0.5]])), 4)
        0.5

    Source: Salehi et al. 2017. Keras 3.15 swaps the two weights (alpha multiplies false negatives there).
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "tversky",
        axis: int | tuple[int, ...] | None = None,
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
        *,
        grouping: str | None = None,
        smooth_numerator: float | None = None,
        include_background: bool = True,
        squared: bool = False,
        absent: str = "keep",
    ) -> None:
        policies = Policies(grouping, smooth_numerator, include_background, squared, absent)
        super().__init__((1.0, alpha, beta), axis, from_logits, smooth, name, reduction, dtype, policies)
        if alpha < 0 or beta < 0:
            raise InputError(f"{self.name}: alpha and beta must not be negative; received {alpha!r} and {beta!r}.")
        if squared and alpha != beta:
            raise InputError(
                f"{self.name}: squared=True needs alpha = beta, received {alpha!r} and {beta!r}: otherwise a good "
                "prediction could score more than 1. Use Dice or Jaccard with squares."
            )
        self.alpha = alpha
        self.beta = beta


class FocalTversky(Tversky):
    """Power of the Tversky loss of each cell: `(1 − TI)^γ`.

    γ here is the exponent itself. γ > 1 turns well-found cells down, as in a focal cross-entropy; γ < 1 keeps their
    gradient large. The paper writes `(1 − TI)^(1/γ)` with γ = 4/3, which is the exponent 0.75 here, the default.

    Args:
        alpha: α ≥ 0, the weight of false positives (the paper gives the letter to false negatives).
        beta: β ≥ 0, the weight of false negatives.
        gamma: γ > 0, the exponent.
        axis: axes of the sums, as for `Dice`.
        from_logits: `False`, `"sigmoid"` or `"softmax"`.
        smooth: as for `Tversky`, as all further arguments.
        grouping: see `Dice`.
        smooth_numerator: see `Dice`.
        include_background: see `Dice`.
        squared: see `Tversky`.
        absent: see `Dice`.
        reduction: of the kept cells.
        name: name of the term.
        dtype: dtype of the result.

    Divides by: as `Tversky`; the power is applied to each cell, over the whole window.

    Raises:
        InputError: as `Tversky`; γ that is not positive.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.FocalTversky(gamma=2.0)([[1.0, 0.0]], [[0.5, 0.5]])), 4)
        0.25

    Source: Abraham and Khan 2019. segmentation_models.pytorch 0.6 takes the power of the mean over classes.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 0.75,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "focal_tversky",
        axis: int | tuple[int, ...] | None = None,
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
        *,
        grouping: str | None = None,
        smooth_numerator: float | None = None,
        include_background: bool = True,
        squared: bool = False,
        absent: str = "keep",
    ) -> None:
        self.gamma = gamma
        super().__init__(
            alpha,
            beta,
            reduction,
            name,
            axis,
            dtype,
            from_logits,
            smooth,
            grouping=grouping,
            smooth_numerator=smooth_numerator,
            include_background=include_background,
            squared=squared,
            absent=absent,
        )
        if not gamma > 0:
            raise InputError(f"{self.name}: gamma must be positive, received {gamma!r}.")

    @property
    def _curve(self) -> Curve | None:
        return Power(self.gamma)
