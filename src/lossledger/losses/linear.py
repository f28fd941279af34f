"""Cross-entropy over a large vocabulary, from hidden states: the last layer is a part of the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lossledger.errors import InputError, InputTypeError
from lossledger.losses import groups as grouping
from lossledger.losses.aligned import Aligned
from lossledger.losses.chunks import Gradients, Head, LinearCrossentropyFunction, passed
from lossledger.losses.classification import IntegerLabels
from lossledger.losses.loss import By
from lossledger.losses.prediction import Prediction, Space
from lossledger.losses.reach import is_wanted
from lossledger.reduction import Reduction
from lossledger.tally import Groups, Tally
from lossledger.values import is_number, reciprocal, shape_of
from lossledger.weighting import ClassWeight, Weighting, as_tensor, split_shape

# A ledger row a word and epoch would be no ledger that anyone reads.
MOST_CLASSES = 10_000


class LinearCrossentropy(IntegerLabels):
    """Cross-entropy of integer labels from hidden states `h`, with logits `z = h · weightᵀ + bias` made in chunks.

    Entry `log Σ exp z − (1 − ε) z_y − ε mean z + ζ (log Σ exp z)²`, with ε the label smoothing and ζ the z-loss. The
    logits of the whole batch never exist at once: beside inputs and gradients a step needs `chunk_bytes`, at any
    vocabulary. The network returns what goes into its last layer, and the loss is given that layer:

        class Tokens(nn.Module):
            def __init__(self): ...; self.head = nn.Linear(512, 128_000, bias=False)
            def forward(self, x): return self.body(x)              # the head only where logits are wanted

        model.compile("adamw", ll.losses.LinearCrossentropy(net.head, ignore_class=-100))

    Loss and gradient of the weight are made in at least float32; the products are in the wider dtype of hidden states
    and weight. Rows that are masked or ignored are left out before the product. The gradient of the head goes to the
    `.grad` of its parameters as the step runs, and through autograd, once differentiable, where the loss is called.

    Args:
        head: an `nn.Linear`, or its weight `[V, D]`. It must be a part of the network, or the optimizer never sees it.
        ignore_class: a label whose entries are masked: they count nowhere, not in the divisor either.
        label_smoothing: ε in [0, 1).
        z_loss: ζ ≥ 0.
        chunk_bytes: what the logits of a chunk may take; at least one row is made at once. Below 32 rows at once the
            rounding errors of the weight's gradient grow past those of one big product.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B, d…]` or `[B, d…, 1]`, hidden states `[B, d…, D]`; entries, weights and masks `[B, d…]`.

    Divides by: unmasked entries whose label is not `ignore_class`.

    Raises:
        InputError: labels outside 0 … V−1, shapes that do not fit, a head that is sharded.

    Example:
        >>> import lossledger as ll, torch
        >>> head = torch.nn.Linear(8, 1000, bias=False)
        >>> hidden, labels = torch.randn(2, 5, 8), torch.randint(1000, (2, 5))
        >>> plain = torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
        >>> bool(torch.isclose(ll.losses.LinearCrossentropy(head)(labels, hidden), plain))
        True

    Source: the same value as torch.nn.functional.cross_entropy of a linear layer; the z-loss of de Brébisson and
    Vincent 2016, as PaLM (Chowdhery et al. 2022) uses it.
    """

    def __init__(
        self,
        head: nn.Linear | Tensor,
        ignore_class: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        chunk_bytes: int = 48 * 2**20,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "linear_crossentropy",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(True, label_smoothing, -1, name, reduction, dtype)
        weight = head if isinstance(head, Tensor) else getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            found = shape_of(weight) if isinstance(weight, Tensor) else type(head).__name__
            raise InputTypeError(
                f"{self.name}: head: expected a torch.nn.Linear or its weight [V, D], received {found}. Pass the last "
                "layer of the network."
            )
        for what, value in (("z_loss", z_loss), ("chunk_bytes", chunk_bytes)):
            if not is_number(value) or value < 0:
                raise InputError(f"{self.name}: {what}: expected a number of 0 or more, received {value!r}.")
        self.head, self.ignore_class, self.z_loss, self.chunk_bytes = head, ignore_class, float(z_loss), chunk_bytes

    @property
    def space(self) -> Space:  # type: ignore[override]
        """Hidden states are neither logits nor probabilities."""
        return None

    @property
    def classes_are(self) -> str | None:  # type: ignore[override]
        """Classes are labels; of a large vocabulary none has rows unless asked for with `by="label"`."""
        return "label" if len(self._layer().weight) <= MOST_CLASSES else None

    def class_count(self, y_pred: Tensor, class_weight: ClassWeight) -> int:
        """One class weight a word of the vocabulary."""
        return len(self._layer().weight)

    def align(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        mask: Any = None,
        class_weight: ClassWeight | None = None,
        where: str | None = None,
        checked: bool = False,
    ) -> Aligned:
        """One batch, checked; hidden states are neither copied nor widened, and masked ones never read."""
        where = where or self.name
        hidden = as_tensor(y_pred, f"{where}: y_pred")
        split_shape(hidden, where)
        weight = self._layer().weight
        if hidden.shape[-1] != weight.shape[1]:
            raise InputError(
                f"{where}: y_pred: expected hidden states [B, …, {weight.shape[1]}], what goes into the head of weight "
                f"{shape_of(weight)}; received {shape_of(hidden)}. Return them from the network instead of logits."
            )
        if hidden.device != weight.device:
            raise InputError(
                f"{where}: y_pred is on {hidden.device} and the weight of the head on {weight.device}; expected one "
                "device. Give the loss the layer of this network."
            )
        # One column stands for the rows; values of it are not looked at.
        column = hidden[..., :1]
        if (carried := getattr(y_pred, "_keras_mask", None)) is not None:
            column._keras_mask = carried  # type: ignore[attr-defined]
        batch = super().align(y_true, column, sample_weight, mask, class_weight, where, checked)
        return replace(batch, prediction=Prediction(hidden if hidden.is_floating_point() else hidden.to(weight)))

    def backprop_aligned(
        self, batch: Aligned, window: Tally | None, factor: float, by: By = None
    ) -> tuple[Tally, Tensor]:
        """The tally of an aligned batch and `factor` times the gradient; that of the head is added to its `.grad`."""
        whole = self.divisor_aligned(batch) if window is None else window
        layer, hidden = self._layer(), batch.prediction.raw.detach()
        rows = hidden.flatten(0, -2)
        scale = factor * reciprocal(whole.divisor + whole.offset, torch.float64)
        weights = self._entry_weight(batch)
        wide = scale if isinstance(scale, Tensor) else rows.new_full((), scale, dtype=torch.float64)
        factors = wide.double().expand(batch.weighting.shape)
        if weights is not None:
            factors = factors * weights
        found = Gradients(
            torch.zeros_like(rows, memory_format=torch.contiguous_format),
            _total(layer.weight),
            None if layer.bias is None else _total(layer.bias),
        )
        with torch.no_grad():
            labels = batch.y_true.long().reshape(-1)
            values = passed(rows, labels, layer, _kept(batch), factors.reshape(-1), found)
            for parameter, gradient in ((layer.weight, found.weight), (layer.bias, found.bias)):
                if parameter is not None and gradient is not None and gradient is not parameter.grad:
                    _accumulate(parameter, gradient)
        tally = self._tally_elements(batch, values.reshape(batch.weighting.shape), by)
        assert found.hidden is not None
        return tally, found.hidden.reshape(hidden.shape)

    def get_config(self) -> dict[str, Any]:
        """The arguments as plain values; in the place of the head, which belongs to the network, its shape [V, D]."""
        config = super().get_config()
        return config | {"head": list(self._layer().weight.shape)}

    def _layer(self) -> Head:
        """The last layer as it is now."""
        weight = self.head if isinstance(self.head, Tensor) else self.head.weight
        bias = None if isinstance(self.head, Tensor) else self.head.bias
        if hasattr(weight, "full_tensor"):
            raise InputError(
                f"{self.name}: the weight of the head is sharded; expected a whole one. Leave the head out of "
                "fully_shard, or give SparseCategoricalCrossentropy its logits."
            )
        return Head(weight, bias, self.label_smoothing, self.z_loss, self.chunk_bytes)

    def _classes(self, y_pred: Tensor) -> int:
        return len(self._layer().weight)

    def _elements(self, batch: Aligned) -> Tensor:
        layer = self._layer()
        rows, labels = batch.prediction.raw.flatten(0, -2), batch.y_true.long().reshape(-1)
        values = LinearCrossentropyFunction.apply(rows, layer.weight, layer.bias, labels, _kept(batch), layer)  # type: ignore[no-untyped-call]
        elements: Tensor = values.reshape(batch.weighting.shape)
        return elements

    def _groups(self, batch: Aligned, weighted: Tensor, total: Tensor, weights: Weighting, by: By) -> Groups:
        if by != "label" or self.classes_are == "label":
            return super()._groups(batch, weighted, total, weights, by)
        size, labels = self._labels(batch)
        return grouping.by_index("label", labels, grouping.keys_of(size), size, weighted, total, weights)


def _kept(batch: Aligned) -> Tensor | None:
    """Indices of the rows that count, `None` for all."""
    mask = batch.weighting.mask
    return None if mask is None else mask.expand(batch.weighting.shape).reshape(-1).nonzero().squeeze(1)


def _total(parameter: Tensor) -> Tensor | None:
    """Where the gradient of a parameter adds up: in its own `.grad` where that is wide enough."""
    if not is_wanted(parameter):
        return None
    grad = parameter.grad
    wide = torch.promote_types(parameter.dtype, torch.float32)
    if grad is not None and grad.dtype == wide and grad.is_contiguous():
        return grad
    return torch.zeros_like(parameter, dtype=wide, memory_format=torch.contiguous_format).detach()


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    found = gradient.to(parameter.dtype)
    parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)
