"""Asymmetric focal losses: class 0 is the background and is focused; the other classes are rare and are not."""

from __future__ import annotations

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.classification import EPSILON, CategoricalCrossentropy
from lossledger.losses.expression import Expression
from lossledger.losses.links import Curve, Power
from lossledger.losses.ratio import Overlap, Policies
from lossledger.reduction import Reduction


def _check_delta(delta: float, name: str) -> None:
    if not 0 <= delta <= 1:
        raise InputError(f"{name}: delta must be in [0, 1], received {delta!r}.")


class AsymmetricFocal(CategoricalCrossentropy):
    """Cross-entropy focused on the background alone: `−(1 − δ)(1 − q_0)^γ y_0 log q_0 − δ Σ_{k≥1} y_k log q_k`.

    `q = clip(p, ε, 1 − ε)` with ε = 1e-7; probabilities are taken as they are, without making them sum to 1.

    Args:
        delta: δ in [0, 1], the weight of the foreground; the background has 1 − δ.
        gamma: γ ≥ 0, turns easy background down.
        from_logits: `True` for logits of a softmax.
        axis: class axis of the output; class 0 is the background.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, K]`; entries, weights and masks `[B, d…]`.

    Divides by: unmasked entries.

    Raises:
        InputError: as `CategoricalCrossentropy`; δ or γ out of range.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.AsymmetricFocal()([[0.0, 1.0]], [[0.5, 0.5]])), 4)
        0.4852

    Source: Yeung et al. 2022; monai.losses.AsymmetricFocalLoss 1.6 (two classes; ours sums over the foreground).
    """

    def __init__(
        self,
        delta: float = 0.7,
        gamma: float = 2.0,
        from_logits: bool = False,
        axis: int = -1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "asymmetric_focal",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(from_logits, 0.0, axis, reduction, name, dtype)
        _check_delta(delta, self.name)
        if not gamma >= 0:
            raise InputError(f"{self.name}: expected gamma >= 0, received {gamma!r}.")
        self.delta = delta
        self.gamma = gamma

    def _elements(self, batch: Aligned) -> Tensor:
        y = batch.y_true
        p = batch.prediction.softmax() if self.from_logits else batch.prediction.raw
        q = p.clamp(EPSILON, 1 - EPSILON)
        cross = -y * q.log()
        back = (1 - self.delta) * (1 - q[..., :1]) ** self.gamma * cross[..., :1]
        entries = back + self.delta * cross[..., 1:].sum(-1, keepdim=True)
        return entries if self.from_logits else self._flagged_entry(entries, batch.prediction)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        return None


class AsymmetricFocalTversky(Overlap):
    """Tversky loss whose foreground classes are raised: `1 − TI_0` and `(1 − TI_k)^(1 − γ)`, and their mean.

    `TI = (TP + ε) / (TP + δ·FN + (1 − δ)·FP + ε)` of each class. The exponent 1 − γ is below 1: it keeps the gradient
    of a foreground class large until the class is found.

    Args:
        delta: δ in [0, 1], the weight of false negatives; false positives have 1 − δ.
        gamma: γ in [0, 1).
        from_logits: `False`, `"sigmoid"` or `"softmax"`.
        smooth: ε > 0.
        grouping: `"sample_class"`: each sample and class, then their mean; `"class"`: each class over the whole window.
        absent: as for `Dice`.
        reduction: of the cells.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, K]`; class 0 is the background.

    Divides by: TP + δ·FN + (1 − δ)·FP of each cell, then the number of cells.

    Raises:
        InputError: as `Dice`; δ or γ out of range, another grouping.

    Example:
        >>> import lossledger as ll
        >>> masks, found = [[[1.0, 0.0], [0.0, 1.0]]], [[[0.5, 0.5], [0.5, 0.5]]]
        >>> round(float(ll.losses.AsymmetricFocalTversky(gamma=0.5)(masks, found)), 4)
        0.6036

    Source: Yeung et al. 2022; monai.losses.AsymmetricFocalTverskyLoss 1.6 (which clips probabilities by ε first).
    """

    def __init__(
        self,
        delta: float = 0.7,
        gamma: float = 0.75,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "asymmetric_focal_tversky",
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
        *,
        grouping: str = "sample_class",
        absent: str = "keep",
    ) -> None:
        self.gamma = gamma
        policies = Policies(grouping, absent=absent)
        super().__init__((1.0, 1 - delta, delta), None, from_logits, smooth, name, reduction, dtype, policies)
        _check_delta(delta, self.name)
        if not 0 <= gamma < 1:
            raise InputError(f"{self.name}: gamma must be in [0, 1), received {gamma!r}.")
        if grouping not in ("sample_class", "class"):
            raise InputError(
                f"{self.name}: grouping must be 'sample_class' or 'class', received {grouping!r}: background and "
                "foreground have curves of their own."
            )
        self.delta = delta

    @property
    def _curve(self) -> Curve | None:
        return Power(1 - self.gamma, first=1)


class AsymmetricUnifiedFocal(Expression):
    """Unified focal loss: `λ · AsymmetricFocal + (1 − λ) · AsymmetricFocalTversky`, two terms of the ledger.

    Args:
        weight: λ in [0, 1], of the cross-entropy.
        delta: δ of both.
        gamma: γ of both, in [0, 1).
        from_logits: `True` for logits of a softmax.
        reduction: of both.

    Divides by: each term as its class says.

    Raises:
        InputError: λ, δ or γ out of range.

    Example:
        >>> import lossledger as ll
        >>> [(weight, part.name) for weight, part in ll.losses.AsymmetricUnifiedFocal(0.4).terms]
        [(0.4, 'asymmetric_focal'), (0.6, 'asymmetric_focal_tversky')]

    Source: Yeung et al. 2022; monai.losses.AsymmetricUnifiedFocalLoss 1.6.
    """

    def __init__(
        self,
        weight: float = 0.5,
        delta: float = 0.7,
        gamma: float = 0.5,
        from_logits: bool = False,
        reduction: str | Reduction | None = "sum_over_batch_size",
    ) -> None:
        if not 0 <= weight <= 1:
            raise InputError(f"AsymmetricUnifiedFocal: weight must be in [0, 1], received {weight!r}.")
        cross = AsymmetricFocal(delta, gamma, from_logits, reduction=reduction)
        tversky = AsymmetricFocalTversky(delta, gamma, reduction, from_logits="softmax" if from_logits else False)
        super().__init__(((float(weight), cross), (1.0 - weight, tversky)))
