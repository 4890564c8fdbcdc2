"""The trainer inside nnU-Net, on tiny phantoms: files, resuming, mistakes."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import nnunet_trainers
from ima_seg.errors import UserError
from ima_seg.nnunet import compat
from ima_seg.nnunet.checkpoint import KEY, read_checkpoint
from tests.nnunet_data import MR, make_trainer, run, settings_file

pytestmark = pytest.mark.usefixtures("nnunet")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder of the test's own, and very short trainings by default."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("IMA_CONFIG", settings_file(tmp_path))
    return tmp_path


def rows(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_training_leaves_checkpoint_margins_history_and_plot(results, configuration):
    # With tau near 0 the patches of a network that has learnt nothing are searched already.
    settings_file(results, tau=0.001, delta=0.05, eps_max=0.2)
    trainer = make_trainer(configuration=configuration)
    trainer.run_training()
    folder = Path(trainer.output_folder)
    margins, history = rows(folder / "ima_margins.csv"), rows(folder / "ima_history.csv")
    assert [row["case"] for row in margins] == sorted(trainer.do_split()[0])
    voxels = np.prod(trainer.configuration_manager.patch_size)
    for row in margins:
        assert float(row["training_margin_l2"]) == pytest.approx(
            float(row["training_margin_rms"]) * voxels**0.5, rel=1e-4
        )
    assert [int(row["epoch"]) for row in history] == [0, 1]
    assert sum(int(row["visits"]) for row in history) == sum(int(row["visits"]) for row in margins) > 0
    assert all(float(row["passes_per_sample"]) > 0 for row in history)
    assert (folder / "ima_progress.png").stat().st_size > 10_000
    state = read_checkpoint(folder / "checkpoint_final.pth")[KEY]
    assert state["ledger"]["epoch"] == 2 and len(state["history"]) == 2
    assert state["settings"]["tau"] == 0.001
    log = next(folder.glob("training_log_*.txt")).read_text()
    assert "tau: 0.001" in log and "IMA training margins: median" in log
    assert not list(folder.glob(".*")), "no temporary file stays"


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_regions_ignore_label_and_two_channels(results, configuration):
    settings_file(results, tau=0.001)
    trainer = make_trainer(dataset="Dataset982_Regions", configuration=configuration)
    labels = trainer.training.method.labels
    assert labels.regions and labels.ignore_label is not None
    assert trainer.training.method.threat.image_channels == 2
    trainer.run_training()
    assert rows(Path(trainer.output_folder) / "ima_history.csv")


def test_resumed_training_has_the_margins_and_learning_rate_of_the_checkpoint(results):
    settings_file(results, tau=0.001, epochs=4, delta=0.05, eps_max=0.2)
    first = make_trainer()
    first.on_train_start()
    for _ in range(2):
        epoch(first)
    rates = [first.optimizer.param_groups[0]["lr"]]
    saved = first.training.method.ledger.table()
    # As if killed in the middle of the third epoch: its visits are lost, nothing else.
    first.on_epoch_start()
    first.on_train_epoch_start()
    rates.append(first.optimizer.param_groups[0]["lr"])
    first.train_step(next(first.dataloader_train))

    resumed = make_trainer(go_on=True)
    assert resumed.current_epoch == 2
    assert resumed.training.method.ledger.table() == saved
    resumed.on_train_start()
    on_disk = {
        row["case"]: float(row["training_margin_rms"]) for row in rows(Path(resumed.output_folder) / "ima_margins.csv")
    }
    assert on_disk == pytest.approx({row["case"]: row["margin"] for row in saved}, rel=1e-5)
    epoch(resumed)
    assert resumed.optimizer.param_groups[0]["lr"] == rates[1] < rates[0]
    assert [row["epoch"] for row in resumed.training.history] == [0, 1, 2]
    assert len(rows(Path(resumed.output_folder) / "ima_history.csv")) == 3


def epoch(trainer):
    """One epoch as nnU-Net runs it."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    trainer.on_epoch_end()


def test_other_settings_neither_overwrite_nor_continue_a_training(results):
    settings_file(results, tau=0.45)
    trainer = make_trainer()
    trainer.run_training()
    before = (Path(trainer.output_folder) / "checkpoint_final.pth").read_bytes()
    settings_file(results, tau=0.7)
    with pytest.raises(
        UserError, match=r"would overwrite.*tau: 0.45 there, 0.7 now|tau: 0.45 there, 0.7 now.*overwrite"
    ):
        make_trainer().run_training()
    settings_file(results, tau=0.7, epochs=3)
    with pytest.raises(UserError, match=r"was trained with other IMA settings .*tau: 0.45 there, 0.7 now"):
        make_trainer(go_on=True).run_training()
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").read_bytes() == before
    settings_file(results, tau=0.45)
    make_trainer().on_train_start()  # the same settings again: as with any trainer of nnU-Net


def test_checkpoint_without_ledger_starts_fresh_margins_with_a_warning(results, capsys):
    trainer = make_trainer()
    trainer.run_training()
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint[KEY]
    torch.save(checkpoint, path)
    resumed = make_trainer(go_on=True)
    assert "holds no margin ledger; all margins start anew" in capsys.readouterr().out
    resumed.on_train_start()
    ledger = resumed.training.method.ledger
    assert {record.margin for record in ledger.cases.values()} == {ledger.delta}


def test_new_and_vanished_cases_are_reported_and_kept(results, capsys):
    trainer = make_trainer()
    trainer.training.method.ledger.register(["gone"])
    trainer.training.method.ledger.cases["gone"].margin = 0.123
    trainer.on_train_start()
    output = capsys.readouterr().out
    assert "4 cases are new to the margin ledger" in output and "1 cases of the margin ledger are not" in output
    assert trainer.training.method.ledger.cases["gone"].margin == 0.123


def test_nan_voxels_cost_only_the_patch_that_has_them(results, capsys):
    trainer = make_trainer()
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    batch["data"][1, 0, 0, 0, 0] = float("nan")
    outputs = [trainer.train_step(batch)]
    assert np.isfinite(outputs[0]["loss"])
    assert f"NaN or infinite voxels in {batch['keys'][1]}" in capsys.readouterr().out
    batch["data"][:] = float("inf")
    weights = [p.clone() for p in trainer.network.parameters()]
    outputs.append(trainer.train_step(batch))
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.network.parameters(), strict=True))
    trainer.on_train_epoch_end(outputs)
    assert trainer.training.history[-1]["dropped_patches"] == 3
    assert np.isfinite(trainer.logger.get_value("train_losses", step=-1))
    with pytest.raises(UserError, match="10 batches in a row"):
        for _ in range(10):
            trainer.train_step(batch)


def test_a_fold_without_foreground_is_refused_before_training(results, nnunet, monkeypatch):
    trainer = make_trainer()
    empty = nnunet / "preprocessed" / "empty"
    shutil.copytree(trainer.preprocessed_dataset_folder, empty, dirs_exist_ok=True)
    import pickle

    for path in empty.glob("*.pkl"):
        properties = pickle.loads(path.read_bytes())
        properties["class_locations"] = {key: [] for key in properties["class_locations"]}
        path.write_bytes(pickle.dumps(properties))
    trainer.preprocessed_dataset_folder = str(empty)
    with pytest.raises(UserError, match=r"none of the training cases in .*empty has a foreground voxel"):
        trainer.on_train_start()


def test_unsupported_nnunet_is_refused(results, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.6.4")
    with pytest.raises(UserError, match=r"2.6.4.*pip install"):
        make_trainer()
    assert not list(results.glob("Dataset*")), "nothing was made"


@pytest.mark.parametrize(
    ("content", "message"),
    [("taw = 1\n", "unknown setting 'taw'; did you mean 'tau'"), ("delta = -1\n", "delta is -1; it must be positive")],
)
def test_the_command_line_ends_with_one_clear_message(results, content, message):
    (results / "bad.toml").write_text(content)
    done = run("nnUNetv2_train", MR, "2d", 0, "-tr", "nnUNetTrainerIMA", "-p", "tiny", "-device", "cpu",
               IMA_CONFIG=str(results / "bad.toml"))  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ima-seg: error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(results.glob("Dataset*")), "nothing was made"


def test_every_name_is_found_by_nnunet_and_has_its_length():
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

    for name in nnunet_trainers.__all__:
        trainer = find(name)
        assert trainer is getattr(nnunet_trainers, name)
        length = name.partition("IMA_")[2].removesuffix("epochs").removesuffix("epoch")
        if length.isdigit():
            assert trainer.preset.epochs == int(length)


def test_native_units_come_from_the_plans_for_ct_and_from_the_image_otherwise(nnunet, tmp_path):
    from ima_seg.nnunet.intensity import native_scale

    folder = nnunet / "preprocessed" / "Dataset981_Mr"
    plans, dataset = (json.loads((folder / n).read_text()) for n in ("nnUNetPlans.json", "dataset.json"))
    assert compat.shared_native_scale(plans, "3d_fullres", dataset) == {}
    images = nnunet / "raw" / "Dataset981_Mr" / "imagesTr"
    case = sorted(images.iterdir())[0].name.removesuffix("_0000.nii.gz")
    import SimpleITK as sitk

    scale = native_scale(case, images, plans=plans, configuration="3d_fullres", dataset_json=dataset)
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(images / f"{case}_0000.nii.gz"))).astype(float)
    assert list(scale.values()) == pytest.approx([values.std()], rel=0.02)
    ct = {**plans, "configurations": {"2d": {"normalization_schemes": ["CTNormalization"]}},
          "foreground_intensity_properties_per_channel": {"0": {"std": 123.0}}}  # fmt: skip
    assert compat.shared_native_scale(ct, "2d", dataset) == {"hu": 123.0}
    ct["configurations"]["2d"]["normalization_schemes"] *= 2
    ct["foreground_intensity_properties_per_channel"]["1"] = {"std": 5.0}
    phases = {"channel_names": {"0": "CT arterial", "1": "CT arterial"}}
    scales = compat.shared_native_scale(ct, "2d", phases)
    assert scales == {"CT_arterial_0_native": 123.0, "CT_arterial_1_native": 5.0}
    with pytest.raises(UserError, match=r"none_0000\.nii\.gz does not exist"):
        native_scale("none", images, plans=plans, configuration="3d_fullres", dataset_json=dataset)
