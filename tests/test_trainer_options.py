"""What every trainer can do beside its method: averaged weights, a teacher, other trainers' augmentation and loss."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ima_seg.errors import UserError
from ima_seg.nnunet.checkpoint import TRAINED_KEY, read_checkpoint
from ima_seg.nnunet.export import export_model
from ima_seg.nnunet.plans import write_plans
from nnunet_trainers.ima import IMAMixin
from tests.nnunet_data import MR, make_trainer, settings_file

pytestmark = pytest.mark.usefixtures("nnunet")
VARIANTS = "nnunetv2.training.nnUNetTrainer.variants."


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("IMA_CONFIG", settings_file(tmp_path, tau=0.001, criterion="dice", ema=0.5))
    return tmp_path


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def weights(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def test_the_average_is_the_recursion_written_out_and_is_what_is_saved(results):
    trainer = make_trainer(configuration="2d")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    expected = None
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
        now = weights(trainer.network)
        expected = now if expected is None else {name: 0.5 * expected[name] + 0.5 * now[name] for name in now}
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    saved = read_checkpoint(path)
    assert same(saved[TRAINED_KEY], now) and not same(saved["network_weights"], now)
    for name, value in saved["network_weights"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_validation_has_the_average_and_training_goes_on_with_its_own_weights(results):
    trainer = make_trainer(configuration="2d")
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    trainer.on_train_epoch_end(outputs)
    mine, average = weights(trainer.network), weights(trainer.average.module)
    trainer.on_validation_epoch_start()
    assert same(weights(trainer.network), average) and not same(mine, average)
    with torch.no_grad():
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    assert same(weights(trainer.network), mine)
    trainer.on_epoch_end()
    resumed = make_trainer(configuration="2d", go_on=True)
    assert same(weights(resumed.network), mine) and same(weights(resumed.average.module), average)


def test_averaged_weights_are_exported_and_predict_under_stock_nnunet(results, tmp_path):
    trainer = make_trainer(configuration="2d")
    trainer.run_training()
    exported = export_model(Path(trainer.output_folder).parent, tmp_path / "exported")
    checkpoint = torch.load(exported / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and not [key for key in checkpoint if key.startswith("ima")]
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(exported), (0,))
    assert same(predictor.list_of_parameters[0], weights(trainer.average.module))


def test_another_average_neither_continues_nor_overwrites(results):
    trainer = make_trainer(configuration="2d")
    trainer.run_training()
    settings_file(results, tau=0.001, criterion="dice", ema=0.9)
    with pytest.raises(UserError, match=r"ema: 0\.5 there, 0\.9 now"):
        make_trainer(configuration="2d").run_training()


def test_a_teacher_is_the_same_fold_of_a_model_of_the_same_data(results, monkeypatch):
    settings_file(results, beta=0.0)
    standard = make_trainer(configuration="2d")
    standard.run_training()
    folder = Path(standard.output_folder).parent
    monkeypatch.setenv("nnUNet_results", str(results / "taught"))
    settings_file(results, teacher=str(folder), teacher_weight=3.0, tau=0.001, criterion="dice")
    trainer = make_trainer(configuration="2d")
    trainer.run_training()
    assert same(weights(trainer.training.method.teacher), weights(standard.network)), "the teacher stays as it is"
    settings = json.loads((Path(trainer.output_folder) / "ima_settings.json").read_text())
    assert settings["teacher"] == str(folder) and settings["teacher_weight"] == 3
    with pytest.raises(UserError, match=r"teacher: fold 1 of .* was not trained"):
        make_trainer(configuration="2d", fold=1)
    with pytest.raises(UserError, match=r"its spacing are .* name a standard model"):
        make_trainer(configuration="3d_fullres")
    settings_file(results, teacher=str(results / "nowhere"))
    with pytest.raises(UserError, match=r"teacher: model folder .*nowhere does not exist"):
        make_trainer(configuration="2d")


@pytest.mark.parametrize(
    ("module", "base"),
    [
        ("data_augmentation.nnUNetTrainerDA5", "nnUNetTrainerDA5"),
        ("data_augmentation.nnUNetTrainerNoMirroring", "nnUNetTrainerNoMirroring"),
        ("loss.nnUNetTrainerCELoss", "nnUNetTrainerCELoss"),
        ("loss.nnUNetTrainerTopkLoss", "nnUNetTrainerDiceTopK10Loss"),
        ("optimizer.nnUNetTrainerAdam", "nnUNetTrainerAdam"),
        ("lr_schedule.nnUNetTrainerCosAnneal", "nnUNetTrainerCosAnneal"),
        ("network_architecture.nnUNetTrainerNoDeepSupervision", "nnUNetTrainerNoDeepSupervision"),
        ("network_architecture.nnUNetTrainerBN", "nnUNetTrainerBN"),
    ],
)
def test_the_mixin_goes_with_nnunets_own_variants(results, monkeypatch, module, base):
    other = getattr(importlib.import_module(VARIANTS + module), base)
    kind = type(f"nnUNetTrainerOurs_{base}", (IMAMixin, other), {})
    monkeypatch.setattr("nnunetv2.run.run_training.recursive_find_trainer_class_by_name", lambda name: kind)
    trainer = make_trainer(kind.__name__, configuration="2d")
    trainer.run_training()
    history = (Path(trainer.output_folder) / "ima_history.csv").read_text().splitlines()
    assert len(history) == 3 and (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()
    # What the variant changes is still its own.
    assert type(trainer).mro().index(other) < type(trainer).mro().index(nnUNetTrainer)


def test_a_mixin_behind_its_trainer_is_refused():
    with pytest.raises(UserError, match=r"Wrong would train as nnUNetTrainer does.*class Wrong\(IMAMixin, nnUNetTr"):
        type("Wrong", (nnUNetTrainer, IMAMixin), {})


def test_a_trainer_with_a_step_of_its_own_is_refused():
    own = type("Distilling", (nnUNetTrainer,), {"train_step": lambda self, batch: {}})
    with pytest.raises(UserError, match="Distilling has a train_step of its own"):
        type("Both", (IMAMixin, own), {})
    # On top of ours it is the user's business.
    type("OnTop", (IMAMixin, nnUNetTrainer), {"train_step": lambda self, batch: IMAMixin.train_step(self, batch)})


def test_a_smooth_activation_keeps_the_names_of_weights_and_needs_only_nnunet(results, tmp_path):
    write_plans(str(MR), "tiny", "tiny_silu", activation="SiLU")
    trainer = make_trainer(configuration="2d", plans="tiny_silu")
    trainer.run_training()
    assert any(isinstance(module, torch.nn.SiLU) for module in trainer.network.modules())
    other = make_trainer(configuration="2d")
    other.initialize()
    assert list(trainer.network.state_dict()) == list(other.network.state_dict())
    folder = shutil.copytree(Path(trainer.output_folder).parent, tmp_path / "copy")
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(export_model(folder, tmp_path / "exported")), (0,))
    assert any(isinstance(module, torch.nn.SiLU) for module in predictor.network.modules())
    with pytest.raises(UserError, match="activation is 'Swish'; there are: LeakyReLU, SiLU"):
        write_plans(str(MR), "tiny", "tiny_swish", activation="Swish")
