"""Every framework's number from the same arrays, with its numerator and its divisor, without the framework."""

from lossledger.conventions.common import FrameworkError, NotSupported, Reduced
from lossledger.conventions.compare import Comparison, Row, compare
from lossledger.conventions.registry import evaluate, outcome

__all__ = ["Comparison", "FrameworkError", "NotSupported", "Reduced", "Row", "compare", "evaluate", "outcome"]
