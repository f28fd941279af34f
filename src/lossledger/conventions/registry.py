"""Cases in the form of `tests/goldens/frameworks.json`: which convention evaluates them, and as what."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossledger.conventions import (
    accumulation,
    elements,
    fit,
    hf,
    keras3,
    keras_classic,
    monai,
    optax,
    pytorch,
    smp,
    tf_keras,
)
from lossledger.conventions.common import FrameworkError, NotSupported

Case = Mapping[str, Any]


def keras3_rules(backend: str = "torch", version: str = "") -> fit.Rules:
    """How Keras 3 runs an epoch; `version` as a case names it, `"3.0-3.12"`; the highest counts."""
    minor = max((int(number) for number in re.findall(r"3\.(\d+)", version)), default=99)
    loss = partial(keras3.loss, backend=backend, mask_epsilon=elements.KERAS3.epsilon if minor < 13 else None)
    return fit.Rules(
        "keras3",
        loss,
        by_size=minor >= 2,
        class_weight=fit.keras3_class_weight,
        sees_logits=backend == "tensorflow",
        loss_weight_error="KeyError",
        extra_metric="<auto>_loss",
    )


def tf_keras_rules(divide_by_all: bool = False) -> fit.Rules:
    """How tf_keras runs an epoch, or tf.keras 2.0 to 2.9."""
    return fit.Rules(
        "tf_keras",
        partial(tf_keras.loss, divide_by_all=divide_by_all),
        class_weight=fit.tf_keras_class_weight,
        sees_logits=True,
        expands_targets=True,
    )


def classic_rules(mask_epsilon: float = 0.0) -> fit.Rules:
    """How Keras up to 2.2 runs an epoch."""
    loss = partial(keras_classic.loss, mask_epsilon=mask_epsilon)
    return fit.Rules("keras_classic", loss, class_weight=fit.classic_class_weight)


def _keras_family(case: Case, rules: fit.Rules) -> Any:
    options = case["kwargs"]
    if case["scope"] in ("fit", "evaluate", "epoch"):
        return fit.fit(case, rules)
    if case["scope"] in ("total", "step"):
        return fit.total(case, rules)
    if case["scope"] == "loss":
        if case.get("class_weight") is not None:
            raise NotSupported(f"{rules.name}: a loss takes no class_weight")
        return rules.loss(
            case["loss"], options, case["y_true"], case["y_pred"], case["sample_weight"], case["mask"]
        ).value
    raise NotSupported(f"{rules.name}: scope {case['scope']!r}")


def _keras3(case: Case) -> Any:
    backend = case.get("backend") or "torch"
    if backend not in keras3.DIALECTS:
        raise NotSupported(f"keras3: backend {backend!r}")
    if case["scope"] in ("function", "functional"):
        return keras3.function(case["loss"], case["kwargs"], case["y_true"], case["y_pred"], backend)
    return _keras_family(case, keras3_rules(backend, case["convention"]))


def _tf_keras(case: Case) -> Any:
    return _keras_family(case, tf_keras_rules())


def _tf20(case: Case) -> Any:
    return _keras_family(case, tf_keras_rules(divide_by_all=True))


def _classic(case: Case) -> Any:
    return _keras_family(case, classic_rules(1e-7 if "2.2.5" in case["convention"] else 0.0))


def _only(case: Case, *scopes: str) -> tuple[Any, Any, Any, Any]:
    if case["scope"] not in scopes:
        raise NotSupported(f"{case['convention']}: scope {case['scope']!r}")
    return case["loss"], case["kwargs"], case["y_true"], case["y_pred"]


def _torch(case: Case) -> Any:
    if case["mask"] is not None:
        raise NotSupported("torch: a loss takes no mask")
    return pytorch.loss(*_only(case, "loss"), case["sample_weight"], case["class_weight"])


def _optax(case: Case) -> Any:
    return optax.loss(*_only(case, "loss"), case["mask"], case["sample_weight"])


def _monai(case: Case) -> Any:
    return monai.loss(*_only(case, "loss"), case["class_weight"])


def _smp(case: Case) -> Any:
    return smp.loss(*_only(case, "loss"), case["class_weight"])


def _hf(case: Case) -> Any:
    arguments = _only(case, "loss", "step")
    return hf.step(*arguments) if case["scope"] == "step" else hf.loss(*arguments).value


# From the beginning of a convention's name to what evaluates it; the first that fits.
CONVENTIONS: tuple[tuple[str, Callable[[Case], Any]], ...] = (
    ("keras-classic", _classic),
    ("keras_classic", _classic),
    ("keras3", _keras3),
    ("tf_keras", _tf_keras),
    ("tf.keras", _tf20),
    ("tf20", _tf20),
    ("pytorch-ddp", lambda case: accumulation.ddp(*_only(case, "step"))),
    ("ddp", lambda case: accumulation.ddp(*_only(case, "step"))),
    ("pytorch", _torch),
    ("torch", _torch),
    ("optax", _optax),
    ("monai", _monai),
    ("smp", _smp),
    ("hf", _hf),
    ("lightning", lambda case: accumulation.lightning(*_only(case, "fit"))),
    ("naive", lambda case: accumulation.naive(*_only(case, "step"))),
)


def evaluate(case: Case) -> Any:
    """The number of a case: a float, a list, or a dict of them.

    Args:
        case: with `convention`, `scope`, `loss`, `kwargs`, `y_true`, `y_pred`, and perhaps `sample_weight`, `mask`,
            `class_weight`, `backend`.

    Raises:
        NotSupported: nobody described this combination.
        FrameworkError: the framework raises an error, whose type it names. Errors of torch come as they are.

    Example:
        >>> case = {"convention": "keras3", "scope": "loss", "loss": "mse", "y_true": [[0.0]], "y_pred": [[3.0]]}
        >>> evaluate(case)
        9.0
    """
    whole = {"kwargs": {}, "scope": "loss", "sample_weight": None, "mask": None, "class_weight": None, **case}
    whole["kwargs"] = whole["kwargs"] or {}
    for beginning, function in CONVENTIONS:
        if str(whole["convention"]).startswith(beginning):
            return plain(function(whole))
    raise NotSupported(f"no convention {whole['convention']!r}")


def outcome(case: Case) -> dict[str, Any]:
    """What `tests/conformance.py` prints for a case: its id with a value, or with the type of an error."""
    identity = {"id": case.get("id") if isinstance(case, Mapping) else None}
    try:
        return {**identity, "value": jsonable(evaluate(case))}
    except FrameworkError as error:
        return {**identity, "error": error.type_name}
    except NotSupported:
        return {**identity, "error": "NotSupported"}
    except (RuntimeError, IndexError, ValueError) as error:
        return {**identity, "error": type(error).__name__}
    except Exception:
        # A file from elsewhere may hold anything; one odd case must not end the others.
        return {**identity, "error": "NotSupported"}


def plain(value: Any) -> Any:
    """Tensors as numbers and lists."""
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64).tolist()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value


def jsonable(value: Any) -> Any:
    """Numbers that JSON has no name for as strings."""
    if isinstance(value, Mapping):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
