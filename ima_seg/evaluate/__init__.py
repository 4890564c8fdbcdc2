"""Robustness reports: attacks on whole volumes, metrics with confidence intervals, one HTML file.

``evaluate`` runs an evaluation, ``write_report`` makes its report anew from what it wrote.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ima_seg.evaluate.api import evaluate
    from ima_seg.evaluate.report import write_report
    from ima_seg.evaluate.run import EvaluationSettings

__all__ = ["EvaluationSettings", "evaluate", "write_report"]

_HOMES = {"evaluate": "api", "write_report": "report", "EvaluationSettings": "run"}


def __getattr__(name: str) -> Any:
    # The report must not wait for torch and nnU-Net, nor the metrics for the report.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
