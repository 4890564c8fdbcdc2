"""Bundles as files: what their configs and metadata say, what is refused, and finding cases for them."""

import io
import re
import sys

import pytest
import torch

from ima_seg.cases.find import find_cases
from ima_seg.errors import UserError
from ima_seg.monai.bundle import load_bundle
from tests.bundle_data import METADATA, PRED, altered, config, transform, write_bundle


def test_names_of_cases(organs, tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for name in ("a.nii.gz", "b_0000.nii.gz", "c.nii", "alone.nii.gz", "._d.nii.gz", "notes.txt"):
        (images / name).touch()
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz", "lonely.nii.gz"):
        (labels / name).touch()
    naming = {"endings": (".nii.gz", ".nii"), "one_name": True}
    found, problems = find_cases(images, labels, channels=1, **naming)
    assert [(c.case, [p.name for p in c.images], c.label.name) for c in found] == [
        ("a", ["a.nii.gz"], "a.nii.gz"), ("b", ["b_0000.nii.gz"], "b.nii.gz"), ("c", ["c.nii"], "c.nii.gz")
    ]  # fmt: skip
    assert [p.case for p in problems] == ["alone", "lonely"]
    assert len(find_cases(images, labels, channels=1, limit=1, **naming)[0]) == 1
    found, problems = find_cases(images, labels, channels=2, **naming)
    assert [c.case for c in found] == ["a", "c"] and "b_0001" in next(p for p in problems if p.case == "b").message
    with pytest.raises(UserError, match="found: nothing"):
        (tmp_path / "empty").mkdir()
        find_cases(tmp_path / "empty", labels, channels=1, **naming)


CODE = {
    "an expression": {"network": "$RAN.append(1) or @network_def"},
    "an attribute": {"network": "$@network_def.__class__"},
    "a target of monai": {"inferer": {"_target_": "monai.bundle.run"}},
    "a target of the bundle": {"inferer": {"_target_": "scripts.inferer.make"}},
    "a function of torch": {"network": {"_target_": "torch.load", "f": "x"}},
    "a reader": {"preprocessing": {"_target_": "Compose", "transforms": [
        transform("LoadImaged", keys="image", reader="builtins.RAN.append")]}},
    "a reader by reference": {"reader": "builtins.RAN.append", "preprocessing": {"_target_": "Compose", "transforms": [
        transform("LoadImaged", keys="image", reader="@reader")]}},
    "a loss": {"network": {"_target_": "PerceptualLoss", "spatial_dims": 3}},
    "a string with a reference": {"image_key": "$'@network_def'"},
    "a nested one": {"image_key": "$str(print('image'))"},
}  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_code_of_a_bundle_runs_only_when_it_is_trusted(tmp_path, monkeypatch, name):
    monkeypatch.setattr("builtins.RAN", ran := [], raising=False)
    folder = write_bundle(tmp_path / "bundle", config(**CODE[name]))
    (folder / "scripts").mkdir()
    (folder / "scripts" / "inferer.py").write_text(
        "import builtins\nfrom monai.inferers import SimpleInferer\nbuiltins.RAN.append(1)\n"
        "def make():\n    return SimpleInferer()\n"
    )
    (folder / "scripts" / "__init__.py").touch()
    with pytest.raises(UserError, match="--trust-checkpoint"):
        load_bundle(folder)
    assert not ran
    if name in ("an expression", "a target of the bundle", "a nested one"):
        model = load_bundle(folder, trust=True)
        assert (
            type(model.inferer).__name__ in ("SimpleInferer", "SlidingWindowInferer") and "scripts" not in sys.modules
        )
        assert ran == [1] or name == "a nested one"


def test_weights_that_would_run_code_are_refused_unless_trusted(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    weights = torch.load(folder / "models" / "model.pt")
    torch.save({"model": weights, "note": io.StringIO("x")}, folder / "models" / "best.pt")
    with pytest.raises(UserError, match="--trust-checkpoint"):
        load_bundle(folder, checkpoint="best.pt")
    assert load_bundle(folder, checkpoint="best.pt", trust=True).weights.name == "best.pt"


def truncate(folder):
    path = folder / "models" / "model.pt"
    path.write_bytes(path.read_bytes()[:2000])


BAD = {
    "no metadata": (lambda f: (f / "configs" / "metadata.json").unlink(), {}, "metadata.json does not exist"),
    "no config": (lambda f: (f / "configs" / "inference.json").unlink(), {}, "has no configs/inference.json"),
    "half a config": (lambda f: (f / "configs" / "inference.json").write_text('{"a": '), {}, "not valid JSON"),
    "no weights": (lambda f: (f / "models" / "model.pt").unlink(), {}, "model.pt does not exist"),
    "other weights": (lambda f: torch.save({"a": torch.ones(2)}, f / "models" / "model.pt"), {}, "does not fit"),
    "no state": (lambda f: torch.save([torch.ones(2)], f / "models" / "model.pt"), {}, "holds list"),
    "truncated": (truncate, {}, "cannot be read"),
    "labels of other classes": (lambda f: None, {"labels": {"liver": [1]}}, "but the classes in .* are organ"),
    "background as a class": (lambda f: None, {"labels": {"organ": [0], "lesion": [2]}}, "which is the background"),
    "sigmoid without labels": (lambda f: None, {"output": "sigmoid"}, "may overlap"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_bundles_are_refused(tmp_path, name):
    spoil, options, message = BAD[name]
    folder = write_bundle(tmp_path / "bundle")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load_bundle(folder, **options)


CONTENTS = {
    "no inferer": ({"inferer": None}, METADATA, "has no 'inferer'"),
    "unknown transform": ({"inferer": {"_target_": "SlidingWindow"}}, METADATA, "would run code"),
    "bad argument": ({"inferer": {"_target_": "SlidingWindowInferer", "roi": 3}}, METADATA, "'inferer' cannot"),
    "missing reference": ({"image_key": "@key"}, METADATA, "cannot be built"),
    "not a network": ({"network": "$str(@network_def)"}, METADATA, "is str, not a torch.nn.Module"),
    "no loader": (
        {"preprocessing": {"_target_": "Compose", "transforms": [transform("NormalizeIntensityd", keys="image")]}},
        METADATA,
        "must be LoadImaged",
    ),
    "random": (
        {"preprocessing": {"_target_": "Compose", "transforms": [
            transform("LoadImaged", keys="image"), transform("RandFlipd", keys="image")]}},
        METADATA,
        "RandFlipd .* is random",
    ),
    "no activation": ({"postprocessing": {"_target_": "Compose", "transforms": []}}, METADATA, "--bundle-output"),
    "no classes": ({}, altered(METADATA, *PRED, "channel_def", value=None), "--bundle-labels"),
    "other count": ({}, altered(METADATA, *PRED, "num_channels", value=4), "num_channels is 4"),
    "gap": ({}, altered(METADATA, *PRED, "channel_def", value={"0": "b", "2": "a"}), "does not name the channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_bad_configs_and_metadata_are_refused(tmp_path, name):
    changes, metadata, message = CONTENTS[name]
    folder = write_bundle(tmp_path / "bundle", config(**changes), metadata=metadata)
    with pytest.raises(UserError, match=message):
        load_bundle(folder)


SLIDING = {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 16]}
SLICES = {"_target_": "SliceInferer", "roi_size": [16, 16]}
INFERERS = [
    (SLIDING | {"overlap": float("nan")}, "inferer.overlap is nan; it is a number from 0"),
    (SLIDING | {"overlap": -0.1}, "inferer.overlap is -0.1"),
    (SLIDING | {"overlap": [0.5, 0.5, 1.0]}, "inferer.overlap is [0.5, 0.5, 1.0]"),
    (SLIDING | {"overlap": [0.5, 0.5]}, "inferer.overlap is [0.5, 0.5]"),
    (SLIDING | {"overlap": "0.5"}, "inferer.overlap is '0.5'"),
    (SLIDING | {"sw_batch_size": 0}, "inferer.sw_batch_size is 0"),
    (SLIDING | {"sw_batch_size": 1.5}, "inferer.sw_batch_size is 1.5"),
    (SLIDING | {"roi_size": [16, 16, 10**6]}, "inferer.roi_size is [16, 16, 1000000]"),
    (SLIDING | {"roi_size": [16, 16, 0.5]}, "inferer.roi_size is [16, 16, 0.5]"),
    (SLIDING | {"roi_size": []}, "inferer.roi_size is []"),
    (SLIDING | {"mode": "linear"}, "'linear' is not a valid BlendMode"),
    (SLIDING | {"sigma_scale": 0}, "inferer.sigma_scale is 0"),
    (SLIDING | {"padding_mode": "mirror"}, "inferer.padding_mode is 'mirror'; it is one of constant"),
    (SLIDING | {"cval": float("inf")}, "inferer.cval is inf"),
    (SLICES | {"spatial_dim": 3}, "inferer.spatial_dim is 3"),
    (SLICES | {"roi_size": [8, 8, 8]}, "two numbers for a SliceInferer"),
    (SLICES, "inferer is SliceInferer, which gives slices to the network, but UNet is for three dimensions"),
]


@pytest.mark.parametrize(("inferer", "message"), INFERERS)
def test_values_of_an_inferer_that_cannot_be_are_refused_at_once(tmp_path, inferer, message):
    folder = write_bundle(tmp_path / "bundle", config(inferer=inferer))
    for trust in (False, True):
        with pytest.raises(UserError, match=re.escape(message)) as found:
            load_bundle(folder, trust=trust)
        assert "inference.json" in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("roi", [-1, 0, 16, [16, -1, 0], None, [None, 16, 16]])
def test_sizes_of_tiles_that_stand_for_a_whole_axis_are_kept(tmp_path, roi):
    folder = write_bundle(tmp_path / "bundle", config(inferer=SLIDING | {"roi_size": roi, "overlap": [0, 0.5, 0.9]}))
    assert load_bundle(folder).inferer.roi_size == roi


def test_classes_without_metadata_come_from_the_command_line(tmp_path):
    metadata = altered(METADATA, *PRED, value=None)
    folder = write_bundle(tmp_path / "bundle", metadata=metadata)
    model = load_bundle(folder, labels={"organ": [1], "lesion": [2]})
    assert model.classes == {"organ": (1,), "lesion": (2,)} and model.labels.outputs == 3
