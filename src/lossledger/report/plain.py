"""The report as plain values for other programs: what the page says, with every digit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from lossledger.ledger.segments import plain
from lossledger.report.sentences import verdict_sentences
from lossledger.report.view import ReportView, RunView

SCHEMA = 1


def as_dict(view: ReportView) -> dict[str, Any]:
    """The view as dicts and lists; numbers that JSON lacks are text, such as "nan".

    Args:
        view: what to say.
    """
    said = {
        "schema": SCHEMA,
        "title": view.title,
        "runs": [_run(run) for run in view.runs],
        "comparisons": [asdict(comparison) for comparison in view.comparisons],
        "note": view.note,
        "waiting": list(view.waiting),
        # Captions only: the pictures themselves lie in the run folder.
        "pictures": [{"run": picture.run, "caption": picture.caption} for picture in view.pictures],
    }
    found: dict[str, Any] = plain(said)
    return found


def as_json(view: ReportView) -> str:
    """The view as JSON.

    Args:
        view: what to say.

    >>> from lossledger.ledger import Ledger, Row
    >>> from lossledger.report import build_view
    >>> ledger = Ledger("demo")
    >>> key = ("training", 1, None, "mse", "data", "linear", "term", "", "")
    >>> ledger.append([Row(*key, 2.0, 4, 4.0, 1.0, 4.0, 0.5, 0)])
    >>> json.loads(as_json(build_view(ledger)))["runs"][0]["verdict"]["loss"]
    0.5
    """
    return json.dumps(as_dict(view), indent=1, ensure_ascii=False)


def _run(run: RunView) -> dict[str, Any]:
    found = asdict(run)
    found["provenance"] = dict(run.provenance)
    found["sentences"] = verdict_sentences(run.verdict)
    for table, own in zip(found["tables"], run.tables, strict=True):
        for line, row in zip(table["rows"], own.rows, strict=True):
            line["metrics"] = dict(zip(own.metrics, row.metrics, strict=True))
            line["change"] = row.change
    if run.against is not None and run.against.diff is not None:
        found["against"]["diff"] = run.against.diff.to_dict()
    return found
