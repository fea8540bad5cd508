"""`--strict`: a fallback that the report names is an error that names the layer."""

from __future__ import annotations

from collections.abc import Iterable

from qtool.artifact import LayerReport
from qtool.errors import QtoolError


def require_no_fallback(reports: Iterable[LayerReport]) -> None:
    """Raise QtoolError for the first layer whose numbers did not allow what was asked."""
    for report in reports:
        if report.fallbacks:
            raise QtoolError(
                f"{report.module}: {'; '.join(report.fallbacks)} (--strict takes no fallback)",
                "calibrate with more text (--num-samples), leave the layer in 16 bit (--keep), or "
                "give the command without --strict, which goes on from here",
            )
