"""The CSV files of a report: one row per record, and one row per condition and class."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from ima_seg.evaluate.measure.statistics import Estimate
from ima_seg.evaluate.measure.summary import Condition, Summary
from ima_seg.evaluate.records import Record
from ima_seg.evaluate.run import Run

_CLASS_FIELDS = (
    "state",
    "dice",
    "nsd",
    "hd95_mm",
    "reference_ml",
    "prediction_ml",
    "volume_error_ml",
    "tp",
    "fp",
    "fn",
)
_RECORD_FIELDS = (
    "case", "model", "kind", "attack", "norm", "unit", "eps", "eps_network", "budget", "severity",
    "dice", "nsd", "hd95_mm",
)  # fmt: skip
_COST_FIELDS = ("breaking_rms", "zero_gradient", "forwards", "gradients", "seconds", "metric_seconds")


def _text(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return buffer.getvalue()


def records_csv(run: Run, records: Sequence[Record]) -> str:
    """One row per record, with the same columns in every row; lists are spread over columns."""
    rows = []
    for r in records:
        row: dict[str, Any] = {name: getattr(r, name) for name in _RECORD_FIELDS}
        row["slice_dice"] = None if r.slice_dice is None else r.slice_dice.mean
        row["slices"] = None if r.slice_dice is None else r.slice_dice.slices
        for name in ("rms", "l2", "linf", "l2_slice", "psnr_db", "ssim"):
            row[f"size_{name}"] = None if r.size is None else getattr(r.size, name)
        for name in ("native_rms", "native_linf", "percent_rms"):
            values = [] if r.size is None else getattr(r.size, name)
            for i, channel in enumerate(run.channels):
                row[f"size_{name}_{channel}"] = values[i] if i < len(values) else None
        row |= {name: getattr(r, name) for name in _COST_FIELDS}
        for name in ("dice", "rms", "linf", "resampled"):
            row[f"disk_{name}"] = None if r.disk is None else getattr(r.disk, name)
        for label in run.classes:
            metrics = r.classes.get(label)
            for name in _CLASS_FIELDS:
                row[f"{label}_{name}"] = None if metrics is None else getattr(metrics, name)
        rows.append(row)
    return _text(rows)


def _spread(name: str, item: Estimate | None) -> dict[str, Any]:
    return {
        name: None if item is None else item.estimate,
        f"{name}_low": None if item is None else item.low,
        f"{name}_high": None if item is None else item.high,
    }


def _condition_row(c: Condition, label: str) -> dict[str, Any]:
    """The row of a class, or of the mean over classes where ``label`` is empty."""
    item = c.classes[label] if label else c
    row: dict[str, Any] = {
        "model": c.model, "kind": c.kind, "attack": c.attack, "eps": c.eps, "severity": c.severity,
        "class": label or "mean", "n": c.n, "missing": c.missing, "undefined": c.undefined, "partial": c.partial,
    }  # fmt: skip
    row |= _spread("dice", item.dice) | {"pooled_dice": item.pooled_dice}
    row |= _spread("nsd", item.nsd) | _spread("hd95_mm", item.hd95_mm)
    row |= _spread("slice_dice", None if label else c.slice_dice)
    row |= _spread("success", None if label else c.success)
    row["success_left_out"] = None if label else c.success_left_out
    row["eps_network"] = c.eps_network
    for name in ("rms", "linf", "l2", "native_rms", "percent_rms", "psnr_db", "ssim"):
        row[f"size_{name}"] = None if c.size is None else getattr(c.size, name)
    row["volume_error_ml"] = c.classes[label].volume_error_ml if label else None
    for state in ("ok", "reference_empty", "prediction_empty", "both_empty"):
        row[f"cases_{state}"] = c.classes[label].states.get(state, 0) if label else None
    return row


def summary_csv(summary: Summary) -> str:
    """One row per condition, and one for each class of it."""
    return _text([_condition_row(c, label) for c in summary.conditions for label in ("", *c.classes)])
