"""Words for numbers: what a loss of one batch is made of, and what an unknown loss function reduces to.

`explanation` makes frozen dataclasses from the breakdown of a batch, `text` and `html` show them; `fingerprint` probes
a function. The rules that judge data and settings are in `checks`.

`lossledger.explain(loss, y_true, y_pred)` explains one. The name is also that of this package, and importing any part
of it puts the package in the place of the function, so the package itself can be called.
"""

import sys
import types
from typing import Any

from lossledger.explain.evidence import Evidence, Fingerprint
from lossledger.explain.explanation import Explanation, Part, TermExplanation, explain
from lossledger.explain.references import Reference
from lossledger.explain.steps import Divisor, Group, Step

__all__ = [
    "Divisor",
    "Evidence",
    "Explanation",
    "Fingerprint",
    "Group",
    "Part",
    "Reference",
    "Step",
    "TermExplanation",
    "explain",
]


class _Callable(types.ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Explanation:
        return explain(*arguments, **named)


sys.modules[__name__].__class__ = _Callable
