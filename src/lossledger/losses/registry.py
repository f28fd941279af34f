"""Losses by name: the class names, the function names and the short names of Keras."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lossledger.errors import InputError, InputTypeError, UnknownNameError
from lossledger.frameworks import refuse_tensorflow
from lossledger.losses.arguments import snake_case
from lossledger.losses.asymmetric import AsymmetricFocal, AsymmetricFocalTversky, AsymmetricUnifiedFocal
from lossledger.losses.classification import (
    BinaryCrossentropy,
    CategoricalCrossentropy,
    SoftCategoricalCrossentropy,
    SparseCategoricalCrossentropy,
)
from lossledger.losses.contrastive import InfoNCE, NTXent
from lossledger.losses.custom import from_callable
from lossledger.losses.divergence import CategoricalGeneralizedCrossEntropy, KLDivergence
from lossledger.losses.expression import Expression, check_loss, factor_of
from lossledger.losses.focal import AsymmetricMultiLabel, BinaryFocalCrossentropy, CategoricalFocalCrossentropy
from lossledger.losses.generalized import GeneralizedDice
from lossledger.losses.hinge import CategoricalHinge, Hinge, SquaredHinge
from lossledger.losses.keras import from_keras, is_keras
from lossledger.losses.likelihood import GaussianNegativeLogLikelihood, PoissonNegativeLogLikelihood
from lossledger.losses.loss import Loss
from lossledger.losses.lovasz import LovaszHinge, LovaszSoftmax
from lossledger.losses.meant import meant
from lossledger.losses.metric_learning import Circle, SupervisedContrastive, TripletHard, TripletSemiHard
from lossledger.losses.overlap import Dice, FocalTversky, Jaccard, LogCoshDice, Tversky
from lossledger.losses.ranking import Contrastive, MarginRanking, Triplet
from lossledger.losses.regression import (
    CosineSimilarity,
    Huber,
    LogCosh,
    MeanAbsoluteError,
    MeanAbsolutePercentageError,
    MeanSquaredError,
    MeanSquaredLogarithmicError,
    Poisson,
    Quantile,
)
from lossledger.losses.sequence import CTC

CLASSES: dict[str, type[Loss]] = {
    c.__name__: c
    for c in (
        BinaryCrossentropy,
        BinaryFocalCrossentropy,
        CategoricalCrossentropy,
        CategoricalFocalCrossentropy,
        SparseCategoricalCrossentropy,
        CategoricalGeneralizedCrossEntropy,
        KLDivergence,
        MeanSquaredError,
        MeanAbsoluteError,
        MeanAbsolutePercentageError,
        MeanSquaredLogarithmicError,
        Huber,
        LogCosh,
        Poisson,
        CosineSimilarity,
        Hinge,
        SquaredHinge,
        CategoricalHinge,
        CTC,
        Circle,
        TripletHard,
        TripletSemiHard,
        SupervisedContrastive,
        InfoNCE,
        NTXent,
        SoftCategoricalCrossentropy,
        AsymmetricMultiLabel,
        Quantile,
        GaussianNegativeLogLikelihood,
        PoissonNegativeLogLikelihood,
        MarginRanking,
        Contrastive,
        Triplet,
        Dice,
        Jaccard,
        Tversky,
        FocalTversky,
        LogCoshDice,
        GeneralizedDice,
        LovaszHinge,
        LovaszSoftmax,
        AsymmetricFocal,
        AsymmetricFocalTversky,
    )
}

# Short names of Keras, which it also has in capitals.
_SHORT = {
    "bce": "BinaryCrossentropy",
    "mse": "MeanSquaredError",
    "mae": "MeanAbsoluteError",
    "mape": "MeanAbsolutePercentageError",
    "msle": "MeanSquaredLogarithmicError",
    "kld": "KLDivergence",
}
# Names of functions that are not the class name in snake case, and older names.
_FUNCTIONS = {
    "kl_divergence": "KLDivergence",
    "ctc": "CTC",
    "info_nce": "InfoNCE",
    "nt_xent": "NTXent",
    "logcosh": "LogCosh",
}
_SPELLED = {c: snake_case(c) for c in CLASSES if c not in ("KLDivergence", "CTC", "InfoNCE", "NTXent")}
# Named sums of losses; their configuration is that of an expression.
_SUMS = (AsymmetricUnifiedFocal,)
NAMES: dict[str, type[Loss] | type[AsymmetricUnifiedFocal]] = {
    **CLASSES,
    **{name: c for c in _SUMS for name in (c.__name__, snake_case(c.__name__))},
    **{function: CLASSES[name] for name, function in _SPELLED.items()},
    **{function: CLASSES[name] for function, name in _FUNCTIONS.items()},
    **{short: CLASSES[name] for short, name in _SHORT.items()},
    **{short.upper(): CLASSES[name] for short, name in _SHORT.items()},
}


def get(identifier: Any) -> Loss | Expression:
    """A loss from a name, a configuration, a callable, a loss of torch or of Keras, or a loss itself.

    Args:
        identifier: for example `"mse"`, `"BinaryCrossentropy"`, `{"class_name": …, "config": …}`,
            `torch.nn.BCEWithLogitsLoss()`, `keras.losses.Huber()`, a function of `(y_true, y_pred)`.

    Raises:
        UnknownNameError: a name that is no loss, with a suggestion.
        InputTypeError: something that cannot be a loss.

    Example:
        >>> get("mse")
        MeanSquaredError()
    """
    if isinstance(identifier, Expression):
        return identifier
    if isinstance(identifier, Loss):
        check_loss(identifier)
        return identifier
    if isinstance(identifier, str):
        if identifier not in NAMES:
            start = "Could not interpret loss identifier"
            raise UnknownNameError("loss", identifier, NAMES, start, meant(identifier))
        return NAMES[identifier]()
    if isinstance(identifier, dict):
        return deserialize(identifier)
    refuse_tensorflow(identifier, "loss")
    if is_keras(identifier):
        return from_keras(identifier, CLASSES)
    if callable(identifier):
        return from_callable(identifier)
    raise InputTypeError(
        f"Could not interpret loss identifier {identifier!r}: expected a name, a Loss, an expression of losses or a "
        f"function; received {type(identifier).__name__}."
    )


def serialize(loss: Loss | Expression) -> dict[str, Any]:
    """The configuration of a loss, as plain values.

    Example:
        >>> deserialize(serialize(Huber(delta=2.0)))
        Huber(delta=2.0)
    """
    if isinstance(loss, Expression):
        return {"class_name": "Expression", "config": {"terms": [[c, serialize(part)] for c, part in loss.terms]}}
    return {"class_name": type(loss).__name__, "config": loss.get_config()}


def deserialize(name: dict[str, Any], custom_objects: Mapping[str, type[Loss]] | None = None) -> Loss | Expression:
    """The loss of a configuration made by `serialize`.

    Args:
        name: the configuration, `{"class_name": …, "config": …}`; the argument is called so in Keras.
        custom_objects: classes of your own by name.

    Raises:
        InputError: not a configuration of a loss.
        UnknownNameError: a class that is no built-in loss, or an argument that the class does not have.
    """
    if not isinstance(name, dict) or not set(name) >= {"class_name", "config"}:
        raise InputError(f"Expected {{'class_name': …, 'config': …}}, received {name!r}.")
    kind, arguments = name["class_name"], name["config"]
    if not isinstance(arguments, dict):
        raise InputError(f"config of {kind!r}: expected a dict of arguments, received {type(arguments).__name__}.")
    if kind == "Expression":
        return _expression(arguments, custom_objects)
    classes = {**CLASSES, **(custom_objects or {})}
    if kind not in classes:
        raise UnknownNameError("loss class", kind, classes)
    known = [argument for argument in inspect.signature(classes[kind].__init__).parameters if argument != "self"]
    for argument in arguments:
        if argument not in known:
            raise UnknownNameError(f"argument of {kind}", argument, known)
    return classes[kind].from_config(arguments)


def _expression(arguments: dict[str, Any], custom_objects: Mapping[str, type[Loss]] | None) -> Expression:
    terms = []
    for pair in arguments.get("terms", ()):
        part = deserialize(pair[1], custom_objects) if isinstance(pair, list | tuple) and len(pair) == 2 else None
        if not isinstance(part, Loss):
            raise InputError(f"terms of 'Expression': expected pairs of a number and a loss, received {pair!r}.")
        terms.append((factor_of(pair[0]), part))
    if not terms:
        raise InputError("config of 'Expression': expected 'terms', at least one; received none.")
    return Expression(tuple(terms))
