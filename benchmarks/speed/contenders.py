"""Who takes part: the file that runs it, the interpreter it needs, and options of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One row of the tables, for each precision.

    Args:
        name: on the command line.
        title: in the tables.
        module: the file in `benchmarks/speed`.
        place: of the interpreter: this one, or one with JAX or with TensorFlow.
        environment: of its process.
        options: of `lossledger.Model.compile` and `fit`.
        peer: whether it is a trainer that others publish.
    """

    name: str
    title: str
    module: str
    place: str = "here"
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: bool = False


def keras(backend: str, title: str, place: str) -> Contender:
    environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    return Contender(f"keras-{backend}", f"Keras 3 on {title}", "keras_fit", place, environment, peer=True)


TUNED, OURS = "tuned", "ours"
_ALL = (
    Contender("torch", "raw torch, as its quickstart", "torch_plain"),
    Contender(TUNED, "raw torch, tuned by hand", "torch_tuned"),
    Contender(OURS, "lossledger", "ours"),
    Contender("ours-samples", "lossledger, every sample kept", "ours", options={"fit": {"samples": True}}),
    Contender("ours-jit", "lossledger, jit", "ours", options={"compile": {"jit": True}}),
    keras("torch", "torch", "here"),
    keras("jax", "JAX", "jax"),
    keras("tensorflow", "TensorFlow", "tensorflow"),
    Contender("lightning", "Lightning", "lightning_fit", peer=True),
    Contender("hf", "HF Trainer", "hf_trainer", peer=True),
    Contender("accelerate", "accelerate", "accelerate_loop", peer=True),
)
CONTENDERS: Mapping[str, Contender] = {contender.name: contender for contender in _ALL}
