"""Table and figure of stored robustness results; nothing in them is typed by hand.

One file: each section of the table with its own figures, and nothing that another script uses.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.robustness.methods import MATCHED, METHODS, OURS, STANDARD
from benchmarks.shared.measuring import ROOT, table
from ima_seg.evaluate.measure.compare import holm, paired
from ima_seg.files import replacing, write_text

matplotlib.use("Agg")
RESAMPLES = 2000
#: What must be the same in all results of a table.
SHARED = ("versions", "sources", "plans", "pretrained", "profile")
#: Explains the columns of the overview.
COLUMNS = (
    "Cost: passes of a standard training per patch. paper: Dice per slice under PGD, L2 of the slice. worst: Dice per "
    "volume under the worst of PGD, APGD, SegPGD and Square, budget per voxel (RMS, or L∞) in standard deviations. "
    "pgdat-N: PGD training on fixed noise, L2 N on a slice of 56x40 or as much per voxel; half: mixed half and half "
    "with the clean loss."
)
Records = list[dict[str, Any]]


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The stored results by method, in the order of the methods; folds in each.

    Raises:
        SystemExit: there are none, or they do not belong together.
    """
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    files = sorted(folder.glob("*_fold*.json"))
    if not files:
        sys.exit(f"no results in {folder}; run without --table first")
    first: dict[str, Any] = {}
    splits: dict[str, str] = {}
    for file in files:
        result = json.loads(file.read_text())
        first = first or result["identity"]
        for key in SHARED:
            if result["identity"][key] != first[key]:
                sys.exit(
                    f"{file.name} was made with other {key} than {files[0].name} ({result['identity'][key]!r}, "
                    f"{first[key]!r}); they are never mixed, run with --rerun {result['method']}"
                )
        results[result["method"]].append(result)
        split = splits.setdefault(result["fold"], result["identity"]["split"])
        if split != result["identity"]["split"]:
            sys.exit(f"{file.name} was made with another split of fold {result['fold']}; --rerun {result['method']}")
    folds = {method: sorted(result["fold"] for result in each) for method, each in results.items()}
    if len({tuple(each) for each in folds.values()}) > 1:
        sys.exit(f"the methods have different folds ({folds}); run the missing ones, or remove what is too much")
    names = [*METHODS, *(method + MATCHED for method in METHODS)]
    return {method: results[method] for method in names if method in results}


def pick(results: list[dict[str, Any]], protocol: str, worst: bool) -> dict[float, dict[str, dict[str, Any]]]:
    """Budget (0: clean) -> case -> its record, of the attack that leaves least Dice; all folds together."""
    found: dict[float, dict[str, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        for record in result["protocols"][protocol]:
            if not worst and record["attack"] not in ("clean", "pgd"):
                continue
            cases = found[record["eps"] or 0.0]
            case = record["case"]
            # Nothing there and nothing predicted is no success of an attack.
            if case not in cases or _rank(record) < _rank(cases[case]):
                cases[case] = record
    return dict(sorted(found.items()))


def _rank(record: dict[str, Any]) -> float:
    return float("inf") if record["dice"] is None else float(record["dice"])


def same_cases(chosen: dict[str, dict[float, dict[str, Any]]]) -> None:
    """Refuse methods that were not evaluated alike.

    Raises:
        SystemExit: naming the method and what it lacks.
    """
    everything = {(level, case) for by_level in chosen.values() for level, cases in by_level.items() for case in cases}
    for method, by_level in chosen.items():
        missing = everything - {(level, case) for level, cases in by_level.items() for case in cases}
        if missing:
            sys.exit(f"{method} lacks budget and case {sorted(missing)[0]} ({len(missing)} in all); --rerun {method}")


def per_slice(records: Records) -> float:
    """Mean Dice over all slices with foreground."""
    pairs = [record["slice_dice"] for record in records if record["slice_dice"] is not None]
    return sum(mean * count for mean, count in pairs) / max(sum(count for _, count in pairs), 1)


def pooled(records: Records) -> float:
    """Dice of the voxels of all cases together, mean over classes."""
    counts = np.array([[record["voxels"][name] for name in sorted(record["voxels"])] for record in records]).sum(0)
    dice = 2 * counts[:, 0] / np.maximum(2 * counts[:, 0] + counts[:, 1] + counts[:, 2], 1)
    return float(dice.mean())


def per_case(key: str) -> Callable[[Records], float]:
    """Mean over cases of a metric."""

    def mean(records: Records) -> float:
        values = [record[key] for record in records if record[key] is not None]
        return float(np.mean(values)) if values else float("nan")

    return mean


def interval(statistic: Callable[[Records], float], records: Records) -> tuple[float, float, float]:
    """Estimate and 95 % interval, percentiles of a bootstrap over cases."""
    rng = np.random.default_rng(0)
    draws = [statistic([records[i] for i in rng.integers(len(records), size=len(records))]) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return statistic(records), float(low), float(high)


def difference(statistic: Callable[[Records], float], ours: Records, other: Records) -> tuple[float, float, float]:
    """Ours minus the other's with its 95 % interval, both from the same bootstrap draws of cases."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        rows = rng.integers(len(ours), size=len(ours))
        draws.append(statistic([ours[i] for i in rows]) - statistic([other[i] for i in rows]))
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return statistic(ours) - statistic(other), float(low), float(high)


def shown(values: tuple[float, float, float], sign: str = "") -> str:
    """``0.512 (0.480 to 0.541)``."""
    return f"{values[0]:{sign}.3f} ({values[1]:{sign}.3f} to {values[2]:{sign}.3f})"


def section(title: str, chosen: dict[str, dict[float, dict[str, Any]]], statistic: Callable[[Records], float]) -> str:
    """One statistic of all methods at all budgets, with intervals."""
    levels = list(next(iter(chosen.values())))
    head = ["", *("clean" if level == 0 else f"{level:g}" for level in levels)]
    body = [
        [method, *(shown(interval(statistic, list(by_level[level].values()))) for level in levels)]
        for method, by_level in chosen.items()
    ]
    return f"### {title}\n\n" + table(head, body)


def overview(
    results: dict[str, list[dict[str, Any]]],
    measured: dict[str, tuple[dict[str, dict[float, dict[str, Any]]], Callable[[Records], float]]],
) -> str:
    """One line per method: its cost, and one statistic of each protocol at all budgets, clean images once per protocol.

    Args:
        results: by method.
        measured: protocol -> records by method, budget and case, and the statistic.
    """
    head, rows = ["", "cost"], {method: [method] for method in results}
    for method, folds in results.items():
        passes = np.mean([fold["cost"]["standard_passes_per_sample"] for fold in folds])
        rows[method].append(f"{passes:.1f}")
    for protocol, (chosen, statistic) in measured.items():
        for level in next(iter(chosen.values())):
            head.append(f"{protocol} " + ("clean" if level == 0 else f"{level:g}"))
            for method, by_level in chosen.items():
                rows[method].append(f"{statistic(list(by_level[level].values())):.3f}")
    return table(head, list(rows.values()))


def duels(chosen: dict[str, dict[float, dict[str, Any]]], statistics: dict[str, Callable[[Records], float]]) -> str:
    """Ours against every other method: differences with intervals, and a paired test over cases."""
    ours, rows, p_values = chosen[OURS], [], []
    for method, by_level in chosen.items():
        if method == OURS:
            continue
        for level, cases in by_level.items():
            common = [case for case in cases if case in ours[level]]
            mine, theirs = [ours[level][case] for case in common], [cases[case] for case in common]
            pairs = [(a["dice"], b["dice"]) for a, b in zip(theirs, mine, strict=True)]
            there = [(a, b) for a, b in pairs if a is not None and b is not None]
            test = paired([a for a, _ in there], [b for _, b in there], resamples=RESAMPLES)
            p_values.append(1.0 if test is None else test.p)
            cells = [shown(difference(statistic, mine, theirs), "+") for statistic in statistics.values()]
            rows.append([method, "clean" if level == 0 else f"{level:g}", *cells])
    rows = [[*row, f"{p:.2g}"] for row, p in zip(rows, holm(p_values), strict=True)]
    return f"### {OURS} minus the other\n\n" + table(["", "budget", *statistics, "p (Dice per case, Holm)"], rows)


def best_fixed(
    chosen: dict[str, dict[float, dict[str, Any]]], statistic: Callable[[Records], float], matched: bool
) -> str:
    """At each budget the best training with fixed noise, of our computation or not, and ours against it."""
    fixed = [method for method in chosen if method.startswith("pgdat") and method.endswith(MATCHED) == matched]
    if not fixed or OURS not in chosen:
        return ""
    rows = []
    for level in chosen[OURS]:
        best = max(fixed, key=lambda method: statistic(list(chosen[method][level].values())))
        theirs, mine = chosen[best][level], chosen[OURS][level]
        common = [case for case in theirs if case in mine]
        gap = difference(statistic, [mine[case] for case in common], [theirs[case] for case in common])
        rows.append(["clean" if level == 0 else f"{level:g}", best, shown(gap, "+")])
    best = "best PGD training there" + (", of the same computation" if matched else "")
    return table(["budget", best, f"{OURS} minus it"], rows)


def costs(results: dict[str, list[dict[str, Any]]]) -> str:
    """What each training took."""
    rows = []
    standard = np.mean([fold["cost"]["seconds"] for fold in results.get(STANDARD, [])] or [np.nan])
    for method, folds in results.items():
        mean = {key: float(np.mean([fold["cost"][key] for fold in folds])) for key in
                ("forwards_per_sample", "gradients_per_sample", "training_passes_per_sample",
                 "standard_passes_per_sample", "seconds")}  # fmt: skip
        relative = "" if np.isnan(standard) else f"{mean['seconds'] / standard:.1f}"
        rows.append([method, f"{mean['training_passes_per_sample']:.2f}", f"{mean['gradients_per_sample']:.2f}",
                     f"{mean['forwards_per_sample']:.2f}", f"{mean['standard_passes_per_sample']:.1f}",
                     f"{mean['seconds']:.0f}", relative])  # fmt: skip
    head = [
        "",
        "training passes per patch",
        "input gradients",
        "forwards",
        "in standard passes",
        "seconds",
        "time / standard",
    ]
    return "### Cost\n\n" + table(head, rows)


def figure(path: Path, panels: dict[str, tuple[dict[str, Any], Callable[[Records], float]]]) -> None:
    """Curves over budgets, one panel per protocol."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False, layout="constrained")
    styles = ["-", "--", ":", "-."]
    for axis, (title, (chosen, statistic)) in zip(axes[0], panels.items(), strict=True):
        drawn = {method: by_level for method, by_level in chosen.items() if not method.endswith(MATCHED)}
        for index, (method, by_level) in enumerate(drawn.items()):
            values = [statistic(list(cases.values())) for cases in by_level.values()]
            axis.plot(
                list(by_level), values, styles[index // 8 % 4] if method != OURS else "-", marker="o", markersize=3,
                color="black" if method == OURS else f"C{index % 8}", linewidth=2.2 if method == OURS else 1.2,
                label=method,
            )  # fmt: skip
        axis.set_title(title.replace(": ", "\n", 1), fontsize=10)
        axis.set(xlabel="budget", ylabel="Dice", ylim=(0, 1))
        axis.grid(alpha=0.3)
    fig.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    with replacing(path) as temporary:
        fig.savefig(temporary, format="png", dpi=130)
    plt.close(fig)


def origin(results: dict[str, list[dict[str, Any]]], protocols: Sequence[str]) -> str:
    """Where the numbers come from."""
    first = next(iter(results.values()))[0]
    identity = first["identity"]
    cases = {protocol: len(pick(results[first["method"]], protocol, True)[0.0]) for protocol in protocols}
    lines = [
        f"`{first['command']}`, {first['date']}, {first['device']}, torch {first['torch']}, "
        f"ima-seg {first['ima_seg']} (sources {identity['sources']}).",
        "Folds: " + ", ".join(sorted(result["fold"] for result in results[first["method"]])) + "; one training each. "
        "Cases: " + ", ".join(f"{count} ({protocol})" for protocol, count in cases.items()) + ". "
        "Intervals: 95 %, bootstrap over cases; they say nothing about other trainings.",
        "Start: " + ("from scratch." if identity["pretrained"] is None else
                     f"all from the same standard model ({identity['pretrained']})."),
    ]  # fmt: skip
    return "\n\n".join(lines)


def put_into(file: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of ``name`` in a Markdown file; without markers nothing happens."""
    begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    if begin in before and end in before:
        head, rest = before.split(begin, 1)
        write_text(file, f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}")
        print(f"updated {file}")


def report(folder: Path) -> None:
    """Write ``table.md`` and ``figure.png`` into the folder of results, and their short form into README and docs."""
    results = load(folder)
    measured: dict[str, Any] = {}
    protocols = list(next(iter(results.values()))[0]["protocols"])
    about = origin(results, protocols)
    parts, short, panels = [f"# Robustness: {folder.name}", about, costs(results)], [], {}
    for protocol in protocols:
        paper = protocol == "paper"
        chosen = {method: pick(each, protocol, not paper) for method, each in results.items()}
        same_cases(chosen)
        title = f"{protocol}: " + ("PGD, L2 of each slice" if paper else "worst of the attacks per case, whole volumes")
        parts.append(f"## {title}")
        statistics = (
            {"Dice per slice": per_slice, "pooled Dice": pooled} if paper
            else {"Dice": per_case("dice"), "NSD": per_case("nsd")}
        )  # fmt: skip
        for index, (name, statistic) in enumerate(statistics.items()):
            found = [section(name, chosen, statistic)]
            found += [best_fixed(chosen, statistic, matched) for matched in (False, True)]
            parts += found
            if OURS in chosen and (paper or index == 0):
                short += [f"{OURS} against the best training on fixed noise, {name} ({protocol}):", *found[1:]]
        if not paper:
            parts.append(section("HD95, mm", chosen, per_case("hd95_mm")))
        if OURS in chosen and len(chosen) > 1:
            parts.append(duels(chosen, statistics))
        panels[title] = (chosen, next(iter(statistics.values())))
        measured[protocol] = panels[title]
    write_text(folder / "table.md", "\n\n".join(part for part in parts if part) + "\n")
    figure(folder / "figure.png", panels)
    print(f"wrote {folder / 'table.md'} and {folder / 'figure.png'}")
    place = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.as_posix()
    for file, up in ((ROOT / "README.md", ""), (ROOT / "docs" / "results.md", "../")):
        links = f"![Dice over budgets]({up}{place}/figure.png)\n\nEverything: [table.md]({up}{place}/table.md)."
        text = [overview(results, measured), COLUMNS, links, *short, about]
        put_into(file, f"robustness {folder.name}", "\n\n".join(part for part in text if part))
