"""A size of 0.1 is a tenth of the standard deviation of each channel of the network's input, whatever normalised it."""

import csv
import io
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from rich.console import Console

from ima_seg import methods
from ima_seg.errors import UserError
from ima_seg.evaluate.measure.collect import collect
from ima_seg.evaluate.run import Run
from ima_seg.monai import AdversarialSupervisedTrainer
from ima_seg.nnunet.dataset import channel_names
from ima_seg.nnunet.folder import load_model
from ima_seg.nnunet.margins import read_margins, show_margins
from ima_seg.types import Labels
from tests.evaluation_runs import evaluated, records, settings, some_cases
from tests.models import TinyUNet
from tests.monai_data import items, loader
from tests.monai_data import make_trainer as make_monai_trainer
from tests.nnunet_data import make_trainer, settings_file

SCHEMES = {"raw": "NoNormalization", "rescaled": "RescaleTo01Normalization", "rgb": "RGBTo01Normalization"}
#: Of the foreground, as nnU-Net's plans have it, in original intensities.
FOREGROUND = 31.0


@pytest.fixture
def model(phantoms, tmp_path):
    """Makes a model of two channels, the first normalised by a scheme, and one case with values within 255."""

    def make(scheme):
        folder, data = tmp_path / "model__tiny__3d_fullres", some_cases(phantoms, "regions", tmp_path / "data", 0)
        shutil.copytree(phantoms.model("regions", steps=0), folder)
        plans = json.loads((folder / "plans.json").read_text())
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = [scheme, "ZScoreNormalization"]
        plans["foreground_intensity_properties_per_channel"]["0"]["std"] = FOREGROUND
        (folder / "plans.json").write_text(json.dumps(plans))
        for file in data[0].iterdir():
            image = nibabel.load(file)
            values = image.get_fdata(dtype=np.float32)
            values = 20 + (values - values.min()) * (200 / np.ptp(values))
            nibabel.save(nibabel.Nifti1Image(values, image.affine), file)
        return folder, data

    return make


def first(folder, pattern):
    return nibabel.load(sorted(folder.glob(pattern))[0]).get_fdata()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_tenth_is_a_tenth_of_the_sd_of_each_channel(model, tmp_path, name):
    """By the files that an evaluation writes, and by its run, records and report."""
    folder, (images, labels) = model(SCHEMES[name])
    out = tmp_path / "out"
    chosen = settings(attacks=["fgsm"], norm="linf", unit="linf", eps=[0.1], save_adversarial=True)
    report, failed = evaluated({"A": folder}, (images, labels), out, chosen)
    assert failed == 0
    clean = [first(images, f"*_000{channel}.nii.gz") for channel in (0, 1)]
    sd = [clean[0].std() if name == "rescaled" else FOREGROUND, clean[1].std()]
    found = records(out)
    (attacked,) = (record for record in found.values() if record.kind == "white")
    for channel in (0, 1):
        change = nibabel.load(out / attacked.disk.image[channel]).get_fdata() - clean[channel]
        assert np.abs(change).max() == pytest.approx(0.1 * sd[channel], rel=2e-3)
        assert np.median(np.abs(change)) == pytest.approx(0.1 * sd[channel], rel=2e-3)
    assert attacked.size.linf == pytest.approx(0.1, rel=1e-4)
    assert attacked.size.native_linf == pytest.approx([0.1 * sd[0], 0.1 * sd[1]], rel=1e-3)
    network = {"raw": FOREGROUND, "rescaled": clean[0].std() / np.ptp(clean[0]), "rgb": FOREGROUND / 255}[name]
    run = Run.model_validate_json((out / "run.json").read_text())
    assert run.models[0].sd == [None if name == "rescaled" else pytest.approx(network), 1.0]
    (unattacked,) = (record for record in found.values() if record.kind == "clean")
    assert unattacked.sd == pytest.approx([network, 1.0], rel=1e-4)
    where = "in the median case" if name == "rescaled" else "in the training set's foreground"
    text = report.read_text()
    assert f"{run.channels[0]}: {network:.3g} network units {where}; {run.channels[1]}: 1 network unit" in text.replace(
        "&#39;", "'"
    )


def test_results_in_other_units_are_neither_resumed_nor_merged(model, tmp_path):
    folder, data = model("NoNormalization")
    out, old = tmp_path / "out", tmp_path / "old"
    chosen = settings(attacks=["fgsm"])
    evaluated({"A": folder}, data, out, chosen)
    shutil.copytree(out, old)
    run = json.loads((out / "run.json").read_text())
    del run["models"][0]["sd"]  # as versions without such units wrote it
    (old / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="the units of sizes are others"):
        evaluated({"A": folder}, data, old, chosen, resume=True)
    with pytest.raises(UserError, match=r"sizes of model 'A' are in other units"):
        collect([out, old])


def test_a_channel_without_contrast_in_the_foreground_keeps_its_unit(model):
    folder, _ = model("NoNormalization")
    plans = json.loads((folder / "plans.json").read_text())
    plans["foreground_intensity_properties_per_channel"]["0"]["std"] = 0.0
    (folder / "plans.json").write_text(json.dumps(plans))
    assert load_model(folder).sd == [1.0, 1.0]


def normalised(nnunet, results, scheme, *, dataset="Dataset982_Regions", schemes=None):
    """Plans ``other`` whose first channel is normalised by ``scheme``, and pre-processed data as that leaves them.

    Returns the standard deviation of the first channel in the first training cases, network units.
    """
    folder = nnunet / "preprocessed" / dataset
    plans = json.loads((folder / "tiny.json").read_text())
    configuration = plans["configurations"]["2d"]
    source = folder / configuration["data_identifier"]
    plans["plans_name"], configuration["data_identifier"] = "other", f"{scheme}_{results.name}"
    configuration["normalization_schemes"][0] = scheme
    plans["foreground_intensity_properties_per_channel"]["0"]["std"] = FOREGROUND
    (folder / "other.json").write_text(json.dumps(plans))
    data_set = infer_dataset_class(str(source))(str(source))
    target = folder / configuration["data_identifier"]
    target.mkdir()
    sd = {}
    for case in data_set.identifiers:
        image, labels, _, properties = data_set.load_case(case)
        image = np.array(image[:])
        image[0] = image[0] * {"NoNormalization": 20, "RGBTo01Normalization": 0.2}.get(scheme, 0.13) + 0.5
        data_set.save_case(image, np.array(labels[:]), properties, str(target / case))
        sd[case] = float(image[0].std())
    return sd


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("IMA_CONFIG", settings_file(tmp_path, norm="linf", eps=0.1))
    return tmp_path


def seen(trainer, batch):
    """What the network sees in the training passes of a step."""
    inputs = []

    def note(module, arguments):
        if module.training:
            inputs.append(arguments[0].detach().clone())

    with trainer.network.register_forward_pre_hook(note):
        trainer.train_step(batch)
    return inputs


@pytest.mark.parametrize("name", SCHEMES)
def test_a_training_perturbs_each_channel_by_a_tenth_of_its_sd_and_goes_on_so(nnunet, results, name, capsys):
    cases = normalised(nnunet, results, SCHEMES[name])
    trainer = make_trainer("nnUNetTrainerPGDAT", dataset="Dataset982_Regions", configuration="2d", plans="other")
    trainer.on_train_start()
    sd = {"raw": FOREGROUND, "rgb": FOREGROUND / 255}.get(name, np.mean([cases[c] for c in trainer.do_split()[0]]))
    assert trainer.training.method.channel_sd == pytest.approx([sd, 1.0], rel=1e-4)
    log = capsys.readouterr().out
    assert "network units of each channel are 1 SD" in log and "eps: 0.1 SD per voxel" in log
    native = trainer.training.native
    assert list(native.values()) == pytest.approx([] if name == "rescaled" else [FOREGROUND])
    batch = next(trainer.dataloader_train)
    (inputs,) = seen(trainer, batch)
    change = (inputs - batch["data"]).abs().amax((0, 2, 3))
    assert change.tolist() == pytest.approx([0.1 * sd, 0.1], rel=1e-3)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    # The unit stays where the data that it was measured on have changed.
    plans = nnunet / "preprocessed" / "Dataset982_Regions" / "other.json"
    plans.write_text(plans.read_text().replace(f'"std": {FOREGROUND}', '"std": 99.0'))
    go_on = {"dataset": "Dataset982_Regions", "configuration": "2d", "plans": "other", "go_on": True}
    resumed = make_trainer("nnUNetTrainerPGDAT", **go_on)
    resumed.on_train_start()
    assert resumed.training.method.channel_sd == trainer.training.method.channel_sd
    (inputs,) = seen(resumed, batch)
    assert (inputs - batch["data"]).abs().amax((0, 2, 3)).tolist() == pytest.approx([0.1 * sd, 0.1], rel=1e-3)


def test_the_cap_on_margins_of_unnormalised_ct_is_that_of_normalised_ct(nnunet, results):
    """0.3 SD of the foreground, not 0.3 HU; in the table of margins, and in what ``ima-seg margins`` prints."""
    settings_file(results, tau=0.001)
    normalised(nnunet, results, "NoNormalization")
    trainer = make_trainer(dataset="Dataset982_Regions", configuration="2d", plans="other")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    with (folder / "ima_margins.csv").open() as file:
        rows = list(csv.DictReader(file))
    name = channel_names(trainer.dataset_json)[0]
    for row in rows:
        assert float(row[f"training_margin_{name}_native"]) == pytest.approx(
            FOREGROUND * float(row["training_margin_rms"]), rel=1e-3
        )
    (fold,), _ = read_margins(folder.parent)
    assert fold.ledger.eps_max * fold.settings["channel_sd"][0] == pytest.approx(0.3 * FOREGROUND)
    printed = io.StringIO()
    images = nnunet / "raw" / "Dataset982_Regions" / "imagesTr"
    show_margins(fold, images=images, console=Console(file=printed, width=200))
    assert f"1 SD in network units: {FOREGROUND:g} of {name}" in printed.getvalue()


@pytest.mark.parametrize("name", methods.METHODS)
def test_any_method_trains_alike_in_either_unit(name):
    """On images times 8 by a network that divides by 8, with the unit said, as on the images themselves."""

    def trained(factor, **options):
        torch.manual_seed(0)
        network = TinyUNet(2).eval()
        x, y = torch.randn(4, 1, 12, 12), torch.randint(0, 3, (4, 1, 12, 12))
        base = methods.registry.preset(name)
        ima = {"criterion": "dice", "tau": 0.01, "share": 1.0, "start": "random"} if name == "ima" else {}
        settings = type(base).model_validate({"precision": "fp32", **ima})
        method = methods.registry.make_method(settings, labels=Labels(3), patch_voxels=144, epochs=10, **options)
        report = method.step(
            network, x * factor, y, list("abcd"), loss=lambda z, rows: F.cross_entropy(z, y[rows, 0]),
            update=lambda: None,
            forward=lambda module, batch: module(batch / factor), victim=lambda batch: network(batch / factor),
        )  # fmt: skip
        return report, [p.grad for p in network.parameters() if p.grad is not None]

    (plain, expected), (other, gradients) = trained(1.0), trained(8.0, channel_sd=[8.0])
    assert torch.allclose(plain.loss, other.loss, rtol=1e-5)
    for a, b in zip(expected, gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    if name == "ima":
        assert torch.allclose(plain.distance, other.distance, rtol=1e-4)
        assert torch.allclose(plain.adversarial * 8, other.adversarial, atol=1e-5)


def test_monai_says_how_far_its_unit_is_from_an_sd_and_takes_another(caplog):
    caplog.set_level("INFO")
    data = items()
    make_monai_trainer(data=data).run()
    assert "IMA: 1 in sizes is " in caplog.text and "should be 1 SD" not in caplog.text
    caplog.clear()
    for item in data:
        item["image"] *= 0.01
    sd = float(torch.stack([item["image"] for item in data[:2]]).std())
    batches = loader(data, shuffle=False)
    make_monai_trainer(train_data_loader=batches).run()
    assert f"should be 1 SD of each channel, but is {1 / sd:.3g} SD" in caplog.text
    caplog.clear()
    network, inputs = TinyUNet(2, outputs=2), []
    network.register_forward_pre_hook(lambda module, given: inputs.append(given[0]) if module.training else None)
    method = {"name": "pgdat", "labels": 2, "norm": "linf", "eps": 0.1, "channel_sd": [sd], "steps": 1}
    kind = AdversarialSupervisedTrainer
    trainer = make_monai_trainer(network, train_data_loader=batches, kind=kind, method=method)
    trainer.run()
    assert "1 in sizes is 1 SD" in caplog.text and "should be 1 SD" not in caplog.text
    change = inputs[0].detach() - torch.stack([item["image"] for item in data[:2]]).as_tensor()
    assert float(change.abs().max()) == pytest.approx(0.1 * sd, rel=1e-3)
    assert trainer.state_dict()["pgdat"]["settings"]["channel_sd"] == [sd]
