"""What does robustness cost? Trains one 2D network once per variant of the search's settings and attacks the results.

    python -m benchmarks.robustness.search_settings 4 -p nnUNetPlans_small --pretrained .../checkpoint_final.pth -w W

Every variant starts from the same standard model, segmentation heads included, and trains fold 0 of a preprocessed data
set for the same number of iterations with nnUNetTrainerIMA (in ``W/VARIANT-SEED`` as nnUNet_results; a
finished training there is taken as it is). The network then meets PGD of 20 steps in float32, L2 per slice, on slices
with foreground of validation cases. Confidence intervals come from a bootstrap over cases, slices of a case staying
together; differences to the reference variant are paired by slice. They say nothing about how much another training of
the same variant would differ: for that there is ``--seeds``.

Writes ``benchmarks/results/search_settings.json`` and ``.md``; the table also goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.measuring import RESULTS, again, command_line
from ima_seg.attacks import Problem, pgd
from ima_seg.files import write_text
from ima_seg.methods.ima_settings import IMASettings
from ima_seg.nnunet.folder import load_model
from ima_seg.ops import hard_dice
from ima_seg.types import Labels, Target, ThreatModel

LEVELS_L2 = (0.0, 1.0, 5.0, 10.0, 15.0)
RESAMPLES = 2000
#: What each variant sets; everything else is the default. ``paper`` is the paper's search with our margin rule.
#: The stored results also have variants of a start, ``gradient``, that was removed since.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"steps": 20, "start": "random", "refine": "bisection", "refine_steps": 10, "refine_tolerance": 0.0,
              "precision": "fp32"},
    "random-K5": {"steps": 5, "start": "random", "refine_steps": 4, "refine_tolerance": 0.05},
    "random-K5-coarse": {"steps": 5, "start": "random", "refine_steps": 2, "refine_tolerance": 0.1},
    "mixed-K5": {"steps": 5, "start": "mixed", "refine_steps": 4, "refine_tolerance": 0.05},
    "mixed-K2-coarse": {"steps": 2, "start": "mixed", "refine_steps": 2, "refine_tolerance": 0.1,
                        "background_steps": 2},
    "mixed-K2-lean": {"steps": 2, "start": "mixed", "refine_steps": 2, "refine_tolerance": 0.1,
                      "background_steps": 1},
    "mixed-K2-refine1": {"steps": 2, "start": "mixed", "refine_steps": 1, "refine_tolerance": 0.1,
                         "background_steps": 1},
    "default": {},
    "beta-75": {"tau": 0.6, "beta": 0.75},
    "tau-30": {"tau": 0.3},
    "tau-30-beta-75": {"tau": 0.3, "beta": 0.75},
    "tau-45": {"tau": 0.45},
    "relative-50": {"criterion": "relative", "tau": 0.5},
    "rule-paper": {"rule": "paper"},
    "rule-majority": {"rule": "majority"},
}  # fmt: skip


def training_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of every script that trains from a standard model: its data, folders, model and device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("-w", "--work", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, required=True, help="final checkpoint of a standard model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def train(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Train a variant in a process of its own unless that is done; returns the final checkpoint."""
    folder = options.work / f"{name}-{seed}"
    pattern = "*/nnUNetTrainerIMA__*__2d/fold_0/checkpoint_final.pth"
    done = list(folder.glob(pattern))
    if done:
        return done[0]
    folder.mkdir(parents=True, exist_ok=True)
    values = {"delta": options.delta, "epochs": options.epochs, "iterations_per_epoch": options.iterations,
              "val_iterations_per_epoch": 1, "save_every": 1000, **VARIANTS[name]}  # fmt: skip
    settings = folder / "settings.toml"
    settings.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    # nnU-Net reads its folders and the number of its workers at import; without workers a seed decides every batch.
    environment = {**os.environ, "nnUNet_results": str(folder), "IMA_CONFIG": str(settings), "nnUNet_n_proc_DA": "0"}
    with (folder / "log.txt").open("w") as log:
        command = again(__file__, *sys.argv[1:], "--train-seed", str(seed))
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return next(folder.glob(pattern))


def seeded_trainer(options: argparse.Namespace, seed: int, pretrained: Path | None) -> Any:
    """nnU-Net's trainer object with the settings of the environment, heads included where it starts ``pretrained``."""
    from nnunetv2.run.run_training import get_trainer_from_args

    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    device = torch.device(options.device)
    trainer = get_trainer_from_args(options.dataset, "2d", 0, "nnUNetTrainerIMA", options.plans, device=device)
    trainer.initialize()
    if pretrained is not None:
        weights = torch.load(pretrained, map_location=device, weights_only=False)["network_weights"]
        trainer.network.load_state_dict(weights)
    return trainer


def validation_slices(
    dataset: str, configuration: Any, skip: int, cases: int, fold: int = 0, part: str = "val"
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Slices with foreground of ``cases`` validation cases after ``skip``, padded or cropped to the patch.

    Returns:
        Images (N, C, H, W), references (N, 1, H, W), and the case of each slice.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    from ima_seg.nnunet.plans import preprocessed_folder

    folder = preprocessed_folder(dataset)
    names = json.loads((folder / "splits_final.json").read_text())[fold][part][skip : skip + cases]
    data = folder / configuration.data_identifier
    images, references, owners = [], [], []
    for name in names:
        image, reference, _, _ = infer_dataset_class(str(data))(str(data), [name]).load_case(name)
        image, reference = torch.from_numpy(np.array(image)), torch.from_numpy(np.array(reference))
        for z in range(image.shape[1]):
            if (reference[:, z] > 0).any():
                images.append(fit(image[:, z].float(), configuration.patch_size))
                references.append(fit(reference[:, z].clamp_min(0).long(), configuration.patch_size))
                owners.append(name)
    return torch.stack(images), torch.stack(references), owners


def fit(slice_: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Pad with zeros or crop, centred, to ``size``."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        spare = wanted - slice_.shape[axis]
        padding = (spare // 2, spare - spare // 2)
        slice_ = torch.nn.functional.pad(slice_, (0, 0, *padding) if axis == -2 else padding)
    return slice_


def robust_dice(
    network: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    labels: Labels,
    levels: Sequence[float] = LEVELS_L2,
) -> list[list[float]]:
    """Dice of each slice at each level (L2 of a slice), levels first."""
    radius = 1 / math.sqrt(x[0].numel())
    result = []
    for level in levels:
        torch.manual_seed(0)
        scores: list[float] = []
        for start in range(0, len(x), 64):
            batch, target = x[start : start + 64], Target.from_raw(y[start : start + 64], labels)
            if level:
                problem = Problem(network, batch, target, ThreatModel("l2"), precision="fp32")
                batch = pgd(problem, level * radius, steps=20, keep="last").adversarial
            with torch.no_grad():
                scores += hard_dice(network(batch), target).tolist()
        result.append(scores)
    return result


def attacked(name: str, checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Per-slice Dice and cost of a training; kept beside it."""
    stored = options.work / f"attacked-{name}-{options.skip}-{options.cases}.json"
    if stored.is_file():
        known: dict[str, Any] = json.loads(stored.read_text())
        return known
    device = torch.device(options.device)
    model = load_model(checkpoint.parents[1], folds=["0"], checkpoint=checkpoint.name, device=device)
    x, y, owners = validation_slices(options.dataset, model.configuration, options.skip, options.cases)
    row: dict[str, Any] = {"owners": owners}
    row["dice"] = robust_dice(model.networks[0], x.to(device), y.to(device), model.labels)
    if model.ima is not None:
        history = model.ima["history"]
        row["settings"] = model.ima["settings"]
        row["median_margin"] = history[-1]["margin_q50"]
        for name in ("seconds", "forwards_per_sample", "gradients_per_sample", "passes_per_sample", "searched_share"):
            row[name] = sum(epoch[name] for epoch in history) / len(history)
    options.work.mkdir(parents=True, exist_ok=True)
    write_text(stored, json.dumps(row))
    return row


def over_cases(values: np.ndarray, owners: list[str]) -> dict[str, float]:
    """Mean of ``values`` (one per slice) and its 95 % interval, percentiles of a bootstrap over cases."""
    names = sorted(set(owners))
    sums = np.array([sum(v for v, owner in zip(values, owners, strict=True) if owner == name) for name in names])
    counts = np.array([owners.count(name) for name in names])
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return {"mean": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def compared(rows: dict[str, dict[str, Any]], reference_variant: str) -> dict[str, dict[str, Any]]:
    """Means with intervals and differences to the reference of the same seed, per training."""
    results: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        dice = np.array(row["dice"])
        entry = {key: value for key, value in row.items() if key not in ("dice", "owners")}
        entry["dice"] = [over_cases(level, row["owners"]) for level in dice]
        reference = rows.get(f"{reference_variant}-{name.rsplit('-', 1)[-1]}")
        if reference is not None and reference is not row:
            entry["difference"] = [over_cases(level, row["owners"]) for level in dice - np.array(reference["dice"])]
        results[name] = entry
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    head = ["variant-seed", *("clean" if level == 0 else f"L2 {level:g}" for level in LEVELS_L2)]
    head += ["gradients", "forwards", "s per epoch"]
    lines = [head, ["---"] * len(head)]
    for name, row in results.items():
        cells = [name]
        for index, dice in enumerate(row["dice"]):
            cell = f"{dice['mean']:.3f} ({dice['low']:.3f} to {dice['high']:.3f})"
            if "difference" in row:
                delta = row["difference"][index]
                cell += f"; {delta['mean']:+.3f} ({delta['low']:+.3f} to {delta['high']:+.3f})"
            cells.append(cell)
        for key, digits in (("gradients_per_sample", 2), ("forwards_per_sample", 2), ("seconds", 0)):
            cells.append(f"{row[key]:.{digits}f}" if key in row else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Train, attack, store."""
    parser = training_parser(__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--delta", type=float, default=0.06, help="expansion step, SD per voxel")
    parser.add_argument("--cases", type=int, default=20, help="validation cases to attack")
    parser.add_argument("--skip", type=int, default=0, help="validation cases before them, left for a final test")
    parser.add_argument(
        "--reference", default="paper", choices=list(VARIANTS), help="what the others are compared with"
    )
    parser.add_argument("--others", nargs="+", default=[], metavar="NAME=CHECKPOINT", help="attack these, too")
    parser.add_argument("--output", type=Path, default=RESULTS / "search_settings.json")
    parser.add_argument("--train-seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_seed is not None:
        seeded_trainer(options, options.train_seed, options.pretrained).run_training()
        return
    others = dict(each.split("=", 1) for each in options.others)
    rows = {
        name: attacked(name, Path(file), options) for name, file in {"standard": options.pretrained, **others}.items()
    }
    for seed in options.seeds:
        for name in options.variants:
            rows[f"{name}-{seed}"] = attacked(f"{name}-{seed}", train(name, seed, options), options)
            print(table(compared(rows, options.reference)), flush=True)
    results = compared(rows, options.reference)
    document = {
        "what": "mean Dice per slice with foreground under PGD-20, L2 of the whole slice; 95 % intervals over cases",
        "levels_l2": LEVELS_L2,
        "slices": len(rows["standard"]["owners"]),
        "cases": options.cases,
        "skipped": options.skip,
        "iterations": options.epochs * options.iterations,
        "default": IMASettings().model_dump(),
        "results": results,
        "command": command_line(__file__),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": str(options.device),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    write_text(options.output, json.dumps(document, indent=2) + "\n")
    write_text(options.output.with_suffix(".md"), table(results) + "\n")


if __name__ == "__main__":
    main()
