"""Views over the table `samples`, each one SELECT: statistics across epochs, and the measures of training dynamics.

Each has a row a run, split, term and sample. Numbers that are not finite are left out and counted, so that one epoch in
which a loss overflowed does not hide the others.
"""

from __future__ import annotations

_KEYS = "run, split, term, sample"

VIEWS = {
    # Mean, spread and slope of the loss.
    "sample_losses": f"""
        SELECT {_KEYS}, count(mean) AS epochs,
            avg(mean) FILTER (isfinite(mean)) AS mean,
            stddev_pop(mean) FILTER (isfinite(mean)) AS deviation,
            CASE WHEN min(epoch) FILTER (isfinite(mean)) < max(epoch) FILTER (isfinite(mean))
                THEN regr_slope(mean, epoch) FILTER (isfinite(mean)) END AS trend,
            min(mean) FILTER (isfinite(mean)) AS lowest,
            max(mean) FILTER (isfinite(mean)) AS highest,
            arg_max(mean, epoch) AS last,
            count(mean) FILTER (NOT isfinite(mean)) AS nonfinite
        FROM samples WHERE mean IS NOT NULL GROUP BY ALL
    """,
    # Mean probability of the true class.
    "dynamics_confidence": f"""
        SELECT {_KEYS}, count(*) AS epochs, avg(confidence) AS confidence
        FROM samples WHERE isfinite(confidence) GROUP BY ALL
    """,
    # How much that probability changes from epoch to epoch.
    "dynamics_variability": f"""
        SELECT {_KEYS}, count(*) AS epochs, stddev_pop(confidence) AS variability
        FROM samples WHERE isfinite(confidence) GROUP BY ALL
    """,
    # How often a sample that was right is wrong in its next epoch, and in how many epochs it was right.
    "dynamics_forgetting": f"""
        SELECT {_KEYS}, count(*) AS epochs, count(*) FILTER (correct > 0.5) AS learned,
            count(*) FILTER (before > 0.5 AND correct <= 0.5) AS forgetting
        FROM (
            SELECT {_KEYS}, correct, lag(correct) OVER (PARTITION BY {_KEYS} ORDER BY epoch) AS before
            FROM samples WHERE isfinite(correct)
        ) GROUP BY ALL
    """,
    # Area under the margin: its mean over the epochs.
    "dynamics_margin": f"""
        SELECT {_KEYS}, count(*) AS epochs, avg(margin) AS margin
        FROM samples WHERE isfinite(margin) GROUP BY ALL
    """,
    # For tools that look for wrong labels.
    "sample_labels": f"""
        SELECT run, split, term, sample AS id, arg_max(label, epoch) AS label, arg_max(predicted, epoch) AS predicted,
            avg(confidence) FILTER (isfinite(confidence)) AS confidence,
            avg(margin) FILTER (isfinite(margin)) AS margin,
            avg(mean) FILTER (isfinite(mean)) AS loss,
            count(*) AS epochs
        FROM samples WHERE label IS NOT NULL GROUP BY {_KEYS}
    """,
}


def mentioned(sql: str) -> bool:
    """Whether a query may read samples, which a run may have millions of: otherwise they are not loaded.

    >>> mentioned("SELECT * FROM dynamics_margin"), mentioned("SELECT * FROM ledger")
    (True, False)
    """
    text = sql.lower()
    return "sample" in text or "dynamics" in text
