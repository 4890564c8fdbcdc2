"""Robustness reports: attacks on whole volumes, metrics with confidence intervals, one HTML file.

``evaluate`` runs an evaluation, ``write_report`` makes its report anew from what it wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ima_seg.evaluate.report import write_report
from ima_seg.evaluate.run import EvaluationSettings

if TYPE_CHECKING:
    from ima_seg.evaluate.api import evaluate

__all__ = ["EvaluationSettings", "evaluate", "write_report"]


def __getattr__(name: str) -> Any:
    # The report must not wait for torch and nnU-Net to be imported.
    if name == "evaluate":
        from ima_seg.evaluate.api import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
