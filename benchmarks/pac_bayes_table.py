"""The Markdown page that `pac_bayes.py` makes of its results file."""

from __future__ import annotations


def table(rows, planned):
    return ""
