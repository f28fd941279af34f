"""The report: what a ledger says, as one HTML file or as text; imports no torch.

`lossledger.report(run, path)` writes one. The name is also that of this package, and importing any part of it puts the
package in the place of the function, so the package itself can be called.
"""

import sys
import types
from pathlib import Path

from lossledger.ledger import Ledger
from lossledger.report.html import report
from lossledger.report.numbers import display
from lossledger.report.plain import as_dict, as_json
from lossledger.report.text import as_markdown, as_text
from lossledger.report.view import Picture, ReportView, build_view

__all__ = ["Picture", "ReportView", "as_dict", "as_json", "as_markdown", "as_text", "build_view", "display", "report"]


class _Callable(types.ModuleType):
    def __call__(self, run: Ledger | str | Path, path: str | Path, against: Ledger | str | Path | None = None) -> Path:
        return report(run, path, against)


sys.modules[__name__].__class__ = _Callable
