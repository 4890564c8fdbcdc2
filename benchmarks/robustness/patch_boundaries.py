"""What predicts how far a patch is from its boundary: its case, its foreground's size, its clean Dice?

    python -m benchmarks.robustness.patch_boundaries 4 MODEL/fold_0/checkpoint_final.pth

A margin belongs to a case, whose patches differ. Slices with foreground of training cases are padded or cropped to the
patch, and the smallest perturbation that takes their Dice below a threshold (0.45, or half of that of the clean patch)
is searched (``minimal_norm``, 8 searches of 20 steps). The variance of the distance's logarithm is split: how much lies
between cases, and how much of it within cases is explained by size and Dice, in a linear regression.

Writes ``benchmarks/results/patch_boundaries.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.measuring import RESULTS, command_line, provenance
from benchmarks.shared.training import validation_slices
from ima_seg.attacks import Problem, minimal_norm
from ima_seg.files import replacing, write_text
from ima_seg.nnunet.folder import load_model
from ima_seg.ops import hard_dice
from ima_seg.types import Target, ThreatModel

#: Thresholds of the two criteria.
TAU, SHARE = 0.45, 0.5
#: Largest distance looked for, SD per voxel, and searches.
LARGEST, ROUNDS = 1.0, 8


def distances(
    network: torch.nn.Module, x: torch.Tensor, target: Target, criterion: str
) -> tuple[np.ndarray, np.ndarray]:
    """Clean Dice and distance (B,) of the boundary; NaN where there is none, or none is found."""
    with torch.no_grad():
        clean = hard_dice(network(x), target)
    problem = Problem(network, x, target, ThreatModel("l2"), precision="fp32")
    threshold = SHARE * clean if criterion == "relative" else torch.full_like(clean, TAU)
    hit = minimal_norm(problem, LARGEST, threshold=threshold, clean_quality=clean, steps=20, rounds=ROUNDS)
    usable = hit.broken & (clean > 0) & (clean >= threshold)
    return clean.numpy(), torch.where(usable, hit.crossing, torch.nan).numpy()


def explained(values: np.ndarray, *features: np.ndarray) -> float:
    """Share of the variance of ``values`` that a linear regression on ``features`` explains."""
    design = np.stack([np.ones_like(values), *features], 1)
    rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return round(float(1 - rest.var() / values.var()), 3)


def within(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """``values`` minus the mean of their case."""
    result: np.ndarray = values.copy()
    for owner in np.unique(owners):
        result[owners == owner] -= values[owners == owner].mean()
    return result


def plot(path: Path, rows: dict[str, np.ndarray]) -> None:
    """Distance against size and Dice, a colour for each of the first cases."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("foreground voxels", "clean Dice"), strict=True):
        for owner in np.unique(rows["owners"])[:10]:
            mine = rows["owners"] == owner
            axes.plot(rows[name][mine], rows["distance"][mine], "o", markersize=3, alpha=0.7)
        axes.set(xlabel=name, ylabel="distance of the boundary, SD per voxel", yscale="log")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def main() -> None:
    """Measure, split, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--criterion", choices=("dice", "relative"), default="relative")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "patch_boundaries.json")
    options = parser.parse_args()
    fold = options.checkpoint.parent.name.removeprefix("fold_")
    model = load_model(options.checkpoint.parents[1], folds=[fold], checkpoint=options.checkpoint.name)
    x, y, owners = validation_slices(
        options.dataset, model.configuration, 0, options.cases, fold=int(fold), part="train"
    )
    measured = [
        distances(model.networks[0], batch, Target.from_raw(truth, model.labels), options.criterion)
        for batch, truth in zip(x.split(32), y.split(32), strict=True)
    ]
    clean, distance = (np.concatenate(part) for part in zip(*measured, strict=True))
    size = (y > 0).flatten(1).sum(1).numpy().astype(float)
    usable = np.isfinite(distance)
    rows = {
        "owners": np.array(owners)[usable], "distance": distance[usable], "foreground voxels": size[usable],
        "clean Dice": clean[usable],
    }  # fmt: skip
    target, cases = np.log(rows["distance"]), rows["owners"]
    features = {"log size": np.log(rows["foreground voxels"]), "clean Dice": rows["clean Dice"]}
    inside = {name: within(values, cases) for name, values in features.items()}
    rest = within(target, cases)
    shares: dict[str, Any] = {
        "case": round(float(1 - rest.var() / target.var()), 3),
        **{name: explained(target, values) for name, values in features.items()},
        "size and Dice": explained(target, *features.values()),
        "within cases: log size": explained(rest, inside["log size"]),
        "within cases: clean Dice": explained(rest, inside["clean Dice"]),
        "within cases: both": explained(rest, *inside.values()),
    }
    document = {
        "what": "share of the variance of the logarithm of a patch's boundary distance that is explained",
        "criterion": options.criterion, "shares": shares, "patches": len(target),
        "without a boundary found": int((~usable).sum()),
        "cases": options.cases, "quartiles": np.quantile(rows["distance"], [0.25, 0.5, 0.75]).round(4).tolist(),
        **provenance(__file__, torch.device("cpu")), "command": command_line(__file__),
    }  # fmt: skip
    write_text(options.output, json.dumps(document, indent=2) + "\n")
    plot(options.output.with_suffix(".png"), rows)
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
