"""Decathlon tasks: folders and archives, whole, incomplete and hostile."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ima_seg.data import recipes
from ima_seg.errors import UserError
from ima_seg.nnunet import decathlon
from ima_seg.nnunet.decathlon import convert_decathlon

TASK = "Task77_Tiny"


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task as people download it: two channels, litter of a file manager, no imagesTs."""
    folder = tmp_path / "download" / TASK
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    affine = np.array([[-1.0, 0, 0, 5], [0, -1.5, 0, 7], [0, 0, 3, -9], [0, 0, 0, 1]])
    rng = np.random.default_rng(0)
    for number in range(2):
        image = rng.normal(100, 20, (6, 5, 4, 2)).astype(np.float32)
        label = (image[..., 0] > 100).astype(np.uint8)
        nib.save(nib.Nifti1Image(image, affine), folder / "imagesTr" / f"tiny_{number}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / f"tiny_{number}.nii.gz")
        for part in ("imagesTr", "labelsTr"):
            (folder / part / f"._tiny_{number}.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    content = {
        "name": "Tiny",
        "licence": "CC-BY-SA 4.0",
        "reference": "Somewhere",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "organ"},
        "numTraining": 2,
        "training": [{"image": f"./imagesTr/tiny_{i}.nii.gz", "label": f"./labelsTr/tiny_{i}.nii.gz"} for i in (0, 1)],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def pack(folder: Path, archive: Path, mode: str = "w") -> Path:
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=folder.name)
    return archive


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fake_convert(source: str, dataset_id: int, num_processes: int) -> None:
    """Stand in for nnU-Net's converter, which spends seconds on starting its processes."""
    target = Path(os.environ["nnUNet_raw"]) / f"Dataset{dataset_id:03d}_{Path(source).name.split('_')[1]}"
    shutil.copytree(source, target)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunetv2.dataset_conversion.convert_MSD_dataset.convert_msd_dataset", fake_convert)


def refuse(match: str, path: Path, roots: Path, **options: Any) -> str:
    """Assert a UserError, and that nothing was left in nnUNet_raw."""
    with pytest.raises(UserError, match=match) as caught:
        convert_decathlon(path, **options)
    raw = roots / "nnUNet_raw"
    assert not raw.exists() or not [entry for entry in raw.iterdir() if entry.name != "Dataset077_Old"]
    return str(caught.value)


def edit(task: Path, **changes: Any) -> None:
    content = json.loads((task / "dataset.json").read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    (task / "dataset.json").write_text(json.dumps(kept))


def test_folder_is_converted_by_nnunet_and_left_alone(task: Path, roots: Path) -> None:
    before = snapshot(task)
    folder = convert_decathlon(task, num_processes=1)
    assert folder == roots / "nnUNet_raw" / "Dataset077_Tiny"
    assert snapshot(task) == before
    assert os.environ["nnUNet_raw"] == str(roots / "nnUNet_raw")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.nii.gz"))
    assert names == [
        *(f"imagesTr/tiny_{case}_{channel:04d}.nii.gz" for case in (0, 1) for channel in (0, 1)),
        *(f"labelsTr/tiny_{case}.nii.gz" for case in (0, 1)),
    ]
    content = json.loads((folder / "dataset.json").read_text())
    assert content["licence"] == "CC-BY-SA 4.0" and content["reference"] == "Somewhere"
    assert content["channel_names"] == {"0": "T2", "1": "ADC"} and content["labels"] == {"background": 0, "organ": 1}
    assert content["numTraining"] == 2
    source = nib.load(task / "imagesTr" / "tiny_0.nii.gz")
    made = nib.load(folder / "imagesTr" / "tiny_0_0001.nii.gz")
    np.testing.assert_array_equal(made.get_fdata(), source.get_fdata()[..., 1])
    np.testing.assert_allclose(made.affine, source.affine, atol=1e-5)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(("ending", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
@pytest.mark.usefixtures("quick")
def test_archive_is_unpacked_and_converted(task: Path, roots: Path, ending: str, mode: str) -> None:
    archive = pack(task, roots / f"{TASK}{ending}", mode)
    folder = convert_decathlon(archive, dataset_id=5)
    assert folder.name == "Dataset005_Tiny"
    assert len(list(folder.glob("imagesTr/tiny_*"))) == 2 and not list(folder.rglob("._*"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.usefixtures("quick")
def test_checksum_of_a_known_task(task: Path, roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = recipes.load_recipe("msd_heart")
    assert known.decathlon is not None
    renamed = task.rename(task.with_name("Task02_Heart"))
    archive = pack(renamed, roots / "Task02_Heart.tar")
    actual = hashlib.md5(archive.read_bytes()).hexdigest()
    message = refuse("download it again", archive, roots)
    assert actual in message and known.decathlon.md5 in message
    other_name = archive.rename(roots / "heart (1).tar")
    assert actual in refuse("download it again", other_name, roots)
    source = known.decathlon.model_copy(update={"md5": actual})
    fitting = known.model_copy(update={"decathlon": source})
    monkeypatch.setattr(decathlon, "recipe_of_task", {"Task02_Heart": fitting}.get)
    assert convert_decathlon(other_name, dataset_id=3).name == "Dataset003_Heart"
    monkeypatch.undo()
    monkeypatch.setenv("nnUNet_raw", str(roots / "nnUNet_raw"))
    monkeypatch.setattr("nnunetv2.dataset_conversion.convert_MSD_dataset.convert_msd_dataset", fake_convert)
    assert convert_decathlon(other_name, verify=False).name == "Dataset002_Heart"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_damaged_archives(task: Path, roots: Path, mode: str) -> None:
    archive = pack(task, roots / f"{TASK}.tar{'.gz' if mode == 'w:gz' else ''}", mode)
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2 + 7], b"no archive" * 100, b""):
        archive.write_bytes(damaged)
        refuse("damaged|holds nothing", archive, roots)
    middle = bytearray(whole)
    middle[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    if mode == "w:gz":
        archive.write_bytes(middle)
        refuse("damaged", archive, roots)


@pytest.mark.parametrize("name", ["../evil.txt", f"{TASK}/../../evil.txt", "/tmp/evil.txt", "C:\\evil.txt"])
def test_an_archive_that_points_outside_is_refused(task: Path, roots: Path, name: str) -> None:
    archive = pack(task, roots / f"{TASK}.tar")
    with tarfile.open(archive, "a") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"evil"))
    refuse("points outside", archive, roots)
    assert not list(roots.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_an_archive_with_links_or_devices_is_refused(task: Path, roots: Path, kind: bytes) -> None:
    archive = pack(task, roots / f"{TASK}.tar")
    with tarfile.open(archive, "a") as tar:
        entry = tarfile.TarInfo(f"{TASK}/link")
        entry.type, entry.linkname = kind, "/etc/passwd"
        tar.addfile(entry)
    refuse("neither a plain file nor a folder", archive, roots)


def test_an_archive_without_a_single_folder(task: Path, roots: Path) -> None:
    two = roots / "two.tar"
    with tarfile.open(two, "w") as tar:
        tar.add(task, arcname=TASK)
        tar.add(task / "dataset.json", arcname="notes.json")
    refuse("holds Task77_Tiny, notes.json", two, roots)
    one = roots / "one.tar"
    with tarfile.open(one, "w") as tar:
        tar.add(task / "dataset.json", arcname=TASK)
    refuse("single file", one, roots)
    renamed = pack(task.rename(task.with_name("tiny")), roots / f"{TASK}.tar")
    refuse("the folder tiny in .*TaskNN_Name", renamed, roots)


def test_place_and_path_errors(task: Path, roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse("does not exist", roots / "absent", roots)
    refuse("is no archive", task / "dataset.json", roots)
    refuse("at least 1", task, roots, num_processes=0)
    refuse("1..999", task, roots, dataset_id=1000)
    refuse("TaskNN_Name", task.parent, roots)
    for variable in ("nnUNet_raw", "nnUNet_results"):
        old = roots / variable / "Dataset077_Old"
        old.mkdir(parents=True)
        refuse("taken by .*Dataset077_Old", task, roots)
        old.rmdir()
    (roots / "file").write_text("")
    monkeypatch.setenv("nnUNet_raw", str(roots / "file"))
    with pytest.raises(UserError, match="name a writable folder"):
        convert_decathlon(task)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="nnUNet_raw is not set"):
        convert_decathlon(task)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"modality": None}, "'modality' is missing"),
        ({"modality": ["MRI"]}, "'modality' is missing or malformed"),
        ({"modality": {"0": "MRI"}}, "holds 2 channels, dataset.json names 1"),
        ({"labels": {"0": "nothing", "1": "organ"}}, "'nothing'"),
        ({"modality": None, "channel_names": {"0": "MRI"}}, "own format"),
        ({"training": [{"image": "./imagesTr/tiny_9.nii.gz"}]}, "lists tiny_9.nii.gz"),
    ],
)
def test_a_wrong_description(task: Path, roots: Path, changes: dict[str, Any], match: str) -> None:
    edit(task, **changes)
    refuse(match, task, roots)


def test_missing_and_broken_parts(task: Path, roots: Path) -> None:
    description = (task / "dataset.json").read_text()
    for text, match in (("{", "not valid JSON"), ("[1]", "no JSON object")):
        (task / "dataset.json").write_text(text)
        refuse(match, task, roots)
    (task / "dataset.json").unlink()
    refuse("dataset.json is missing", task, roots)
    (task / "dataset.json").write_text(description)
    image = task / "imagesTr" / "tiny_1.nii.gz"
    image.write_bytes(b"no image")
    refuse("tiny_1.nii.gz: cannot be read", task, roots)
    image.unlink()
    refuse("tiny_1.nii.gz has no image", task, roots)
    shutil.rmtree(task / "labelsTr")
    refuse("labelsTr is missing", task, roots)


@pytest.mark.usefixtures("quick")
def test_an_incomplete_task_can_be_converted_on_request(task: Path, roots: Path) -> None:
    for part in ("imagesTr", "labelsTr"):
        (task / part / "tiny_1.nii.gz").unlink()
    refuse("incomplete", task, roots)
    folder = convert_decathlon(task, verify=False)
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 1


def test_a_failing_conversion_leaves_nothing(task: Path, roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, dataset_id: int, num_processes: int) -> None:
        fake_convert(source, dataset_id, num_processes)
        raise RuntimeError("tiny_0.nii.gz is broken")

    monkeypatch.setattr("nnunetv2.dataset_conversion.convert_MSD_dataset.convert_msd_dataset", fail)
    refuse("tiny_0.nii.gz is broken", task, roots)
    assert os.environ["nnUNet_raw"] == str(roots / "nnUNet_raw")
