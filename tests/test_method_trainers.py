"""The trainers of the other methods inside nnU-Net, on tiny phantoms."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nnunet_trainers
from ima_seg.errors import UserError
from ima_seg.nnunet.checkpoint import read_checkpoint
from tests.nnunet_data import make_trainer, run

pytestmark = pytest.mark.usefixtures("nnunet")
NAMES = ("PGDAT", "FGSMAT", "SegPGDAT", "FreeAT", "TRADES", "TE", "Noise")
#: Input gradients and training passes per patch with two steps, two replays.
PASSES = {"PGDAT": (2, 1), "FGSMAT": (1, 1), "SegPGDAT": (1, 1), "FreeAT": (0, 2), "TRADES": (2, 2), "TE": (2, 1),
          "Noise": (0, 1)}  # fmt: skip


def configure(folder, monkeypatch, name, **values):
    short = {"epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1, "save_every": 1}
    if name in ("PGDAT", "SegPGDAT", "TRADES", "TE"):
        short["steps"] = 2
    if name == "FreeAT":
        short["replays"] = 2
    file = Path(folder) / "settings.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in {**short, **values}.items()))
    monkeypatch.setenv("nnUNet_results", str(folder))
    monkeypatch.setenv("IMA_CONFIG", str(file))


def rows(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", NAMES)
def test_training_leaves_its_history_and_goes_on(name, tmp_path, monkeypatch):
    configure(tmp_path, monkeypatch, name)
    trainer = make_trainer(f"nnUNetTrainer{name}", configuration="2d")
    before = None
    trainer.initialize()
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.run_training()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    folder = Path(trainer.output_folder)
    history = rows(folder / f"{name.lower()}_history.csv")
    assert [int(row["epoch"]) for row in history] == [0, 1]
    for row in history:
        assert np.isfinite(float(row["loss"]))
        assert (float(row["gradients_per_sample"]), float(row["training_passes_per_sample"])) == PASSES[name]
    settings = json.loads((folder / f"{name.lower()}_settings.json").read_text())
    assert settings["eps"] == pytest.approx(trainer.training.method.eps) and settings["unit"] == "voxel"
    state = read_checkpoint(folder / "checkpoint_final.pth")["ima_method"]
    assert state["method"] == name and len(state["history"]) == 2
    assert "eps:" in next(folder.glob("training_log_*.txt")).read_text()

    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    configure(tmp_path, monkeypatch, name, eps=0.3)
    with pytest.raises(UserError, match=r"eps: 0\.[0-9]+ there, 0\.3 now"):
        make_trainer(f"nnUNetTrainer{name}", configuration="2d", go_on=True).run_training()
    configure(tmp_path, monkeypatch, name)
    resumed = make_trainer(f"nnUNetTrainer{name}", configuration="2d", go_on=True)
    resumed.run_training()
    assert resumed.training.history[:2] == trainer.training.history
    if name == "TE":
        kept, mean = state["method_state"]["mean"], resumed.training.method.state_dict()["mean"]
        assert kept.keys() == mean.keys() and all(torch.equal(kept[key], mean[key].cpu()) for key in kept)


@pytest.mark.parametrize("name", ["PGDAT", "TRADES", "TE", "Noise"])
def test_regions_and_ignore_label(name, tmp_path, monkeypatch):
    configure(tmp_path, monkeypatch, name, epochs=1)
    trainer = make_trainer(f"nnUNetTrainer{name}", dataset="Dataset982_Regions", configuration="2d")
    trainer.run_training()
    assert trainer.training.method.labels.regions and np.isfinite(trainer.training.history[0]["loss"])


def test_free_training_divides_the_iterations_by_the_replays(tmp_path, monkeypatch):
    configure(tmp_path, monkeypatch, "FreeAT")
    assert make_trainer("nnUNetTrainerFreeAT", configuration="2d").num_iterations_per_epoch == 2
    monkeypatch.delenv("IMA_CONFIG")
    assert make_trainer("nnUNetTrainerFreeAT", configuration="2d").num_iterations_per_epoch == 250 // 4


def test_settings_of_another_method_are_refused(tmp_path, monkeypatch):
    configure(tmp_path, monkeypatch, "PGDAT", delta=0.1)
    with pytest.raises(UserError, match="unknown setting 'delta'"):
        make_trainer("nnUNetTrainerPGDAT", configuration="2d")


def test_a_checkpoint_without_ledger_has_no_margins(tmp_path, monkeypatch):
    configure(tmp_path, monkeypatch, "Noise", epochs=1)
    trainer = make_trainer("nnUNetTrainerNoise", configuration="2d")
    trainer.run_training()
    done = run("ima-seg", "margins", str(Path(trainer.output_folder).parent))
    assert done.returncode != 0 and "ledger" in done.stderr


def test_paper_presets_are_the_papers_sizes():
    for name, level, values in (("Hippocampus5", 5, 56 * 40), ("Heart25", 25, 320 * 256),
                                ("Prostate40", 40, 2 * 320 * 320)):  # fmt: skip
        preset = getattr(nnunet_trainers, f"nnUNetTrainerPGDAT_paper{name}").preset
        assert preset.eps * values**0.5 == pytest.approx(level)
        assert (preset.steps, preset.step_factor, preset.epochs) == (20, 4.0, 50)
