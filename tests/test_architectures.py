"""Every kind of nnU-Net configuration: low resolution and cascade, residual encoders, without deep supervision."""

import json
from pathlib import Path

import pytest
import torch

from tests.nnunet_data import make_trainer, run, settings_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nnunet")]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("IMA_CONFIG", settings_file(tmp_path, tau=0.001, iterations_per_epoch=1, epochs=1))
    return tmp_path


def write_variant(nnunet, name, change):
    folder = nnunet / "preprocessed" / "Dataset981_Mr"
    plans = json.loads((folder / "tiny.json").read_text())
    plans["plans_name"] = name
    change(plans["configurations"])
    (folder / f"{name}.json").write_text(json.dumps(plans))


def test_low_resolution_and_cascade(nnunet, results):
    def add_cascade(configurations):
        configurations["3d_lowres"] = {
            "data_identifier": "cascade_3d_lowres", "inherits_from": "3d_fullres", "spacing": [1.5, 1.5, 1.5],
            "patch_size": [16, 16, 16], "next_stage": "3d_cascade_fullres",
        }  # fmt: skip
        configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}

    write_variant(nnunet, "cascade", add_cascade)
    done = run("nnUNetv2_preprocess", "-d", 981, "-plans_name", "cascade", "-c", "3d_lowres", "-np", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    # With fold `all` validation predicts every case, and that is what the second stage trains on.
    low = make_trainer(configuration="3d_lowres", fold="all", plans="cascade")
    low.run_training()
    low.perform_actual_validation()
    full = make_trainer(configuration="3d_cascade_fullres", fold="all", plans="cascade")
    seen = []
    step = full.training.method.step

    def spy(network, x, *arguments, **options):
        report = step(network, x, *arguments, **options)
        seen.append((x, report.adversarial))
        return report

    full.training.method.step = spy
    full.run_training()
    attacked = [(clean, adversarial) for clean, adversarial in seen if adversarial is not None]
    assert attacked
    for clean, adversarial in attacked:
        assert clean.shape[1] == 3, "image, and one mask for each of two foreground classes"
        assert torch.equal(clean[:, 1:], adversarial[:, 1:])
        assert not torch.equal(clean[:, :1], adversarial[:, :1])


def test_residual_encoder(nnunet, results):
    def change(configurations):
        architecture = configurations["3d_fullres"]["architecture"]
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        arguments = architecture["arch_kwargs"]
        arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")

    write_variant(nnunet, "resenc", change)
    trainer = make_trainer(plans="resenc")
    trainer.run_training()
    assert "ResidualEncoderUNet" in type(trainer.network).__name__
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()


def test_without_deep_supervision(results):
    trainer = make_trainer()
    trainer.enable_deep_supervision = False
    trainer.run_training()
    assert trainer.training.history[0]["visits"] > 0


def test_standard_weights_are_a_start_and_validation_alone_works(results):
    first = make_trainer("nnUNetTrainer")
    first.num_epochs = first.num_iterations_per_epoch = first.num_val_iterations_per_epoch = 1
    first.run_training()
    weights = Path(first.output_folder) / "checkpoint_final.pth"
    common = (
        "nnUNetv2_train",
        "Dataset981_Mr",
        "3d_fullres",
        0,
        "-tr",
        "nnUNetTrainerIMA",
        "-p",
        "tiny",
        "-device",
        "cpu",
    )
    done = run(*common, "-pretrained_weights", weights, "--npz")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Loading pretrained weights" in done.stdout
    folder = results / "Dataset981_Mr" / "nnUNetTrainerIMA__tiny__3d_fullres" / "fold_0"
    (folder / "validation" / "summary.json").unlink()
    done = run(*common, "--val")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "validation" / "summary.json").is_file()
    assert list((folder / "validation").glob("*.npz"))
