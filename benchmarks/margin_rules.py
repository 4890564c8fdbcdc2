"""Which margin rule buys most robustness? Trains the same 2D network once per rule and attacks the result.

    python benchmarks/margin_rules.py 4 -p nnUNetPlans_small --pretrained .../checkpoint_final.pth -w work_folder

Each rule trains fold 0 of a preprocessed data set with nnUNetTrainerIMA (in ``work_folder/RULE`` as nnUNet_results; a
finished training there is taken as it is). The network then meets PGD of 20 steps, L2 per slice, on slices with
foreground of validation cases. Writes ``benchmarks/results/margin_rules.json``; the table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ima_seg.attacks import pgd
from ima_seg.files import write_text
from ima_seg.ledger import RULES
from ima_seg.nnunet.folder import load_model
from ima_seg.ops import hard_dice
from ima_seg.types import Labels, Target, ThreatModel

LEVELS_L2 = (0.0, 1.0, 5.0, 10.0, 15.0)


def train(rule: str, folder: Path, options: argparse.Namespace) -> Path:
    """Train with ``rule`` unless that is done; returns the final checkpoint."""
    done = list(folder.glob("*/nnUNetTrainerIMA__*__2d/fold_0/checkpoint_final.pth"))
    if done:
        return done[0]
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "settings.toml"
    settings.write_text(
        f'rule = "{rule}"\ndelta = {options.delta}\nepochs = {options.epochs}\n'
        f"iterations_per_epoch = {options.iterations}\n"
        "val_iterations_per_epoch = 5\nsave_every = 3\n"
    )
    command = ["nnUNetv2_train", options.dataset, "2d", "0", "-tr", "nnUNetTrainerIMA", "-p", options.plans,
               "-device", options.device]  # fmt: skip
    if options.pretrained:
        command += ["-pretrained_weights", str(options.pretrained)]
    environment = {**os.environ, "nnUNet_results": str(folder), "IMA_CONFIG": str(settings)}
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return next(folder.glob("*/nnUNetTrainerIMA__*__2d/fold_0/checkpoint_final.pth"))


def validation_slices(dataset: str, configuration: Any, cases: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices with foreground of the first ``cases`` validation cases of fold 0, padded or cropped to the patch."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    from ima_seg.nnunet.plans import preprocessed_folder

    folder = preprocessed_folder(dataset)
    names = json.loads((folder / "splits_final.json").read_text())[0]["val"][:cases]
    data = folder / configuration.data_identifier
    images, references = [], []
    for name in names:
        image, reference, _, _ = infer_dataset_class(str(data))(str(data), [name]).load_case(name)
        image, reference = torch.from_numpy(np.array(image)), torch.from_numpy(np.array(reference))
        for z in range(image.shape[1]):
            if (reference[:, z] > 0).any():
                images.append(fit(image[:, z].float(), configuration.patch_size))
                references.append(fit(reference[:, z].clamp_min(0).long(), configuration.patch_size))
    return torch.stack(images), torch.stack(references)


def fit(slice_: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Pad with zeros or crop, centred, to ``size``."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        spare = wanted - slice_.shape[axis]
        padding = (spare // 2, spare - spare // 2)
        slice_ = torch.nn.functional.pad(slice_, (0, 0, *padding) if axis == -2 else padding)
    return slice_


def robust_dice(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, labels: Labels) -> dict[str, list[float]]:
    """Mean per-slice Dice at each level, with the standard error over slices."""
    radius = 1 / math.sqrt(x[0].numel())
    means, errors = [], []
    for level in LEVELS_L2:
        scores = []
        for start in range(0, len(x), 64):
            batch, target = x[start : start + 64], Target.from_raw(y[start : start + 64], labels)
            if level:
                eps = torch.full((len(batch),), level * radius, device=x.device)
                hit = pgd(network, batch, target, eps=eps, steps=20, threat=ThreatModel("l2"), keep="last")
                batch = hit.adversarial
            with torch.no_grad():
                scores.append(hard_dice(network(batch), target))
        values = torch.cat(scores)
        means.append(round(values.mean().item(), 4))
        errors.append(round((values.std() / math.sqrt(len(values))).item(), 4))
    return {"dice": means, "standard_error": errors}


def main() -> None:
    """Train, attack, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("-w", "--work", type=Path, required=True)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--pretrained", type=Path, help="checkpoint to start from; also attacked, as 'standard'")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--delta", type=float, default=0.06, help="expansion step, SD per voxel")
    parser.add_argument("--cases", type=int, default=12, help="validation cases to attack")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "margin_rules.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    checkpoints = {rule: train(rule, options.work / rule, options) for rule in options.rules}
    if options.pretrained:
        checkpoints = {"standard": options.pretrained, **checkpoints}
    results: dict[str, Any] = {}
    for name, path in checkpoints.items():
        model = load_model(path.parents[1], folds=["0"], checkpoint=path.name, device=device)
        x, y = (part.to(device) for part in validation_slices(options.dataset, model.configuration, options.cases))
        torch.manual_seed(0)
        row: dict[str, Any] = robust_dice(model.networks[0], x, y, model.labels)
        if name != "standard" and model.ima is not None:
            history = model.ima["history"]
            row["median_margin_rms"] = round(history[-1]["margin_q50"], 4)
            row["passes_per_sample"] = round(sum(h["passes_per_sample"] for h in history) / len(history), 2)
            row["settings"] = model.ima["settings"]
        results[name] = row
        print(
            f"{name:10s}",
            "  ".join(f"{level:g}: {dice:.3f}" for level, dice in zip(LEVELS_L2, row["dice"], strict=True)),
        )
    write_text(
        options.output,
        json.dumps(
            {
                "what": "mean Dice per slice with foreground under PGD-20, L2 of the whole slice",
                "levels_l2": LEVELS_L2,
                "slices": len(x),
                "cases": options.cases,
                "results": results,
                # file names only: a path says nothing to a reader
                "command": " ".join(["python", "benchmarks/margin_rules.py", *(Path(a).name for a in sys.argv[1:])]),
                "torch": torch.__version__,
                "machine": platform.machine(),
                "device": str(device),
                "date": datetime.now(timezone.utc).date().isoformat(),
            },
            indent=2,
        )
        + "\n",
    )


if __name__ == "__main__":
    main()
