"""``ima-seg demo``: the whole way on a phantom data set, in minutes on two cores."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ima_seg.errors import UserError
from ima_seg.files import write_text

DATASET_ID = 990
DATASET_NAME = "Phantom"
PLANS = "nnUNetPlans_demo"
CONFIGURATION = "3d_fullres"
#: Validation batches per epoch.
VALIDATION = 5


@dataclass(frozen=True)
class DemoSize:
    """How long the demo takes: cases of the phantom, epochs and iterations of both trainings, steps of the attacks."""

    cases: int = 20
    test_cases: int = 4
    shape: tuple[int, int, int] = (32, 32, 32)
    standard_epochs: int = 8
    ima_epochs: int = 8
    standard_iterations: int = 50
    ima_iterations: int = 30
    features: int = 12
    attack_steps: int = 10


def add_parsers(commands: Any) -> None:
    """Add the command to ``commands``, the result of ``add_subparsers``."""
    demo = commands.add_parser("demo", help="the whole way on a phantom data set, in minutes")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo_output"), help="default: demo_output")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    run_demo(arguments.output)


def run_demo(output: Path, size: DemoSize | None = None) -> None:
    """Make a phantom data set, plan and preprocess it, train nnUNetTrainer and nnUNetTrainerIMA, attack both, report.

    Args:
        output: folder for everything; its nnU-Net folders are used whatever the environment says.
        size: how much to do.

    Raises:
        UserError: ``output`` is a file, or holds something that is no demo.
    """
    import torch
    from rich.console import Console
    from rich.rule import Rule

    size = size or DemoSize()
    console = Console()
    began = time.monotonic()
    marker = output / "demo.json"
    if output.exists() and not marker.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and was not made by the demo; name another folder with -o")
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for name in ("raw", "preprocessed", "results"):
        folder = output / f"nnUNet_{name}"
        folder.mkdir(exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)
    os.environ.pop("IMA_CONFIG", None)
    os.environ.setdefault("nnUNet_n_proc_DA", "1")
    os.environ.setdefault("nnUNet_def_n_proc", "2")
    os.environ.setdefault("nnUNet_compile", "f")
    write_text(marker, json.dumps({"made_by": "ima-seg demo", **size.__dict__}, indent=2) + "\n")

    def stage(number: int, text: str) -> None:
        console.print()
        console.print(Rule(f"[bold]{number}/6  {text}  ({time.monotonic() - began:.0f} s so far)", align="left"))

    stage(1, f"phantom data set: {size.cases} CT-like volumes")
    from ima_seg.data.phantom import write_phantom_dataset

    write_phantom_dataset(
        output / "nnUNet_raw",
        dataset_id=DATASET_ID,
        name=DATASET_NAME,
        cases=size.cases,
        test_cases=size.test_cases,
        shape=size.shape,
        modality="ct",
        overwrite=True,
    )
    stage(2, "nnU-Net: fingerprint, plans, preprocessing")
    _call("nnUNetv2_plan_and_preprocess", "-d", str(DATASET_ID), "-c", CONFIGURATION, "-np", "2", "--clean")
    (output / "nnUNet_preprocessed" / f"Dataset{DATASET_ID}_{DATASET_NAME}" / f"{PLANS}.json").unlink(missing_ok=True)
    _call("ima-seg", "plans", str(DATASET_ID), "-o", PLANS, "-c", CONFIGURATION,
          "--features", str(size.features), "--max-features", str(4 * size.features), "--batch-size", "2")  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stage(3, f"nnUNetTrainer: {size.standard_epochs} epochs of {size.standard_iterations} iterations")
    from ima_seg.nnunet.runs import train_standard

    standard = train_standard(
        f"Dataset{DATASET_ID}_{DATASET_NAME}", CONFIGURATION, PLANS, epochs=size.standard_epochs,
        iterations=size.standard_iterations, validation=VALIDATION, device=device,
    )  # fmt: skip
    stage(4, f"nnUNetTrainerIMA from its weights: {size.ima_epochs} epochs of {size.ima_iterations} iterations")
    settings = output / "ima.toml"
    lines = {
        "epochs": size.ima_epochs,
        "iterations_per_epoch": size.ima_iterations,
        "val_iterations_per_epoch": VALIDATION,
        # In so short a training the lesion is not found yet, and counts with Dice 0 beside the organ's.
        "tau": 0.3,
    }
    write_text(settings, "".join(f"{key} = {value}\n" for key, value in lines.items()))
    os.environ["IMA_CONFIG"] = str(settings)
    _call("nnUNetv2_train", str(DATASET_ID), CONFIGURATION, "0", "-tr", "nnUNetTrainerIMA", "-p", PLANS,
          "-device", device, "-pretrained_weights", str(standard / "checkpoint_final.pth"))  # fmt: skip
    ima = standard.parent.parent / f"nnUNetTrainerIMA__{PLANS}__{CONFIGURATION}" / "fold_0"
    stage(5, "margins")
    _call("ima-seg", "margins", str(ima.parent), "-f", "0")
    stage(6, f"both attacked on {size.test_cases} test cases")
    raw = output / "nnUNet_raw" / f"Dataset{DATASET_ID}_{DATASET_NAME}"
    report = output / "report"
    shutil.rmtree(report, ignore_errors=True)
    _call("ima-seg", "evaluate", "-i", str(raw / "imagesTs"), "-gt", str(raw / "labelsTs"), "-o", str(report),
          "-m", str(standard.parent), "--name", "standard", "-m", str(ima.parent), "--name", "IMA", "-device", device,
          "--attack", "fgsm", "pgd", "apgd-dice", "gaussian", "--eps", "0.02", "0.05", "0.1", "0.2",
          "--steps", str(size.attack_steps), "--corruption", "--disable_tta")  # fmt: skip
    console.print(f"models: {standard.parent}\n        {ima.parent}", soft_wrap=True)
    console.print(f"Done in {time.monotonic() - began:.0f} s. Open {report / 'report.html'}", soft_wrap=True)


def _call(program: str, *arguments: str) -> None:
    """Run a console script of this environment; its output is shown."""
    beside = str(Path(sys.executable).parent)
    command = shutil.which(program, path=beside) or shutil.which(program)
    if command is None:
        raise UserError(f"the program {program} is neither in {beside} nor on the PATH; reinstall nnunetv2 and ima-seg")
    sys.stdout.flush()
    status = subprocess.run([command, *arguments], check=False).returncode
    if status:
        raise UserError(f"{program} {' '.join(arguments)} ended with status {status}; see its message above")
