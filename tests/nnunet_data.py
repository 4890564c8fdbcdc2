"""Small preprocessed data sets for tests of the trainers, made once per session by nnU-Net itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ima_seg.data.phantom import write_phantom_dataset
from ima_seg.nnunet.plans import write_plans

MR, REGIONS = 981, 982


def run(program, *arguments, **environment):
    """A console script of this environment; returns the finished process with its output as text."""
    return subprocess.run(
        [str(Path(sys.executable).parent / program), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="session")
def nnunet(tmp_path_factory):
    """nnU-Net folders with a plain MR phantom (981) and a two-channel one with regions and ignore label (982).

    Plans ``tiny``: four feature maps, two patches. Training uses one process, so that it ends with the test.
    """
    root = tmp_path_factory.mktemp("nnunet")
    patch = pytest.MonkeyPatch()
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir()
        patch.setenv(f"nnUNet_{name}", str(root / name))
    patch.setenv("nnUNet_n_proc_DA", "0")
    patch.setenv("nnUNet_def_n_proc", "1")
    patch.delenv("IMA_CONFIG", raising=False)
    shape = (24, 24, 24)
    write_phantom_dataset(root / "raw", dataset_id=MR, name="Mr", cases=5, shape=shape)
    flavour = {"modality": "mr2", "regions": True, "ignore_label": True}
    write_phantom_dataset(root / "raw", dataset_id=REGIONS, name="Regions", cases=5, shape=shape, **flavour)
    done = run("nnUNetv2_plan_and_preprocess", "-d", MR, REGIONS, "-c", "2d", "3d_fullres", "-np", "1", "1",
               nnUNet_n_proc_DA="1")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for dataset in (MR, REGIONS):
        write_plans(str(dataset), "nnUNetPlans", "tiny", features=4, max_features=8, batch_size=2)
    yield root
    patch.undo()


def make_trainer(name="nnUNetTrainerIMA", *, dataset="Dataset981_Mr", configuration="3d_fullres", fold=0, go_on=False,
                 plans="tiny"):  # fmt: skip
    """A trainer as nnUNetv2_train makes it, on the CPU."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    trainer = get_trainer_from_args(
        dataset, configuration, fold, name, plans, continue_training=go_on, device=torch.device("cpu")
    )
    maybe_load_checkpoint(trainer, go_on, False)
    return trainer


def settings_file(folder, **values):
    """A settings file with ``values`` on top of a very short training."""
    short = {"epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1, "save_every": 1, "steps": 2}
    if "tau" in values:
        short["criterion"] = "dice"
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**short, **values}.items()]
    path = Path(folder) / "ima.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)
