"""An explanation for a notebook: a fragment of HTML that takes its colours from the page around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossledger.explain.text import group_rows, reference_rows, shape_text
from lossledger.report.numbers import display
from lossledger.report.templating import environment

if TYPE_CHECKING:
    from lossledger.explain.explanation import Explanation

MOST_GROUPS = 30


def as_html(explanation: Explanation) -> str:
    """The explanation as a fragment; every name in it is escaped.

    Args:
        explanation: what to show.
    """
    found = environment("lossledger.explain")
    found.filters.update(display=display, shape=shape_text)
    template = found.get_template("explanation.html")
    return template.render(found=explanation, groups=group_rows, levels=reference_rows, most=MOST_GROUPS)
