"""Which framework an object comes from, told by its classes, so that no framework is imported to ask."""

from __future__ import annotations

from lossledger.errors import InputTypeError


def comes_from(value: object, package: str) -> bool:
    """Whether an object, its class or what it inherits from was defined in a package.

    Example:
        >>> comes_from(ValueError(), "builtins"), comes_from(ValueError(), "keras")
        (True, False)
    """
    if isinstance(value, type) or not hasattr(value, "__qualname__"):
        kind = value if isinstance(value, type) else type(value)
        return any(base.__module__.split(".")[0] == package for base in kind.__mro__)
    return str(getattr(value, "__module__", "")).split(".")[0] == package


def refuse_tensorflow(value: object, what: str) -> None:
    """Objects of tf_keras and tf.keras calculate in TensorFlow, which has no gradient for torch.

    Raises:
        InputTypeError: such an object.
    """
    for package in ("tf_keras", "tensorflow"):
        if comes_from(value, package):
            raise InputTypeError(
                f"{what}: expected an object of torch, or of Keras 3 on the torch backend; received "
                f"{type(value).__name__} of {package}, which calculates in TensorFlow. Build it with Keras 3 and set "
                "KERAS_BACKEND=torch before importing keras."
            )
