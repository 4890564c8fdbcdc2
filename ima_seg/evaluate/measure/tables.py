"""The CSV files of a report: one row per record, and one row per condition and class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ima_seg.evaluate.measure.statistics import Estimate
from ima_seg.evaluate.measure.summary import Condition, Summary
from ima_seg.evaluate.records import Record
from ima_seg.evaluate.run import Run
from ima_seg.files import csv_text

_CLASS = ("state", "dice", "nsd", "hd95_mm", "reference_ml", "prediction_ml", "volume_error_ml", "tp", "fp", "fn")
_RECORD = (
    "case", "model", "kind", "attack", "norm", "unit", "eps", "eps_network", "budget", "severity",
    "dice", "nsd", "hd95_mm",
)  # fmt: skip
_COST = ("breaking_rms", "zero_gradient", "forwards", "gradients", "seconds", "metric_seconds")
_STATES = ("ok", "reference_empty", "prediction_empty", "both_empty")


def _columns(item: object | None, prefix: str, names: Iterable[str]) -> dict[str, Any]:
    """The attributes ``names`` as columns; empty ones where there is no item."""
    return {f"{prefix}{name}": None if item is None else getattr(item, name) for name in names}


def _spread(name: str, item: Estimate | None) -> dict[str, Any]:
    estimate, low, high = (None, None, None) if item is None else (item.estimate, item.low, item.high)
    return {name: estimate, f"{name}_low": low, f"{name}_high": high}


def records_csv(run: Run, records: Sequence[Record]) -> str:
    """One row per record, with the same columns in every row; lists are spread over columns."""
    rows = []
    for r in records:
        row = _columns(r, "", _RECORD)
        row |= {"slice_dice": r.slice_dice and r.slice_dice.mean, "slices": r.slice_dice and r.slice_dice.slices}
        row |= _columns(r.size, "size_", ("rms", "l2", "linf", "l2_slice", "psnr_db", "ssim"))
        for name in ("native_rms", "native_linf", "percent_rms"):
            values = [] if r.size is None else getattr(r.size, name)
            for i, channel in enumerate(run.channels):
                row[f"size_{name}_{channel}"] = values[i] if i < len(values) else None
        row |= _columns(r, "", _COST) | _columns(r.disk, "disk_", ("dice", "rms", "linf", "resampled"))
        for label in run.classes:
            row |= _columns(r.classes.get(label), f"{label}_", _CLASS)
        rows.append(row)
    return csv_text(rows)


def _condition_row(c: Condition, label: str) -> dict[str, Any]:
    """The row of a class, or of the mean over classes where ``label`` is empty."""
    item = c.classes[label] if label else c
    states = c.classes[label].states if label else {}
    return {
        **_columns(c, "", ("model", "kind", "attack", "eps", "severity")),
        "class": label or "mean",
        **_columns(c, "", ("n", "missing", "undefined", "partial")),
        **_spread("dice", item.dice),
        "pooled_dice": item.pooled_dice,
        **_spread("nsd", item.nsd),
        **_spread("hd95_mm", item.hd95_mm),
        **_spread("slice_dice", None if label else c.slice_dice),
        **_spread("success", None if label else c.success),
        "success_left_out": None if label else c.success_left_out,
        "eps_network": c.eps_network,
        **_columns(c.size, "size_", ("rms", "linf", "l2", "native_rms", "percent_rms", "psnr_db", "ssim")),
        "volume_error_ml": c.classes[label].volume_error_ml if label else None,
        **{f"cases_{state}": states.get(state, 0) if label else None for state in _STATES},
    }


def summary_csv(summary: Summary) -> str:
    """One row per condition, and one for each class of it."""
    return csv_text([_condition_row(c, label) for c in summary.conditions for label in ("", *c.classes)])
