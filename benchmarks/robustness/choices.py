"""Which settings deserve to be the default? Trainings of a 2D network by variants of the settings, and seeds.

    python -m benchmarks.robustness.choices 4 -w W --variants ima noise-15 --seeds 0 1 2 --reference noise-15

The validation fold has no part in choices: the training cases of fold 0 are split once more, 40 of them apart, as a
further fold of the data set (``splits_final.json``). A standard model of each activation is trained first, 1,600
iterations of 32 slices; every variant then goes on from it for 600, by nnU-Net's own trainer with its augmentation, in
``W/VARIANT-SEED`` as nnUNet_results. What is there is taken as it is, so that the same command resumes. Settings that
are not said are today's defaults.

Networks meet PGD of 20 steps in float32 (L2 0 to 15 per slice) on slices with foreground of the cases set apart. The
first 20 serve to choose; ``--skip 20`` takes the others. Reported are the Dice per slice, over the pooled voxels of a
case, and the area under the curve of Dice against budget, of the weights that a model predicts with (``average``) and
of those that the optimiser left (``last``). Differences are paired over cases and seeds; intervals are percentiles of a
bootstrap that draws both.

Writes ``benchmarks/results/choices.json`` and ``.md``, or ``--output``.

One file: the variants, how they train, how they are attacked and compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.measuring import RESULTS, again, command_line, provenance, table
from benchmarks.shared.training import seeded_trainer, validation_slices
from ima_seg.attacks import Problem, pgd
from ima_seg.files import write_text
from ima_seg.methods.ima_settings import IMASettings
from ima_seg.nnunet.checkpoint import TRAINED_KEY, read_checkpoint
from ima_seg.nnunet.folder import load_model
from ima_seg.nnunet.plans import preprocessed_folder, write_plans
from ima_seg.ops import hard_counts, mean_dice
from ima_seg.types import Target, ThreatModel

LEVELS_L2 = (0.0, 1.0, 5.0, 10.0, 15.0)
RESAMPLES = 2000
#: The fold that the training cases of fold 0 make, and how many of them are set apart.
FOLD, APART = 5, 40
#: All trainings share these, unless a variant says otherwise.
SHORT = {"epochs": 15, "iterations_per_epoch": 40, "val_iterations_per_epoch": 1, "save_every": 1000, "ema": 0.99,
         "training_precision": "bf16"}  # fmt: skip
STANDARD = {"beta": 0.0, "epochs": 40, "iterations_per_epoch": 40, "val_iterations_per_epoch": 1, "save_every": 10}
PER_VOXEL = 1 / math.sqrt(56 * 40)
#: Stands for the standard model's folder in a variant's settings.
TEACHER = "TEACHER"
#: The default of 0.1.0, before margins rested at a quantile. Only code of that version can train it.
BEFORE, COMMIT = "before", "d3d7830"


def _noise(**more: Any) -> dict[str, Any]:
    """Fixed noise of L2 15, half of the loss clean."""
    return {"eps": round(15 * PER_VOXEL, 4), "beta": 0.5, "steps": 5, **more}


_DICE = {"criterion": "dice", "tau": 0.45}
_FP32 = {"training_precision": "nnunet"}
_FIVE = {"steps": 5, "start": "random", "refine_steps": 2}
#: Name -> method, activation, settings beside :data:`SHORT`.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ima": ("IMA", "SiLU", {}),
    "ima-dice": ("IMA", "SiLU", _DICE),
    "ima-q90": ("IMA", "SiLU", {"crossing_share": 0.9}),
    "ima-teacher": ("IMA", "SiLU", {"teacher": TEACHER}),
    "ima-fast": ("IMA", "SiLU", {"steps": 2}),
    "ima-fp32-K5": ("IMA", "SiLU", {**_FP32, **_FIVE}),
    "ima-fp32-K5-dice": ("IMA", "SiLU", {**_FP32, **_FIVE, **_DICE}),
    "ima-fp32-dice": ("IMA", "SiLU", {**_FP32, **_DICE}),
    "noise-15": ("PGDAT", "SiLU", _noise()),
    "noise-15-fp32": ("PGDAT", "SiLU", _noise(**_FP32)),
    BEFORE: ("IMA", "LeakyReLU", {}),
}


def inner_split(dataset: str) -> None:
    """Add the further fold to the splits of a preprocessed data set, unless it is there."""
    file = preprocessed_folder(dataset) / "splits_final.json"
    if not file.is_file():
        sys.exit(f"{file} does not exist; nnU-Net writes it when a first training begins")
    splits = json.loads(file.read_text())
    cases = sorted(splits[0]["train"])
    apart = sorted(random.Random(0).sample(cases, APART))
    inner = {"train": [case for case in cases if case not in apart], "val": apart}
    if len(splits) == FOLD:
        write_text(file, json.dumps([*splits, inner], indent=1))
    elif splits[FOLD:] != [inner]:
        sys.exit(f"{file} has other folds behind the first five")


def plans_of(activation: str) -> str:
    """Name of the plans."""
    return f"nnUNetPlans_{activation.lower().removeprefix('leaky')}"


def settings_of(name: str, options: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    """Trainer, activation and settings of a variant, or of ``standard-ACTIVATION``."""
    if name.startswith("standard-"):
        return "nnUNetTrainerIMA", name.removeprefix("standard-"), STANDARD
    method, activation, values = VARIANTS[name]
    values = {**SHORT, **values}
    if values.get("teacher") == TEACHER:
        values["teacher"] = str(train(f"standard-{activation}", 0, options).parents[1])
    return f"nnUNetTrainer{method}", activation, values


def train(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Train in a process of its own unless that is done; returns the final checkpoint."""
    folder = options.work / f"{name}-{seed}"
    trainer, activation, values = settings_of(name, options)
    pattern = f"*/{trainer}__{plans_of(activation)}__2d/fold_{FOLD}/checkpoint_final.pth"
    done = list(folder.glob(pattern))
    if not done and name == BEFORE:
        sys.exit(f"train {folder} with the code of {COMMIT}, from the same standard model and with the same lengths")
    if not done:
        start = "" if name.startswith("standard-") else str(train(f"standard-{activation}", 0, options))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.toml"
        write_text(file, "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        # nnU-Net reads its folders and the number of its workers at import; without workers a seed decides all.
        environment = {**os.environ, "nnUNet_results": str(folder), "IMA_CONFIG": str(file), "nnUNet_n_proc_DA": "0"}
        with (folder / "log.txt").open("w") as log:
            command = again(__file__, options.dataset, "-w", str(options.work), "--train", trainer, activation,
                            str(seed), start)  # fmt: skip
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
        done = list(folder.glob(pattern))
    return done[0]


def attacked(checkpoint: Path, which: str, options: argparse.Namespace) -> dict[str, Any]:
    """Dice per level and slice, and per level and case over pooled voxels; kept beside the checkpoint."""
    stored = checkpoint.parent / f"attacked-{which}-{options.skip}-{options.cases}-{options.stride}.json"
    if stored.is_file():
        known: dict[str, Any] = json.loads(stored.read_text())
        return known
    model = load_model(checkpoint.parents[1], folds=[str(FOLD)], checkpoint=checkpoint.name)
    network = model.networks[0]
    if which == "last":
        network.load_state_dict(read_checkpoint(checkpoint)[TRAINED_KEY])
    x, y, owners = validation_slices(options.dataset, model.configuration, options.skip, options.cases, fold=FOLD)
    x, y, owners = x[:: options.stride], y[:: options.stride], owners[:: options.stride]
    row: dict[str, Any] = {"owners": owners, "dice": [], "pooled": []}
    for level in LEVELS_L2:
        torch.manual_seed(0)
        counts = []
        for batch, truth in zip(x.split(32), y.split(32), strict=True):
            target = Target.from_raw(truth, model.labels)
            if level:
                problem = Problem(network, batch, target, ThreatModel("l2"), precision="fp32")
                batch = pgd(problem, level * PER_VOXEL, steps=20, keep="last").adversarial
            with torch.no_grad():
                logits = network(batch)
            counts.append(hard_counts(logits, target)[0])
        found = torch.cat(counts)
        row["dice"].append(mean_dice(found).tolist())
        cases = {case: [owner == case for owner in owners] for case in sorted(set(owners))}
        row["pooled"].append([float(mean_dice(found[rows].sum(0, keepdim=True))) for rows in cases.values()])
    write_text(stored, json.dumps(row))
    return row


Scores = np.ndarray  # (seeds, measures, cases)


def scores(rows: list[dict[str, Any]]) -> Scores:
    """Per seed and case: mean Dice of its slices at each level, area under that, pooled Dice at each level."""
    levels = np.array(LEVELS_L2)
    result = []
    for row in rows:
        owners = np.array(row["owners"])
        cases = sorted(set(row["owners"]))
        dice = np.array(row["dice"])
        each = np.stack([dice[:, owners == case].mean(1) for case in cases], 1)
        # By the trapezoidal rule.
        area = (np.diff(levels)[:, None] * (each[1:] + each[:-1]) / 2).sum(0)[None] / levels[-1]
        result.append(np.concatenate([each, area, np.array(row["pooled"])]))
    return np.stack(result)


def interval(values: Scores) -> list[dict[str, float]]:
    """Of each measure the mean and its 95 % interval: percentiles of a bootstrap over seeds and cases."""
    generator = np.random.default_rng(0)
    seeds, _, cases = values.shape
    drawn = np.stack([
        values[generator.integers(seeds, size=seeds)][:, :, generator.integers(cases, size=cases)].mean((0, 2))
        for _ in range(RESAMPLES)
    ])  # fmt: skip
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    columns = zip(values.mean((0, 2)), low, high, strict=True)
    return [{"mean": round(float(m), 4), "low": round(float(a), 4), "high": round(float(b), 4)} for m, a, b in columns]


MEASURES = [
    *("clean" if level == 0 else f"L2 {level:g}" for level in LEVELS_L2), "area",
    *(f"pooled {level:g}" for level in LEVELS_L2),
]  # fmt: skip


def shown(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    body = []
    for name, result in results.items():
        cells = [name, result["seeds"]]
        for index, measure in enumerate(result["measures"]):
            cell = f"{measure['mean']:.3f} ({measure['low']:.3f} to {measure['high']:.3f})"
            if "difference" in result:
                delta = result["difference"][index]
                cell += f"; {delta['mean']:+.3f} ({delta['low']:+.3f} to {delta['high']:+.3f})"
            cells.append(cell)
        cells += [result.get(key, "") for key in ("median_margin", "passes_per_sample", "seconds")]
        body.append(cells)
    return table(["", "seeds", *MEASURES, "margin", "passes", "s per epoch"], body)


def course(checkpoint: Path) -> dict[str, float]:
    """What a training cost, and its median margin at the end."""
    state = read_checkpoint(checkpoint)
    history = (state.get("ima") or state["ima_method"])["history"]
    found = {key: sum(row[key] for row in history) / len(history) for key in ("passes_per_sample", "seconds")}
    if "margin_q50" in history[-1]:
        found["median_margin"] = history[-1]["margin_q50"]
    return {key: round(float(value), 3) for key, value in found.items()}


def main() -> None:
    """Train, attack, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("-w", "--work", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--reference", help="what the others are compared with")
    parser.add_argument("--cases", type=int, default=20, help="of those set apart")
    parser.add_argument("--skip", type=int, default=0, help="so many of them first")
    parser.add_argument("--last", action="store_true", help="attack the weights that are no average, too")
    parser.add_argument("--stride", type=int, default=1, help="attack every so many-th slice")
    parser.add_argument("--output", type=Path, default=RESULTS / "choices.json")
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        trainer, activation, seed, *start = options.train
        # In this process, whose environment names settings and folders.
        seeded_trainer(
            options.dataset, plans=plans_of(activation), seed=int(seed), name=trainer, fold=FOLD,
            pretrained=Path(start[0]) if start and start[0] else None,
        ).run_training()  # fmt: skip
        return
    inner_split(options.dataset)
    for activation in sorted({VARIANTS[name][1] for name in options.variants}):
        write_plans(options.dataset, "nnUNetPlans", plans_of(activation), configurations=["2d"], features=16,
                    max_features=128, batch_size=32, activation=activation)  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    found: dict[str, Scores] = {}
    for name in options.variants:
        checkpoints = [train(name, seed, options) for seed in options.seeds]
        for which in ("average",) if name == BEFORE else ("average", "last")[: 1 + options.last]:
            key = name if which == "average" else f"{name}, last"
            found[key] = scores([attacked(each, which, options) for each in checkpoints])
            results[key] = {"seeds": len(checkpoints), "measures": interval(found[key])}
            courses = [course(each) for each in checkpoints]
            results[key] |= {k: round(float(np.mean([each[k] for each in courses])), 3) for k in courses[0]}
            if options.reference in found and key != options.reference:
                results[key]["difference"] = interval(found[key] - found[options.reference])
        print(shown(results), flush=True)
    document = {
        "what": "Dice under PGD-20, L2 of a slice, of trainings on part of the training cases; 95 % intervals",
        "measures": MEASURES, "cases": options.cases, "skipped": options.skip, "stride": options.stride,
        "shared": SHORT, "variants": {name: VARIANTS[name] for name in options.variants}, "before": COMMIT,
        "default": IMASettings().model_dump(), "reference": options.reference, "results": results,
        **provenance(__file__, torch.device("cpu")), "command": command_line(__file__),
    }  # fmt: skip
    write_text(options.output, json.dumps(document, indent=2) + "\n")
    write_text(options.output.with_suffix(".md"), shown(results) + "\n")


if __name__ == "__main__":
    main()
