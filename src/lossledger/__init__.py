"""The training loss, with its books open. Names are loaded on first use, so that a report needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Batch": "lossledger.batch",
    "Ledger": "lossledger.ledger",
    "Model": "lossledger.training.model",
    "Objective": "lossledger.objective",
    "Outputs": "lossledger.objective",
    "Reduction": "lossledger.reduction",
    "Tally": "lossledger.tally",
    "add_loss": "lossledger.objective",
    "callbacks": "lossledger.training.callbacks",
    "check": "lossledger.explain.checks.run",
    "compare": "lossledger.conventions.compare",
    "conventions": "lossledger.conventions",
    "errors": "lossledger.errors",
    "explain": "lossledger.explain",
    "fingerprint": "lossledger.explain.fingerprint",
    "gap": "lossledger.training.difference",
    "losses": "lossledger.losses",
    "metrics": "lossledger.metrics",
    "regularizers": "lossledger.regularizers",
    "report": "lossledger.report",
    "watch": "lossledger.report.watch",
}
_MODULES = ("callbacks", "conventions", "errors", "explain", "losses", "metrics", "regularizers", "report")

__all__ = [
    "Batch",
    "Ledger",
    "Model",
    "Objective",
    "Outputs",
    "Reduction",
    "Tally",
    "__version__",
    "add_loss",
    "callbacks",
    "check",
    "compare",
    "conventions",
    "errors",
    "explain",
    "fingerprint",
    "gap",
    "losses",
    "metrics",
    "regularizers",
    "report",
    "watch",
]

if TYPE_CHECKING:
    from lossledger import conventions, errors, explain, losses, metrics, regularizers, report
    from lossledger.batch import Batch
    from lossledger.conventions.compare import compare
    from lossledger.explain.checks.run import check
    from lossledger.explain.fingerprint import fingerprint
    from lossledger.ledger import Ledger
    from lossledger.objective import Objective, Outputs, add_loss
    from lossledger.reduction import Reduction
    from lossledger.report.watch import watch
    from lossledger.tally import Tally
    from lossledger.training import callbacks
    from lossledger.training.difference import gap
    from lossledger.training.model import Model


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lossledger' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
