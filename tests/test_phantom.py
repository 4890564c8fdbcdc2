"""The phantom: reproducible, geometrically honest, valid for nnU-Net, and not solved by a threshold."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from ima_seg.cli.dataset import add_parsers
from ima_seg.data import recipes
from ima_seg.data.phantom import draw_case, write_phantom_dataset
from ima_seg.errors import UserError

SMALL = (20, 18, 16)


def run_cli(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    args = parser.parse_args(["dataset", *words])
    return int(args.run(args) or 0)


def describe(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "dataset.json").read_text()))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.nii.gz")}


def test_same_seed_same_bytes_and_cases_do_not_depend_on_their_number(tmp_path: Path) -> None:
    few = write_phantom_dataset(tmp_path / "a", dataset_id=990, cases=2, test_cases=1, shape=SMALL, seed=7)
    more = write_phantom_dataset(tmp_path / "b", dataset_id=990, cases=3, test_cases=1, shape=SMALL, seed=7)
    other = write_phantom_dataset(tmp_path / "c", dataset_id=990, cases=2, test_cases=1, shape=SMALL, seed=8)
    first, second, third = contents(few), contents(more), contents(other)
    assert len(first) == 6 and len(second) == 8
    assert all(second[name] == data for name, data in first.items())
    assert all(third[name] != data for name, data in first.items())
    assert len(set(first.values())) == len(first), "training and test cases must differ"


@pytest.mark.parametrize("modality", ["mr", "mr2", "ct"])
def test_files_have_the_declared_geometry_and_type(tmp_path: Path, modality: Any) -> None:
    spacing, shape = (0.8, 0.9, 3.0), (24, 20, 16)
    folder = write_phantom_dataset(
        tmp_path, dataset_id=12, name="Geo", cases=6, modality=modality, spacing=spacing, shape=shape
    )
    channels = describe(folder)["channel_names"]
    signs = set()
    for label_path in sorted((folder / "labelsTr").iterdir()):
        label = nib.load(label_path)
        assert label.get_data_dtype() == np.uint8
        linear = label.affine[:3, :3]
        assert not np.allclose(label.affine, np.diag([*spacing, 1]), atol=0.01)
        np.testing.assert_allclose(np.linalg.norm(linear, axis=0), spacing, rtol=1e-5)
        np.testing.assert_allclose(label.get_qform(), label.affine, atol=1e-3)
        axes = linear / np.asarray(spacing)
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-5)
        assert np.linalg.det(axes) == pytest.approx(1, abs=1e-5)
        signs.add("".join(nib.aff2axcodes(label.affine)))
        for channel in channels:
            path = folder / "imagesTr" / label_path.name.replace(".nii.gz", f"_{int(channel):04d}.nii.gz")
            image = nib.load(path)
            assert image.shape == label.shape == shape
            assert image.get_data_dtype() == np.int16
            np.testing.assert_array_equal(image.affine, label.affine)
            np.testing.assert_allclose(SimpleITK.ReadImage(str(path)).GetSpacing(), spacing, rtol=1e-5)
            values = np.asanyarray(image.dataobj)
            if modality == "ct":
                assert values.min() < -950 and values.max() > 250
            else:
                assert values.min() >= 0 and 800 < values.max() <= 4095
    assert signs == {"RAS", "LPS"}


def test_labels_and_the_share_of_cases_without_lesion() -> None:
    cases = [draw_case(i, shape=(32, 32, 32)) for i in range(20)]
    assert all(set(np.unique(case.label)) <= {0, 1, 2} for case in cases)
    assert all((case.label == 1).any() for case in cases)
    spared = [not (case.label == 2).any() for case in cases]
    assert [sum(spared[i : i + 5]) for i in range(0, 20, 5)] == [1, 1, 1, 1]
    volumes = [(case.label > 0).mean() for case in cases]
    assert max(volumes) > 1.3 * min(volumes)


def test_the_smallest_matrix_still_holds_an_organ() -> None:
    assert all((draw_case(i, shape=(16, 16, 16), modality="ct").label > 0).sum() > 20 for i in range(5))


@pytest.mark.parametrize("modality", ["mr", "mr2", "ct"])
def test_no_intensity_band_finds_the_foreground(modality: Any) -> None:
    """The best band of intensities, chosen with knowledge of the truth, stays below a Dice of 0.7."""
    cases = [draw_case(i, modality=modality) for i in range(6)]
    truth = np.concatenate([case.label.ravel() > 0 for case in cases])
    for channel in range(len(cases[0].images)):
        values = np.concatenate([case.images[channel].ravel() for case in cases])
        bins = np.searchsorted(np.unique(np.quantile(values, np.linspace(0, 1, 80))), values)
        inside = np.concatenate([[0], np.cumsum(np.bincount(bins))])
        hits = np.concatenate([[0], np.cumsum(np.bincount(bins, weights=truth))])
        dice = 2 * (hits[None] - hits[:, None]) / np.maximum(inside[None] - inside[:, None] + truth.sum(), 1)
        assert 0.05 < dice.max() < 0.7


def test_regions_and_ignore_label_are_what_nnunet_expects(tmp_path: Path) -> None:
    folder = write_phantom_dataset(
        tmp_path, dataset_id=5, cases=3, test_cases=1, shape=(24, 24, 24), regions=True, ignore_label=True
    )
    content = describe(folder)
    manager = LabelManager(content["labels"], content["regions_class_order"])
    assert manager.has_regions and manager.foreground_regions == [(1, 2), 2]
    assert manager.ignore_label == 3
    dense = [draw_case(i, shape=(24, 24, 24)).label for i in range(3)]
    for index, label in enumerate(dense):
        sparse = np.asanyarray(nib.load(folder / "labelsTr" / f"Phantom_{index:03d}.nii.gz").dataobj)
        seen = sparse != 3
        assert 0.1 < seen.mean() < 0.6
        assert (sparse[seen] == label[seen]).all() and (sparse[seen] > 0).any()
    test_label = np.asanyarray(nib.load(folder / "labelsTs" / "Phantom_test_000.nii.gz").dataobj)
    assert test_label.max() < 3


def test_plain_labels_and_channels(tmp_path: Path) -> None:
    content = describe(write_phantom_dataset(tmp_path, dataset_id=5, cases=1, shape=SMALL, modality="ct"))
    manager = LabelManager(content["labels"], None)
    assert manager.foreground_labels == [1, 2] and not manager.has_ignore_label
    assert content["numTraining"] == 1 and content["file_ending"] == ".nii.gz"
    assert get_normalization_scheme(content["channel_names"]["0"]).__name__ == "CTNormalization"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dataset_id": 0}, "1..999"),
        ({"dataset_id": 1000}, "1..999"),
        ({"name": "a/b"}, "letters and digits"),
        ({"name": "a__b"}, "letters and digits"),
        ({"cases": 0}, "at least 1"),
        ({"test_cases": -1}, "0 or more"),
        ({"seed": -1}, "seed -1"),
        ({"shape": (15, 32, 32)}, "at least 16"),
        ({"shape": (9999, 9999, 9999)}, "too large"),
        ({"spacing": "thick"}, "isotropic or anisotropic"),
        ({"spacing": (1.0, 0.0, 1.0)}, "0.05 to 50"),
        ({"spacing": (1.0, float("nan"), 1.0)}, "0.05 to 50"),
        ({"modality": "pet"}, "mr, mr2, ct"),
    ],
)
def test_wrong_arguments_are_named_and_leave_nothing(tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        write_phantom_dataset(tmp_path / "raw", **({"dataset_id": 990, "cases": 1} | arguments))
    assert not list(tmp_path.rglob("*Dataset*"))


def test_existing_folders_are_protected(tmp_path: Path) -> None:
    folder = write_phantom_dataset(tmp_path, dataset_id=990, cases=1, shape=SMALL)
    before = contents(folder)
    with pytest.raises(UserError, match="exists already"):
        write_phantom_dataset(tmp_path, dataset_id=990, cases=1, shape=SMALL, seed=1)
    with pytest.raises(UserError, match="taken by"):
        write_phantom_dataset(tmp_path, dataset_id=990, name="Other", cases=1, shape=SMALL)
    assert contents(folder) == before
    write_phantom_dataset(tmp_path, dataset_id=990, cases=2, shape=SMALL, seed=1, overwrite=True)
    assert describe(folder)["numTraining"] == 2
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="not a phantom"):
        write_phantom_dataset(tmp_path, dataset_id=990, cases=1, shape=SMALL, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_an_interrupted_write_leaves_the_old_set_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_phantom_dataset(tmp_path, dataset_id=990, cases=1, shape=SMALL)
    before = contents(folder)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ima_seg.data.phantom._save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_phantom_dataset(tmp_path, dataset_id=990, cases=1, shape=SMALL, overwrite=True)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_recipes_are_valid_and_convert_the_published_noise() -> None:
    names = recipes.list_recipes()
    assert {"msd_heart", "msd_hippocampus", "msd_prostate", "phantom_mr"} <= set(names)
    for name in names:
        assert recipes.load_recipe(name).name == name
    hippocampus = recipes.load_recipe("msd_hippocampus")
    assert hippocampus.eps_max_rms == pytest.approx(0.317, abs=5e-4)
    prostate = recipes.load_recipe("msd_prostate")
    assert prostate.test_rms[-1] == pytest.approx(40 / np.sqrt(2 * 320 * 320))
    assert recipes.load_recipe("phantom_ct").eps_max_rms is None
    with pytest.raises(UserError, match="msd_heart"):
        recipes.load_recipe("msd_hart")
    with pytest.raises(UserError, match="no \\[adversarial\\]"):
        recipes.load_recipe("phantom_ct").rms(1.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("licence", "license"), "licence: Field required|license: Extra inputs"),
        (('kind = "phantom"', 'kind = "decathlon"'), "the sections are"),
        (('name = "phantom_mr"', 'name = "x"'), "calls itself 'x'"),
        (("[phantom]", "[phantom"), "cannot be read"),
        (("48, 48, 48", "48, 48"), "phantom.shape"),
    ],
)
def test_a_malformed_recipe_is_named(tmp_path: Path, change: tuple[str, str], match: str) -> None:
    text = (recipes.recipe_folder() / "phantom_mr.toml").read_text()
    assert change[0] in text
    path = tmp_path / "phantom_mr.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(UserError, match=match) as caught:
        recipes.read_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("flavour", sorted(recipes.flavours()))
def test_command_line_writes_each_flavour(tmp_path: Path, flavour: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["phantom", "--flavour", flavour, "--cases", "1", "--shape", "16", "16", "16", "-o", str(tmp_path)]
    assert run_cli(*words) == 0
    assert "nnUNetv2_plan_and_preprocess -d 990" in capsys.readouterr().out
    content = describe(tmp_path / "Dataset990_Phantom")
    assert ("ignore" in content["labels"]) == (flavour == "ignore")
    assert ("regions_class_order" in content) == (flavour == "regions")


def test_command_line_needs_a_place_and_a_known_flavour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(UserError, match="nnUNet_raw is not set"):
        run_cli("phantom")
    with pytest.raises(UserError, match="use one of ct, ignore, mr"):
        run_cli("phantom", "--flavour", "pet")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    monkeypatch.delenv("nnUNet_results", raising=False)
    (tmp_path / "pre" / "Dataset990_Old").mkdir(parents=True)
    with pytest.raises(UserError, match="Dataset990_Old"):
        run_cli("phantom")


def test_command_line_lists_the_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_cli("list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in recipes.list_recipes())


def test_recipes_are_found_in_a_wheel_and_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "ima_seg" / "data" / "recipes.py"
    packaged = module.parent / "recipes"
    packaged.mkdir(parents=True)
    monkeypatch.setattr(recipes, "__file__", str(module))
    with pytest.raises(UserError, match="install ima-seg again"):
        recipes.recipe_folder()
    checkout = tmp_path / "datasets"
    checkout.mkdir()
    (checkout / "a.toml").write_text("")
    assert recipes.recipe_folder() == checkout
    (packaged / "a.toml").write_text("")
    assert recipes.recipe_folder() == packaged
