"""Cross-entropies that turn easy elements down: focal forms, and the asymmetric one of many labels.

Notation as in `lossledger.losses.classification`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lossledger.errors import InputError, InputTypeError
from lossledger.losses.aligned import Aligned
from lossledger.losses.classification import EPSILON, BinaryCrossentropy, CategoricalCrossentropy, normalised
from lossledger.reduction import Reduction


class BinaryFocalCrossentropy(BinaryCrossentropy):
    """Binary cross-entropy with easy elements turned down: `(1 − p_t)^γ · bce`.

    `p_t = y·p + (1 − y)(1 − p)` is the probability given to the target. With `apply_class_balancing` elements are
    also multiplied by `y·α + (1 − y)(1 − α)`; otherwise `alpha` has no effect (as in Keras).

    Args:
        apply_class_balancing: multiply by α.
        alpha: α in [0, 1], the weight of the present class.
        gamma: γ ≥ 0; 0 gives binary cross-entropy.
        from_logits: as for `BinaryCrossentropy`.
        label_smoothing: as for `BinaryCrossentropy`.
        axis: class axis.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Divides by: unmasked entries × C.

    Raises:
        InputError: as `BinaryCrossentropy`.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.BinaryFocalCrossentropy(gamma=2)([[0.0, 1.0]], [[0.1, 0.6]])), 4)
        0.0414

    Source: Lin et al. 2017; keras.losses.BinaryFocalCrossentropy 3.15.
    """

    def __init__(
        self,
        apply_class_balancing: bool = False,
        alpha: float = 0.25,
        gamma: float = 2.0,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "binary_focal_crossentropy",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype)
        if isinstance(alpha, list | tuple) or getattr(alpha, "ndim", 0) > 0:
            raise InputTypeError(
                f"{self.name}: expected one number as alpha, the weight of entries where a class is present; received "
                f"{alpha!r}. For a number a class use class_weight."
            )
        if gamma < 0 or not 0 <= alpha <= 1:
            raise InputError(f"{self.name}: expected gamma >= 0 and alpha in [0, 1], received {gamma!r} and {alpha!r}.")
        self.apply_class_balancing = apply_class_balancing
        self.alpha = alpha
        self.gamma = gamma

    def _elements(self, batch: Aligned) -> Tensor:
        y, bce = self._targets(batch), super()._elements(batch)
        p = batch.prediction.sigmoid() if self.from_logits else batch.prediction.raw
        focal = (1 - (y * p + (1 - y) * (1 - p))) ** self.gamma * bce
        return focal * (y * self.alpha + (1 - y) * (1 - self.alpha)) if self.apply_class_balancing else focal

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        return None


class CategoricalFocalCrossentropy(CategoricalCrossentropy):
    """Categorical cross-entropy with easy entries turned down: `Σ_k α (1 − q_k)^γ · (−y_k log q_k)`.

    Args:
        alpha: α, one number or one a class; always multiplies (as in Keras).
        gamma: γ ≥ 0.
        from_logits: as for `CategoricalCrossentropy`.
        label_smoothing: as for `CategoricalCrossentropy`.
        axis: class axis.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Divides by: unmasked entries.

    Raises:
        InputError: as `CategoricalCrossentropy`.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.CategoricalFocalCrossentropy()([[0.0, 1.0]], [[0.1, 0.9]])), 6)
        0.000263

    Source: Lin et al. 2017; keras.losses.CategoricalFocalCrossentropy 3.15.
    """

    def __init__(
        self,
        alpha: float | tuple[float, ...] = 0.25,
        gamma: float = 2.0,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "categorical_focal_crossentropy",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype)
        if gamma < 0:
            raise InputError(f"{self.name}: expected gamma >= 0, received {gamma!r}.")
        self.alpha = tuple(alpha) if isinstance(alpha, list | tuple) else alpha
        self.gamma = gamma

    def _elements(self, batch: Aligned) -> Tensor:
        y = self._targets(batch)
        p = batch.prediction.softmax() if self.from_logits else batch.prediction.raw
        q = normalised(p)
        alpha = torch.as_tensor(self.alpha, dtype=q.dtype).to(q.device, non_blocking=True)
        if alpha.ndim and alpha.shape not in ((1,), q.shape[-1:]):
            raise InputError(
                f"{batch.where}: alpha must be one number, or one for each of the {q.shape[-1]} classes; received "
                f"{alpha.tolist()}."
            )
        entries = (alpha * (1 - q) ** self.gamma * (-y * q.log())).sum(-1, keepdim=True)
        return entries if self.from_logits else self._flagged_entry(entries, batch.prediction)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        return None


class AsymmetricMultiLabel(BinaryCrossentropy):
    """Focal cross-entropy of many labels of which few are present: absent ones are turned down more, easy ones dropped.

    Element `−y (1 − p)^γ₊ log p − (1 − y) p_m^γ₋ log(1 − p_m)` with `p_m = max(p − m, 0)`: an absent label that is
    given a probability up to m has no loss and no gradient.

    Args:
        gamma_positive: γ₊ ≥ 0, for present labels.
        gamma_negative: γ₋ ≥ 0, for absent labels.
        clip: m in [0, 1).
        from_logits: as for `BinaryCrossentropy`.
        label_smoothing: as for `BinaryCrossentropy`.
        axis: class axis.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, C]`; groups and class weights as for `BinaryCrossentropy`.

    Divides by: unmasked entries × C. The authors' code sums over everything: `reduction="sum"` is that sum over C.

    Raises:
        InputError: as `BinaryCrossentropy`; γ below 0, m outside [0, 1).

    Example:
        >>> import lossledger as ll
        >>> loss = ll.losses.AsymmetricMultiLabel(gamma_positive=1.0, gamma_negative=2.0, clip=0.1)
        >>> loss([[1.0, 0.0], [0.0, 0.0]], [[0.5, 0.6], [0.1, 0.05]], sample_weight=[1.0, 1.0])
        tensor(0.1300)

    Source: Ridnik et al. 2021 (which clips and focuses the same way; soft targets are ours).
    """

    def __init__(
        self,
        gamma_positive: float = 1.0,
        gamma_negative: float = 4.0,
        clip: float = 0.05,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "asymmetric_multi_label",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype)
        if gamma_positive < 0 or gamma_negative < 0 or not 0 <= clip < 1:
            raise InputError(
                f"{self.name}: expected gamma_positive >= 0, gamma_negative >= 0 and clip in [0, 1), received "
                f"{gamma_positive!r}, {gamma_negative!r} and {clip!r}."
            )
        self.gamma_positive = gamma_positive
        self.gamma_negative = gamma_negative
        self.clip = clip

    def _elements(self, batch: Aligned) -> Tensor:
        y = self._targets(batch)
        if self.from_logits:
            z = batch.prediction.raw
            log_present, log_absent = F.logsigmoid(z), F.logsigmoid(-z)
            p = batch.prediction.sigmoid()
        else:
            p = batch.prediction.raw.clamp(EPSILON, 1 - EPSILON)
            log_present, log_absent = p.log(), (1 - p).log()
        present = (self.gamma_positive * log_absent).exp() * log_present
        absent = (self.gamma_negative * log_present).exp() * log_absent
        if self.clip:
            # 1 − p_m is at least m, so its logarithm is exact; below m a power would have no derivative.
            above = p > self.clip
            shifted = (p - self.clip).where(above, 0.5)
            absent = (shifted**self.gamma_negative * (-shifted).log1p()).where(above, 0.0)
        elements = -(y * present + (1 - y) * absent)
        return elements if self.from_logits else self._flagged(elements, batch.prediction)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        return None
