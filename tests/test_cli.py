"""The command line on a trained model: export, margins, plans."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ima_seg.cli import main
from ima_seg.errors import UserError
from ima_seg.nnunet.checkpoint import KEY, read_checkpoint
from ima_seg.nnunet.plans import vary_plans
from tests.nnunet_data import make_trainer, run, settings_file


@pytest.fixture(scope="module")
def model(nnunet, tmp_path_factory):
    """A model folder with one trained fold."""
    root = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(root))
        patch.setenv("IMA_CONFIG", settings_file(root, tau=0.001))
        trainer = make_trainer()
        trainer.run_training()
    return Path(trainer.output_folder_base)


def logits(model_folder, image):
    """What stock inference computes for ``image`` (C, X, Y, Z)."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(model_folder), (0,), "checkpoint_final.pth")
    return predictor.trainer_name, predictor.predict_sliding_window_return_logits(image)


def test_exported_model_predicts_bit_for_bit_and_names_the_stock_trainer(model, tmp_path, capsys):
    assert main(["export", str(model), "-o", str(tmp_path / "deployed")]) == 0
    image = torch.randn(1, 24, 24, 24)
    ours, expected = logits(model, image)
    stock, exported = logits(tmp_path / "deployed", image)
    assert (ours, stock) == ("nnUNetTrainerIMA", "nnUNetTrainer")
    assert torch.equal(expected, exported)
    checkpoint = torch.load(tmp_path / "deployed" / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert KEY not in checkpoint, "the case ids of the training set stay at home"
    assert KEY in read_checkpoint(model / "fold_0" / "checkpoint_final.pth"), "the original is as it was"
    # Again onto the same folder: refused, nothing changed.
    assert main(["export", str(model), "-o", str(tmp_path / "deployed")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_export_leaves_nothing_behind_when_it_fails(model, tmp_path, capsys):
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    (broken / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK\x03\x04 truncated")
    assert main(["export", str(broken), "-o", str(tmp_path / "out" / "deployed")]) == 2
    error = capsys.readouterr().err
    assert "checkpoint_final.pth" in error and "Traceback" not in error
    assert not any((tmp_path / "out").iterdir())


def test_a_checkpoint_that_carries_code_is_not_read(model, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    evil = tmp_path / "model"
    shutil.copytree(model, evil)
    torch.save(
        {"network_weights": {}, "trainer_name": "nnUNetTrainerIMA", "x": Evil()},
        evil / "fold_0" / "checkpoint_final.pth",
    )
    assert main(["export", str(evil), "-o", str(tmp_path / "out")]) == 2
    assert "--trust-checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_margins_are_printed_and_plotted(model, nnunet, tmp_path, capsys):
    images = nnunet / "raw" / "Dataset981_Mr" / "imagesTr"
    assert main(["margins", str(model), "-o", str(tmp_path), "--images", str(images)]) == 0
    output = capsys.readouterr().out
    assert "equilibrium: no" in output
    for row in (model / "fold_0" / "ima_margins.csv").read_text().splitlines()[1:]:
        assert row.split(",")[0] in output
    assert (tmp_path / "fold_0" / "ima_progress.png").stat().st_size > 10_000
    assert "_native" in (tmp_path / "fold_0" / "ima_margins_native.csv").read_text().splitlines()[0]
    assert main(["margins", str(model), "-f", "3"]) == 2
    assert "fold_3 has no checkpoint" in capsys.readouterr().err
    assert main(["margins", str(tmp_path / "none")]) == 2


def test_plans_variants(nnunet, capsys):
    folder = nnunet / "preprocessed" / "Dataset981_Mr"
    assert main(["plans", "981", "-o", "small", "-c", "3d_fullres", "--features", "4", "--patch-size", "16", "24", "24",
                 "--set", "criterion=dice", "tau=0.7", "norm=linf"]) == 0  # fmt: skip
    plans = json.loads((folder / "small.json").read_text())
    assert plans["plans_name"] == "small" and plans["ima"] == {"criterion": "dice", "tau": 0.7, "norm": "linf"}
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [16, 24, 24]
    assert plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"][:2] == [4, 8]
    assert plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"][0] == 32
    for arguments, message in (
        (["plans", "981", "-o", "small", "--features", "8"], "exist with other contents"),
        (["plans", "981", "-o", "x", "--patch-size", "17", "24", "24", "-c", "3d_fullres"], "must be multiples of"),
        (["plans", "981", "-o", "x", "-c", "4d"], "configuration '4d' is not in the plans"),
        (["plans", "981", "-o", "x", "--set", "taw=1"], "did you mean 'tau'"),
        (["plans", "981", "-o", "x", "-p", "none"], "there are: nnUNetPlans"),
        (["plans", "981", "-o", "x", "--set", "tau=["], "neither a number nor a name"),
        (["plans", "981", "-o", "x", "--batch-size", "0"], "batch_size is 0"),
        (["plans", "980", "-o", "x"], "data sets 980"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "x.json").exists()


def test_plans_settings_reach_the_trainer(nnunet, tmp_path, monkeypatch):
    folder = nnunet / "preprocessed" / "Dataset981_Mr"
    varied = vary_plans(
        json.loads((folder / "tiny.json").read_text()), "with_ima", ima={"criterion": "dice", "tau": 0.77, "epochs": 3}
    )
    (folder / "with_ima.json").write_text(json.dumps(varied))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    trainer = make_trainer(plans="with_ima")
    assert trainer.adversarial_settings.tau == 0.77 and trainer.num_epochs == 3
    assert "nnUNetTrainerIMA__with_ima__3d_fullres" in trainer.output_folder


def test_help_needs_no_nnunet_folders():
    done = run("ima-seg", "--help", nnUNet_raw="", nnUNet_results="", nnUNet_preprocessed="")
    assert done.returncode == 0 and "margins" in done.stdout and not done.stderr


def test_unknown_trainer_is_not_exported(model, tmp_path):
    from ima_seg.nnunet.checkpoint import write_checkpoint
    from ima_seg.nnunet.export import export_model

    other = tmp_path / "model"
    shutil.copytree(model, other)
    path = other / "fold_0" / "checkpoint_final.pth"
    write_checkpoint(path, {**read_checkpoint(path), "trainer_name": "SomebodysTrainer"})
    with pytest.raises(UserError, match="SomebodysTrainer, which nnU-Net does not find here"):
        export_model(other, tmp_path / "out")
