"""Evaluations of whole cases: every attack, the files that are written, what a stock nnU-Net makes of them.

One file: the tests share models and runs that take long to make.
"""

import dataclasses
import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from ima_seg.cases.write import save_adversarial
from ima_seg.errors import UserError
from ima_seg.evaluate import api
from ima_seg.evaluate.attack import sweep
from ima_seg.evaluate.attack.conditions import conditions
from ima_seg.evaluate.measure.metrics import case_metrics
from ima_seg.nnunet import case as nnunet_case
from ima_seg.nnunet.folder import load_model
from tests.evaluation_runs import STEPS, comparable, evaluated, failures, names, records, settings, some_cases

QUICK = ["pgd", "fgsm", "gaussian", "disappear", "appear", "patch-pgd"]
ATTACKS = [*QUICK, "minimal"]
CASE = 0
#: What differs between the runs: name -> flavour, number of models, settings
RUNS = {
    "mr3d": ("mr3d", 2, {"attacks": [*ATTACKS, "transfer"], "eps": [0.05, 0.6], "corruptions": ["gamma"]}),
    "mr2d": ("mr2d", 2, {"attacks": [*ATTACKS, "transfer"], "eps": [0.6]}),
    "mr2d-slice": ("mr2d", 2, {"attacks": [*ATTACKS, "transfer"], "eps": [0.6], "budget": "slice"}),
    "regions": ("regions", 1, {"attacks": QUICK, "eps": [0.6], "corruptions": ["rician_noise"]}),
    "ct": ("ct", 1, {"attacks": QUICK, "eps": [60.0], "norm": "linf", "unit": "hu"}),
    "coarse": ("coarse", 1, {"attacks": ATTACKS, "eps": [5.0], "unit": "percent"}),
}


@pytest.fixture(scope="module")
def whole(phantoms, tmp_path_factory):
    """Name of :data:`RUNS` -> output folder; made once."""
    made = {}

    def make(name):
        if name not in made:
            flavour, count, values = RUNS[name]
            folder = tmp_path_factory.mktemp(name)
            data = some_cases(phantoms, flavour, folder, CASE)
            models = {
                f"model {seed}": phantoms.model(flavour, seed=seed, steps=(STEPS, 60)[seed]) for seed in range(count)
            }
            targets = [next(iter(load_model(models["model 0"]).classes))]
            chosen = settings(**values, targets=targets, save_adversarial=True, mirroring=name in ("ct", "regions"))
            report, failed = evaluated(models, data, folder / "out", chosen, tile_batch=64)
            assert report.is_file() and failed == 0
            made[name] = folder / "out"
        return made[name]

    return make


def rewritten(image, like):
    return nibabel.Nifti1Image(image, like.affine, like.header)


@pytest.mark.parametrize("name", RUNS)
def test_every_attack_from_the_files_to_the_report(whole, phantoms, name):
    out = whole(name)
    flavour, count, _ = RUNS[name]
    run = json.loads((out / "run.json").read_text())
    chosen = settings(**run["settings"])
    found = records(out)
    case = names(phantoms, flavour)[CASE]
    models = [f"model {seed}" for seed in range(count)]
    wanted = {
        (case, model, *condition.key)
        for model in models
        for condition in conditions(chosen, model=model, models=models)
    }
    assert set(found) == wanted and not failures(out)
    page = (out / "report.html").read_text()
    assert case in page and all(model in page for model in models)
    assert json.loads((out / "summary.json").read_text())
    for record in found.values():
        clean = next(r for r in found.values() if r.kind == "clean" and r.model == record.model)
        passable = record.model == "model 0"
        assert clean.dice > 0.2 or not passable
        if record.size is None:
            assert record.kind in ("clean", "corruption")
            continue
        size, budget = record.size, record.eps_network
        if record.budget == "slice":
            voxels = 24 * 24  # of a slice
            assert size.l2_slice <= budget * voxels**0.5 * 1.001
            full = size.rms  # slices without foreground are perturbed as well
        else:
            full = size.linf if record.norm == "linf" else size.rms
        assert full <= budget * 1.001
        if record.attack in ("pgd", "gaussian") and record.norm == "l2":
            # Of all slices at once, the worst points of some are their random starts, which lie within.
            inside = record.attack == "pgd" and record.budget == "slice"
            assert full == pytest.approx(budget, rel=0.05 if inside else 0.01)
        if record.attack == "pgd" and record.eps == max(chosen.eps):
            assert record.gradients > 0 and record.trace
            assert record.dice < clean.dice or not passable
        if record.kind == "minimal" and record.breaking_rms is not None:
            assert record.dice < clean.dice
    if name == "ct":
        pgd = next(r for r in found.values() if r.attack == "pgd")
        assert 50 < pgd.size.native_linf[0] <= 60.06
    if name == "coarse":
        pgd = next(r for r in found.values() if r.attack == "pgd")
        # The RMS is over both channels together; the percentages count that of which a unit is worth most.
        assert (sum(share**2 for share in pgd.size.percent_rms) / 2) ** 0.5 <= 5.005
    # files and records say the same
    assert {p.name for p in (out / "panels").iterdir()} <= {r.panel.split("/")[1] for r in found.values() if r.panel}


def stock_dice(model, record, out, reference, folds=("0",)):
    """Dice of a stock nnU-Net on the adversarial files."""
    mirror = json.loads((out / "run.json").read_text())["settings"]["mirroring"]
    stock = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=mirror, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model.folder), folds)
    (segmentation,) = stock.predict_from_files_sequential([[str(out / file) for file in record.disk.image]], None)
    return case_metrics(
        segmentation,
        reference,
        classes=model.classes,
        spacing_mm=(1.0, 1.0, 1.0),
        nsd_tolerance_mm=2.0,
        ignore_label=model.labels.ignore_label,
    ).dice


@pytest.mark.parametrize("name", ["mr3d", "regions", "ct", "coarse", "mr2d-slice"])
def test_a_stock_nnunet_finds_the_recorded_dice_in_the_written_files(whole, phantoms, name):
    out, flavour = whole(name), RUNS[name][0]
    model, case = phantoms.case(flavour, index=CASE, steps=STEPS)
    pgd = [r for r in records(out).values() if r.attack == "pgd" and r.model == "model 0"]
    worst = max(pgd, key=lambda r: r.eps)
    assert worst.disk.resampled == (flavour == "coarse")
    assert stock_dice(model, worst, out, case.raw.reference) == pytest.approx(worst.disk.dice, abs=0.01)
    if flavour not in ("coarse", "mr2d"):
        assert worst.disk.dice == pytest.approx(worst.dice, abs=0.01)


@pytest.mark.parametrize("name", RUNS)
def test_written_files_keep_the_geometry_and_differ_by_the_perturbation(whole, phantoms, name):
    out, flavour = whole(name), RUNS[name][0]
    case = phantoms.case(flavour, index=CASE, steps=STEPS)[1]
    with_files = [r for r in records(out).values() if r.disk is not None]
    assert {r.attack.split(":")[0] for r in with_files} == set(RUNS[name][2]["attacks"])
    for record in with_files:
        for channel, (image, difference) in enumerate(zip(record.disk.image, record.disk.difference, strict=True)):
            written, change = nibabel.load(out / image), nibabel.load(out / difference)
            original = nibabel.load(phantoms.images(flavour) / f"{case.raw.case}_{channel:04d}.nii.gz")
            for file in (written, change):
                assert np.array_equal(file.affine, original.affine) and file.shape == original.shape
                assert file.header.get_zooms() == original.header.get_zooms()
                for code in ("sform_code", "qform_code"):
                    assert file.header[code] == original.header[code]
                assert file.get_data_dtype() == np.float32
            moved = written.get_fdata() - original.get_fdata()
            assert np.allclose(moved, change.get_fdata(), atol=2e-7 * np.abs(original.get_fdata()).max())
        if not record.disk.resampled and record.size.rms > 0:
            assert record.disk.rms == pytest.approx(record.size.rms, rel=0.01)
            assert record.disk.linf == pytest.approx(record.size.linf, rel=0.01)


@pytest.mark.parametrize("stored", ["int16", "scaled", "float64", "large"])
def test_adversarial_files_of_other_types_and_headers(tmp_path, stored):
    values = np.random.default_rng(0).normal(size=(5, 6, 7)) * 50
    affine = np.array([[0, -1.2, 0, 5], [0.9, 0, 0, -3], [0, 0, 2.5, 8], [0, 0, 0, 1.0]])
    if stored == "int16":
        source = nibabel.Nifti1Image(values.astype(np.int16), affine)
    elif stored == "large":
        source = nibabel.Nifti1Image((values + 2**24 + 400).astype(np.int32), affine)
    else:
        source = nibabel.Nifti1Image(values, affine)
        source.header.set_data_dtype("int16" if stored == "scaled" else "float64")  # the former gets scl_slope
    source.set_sform(affine, 0)
    source.set_qform(affine, 3)
    source.header["descrip"] = b"as scanned"
    nibabel.save(source, tmp_path / "a b_0000.nii.gz")
    original = nibabel.load(tmp_path / "a b_0000.nii.gz")
    assert (stored == "scaled") == (original.dataobj.slope != 1)
    delta = np.random.default_rng(1).normal(size=(1, 7, 6, 5)) * 0.25
    (image,), (difference,) = save_adversarial([tmp_path / "a b_0000.nii.gz"], delta, tmp_path / "out", "a b")
    written, change = nibabel.load(image), nibabel.load(difference)
    assert image.name == "a b_0000.nii.gz" and {p.name for p in image.parent.iterdir()} == {image.name}
    wide = np.float64 if stored in ("float64", "large") else np.float32
    for file in (written, change):
        assert file.get_data_dtype() == wide and file.dataobj.slope == 1 and file.dataobj.inter == 0
        assert np.array_equal(file.affine, original.affine)
        assert (int(file.header["sform_code"]), int(file.header["qform_code"])) == (0, 3)
        assert file.header["descrip"].item() == b"as scanned"
    assert np.allclose(change.get_fdata(), delta[0].T, atol=1e-6)
    assert np.allclose(written.get_fdata(), original.get_fdata() + delta[0].T, atol=2e-5)


def test_scaled_integers_are_attacked_in_their_true_intensities(phantoms, tmp_path):
    images, labels = some_cases(phantoms, "mr3d", tmp_path, CASE)
    (file,) = images.iterdir()
    stored = nibabel.load(file)
    scaled = rewritten(np.asarray(stored.dataobj) * 0.01 - 3, stored)
    scaled.header.set_data_dtype(np.int16)
    nibabel.save(scaled, file)
    assert nibabel.load(file).dataobj.slope != 1
    chosen = settings(save_adversarial=True)
    evaluated({"a": phantoms.model("mr3d", steps=STEPS)}, (images, labels), tmp_path / "out", chosen)
    pgd = next(r for r in records(tmp_path / "out").values() if r.attack == "pgd")
    assert pgd.disk.dice == pytest.approx(pgd.dice, abs=0.01) and pgd.disk.rms == pytest.approx(0.3, rel=0.01)
    model, case = phantoms.case("mr3d", index=CASE, steps=STEPS)
    assert stock_dice(model, pgd, tmp_path / "out", case.raw.reference) == pytest.approx(pgd.dice, abs=0.01)


def test_the_same_seed_gives_the_same_records_and_another_one_others(phantoms, tmp_path):
    data = some_cases(phantoms, "mr3d", tmp_path, CASE)
    models = {"a": phantoms.model("mr3d", steps=STEPS)}
    chosen = settings(attacks=["pgd", "gaussian"])
    for out, seed in (("first", 0), ("second", 0), ("third", 1)):
        evaluated(models, data, tmp_path / out, chosen.model_copy(update={"seed": seed}))
    first, second, third = (comparable(tmp_path / out) for out in ("first", "second", "third"))
    assert first == second
    assert {key[2] for key in first if first[key] != third[key]} >= {"pgd", "gaussian"}


@pytest.mark.parametrize("flavour", ["mr3d", "coarse"])
def test_several_folds_are_averaged_as_nnunet_does(phantoms, tmp_path, monkeypatch, flavour):
    folder = tmp_path / "both"
    shutil.copytree(phantoms.model(flavour, steps=STEPS), folder)
    shutil.copytree(phantoms.model(flavour, seed=1) / "fold_0", folder / "fold_1")
    model = load_model(folder)
    assert model.folds == ["0", "1"] and len(model.networks) == 2
    _, case = phantoms.case(flavour, index=CASE, steps=STEPS)
    monkeypatch.setattr(torch, "half", torch.float32)
    stock = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=True, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(folder), ("0", "1"))
    expected = stock.predict_logits_from_preprocessed_data(case.clean[0])
    logits = case.network(model.window(step_size=0.5, mirroring=True), whole=True)(case.base)[0]
    assert (logits - expected).abs().max() < 1e-4
    single = load_model(folder, folds=["1"]).window(step_size=0.5, mirroring=True)
    assert (case.network(single, whole=True)(case.base)[0] - expected).abs().max() > 1e-2


class Hungry(torch.nn.Module):
    """Runs out of memory when given more tiles than ``limit()``."""

    def __init__(self, network, limit):
        super().__init__()
        self.network, self.limit = network, limit

    def forward(self, x):
        if len(x) > self.limit():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.network(x)


def hungry(monkeypatch, limit):
    """Let all models that an evaluation loads be hungry."""

    def load(*arguments, **options):
        model = load_model(*arguments, **options)
        return dataclasses.replace(model, networks=[Hungry(network, limit) for network in model.networks])

    monkeypatch.setattr(api, "load_model", load)


def test_out_of_memory_halves_the_tile_batch_and_changes_nothing_else(phantoms, tmp_path, monkeypatch):
    data = some_cases(phantoms, "mr3d", tmp_path, CASE)
    models, chosen = {"a": phantoms.model("mr3d", steps=STEPS)}, settings(attacks=["pgd", "gaussian"])
    evaluated(models, data, tmp_path / "expected", chosen, tile_batch=1)
    seen = []
    hungry(monkeypatch, lambda: 1)
    monkeypatch.setattr(sweep.Sweep, "_write", lambda self, record, write=sweep.Sweep._write: (
        seen.append(self.contestants[0].window.tile_batch), write(self, record)))  # fmt: skip
    _, failed = evaluated(models, data, tmp_path / "out", chosen, tile_batch=4)
    assert failed == 0 and seen == [1, 1, 1]
    assert comparable(tmp_path / "out") == comparable(tmp_path / "expected")


def test_a_case_that_needs_too_much_memory_is_noted_and_the_others_go_on(phantoms, tmp_path, monkeypatch):
    data = some_cases(phantoms, "mr3d", tmp_path, 1, 3)
    large, small = (names(phantoms, "mr3d")[index] for index in (1, 3))
    current = []

    def prepare(raw, *arguments, prepare=nnunet_case.prepare_case, **options):
        current.append(raw.case)
        return prepare(raw, *arguments, **options)

    monkeypatch.setattr(nnunet_case, "prepare_case", prepare)
    hungry(monkeypatch, lambda: 0 if current[-1] == large else 8)
    report, failed = evaluated(
        {"a": phantoms.model("mr3d", steps=STEPS)}, data, tmp_path / "out", settings(attacks=["gaussian"])
    )
    assert failed == 1 and {key[0] for key in records(tmp_path / "out")} == {small}
    (failure,) = failures(tmp_path / "out")
    assert failure.case == large and "out of memory" in failure.message and "-device cpu" in failure.message
    assert large in report.read_text()


def cascade(phantoms, folder):
    """An untrained second stage on the first model's plans."""
    source = phantoms.model("mr3d", steps=STEPS)
    plans = json.loads((source / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    shutil.copy(source / "dataset.json", folder)
    network = phantoms._network(folder, plans, "3d_fullres", 0)
    checkpoint = torch.load(source / "fold_0" / "checkpoint_final.pth", weights_only=False)
    torch.save({**checkpoint, "network_weights": network.state_dict()}, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def test_a_cascade_needs_the_previous_stage_and_uses_it_as_nnunet_does(phantoms, tmp_path):
    folder = cascade(phantoms, tmp_path / "cascade")
    images, labels = some_cases(phantoms, "mr3d", tmp_path, CASE)
    chosen = settings(attacks=["pgd"], eps=[0.5])
    with pytest.raises(UserError, match="-prev_stage_predictions"):
        evaluated({"a": folder}, (images, labels), tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()
    evaluated({"a": folder}, (images, labels), tmp_path / "out", chosen, previous_stage=labels)
    found = records(tmp_path / "out")
    clean, pgd = (next(r for r in found.values() if r.attack == attack) for attack in ("clean", "pgd"))
    assert pgd.size.rms == pytest.approx(0.5, rel=0.01), "the previous stage's masks are not perturbed"
    stock = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(folder), ("0",))
    case = names(phantoms, "mr3d")[CASE]
    stock.predict_from_files_sequential(
        [[str(images / f"{case}_0000.nii.gz")]], [str(tmp_path / case)], folder_with_segs_from_prev_stage=str(labels)
    )
    segmentation = nibabel.load(tmp_path / f"{case}.nii.gz").get_fdata()
    reference = nibabel.load(labels / f"{case}.nii.gz").get_fdata()
    for index, metrics in enumerate(clean.classes.values(), 1):
        assert metrics.tp == pytest.approx(((segmentation == index) & (reference == index)).sum(), rel=0.01, abs=5)
        assert metrics.fp == pytest.approx(((segmentation == index) & (reference != index)).sum(), rel=0.01, abs=5)
