"""What was done and shown, for a person: as text, as HTML, as a picture, as plain values."""

from cachefree.report.outline import Block, Outline, Row
from cachefree.report.picture import Picture
from cachefree.report.report import Branch, Report, Step, Verdict
from cachefree.report.source import Excerpt, excerpt

__all__ = [
    "Block",
    "Branch",
    "Excerpt",
    "Outline",
    "Picture",
    "Report",
    "Row",
    "Step",
    "Verdict",
    "excerpt",
]
