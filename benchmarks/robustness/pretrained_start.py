"""How much sooner is IMA robust when it starts from a standard model? One 2D training from it, one from scratch.

    python -m benchmarks.robustness.pretrained_start 4 -p nnUNetPlans_small --pretrained .../checkpoint_final.pth -w W

Both train fold 0 with nnUNetTrainerIMA and the same settings; every ``--every`` epochs the network meets PGD-20 (L2 5
per slice, float32) on slices with foreground of validation cases. The time of a point is that of the training alone,
from its history; what the standard model itself took is not counted. A finished training in WORK is taken as it is.

Writes ``benchmarks/results/pretrained_start.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.measuring import RESULTS, again, command_line, provenance, table
from benchmarks.shared.training import robust_dice, seeded_trainer, training_parser, validation_slices
from ima_seg.files import write_text
from ima_seg.types import Labels

STARTS = ("pretrained", "scratch")


def train_here(options: argparse.Namespace) -> None:
    """Train in this process, whose environment names settings and folders, and attack on the way."""
    trainer = seeded_trainer(
        options.dataset, plans=options.plans, seed=0, device=options.device,
        pretrained=options.pretrained if options.start == "pretrained" else None,
    )  # fmt: skip
    x, y, owners = validation_slices(options.dataset, trainer.configuration_manager, 0, options.cases)
    x, y = x.to(trainer.device), y.to(trainer.device)
    points: list[dict[str, Any]] = []
    end_of_epoch = trainer.on_epoch_end

    def measured() -> None:
        epoch = trainer.current_epoch
        end_of_epoch()
        if (epoch + 1) % options.every and epoch + 1 != trainer.num_epochs:
            return
        trainer.network.eval()
        trainer.set_deep_supervision_enabled(False)
        outputs = trainer.label_manager.num_segmentation_heads
        dice = np.array(robust_dice(trainer.network, x, y, Labels(outputs), levels=(0.0, 5.0)))
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        points.append({"epoch": epoch + 1, "clean": float(dice[0].mean()), "l2_5": float(dice[1].mean())})

    trainer.on_epoch_end = measured
    trainer.run_training()
    with (Path(trainer.output_folder) / "ima_history.csv").open() as file:
        names, *rows = (line.strip().split(",") for line in file)
    seconds = np.cumsum([float(row[names.index("seconds")]) for row in rows])
    for point in points:
        point["seconds"] = round(float(seconds[point["epoch"] - 1]), 1)
    write_text(options.work / f"{options.start}.json", json.dumps({"slices": len(owners), "points": points}))


def train(start: str, options: argparse.Namespace) -> dict[str, Any]:
    """The points of a training, made in a process of its own unless they are there."""
    done, folder = options.work / f"{start}.json", options.work / start
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        values = {"epochs": options.epochs, "iterations_per_epoch": options.iterations, "val_iterations_per_epoch": 1}
        write_text(folder / "settings.toml", "".join(f"{key} = {value}\n" for key, value in values.items()))
        environment = {**os.environ, "nnUNet_results": str(folder), "IMA_CONFIG": str(folder / "settings.toml")}
        with (folder / "log.txt").open("w") as log:
            command = again(__file__, *sys.argv[1:], "--start", start)
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    points: dict[str, Any] = json.loads(done.read_text())
    return points


def reached(points: list[dict[str, Any]], level: float) -> dict[str, Any] | None:
    """The first point whose robust Dice is at least ``level``."""
    return next((point for point in points if point["l2_5"] >= level), None)


def main() -> None:
    """Train both, compare, store."""
    parser = training_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--every", type=int, default=3, help="epochs between attacks")
    parser.add_argument("--cases", type=int, default=6, help="validation cases to attack")
    parser.add_argument("--start", choices=STARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        train_here(options)
        return
    trainings = {start: train(start, options) for start in STARTS}
    points = {start: training["points"] for start, training in trainings.items()}
    target = max(point["l2_5"] for point in points["scratch"])
    sooner = {start: reached(each, target) for start, each in points.items()}
    rows = [
        [start, str(point["epoch"]), f"{point['seconds']:.0f}", f"{point['clean']:.3f}", f"{point['l2_5']:.3f}"]
        for start, each in points.items()
        for point in each
    ]
    document = {
        "what": "mean Dice per slice with foreground, clean and under PGD-20 of L2 5, along two IMA trainings",
        "slices": trainings["scratch"]["slices"], "points": points,
        "best_of_scratch": target, "first_at_least_that": sooner,
        **provenance(__file__, torch.device(options.device)),
        "command": command_line(__file__),
    }  # fmt: skip
    write_text(RESULTS / "pretrained_start.json", json.dumps(document, indent=2) + "\n")
    text = table(["start", "epoch", "seconds of training", "clean", "L2 5"], rows)
    write_text(RESULTS / "pretrained_start.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
