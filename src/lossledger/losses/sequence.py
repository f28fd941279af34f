"""Losses of sequences whose alignment with the output is not known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.elementwise import ElementLoss
from lossledger.losses.prediction import Space
from lossledger.losses.regression import refuse_class_weight
from lossledger.reduction import Reduction
from lossledger.values import any_of, check_labels, shape_of, unwrapped
from lossledger.weighting import ClassWeight, Weighting, split_shape


class CTC(ElementLoss):
    """Connectionist temporal classification: `−log Σ P(path)` over the paths of T labels that spell the target.

    A path spells what is left of it when repetitions are joined and blanks are dropped. Label 0 is the blank; targets
    are padded with it at their end. All T steps of the output are read, and the value of a sample is not divided by
    the length of its target (`torch.nn.CTCLoss` with its default mean does).

    Args:
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B, S]`, logits `[B, T, C]` (no softmax); weights and masks `[B]`.

    Divides by: unmasked samples.

    Raises:
        InputError: shapes that do not fit, labels outside 0 … C−1 or after a 0, a target that T steps cannot
            spell (Keras: ∞).

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.CTC()([[1, 0]], [[[0.0, 0.0], [0.0, 0.0]]])), 4)
        0.2877

    Source: Graves et al. 2006; keras.losses.CTC 3.15.
    """

    space: Space = "logits"

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "ctc",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        split_shape(y_pred, where)
        for what, expected, received, rank in (
            ("Targets `y_true`", "(batch_size, max_length)", y_true, 2),
            ("Logits `y_pred`", "(batch_size, max_length, num_classes)", y_pred, 3),
        ):
            if received.ndim != rank or y_true.shape[0] != y_pred.shape[0]:
                raise InputError(
                    f"{where}: {what} are expected to be a tensor of shape `{expected}`, both of one batch; received "
                    f"y_true {shape_of(y_true)} and y_pred {shape_of(y_pred)}. Pad the labels of a batch with 0 to one "
                    "length."
                )
        return y_true, y_pred

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return (y_pred.shape[0], 1)

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        refuse_class_weight("a sequence", class_weight, where)

    def _safe(self, y_true: Tensor, y_pred: Tensor, weights: Weighting) -> tuple[Tensor, Tensor]:
        assert weights.mask is not None
        zero = torch.zeros((), dtype=y_true.dtype, device=y_true.device)
        half = torch.full((), 0.5, dtype=y_pred.dtype, device=y_pred.device)
        return torch.where(weights.mask, y_true, zero), torch.where(weights.mask.unsqueeze(-1), y_pred, half)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        check_labels(y_true, y_pred.shape[-1], where)
        before, after = y_true[:, :-1], y_true[:, 1:]
        if any_of((before == 0) & (after != 0)):
            raise InputError(
                f"{where}: 0 is the blank and pads labels at their end; expected no label after a 0, received one. "
                "Number the labels from 1."
            )
        # Between two equal labels a path needs a blank.
        needed = (y_true != 0).sum(1) + ((before == after) & (after != 0)).sum(1)
        if any_of(needed > y_pred.shape[1]):
            needed = unwrapped(needed)
            raise InputError(
                f"{where}: an output of T = {y_pred.shape[1]} steps cannot spell the target of sample "
                f"{int(needed.argmax())}; expected at least {int(needed.max())} steps. Shorten the target, use more "
                "steps, or mask the sample."
            )

    def _elements(self, batch: Aligned) -> Tensor:
        labels, logits = batch.y_true.long(), batch.prediction
        samples, steps, _ = logits.raw.shape
        if samples == 0:
            return logits.raw.sum((1, 2)).unsqueeze(-1)
        lengths = torch.full((samples,), steps, dtype=torch.long, device=labels.device)
        paths = logits.log_softmax().transpose(0, 1)
        return F.ctc_loss(paths, labels, lengths, (labels != 0).sum(1), reduction="none").unsqueeze(-1)
