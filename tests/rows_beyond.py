"""Rows of the classification, regression and metric-learning losses that Keras does not have."""

from __future__ import annotations

from declaration import Declaration

ROWS: list[Declaration] = []
