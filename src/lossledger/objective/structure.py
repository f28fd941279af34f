"""From what a caller gives, in the structure of the outputs, to one value an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lossledger.errors import InputError, OutputNameError, UnknownNameError


def split(
    value: Any, what: str, outputs: tuple[str, ...], structure: str, required: frozenset[str] | None = None
) -> dict[str, Any]:
    """A value for each output, from the structure of the outputs.

    Args:
        value: one value, or values in a dict or list.
        what: name of the argument, for messages.
        outputs: names of the outputs.
        structure: "one", "list" or "dict".
        required: the outputs that must be there; all, if not given.

    Raises:
        InputError: a structure that does not fit the loss.
        UnknownNameError: an output that does not exist.
    """
    required = frozenset(outputs) if required is None else required
    if structure == "one":
        if isinstance(value, Mapping | list | tuple) and what == "y_pred":
            raise InputError(
                f"The loss is for one output; expected {what} to be one tensor, received a "
                f"{type(value).__name__} of {len(value)}. Give a loss for each output: a dict by name or a list."
            )
        return {"": value}
    if isinstance(value, Mapping):
        unknown = [name for name in value if name not in outputs]
        if unknown and what != "y_pred":
            raise UnknownNameError(f"output in {what}", unknown[0], outputs)
        missing = [name for name in required if name not in value]
        if missing and what == "y_pred":
            raise OutputNameError(
                f"The output {missing[0]!r} of the loss can't be found in the model's output (`y_pred`): "
                f"Expected keys {list(value)} in loss dict, received {list(outputs)}. Name the losses as the "
                "model names its outputs."
            )
        if missing:
            raise InputError(
                f"{_mismatch(what)}: expected the output {missing[0]!r}, received only {list(value)}. The loss "
                f"was given for {list(outputs)}; give the loss None to an output without one."
            )
        return {name: value[name] for name in outputs if name in value}
    if isinstance(value, list | tuple):
        if len(value) != len(outputs):
            raise InputError(
                f"{_mismatch(what)}: expected {len(outputs)} outputs {list(outputs)}, received "
                f"{len(value)}. Give one value an output; the loss None skips an output."
            )
        return dict(zip(outputs, value, strict=True))
    raise InputError(
        f"{_mismatch(what)}: expected a {'dict' if structure == 'dict' else 'list'} with the outputs "
        f"{list(outputs)}, received {type(value).__name__}. The loss was given by output; for several losses "
        "on one output add them: a + b."
    )


def split_optional(value: Any, what: str, outputs: tuple[str, ...], structure: str) -> dict[str, Any]:
    """A weight or mask for each output; a single one is for all of them."""
    if value is None:
        return {}
    if structure == "one":
        if isinstance(value, Mapping):
            raise InputError(f"{what}: the model has one output; expected an array, received a dict.")
        return {"": value}
    if isinstance(value, Mapping):
        unknown = [name for name in value if name not in outputs]
        if unknown:
            raise UnknownNameError(f"output in {what}", unknown[0], outputs)
        return dict(value)
    if isinstance(value, list | tuple) and len(value) == len(outputs) and not _is_numbers(value):
        return dict(zip(outputs, value, strict=True))
    return dict.fromkeys(outputs, value)


def _mismatch(what: str) -> str:
    """How the message starts when targets or outputs do not come as the losses do."""
    return f"y_true and y_pred have different structures: {what}" if what == "y_true" else what


def _is_numbers(value: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) for v in value)
