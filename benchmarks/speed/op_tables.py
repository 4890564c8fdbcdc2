"""The table of ``ops.py`` and the bars that its numbers are held to."""

from __future__ import annotations

from typing import Any

from benchmarks.shared.measuring import bar_table, table
from benchmarks.speed.op_cases import LARGE, NORMS, PLAIN

#: Share of the copy bandwidth that a step is to reach on CUDA.
BAR = 0.8


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is demanded of steps on CUDA, what was measured, and whether it is enough."""
    steps = {f"gradient_step {norm}" for norm in NORMS}
    judged = [r for r in rows if r["op"] in steps and r["case"] == LARGE and r["implementation"] == "triton"]
    missing = sorted(steps - {row["op"] for row in judged})
    found = [
        {
            "op": row["op"],
            "case": row["case"],
            "measured": row["share"],
            "bar": f">= {BAR}",
            "pass": row["share"] >= BAR,
        }
        for row in judged
    ]
    # Kernels that did not run have not passed.
    return found + [
        {"op": op, "case": LARGE, "measured": "no kernel ran", "bar": f">= {BAR}", "pass": False} for op in missing
    ]


def tables(result: dict[str, Any]) -> str:
    """Measurements and bars as Markdown."""
    device = any("device_us" in row for row in result["rows"])
    kinds = ["call", *["device"] * device]
    keys = ["op", "case", "implementation", *(f"{kind}_us" for kind in kinds), "to_reference", "bytes", "gb_per_s",
            "copy_gb_per_s", "share"]  # fmt: skip
    body = [[*(row[key] for key in keys), "-".join(map(str, row["share_min_max"]))] for row in result["rows"]]
    head = ["op", "case", "implementation", *(f"{kind}, us" for kind in kinds), "time / reference", "bytes", "GB/s",
            "copy GB/s", "share of copy", "min-max"]  # fmt: skip
    triton = f"triton {result['triton']}" if result["triton"] else "triton not installed"
    parts = [
        "# Fused ops",
        f"`{result['command']}`, {result['date']}. {result['device']} ({result['cpu']}). torch {result['torch']}, "
        f"{triton}.",
        f"Median of {result['rounds']} rounds, float32. Copy is `copy_` at the footprint of the op, read plus written. "
        f"`{PLAIN}` is a composition of torch's functions. Bytes are those that the op must move, whatever an "
        "implementation does move. `hard_counts` includes the check for finite logits. "
        + ("`call` is with Python's part, `device` without; ratios and shares are of `device`. " if device else "")
        + f"All results were compared with the reference in float64 first: {result['checked']} comparisons.",
        table(head, body),
    ]
    if result["bars"]:
        held = bar_table(("op", "case", "measured", "bar"), result["bars"])
        parts += ["## Bars", "Share of the copy bandwidth.", held]
    return "\n\n".join(parts) + "\n"
