"""The tables of ``attack_speed.py`` and the bars that its numbers are held to."""

from __future__ import annotations

from typing import Any

from benchmarks.shared.measuring import bar_table, table

#: Float32 may cost this much more than the bare passes; what separates equal work in a run is noise of this size too.
FP32_BAR = 1.03
#: Image-sized buffers that an attack may need beyond the bare passes.
BUFFERS_BAR = 4


def bars(rows: list[dict[str, Any]], device: str, bf16: bool) -> list[dict[str, Any]]:
    """What is demanded of each of our rows, what was measured, and whether it is enough."""
    found = []
    for row in rows:
        if not row["contender"].startswith("ima-seg"):
            continue
        default = row["contender"] == "ima-seg default"
        demands: list[tuple[str, float, str, float]] = []
        if not default or not bf16:
            demands.append(("time / floor", row["ratio"], "<=", FP32_BAR))
            # The plain loop makes the same passes: beside it, equal work must not be called slower for noise.
            demands.append(("time / fastest peer", row["to_fastest_peer"], "<=", FP32_BAR))
        else:
            faster = 1.8 if device == "cpu" else 3.0 if row["case"].startswith("2D") else 2.0
            demands.append(("fastest peer / time", round(1 / row["to_fastest_peer"], 3), ">=", faster))
            if device == "cpu":
                demands.append(("time / floor", row["ratio"], "<=", 0.55))
        if "buffers_over_floor" in row:
            demands.append(("image-sized buffers over floor", row["buffers_over_floor"], "<=", BUFFERS_BAR))
        for what, value, sign, bar in demands:
            passed = value <= bar if sign == "<=" else value >= bar
            where = {key: row[key] for key in ("case", "network", "norm", "contender")}
            found.append(where | {"what": what, "measured": value, "bar": f"{sign} {bar}", "pass": passed})
    return found


def tables(result: dict[str, Any]) -> str:
    """Contenders, measurements and bars as Markdown."""
    machine = f"{result['device']} ({result['cpu']})"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    absent = f" Not installed, hence left out: {', '.join(result['not_installed'])}." * bool(result["not_installed"])
    parts = [
        "# Speed of PGD",
        f"`{result['command']}`, {result['date']}. {machine}; bfloat16 instructions: "
        f"{'yes' if result['bf16_instructions'] else 'no'}. {versions}.{absent}",
        f"{result['steps']} steps from the clean image, eps {result['eps']} (l2: RMS per voxel; linf: largest); median "
        f"of {result['rounds']} rounds. The floor is the bare float32 passes: forward, loss, input gradient. The final "
        "loss is cross-entropy plus 1 - Dice, scored in float32. The fastest peer is in bold.",
        "## Contenders",
        "Each is run once more on a small network in training mode with one frozen batch norm and filled `p.grad`; the "
        "last column is what has changed afterwards.",
        table(
            ["contender", "version", "wrapper it needs here", "alters"],
            [[c["contender"], c["version"], c["wrapper"], ", ".join(c["alters"]) or "nothing"]
             for c in result["contenders"]],
        ),
        "## Time and memory",
        table(
            ["case", "network", "norm", "contender", "time / floor", "min-max", "seconds", "final loss", "size / eps",
             "peak memory, MiB", "image buffers over floor"],
            [_line(row) for row in result["rows"]],
        ),
    ]  # fmt: skip
    if result["bars"]:
        keys = ("case", "network", "norm", "contender", "what", "measured", "bar")
        parts += ["## Bars", bar_table(keys, result["bars"])]
    return "\n\n".join(parts) + "\n"


def _line(row: dict[str, Any]) -> list[Any]:
    name = f"**{row['contender']}**" if row["fastest_peer"] else row["contender"]
    where = [row["case"], row["network"], row["norm"], name]
    if "wrong" in row:
        lacks = row["wrong"].startswith("has no attack")
        return [*where, row["wrong"] if lacks else f"wrong result: {row['wrong']}", "", "", "", "", "", ""]
    spread = "-".join(str(value) for value in row.get("ratio_min_max", []))
    rest = [row.get(key, "") for key in ("seconds", "loss", "size", "memory_mib", "buffers_over_floor")]
    return [*where, row["ratio"], spread, *rest]
