"""``ima-seg demo``: the whole way on a phantom data set, in minutes on two cores."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ima_seg.errors import UserError
from ima_seg.files import write_text

DATASET_ID = 990
DATASET = f"Dataset{DATASET_ID}_Phantom"
PLANS = "nnUNetPlans_demo"
CONFIGURATION = "3d_fullres"
CASES, TEST_CASES = 20, 4
FEATURES = 12
EPOCHS = 8
#: Batches per epoch: of the standard training, of IMA's, and of the validation of both.
STANDARD, IMA, VALIDATION = 50, 30, 5


def add_parsers(commands: Any) -> None:
    """Add the command to ``commands``, the result of ``add_subparsers``."""
    demo = commands.add_parser("demo", help="the whole way on a phantom data set, in minutes")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo_output"), help="default: demo_output")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    """Make a phantom data set, plan and preprocess it, train nnUNetTrainer and nnUNetTrainerIMA, attack both, report.

    The nnU-Net folders are those of the output folder, whatever the environment says.
    """
    import torch
    from rich.console import Console
    from rich.rule import Rule

    console = Console()
    began = time.monotonic()
    output: Path = arguments.output
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
    write_text(marker, '{"made_by": "ima-seg demo"}\n')

    def stage(number: int, text: str) -> None:
        console.print()
        console.print(Rule(f"[bold]{number}/6  {text}  ({time.monotonic() - began:.0f} s so far)", align="left"))

    stage(1, f"phantom data set: {CASES} CT-like volumes")
    from ima_seg.data.phantom import write_phantom_dataset

    write_phantom_dataset(
        output / "nnUNet_raw", dataset_id=DATASET_ID, name="Phantom", cases=CASES, test_cases=TEST_CASES,
        shape=(32, 32, 32), modality="ct", overwrite=True,
    )  # fmt: skip
    stage(2, "nnU-Net: fingerprint, plans, preprocessing")
    _call("nnUNetv2_plan_and_preprocess", "-d", str(DATASET_ID), "-c", CONFIGURATION, "-np", "2", "--clean")
    (output / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json").unlink(missing_ok=True)
    _call("ima-seg", "plans", str(DATASET_ID), "-o", PLANS, "-c", CONFIGURATION,
          "--features", str(FEATURES), "--max-features", str(4 * FEATURES), "--batch-size", "2")  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stage(3, f"nnUNetTrainer: {EPOCHS} epochs of {STANDARD} iterations")
    from ima_seg.nnunet.runs import train_standard

    standard = train_standard(
        DATASET, CONFIGURATION, PLANS, epochs=EPOCHS, iterations=STANDARD, validation=VALIDATION, device=device
    )
    stage(4, f"nnUNetTrainerIMA from its weights: {EPOCHS} epochs of {IMA} iterations")
    settings = output / "ima.toml"
    lengths = f"epochs = {EPOCHS}\niterations_per_epoch = {IMA}\nval_iterations_per_epoch = {VALIDATION}\n"
    write_text(settings, lengths)
    os.environ["IMA_CONFIG"] = str(settings)
    _call("nnUNetv2_train", str(DATASET_ID), CONFIGURATION, "0", "-tr", "nnUNetTrainerIMA", "-p", PLANS,
          "-device", device, "-pretrained_weights", str(standard / "checkpoint_final.pth"))  # fmt: skip
    ima = standard.parent.parent / f"nnUNetTrainerIMA__{PLANS}__{CONFIGURATION}" / "fold_0"
    stage(5, "margins")
    _call("ima-seg", "margins", str(ima.parent), "-f", "0")
    stage(6, f"both attacked on {TEST_CASES} test cases")
    raw = output / "nnUNet_raw" / DATASET
    report = output / "report"
    shutil.rmtree(report, ignore_errors=True)
    _call("ima-seg", "evaluate", "-i", str(raw / "imagesTs"), "-gt", str(raw / "labelsTs"), "-o", str(report),
          "-m", str(standard.parent), "--name", "standard", "-m", str(ima.parent), "--name", "IMA", "-device", device,
          "--attack", "fgsm", "pgd", "apgd-dice", "gaussian", "--eps", "0.02", "0.05", "0.1", "0.2",
          "--steps", "10", "--corruption", "--disable_tta")  # fmt: skip
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
