"""The rows of `compare`: how each framework takes one of our losses with the same arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions import elements, fit, keras3, keras_classic, monai, optax, pytorch, smp, tf_keras
from lossledger.conventions.common import FrameworkError, NotSupported, Reduced, optional, tensor
from lossledger.losses import Loss

ERRORS = {"RuntimeError": "weights are used as given: (B,) is not expanded, and with a mask they are scaled in place"}
_OVERLAP = ("Dice", "Jaccard", "Tversky")
_SUMS = ("sum_over_batch_size", "mean")


@dataclass(frozen=True, slots=True)
class Batch:
    """One of our losses with its arguments, and the arrays as the caller gave them."""

    loss: Loss
    name: str
    options: dict[str, Any]
    reduction: str
    y_true: Any
    y_pred: Any
    sample_weight: Any
    mask: Any
    class_weight: Any

    @classmethod
    def of(cls, loss: Loss, y_true: Any, y_pred: Any, sample_weight: Any, mask: Any, class_weight: Any) -> Batch:
        """The batch, with class weights by index as a dict."""
        options = {k: v for k, v in loss.get_config().items() if k not in ("name", "reduction", "dtype")}
        if class_weight is not None and not isinstance(class_weight, Mapping):
            class_weight = {i: float(w) for i, w in enumerate(class_weight)}
        name, reduction = type(loss).__name__, loss.reduction.name
        return cls(loss, name, options, reduction, y_true, y_pred, sample_weight, mask, class_weight)

    @property
    def logits(self) -> Any:
        """What the loss takes as logits: `False`, `True`, `"sigmoid"` or `"softmax"`."""
        return self.options.get("from_logits", False)

    def probabilities(self) -> Tensor:
        """The predictions as an overlap loss reads them."""
        p = tensor(self.y_pred)
        if self.logits == "softmax" or (self.logits and self.name == "LovaszSoftmax"):
            return p.softmax(-1)
        return p.sigmoid() if self.logits else p

    def weight(self, entries: tuple[int, ...], use_mask: bool = True) -> Tensor | None:
        """Weights and mask in one, over the entries, expanded from the left."""
        found: Tensor | None = None
        for part in (self.sample_weight, self.mask if use_mask else None):
            if part is not None:
                w = tensor(part)
                w = w.reshape(*w.shape, *(1,) * (len(entries) - w.ndim)) if w.ndim <= len(entries) else w.squeeze(-1)
                found = w if found is None else found * w
        return None if found is None else found.expand(entries)


def _keras_options(batch: Batch, framework: str) -> tuple[dict[str, Any], Any]:
    """Options and predictions for the Keras family, where overlap losses take probabilities and an axis."""
    if type(batch.loss).__module__.split(".")[0] != "lossledger":
        raise NotSupported(f"{framework} has no {batch.name}")
    if batch.name not in _OVERLAP:
        return dict(batch.options), batch.y_pred
    changed = [k for k in ("smooth_numerator", "squared", "absent") if not _usual(batch, k)]
    changed += [] if batch.options["include_background"] else ["include_background"]
    if changed and (changed != ["smooth_numerator"] or batch.options["smooth_numerator"] != 0):
        raise NotSupported(f"{framework} has no {changed[0]}: its sums are over all classes, without squares")
    kept = {k: v for k, v in batch.options.items() if k in ("axis", "alpha", "beta")}
    if batch.options["grouping"] is not None:
        kept["axis"] = _axes(batch)
    return kept, batch.probabilities()


_USUAL = {"smooth_numerator": None, "squared": False, "absent": "keep", "include_background": True}


def _usual(batch: Batch, option: str) -> bool:
    """Whether an option of an overlap loss has its default."""
    return bool(batch.options[option] == _USUAL[option])


def _axes(batch: Batch) -> list[int]:
    """The axes of the sums of a grouping, as Keras takes them."""
    rank = keras3.align(tensor(batch.y_true), tensor(batch.y_pred))[1].ndim
    grouping = batch.options["grouping"]
    return list(range("sample" in grouping, rank - ("class" in grouping)))


def _of_keras3(batch: Batch, epsilon: float | None) -> tuple[Reduced, str]:
    options, y_pred = _keras_options(batch, "Keras 3")
    if batch.reduction not in keras3.REDUCTIONS:
        raise NotSupported(f"Keras 3 has no reduction {batch.reduction!r}")
    weight = batch.sample_weight
    if batch.class_weight is not None:
        weight = fit.keras3_class_weight(batch.y_true, batch.class_weight, weight)
    options["reduction"] = batch.reduction
    found = keras3.loss(batch.name, options, batch.y_true, y_pred, weight, batch.mask, epsilon)
    if batch.name == "Tversky":
        return found, "up to 3.15.1 alpha multiplies false negatives and beta false positives"
    if batch.reduction == "mean_with_sample_weight":
        return found, "divides by the weights as given, not as expanded over the entries"
    if weight is None and batch.mask is None:
        if batch.name in _OVERLAP:
            return found, "without target and prediction the loss is 1 there, and 0 here"
        return found, "values become float32, probabilities are clipped to [1e-7, 1 - 1e-7]"
    return found, "weights and masks are broadcast from the last axis, so that they may meet another axis"


def _of_tf_keras(batch: Batch, divide_by_all: bool) -> tuple[Reduced, str]:
    options, y_pred = _keras_options(batch, "tf_keras")
    if batch.reduction not in (*_SUMS, "sum", "none"):
        raise NotSupported(f"tf_keras has no reduction {batch.reduction!r}")
    weight = batch.sample_weight
    if batch.class_weight is not None:
        weight = fit.tf_keras_class_weight(batch.y_true, batch.class_weight, weight)
    options["reduction"] = batch.reduction
    if options.get("axis") == -1 and batch.name == "SparseCategoricalCrossentropy":
        del options["axis"]  # Its class in tf_keras takes none.
    found = tf_keras.loss(batch.name, options, batch.y_true, y_pred, weight, batch.mask, divide_by_all)
    if batch.mask is not None:
        return found, "masked entries stay in the divisor" if divide_by_all else "without a valid entry it divides by 0"
    return found, "adds 1e-7 inside the logarithms, or clips before it normalises"


def _of_classic(batch: Batch, epsilon: float) -> tuple[Reduced, str]:
    options, y_pred = _keras_options(batch, "Keras 2.2")
    if batch.reduction not in _SUMS:
        raise NotSupported("Keras 2.2 has only its mean")
    if any(v not in (False, 0.0, -1, None) for v in options.values()):
        raise NotSupported("the functions of Keras 2.2 take no arguments")
    weight = batch.sample_weight
    if batch.class_weight is not None:
        weight = fit.classic_class_weight(batch.y_true, batch.class_weight, weight)
    found = keras_classic.loss(batch.name, {}, batch.y_true, y_pred, weight, batch.mask, epsilon)
    if weight is not None and batch.mask is not None:
        return found, "divides by the share of valid entries and again by the share of non-zero weights"
    if weight is not None:
        return found, "samples of weight 0 leave the divisor"
    return found, "1e-7 is added to the mean of the mask" if epsilon else "without a valid entry it divides by 0"


def _labels(batch: Batch, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[N, K]` and labels `[N]` in which masked ones are −100."""
    p = tensor(batch.y_pred)
    logs = F.log_softmax(p, -1) if batch.logits else p.log()
    y = torch.as_tensor(batch.y_true).long()
    y = y.squeeze(-1) if y.ndim == p.ndim else y
    ignored = batch.options.get("ignore_class")
    y = y if ignored is None else y.masked_fill(y == ignored, -100)
    y = y if valid is None else y.masked_fill(~valid.bool().reshape(y.shape), -100)
    return logs.reshape(-1, p.shape[-1]), y.reshape(-1)


def _torch_sparse(batch: Batch) -> tuple[Reduced, str]:
    if batch.sample_weight is not None:
        raise NotSupported("CrossEntropyLoss takes no weight a sample")
    classes = tensor(batch.y_pred).shape[-1]
    weight = None
    if batch.class_weight is not None:
        weights = {int(k): float(v) for k, v in batch.class_weight.items()}
        weight = torch.tensor([weights.get(k, 1.0) for k in range(classes)])
    logs, labels = _labels(batch, optional(batch.mask, torch.bool))
    return pytorch.cross_entropy(logs, labels, weight), "divides by the class weights of the labels; 0/0 is NaN"


def _torch_elements(batch: Batch) -> tuple[Tensor, bool]:
    """The losses of elements, and whether the weights divide."""
    if batch.name in _OVERLAP:
        raise NotSupported(f"torch: no {batch.name} here")
    y, p = keras3.align(tensor(batch.y_true), tensor(batch.y_pred))
    if batch.options.get("label_smoothing") or batch.options.get("axis", -1) != -1:
        raise NotSupported("torch has no such argument")
    if batch.name == "MeanSquaredError":
        return F.mse_loss(p, y, reduction="none"), True
    if batch.name == "MeanAbsoluteError":
        return F.l1_loss(p, y, reduction="none"), True
    if batch.name == "Huber":
        return F.huber_loss(p, y, reduction="none", delta=batch.options["delta"]), False
    if batch.name == "BinaryCrossentropy":
        function = F.binary_cross_entropy_with_logits if batch.logits else F.binary_cross_entropy
        return function(p, y, reduction="none"), False
    raise NotSupported(f"torch: no {batch.name} here")


def _of_torch(batch: Batch) -> tuple[Reduced, str]:
    if batch.reduction not in _SUMS:
        raise NotSupported("shown for the mean only")
    if batch.name == "SparseCategoricalCrossentropy":
        return _torch_sparse(batch)
    if batch.class_weight is not None:
        raise NotSupported("only CrossEntropyLoss takes class weights")
    if batch.name == "CategoricalCrossentropy":
        if batch.sample_weight is not None or batch.mask is not None:
            raise NotSupported("CrossEntropyLoss with probabilities takes neither mask nor weight a sample")
        logs = F.log_softmax(tensor(batch.y_pred), -1) if batch.logits else tensor(batch.y_pred).log()
        losses = -(tensor(batch.y_true) * logs).sum(-1)
        return pytorch.weighted(losses, None, False), "probabilities are taken as they are, without a sum or a clip"
    found, by_weight = _torch_elements(batch)
    if batch.sample_weight is not None and torch.as_tensor(batch.sample_weight).ndim < found.ndim - 1:
        raise FrameworkError("ValueError", "weight= must have the shape of the predictions")
    weight = batch.weight(tuple(found.shape[:-1]))
    weight = None if weight is None else weight.unsqueeze(-1).expand_as(found)
    reason = "weight= (mask times weights, expanded) divides too; 0/0 is NaN"
    return pytorch.weighted(found, weight, by_weight), reason if by_weight else "every element stays in the divisor"


def _optax_elements(batch: Batch) -> Tensor:
    y, p = keras3.align(tensor(batch.y_true), tensor(batch.y_pred))
    plain = not batch.options.get("label_smoothing") and batch.options.get("axis", -1) == -1
    if batch.name == "MeanSquaredError":
        return optax.squared_error(y, p).mean(-1)
    if batch.name == "MeanAbsoluteError":
        return optax.absolute_error(y, p).mean(-1)
    if batch.name == "Huber":
        return optax.huber_loss(y, p, delta=batch.options["delta"]).mean(-1)
    if batch.logits and plain and batch.name == "BinaryCrossentropy":
        return optax.sigmoid_binary_cross_entropy(y, p).mean(-1)
    if batch.logits and plain and batch.name == "CategoricalCrossentropy":
        return optax.softmax_cross_entropy(y, p)
    if batch.logits and plain and batch.name == "SparseCategoricalCrossentropy":
        y = y.squeeze(-1) if y.ndim == p.ndim else y
        return optax.softmax_cross_entropy_with_integer_labels(y, p)
    raise NotSupported(f"optax: no {batch.name} here; its cross-entropies take logits, its Dice adds 1")


def _of_optax(batch: Batch) -> tuple[Reduced, str]:
    if batch.class_weight is not None or batch.reduction not in _SUMS:
        raise NotSupported("optax does not reduce; shown for the idiom of a weighted mean")
    losses = _optax_elements(batch)
    reason = "the usual idiom sum(l*w)/sum(w) divides by the weights; 0/0 is NaN"
    return optax.idiom(losses, batch.weight(tuple(losses.shape))), reason


def _image(values: Tensor) -> Tensor:
    """Channels last to channels first."""
    return values.movedim(-1, 1) if values.ndim > 2 else values.unsqueeze(-1)


def _segmentation(batch: Batch, framework: str) -> tuple[Tensor, Tensor]:
    if batch.name not in _OVERLAP:
        raise NotSupported(f"{framework} has no {batch.name}")
    return _unweighted(batch, framework)


def _unweighted(batch: Batch, framework: str) -> tuple[Tensor, Tensor]:
    """Targets and predictions of a call without weights, channels first."""
    if batch.sample_weight is not None or batch.mask is not None or batch.class_weight is not None:
        raise NotSupported(f"{framework} takes neither masks nor weights here")
    return _image(tensor(batch.y_true)), _image(batch.probabilities())


def _by_class(batch: Batch, columns: int, framework: str) -> str | None:
    """The grouping, if it was given, where the framework always keeps classes apart: with one class or without."""
    grouping: str | None = batch.options["grouping"]
    if grouping in ("all", "sample"):
        if columns > 1:
            raise NotSupported(f"{framework} keeps classes apart; grouping={grouping!r} joins them")
        return "class" if grouping == "all" else "sample_class"
    return grouping


def _of_monai(batch: Batch) -> tuple[Reduced, str]:
    if batch.name == "GeneralizedDice":
        return _generalized_of_monai(batch)
    y, p = _segmentation(batch, "MONAI")
    if not _usual(batch, "absent"):
        raise NotSupported(f"MONAI has no absent={batch.options['absent']!r}: an absent class is a class")
    options: dict[str, Any] = {"include_background": batch.options["include_background"], "reduction": "none"}
    options["batch"] = _by_class(batch, p.shape[1], "MONAI") == "class"
    reason = "each sample and channel on its own, 1e-5 above and below, then the mean"
    if options["batch"]:
        reason = "adds 1e-5 above and below"
    if batch.name == "Tversky":
        if batch.options["squared"]:
            raise NotSupported("MONAI has no squares in its Tversky loss")
        losses = monai.tversky(y, p, None, alpha=batch.options["alpha"], beta=batch.options["beta"], **options)
    else:
        squared = batch.options["squared"]
        losses = monai.dice(y, p, None, jaccard=batch.name == "Jaccard", squared_pred=squared, **options)
    return pytorch.weighted(losses, None, False), reason


def _generalized_of_monai(batch: Batch) -> tuple[Reduced, str]:
    y, p = _unweighted(batch, "MONAI")
    options = {"w_type": batch.options["weights"], "include_background": batch.options["include_background"]}
    pooled = batch.options["grouping"] == "all"
    losses = monai.generalized_dice(y, p, None, batch=pooled, reduction="none", **options)
    return pytorch.weighted(losses, None, False), "adds 1e-5 above and below, which counts beside 1 / volume²"


def _of_smp(batch: Batch) -> tuple[Reduced, str]:
    if batch.name in ("LovaszHinge", "LovaszSoftmax"):
        return _lovasz_of_smp(batch)
    y, p = _segmentation(batch, "smp")
    mode = "multilabel" if p.shape[1] > 1 else "binary"
    for option in ("squared", "include_background"):
        if not _usual(batch, option):
            raise NotSupported(f"smp has no {option}")
    if batch.options["absent"] == "skip":
        raise NotSupported("smp has no absent='skip': an absent class counts 0 and stays in the mean")
    if _by_class(batch, p.shape[1], "smp") == "sample_class":
        raise NotSupported("smp sums over batch and space, never over single samples")
    function: Callable[..., Tensor] = {"Dice": smp.dice, "Jaccard": smp.jaccard, "Tversky": smp.tversky}[batch.name]
    options = {k: batch.options[k] for k in ("alpha", "beta") if batch.name == "Tversky"}
    value = function(y, p, None, mode=mode, from_logits=False, **options)
    classes = torch.tensor(float(p.shape[1]))
    return Reduced(value, value * classes, classes), "each class over batch and space; an absent class counts 0"


def _lovasz_of_smp(batch: Batch) -> tuple[Reduced, str]:
    y, p = _unweighted(batch, "smp")
    per_image, images = batch.options["per_image"], torch.tensor(float(len(p)))
    if batch.name == "LovaszHinge":
        if p.shape[1] > 1:
            raise NotSupported("smp takes one binary mask, not several columns")
        value = smp.lovasz((y > 0.5).long(), p, None, mode="binary", per_image=per_image)
    else:
        if batch.options["classes"] == "all":
            raise NotSupported("smp averages over the present classes only")
        value = smp.lovasz(y.argmax(1), p, None, mode="multiclass", per_image=per_image, from_logits=False)
    return Reduced(value, value * images, images) if per_image else Reduced(value), ""


def _of_hf(batch: Batch) -> tuple[Reduced, str]:
    if batch.name != "SparseCategoricalCrossentropy":
        raise NotSupported("the Trainer counts tokens of sparse cross-entropy only")
    if batch.sample_weight is not None or batch.class_weight is not None or batch.reduction not in _SUMS:
        raise NotSupported("token losses of the Trainer take no weights")
    logs, labels = _labels(batch, optional(batch.mask, torch.bool))
    return pytorch.cross_entropy(logs, labels), "divides by the labelled tokens of the whole window; 0/0 is NaN"


def _step_of_torch(reason: str) -> Callable[[Batch], tuple[Reduced, str]]:
    """A training step of one batch on one rank, whose loss is torch's."""

    def row(batch: Batch) -> tuple[Reduced, str]:
        return _of_torch(batch)[0], reason

    return row


ROWS: dict[str, Callable[[Batch], tuple[Reduced, str]]] = {
    "keras3": lambda batch: _of_keras3(batch, None),
    "keras3.0-3.12": lambda batch: _of_keras3(batch, elements.KERAS3.epsilon),
    "tf_keras": lambda batch: _of_tf_keras(batch, False),
    "tf20": lambda batch: _of_tf_keras(batch, True),
    "keras_classic": lambda batch: _of_classic(batch, 0.0),
    "keras_classic-2.2.5": lambda batch: _of_classic(batch, 1e-7),
    "torch": _of_torch,
    "optax": _of_optax,
    "monai": _of_monai,
    "smp": _of_smp,
    "hf": _of_hf,
    "lightning": _step_of_torch("torch's number for one batch; accumulation takes the mean of such means"),
    "ddp": _step_of_torch("torch's number on one rank; the gradient is the mean over ranks, whatever they hold"),
}
