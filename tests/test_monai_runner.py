"""MONAI's nnUNetV2Runner trains with nnUNetTrainerIMA."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from monai.apps.nnunet import nnUNetV2Runner

from ima_seg.nnunet.checkpoint import KEY, read_checkpoint
from tests.nnunet_data import settings_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nnunet")]


@pytest.fixture
def runner(nnunet, tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the runner sets them for the whole process
    monkeypatch.setenv("IMA_CONFIG", settings_file(tmp_path, tau=0.001, epochs=1))
    config = {
        "dataset_name_or_id": "981", "nnunet_raw": str(nnunet / "raw"),
        "nnunet_preprocessed": str(nnunet / "preprocessed"), "nnunet_results": str(tmp_path),
    }  # fmt: skip
    return nnUNetV2Runner(config, trainer_class_name="nnUNetTrainerIMA", export_validation_probabilities=False)


def check(results):
    folder = results / "Dataset981_Mr" / "nnUNetTrainerIMA__tiny__3d_fullres" / "fold_0"
    assert read_checkpoint(folder / "checkpoint_final.pth")[KEY]["ledger"]["epoch"] == 1
    assert (folder / "ima_margins.csv").is_file()
    assert json.loads((folder / "validation" / "summary.json").read_text())["foreground_mean"]


def test_its_command_trains_with_the_trainer(runner, tmp_path):
    # The runner has no way to say -device cpu: it writes --device, which nnUNetv2_train does not know.
    command, environment = runner.train_single_model_command("3d_fullres", 0, 0, {"p": "tiny"})
    assert command[command.index("-tr") + 1] == "nnUNetTrainerIMA"
    done = subprocess.run([*command, "-device", "cpu"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    check(tmp_path)


@pytest.mark.gpu
def test_it_trains_by_itself(runner, tmp_path):
    assert torch.cuda.is_available()
    runner.train_single_model("3d_fullres", 0, p="tiny")
    check(Path(tmp_path))
