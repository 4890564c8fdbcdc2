"""Finding and checking the cases of an evaluation.

One file: one table of bad files, each with the message that it gets.
"""

import gzip
import json
import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from ima_seg.cases.check import check_case
from ima_seg.cases.raw import CaseFiles
from ima_seg.data.phantom import write_phantom_dataset
from ima_seg.errors import UserError
from ima_seg.nnunet.dataset import allowed_labels, find_cases, ignore_value

SHAPE = (9, 8, 7)
AFFINE = np.array([[-1.5, 0, 0, 40], [0, 1.5, 0, -200.5], [0, 0, 3, 12.25], [0, 0, 0, 1]])
DATASET = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "organ": [1, 2], "lesion": 2, "ignore": 3},
    "file_ending": ".nii.gz",
}
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 1000, SHAPE).astype(np.int16)
LABEL = RNG.integers(0, 3, SHAPE).astype(np.uint8)


def save(path, values, affine=AFFINE, codes=(1, 1)):
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine, code=codes[1])
    nib.save(image, path)
    return path


@pytest.fixture
def folders(tmp_path):
    images, labels = tmp_path / "imagesTs", tmp_path / "labelsTs"
    images.mkdir()
    labels.mkdir()
    return images, labels


def write(folders, case, *, ending=".nii.gz", image=IMAGE, label=LABEL):
    """Write a good case with two channels; returns its files."""
    images, labels = folders
    paths = [save(images / f"{case}_{channel:04d}{ending}", image) for channel in range(2)]
    return CaseFiles(case, tuple(paths), save(labels / f"{case}{ending}", label))


@pytest.fixture
def good(folders):
    return write(folders, "case")


def check(files, **options):
    check_case(files, labels_allowed=allowed_labels(DATASET), ignore=ignore_value(DATASET), **options)


def refusal(files, **options):
    with pytest.raises(UserError) as caught:
        check(files, **options)
    return str(caught.value)


# Finding


def test_complete_cases_and_what_is_missing_of_others(folders):
    images, labels = folders
    names = ["a b", "<b>&amp;", "p_0001", "x.y"]
    whole = {name: write(folders, name) for name in names}
    for name in ("no label", "no channel", "too many"):
        write(folders, name)
    (labels / "no label.nii.gz").unlink()
    (images / "no channel_0001.nii.gz").unlink()
    save(images / "too many_0002.nii.gz", IMAGE)
    save(labels / "no images.nii.gz", LABEL)
    for stray in ("notes.txt", "._a b_0000.nii.gz", "odd.nii.gz", "other_0000.nii", "_0000.nii.gz"):
        (images / stray).write_bytes(b"")
    (labels / ".nii.gz").write_bytes(b"")
    (labels / "dataset.json").write_text("{}")
    found, problems = find_cases(images, labels, DATASET)
    assert [files.case for files in found] == sorted(names)
    assert found == [whole[name] for name in sorted(names)]
    messages = {problem.case: problem.message for problem in problems}
    for name, file in {"_0000": "_0000.nii.gz", "odd": "odd.nii.gz", "other": "other_0000.nii"}.items():
        assert f"{images / file} is not taken: the model reads CASE_0000.nii.gz" in messages.pop(name)
    assert list(messages) == ["no channel", "no images", "no label", "too many"]
    assert str(images / "no channel_0001.nii.gz") in messages["no channel"]
    assert str(labels / "no images.nii.gz") in messages["no images"]
    assert str(images / "no images_0000.nii.gz") in messages["no images"]
    assert str(labels / "no label.nii.gz") in messages["no label"]
    assert "too many_0002.nii.gz" in messages["too many"]
    assert "names 2 channel" in messages["too many"]
    assert all("add it or" in message or "remove the file" in message for message in messages.values())
    for files in found:
        check(files)


def test_limit_counts_complete_cases_and_stops(folders):
    for name in "abcd":
        write(folders, name)
    for name in "ad":
        (folders[1] / f"{name}.nii.gz").unlink()
    found, problems = find_cases(*folders, DATASET, limit=1)
    assert [files.case for files in found] == ["b"]
    assert [problem.case for problem in problems] == ["a"]
    assert len(find_cases(*folders, DATASET, limit=9)[0]) == 2
    with pytest.raises(UserError, match="limit of cases 0: give at least 1"):
        find_cases(*folders, DATASET, limit=0)


def test_no_case_at_all(folders):
    images, labels = folders
    for number in range(7):
        (images / f"scan{number}.nii.gz").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        find_cases(images, labels, DATASET)
    message = str(caught.value)
    for part in (
        images,
        labels,
        "CASE_0000.nii.gz to CASE_0001.nii.gz",
        "scan0.nii.gz",
        "and 2 more",
        "found: nothing",
    ):
        assert str(part) in message
    save(images / "a_0000.nii.gz", IMAGE)
    save(labels / "b.nii.gz", LABEL)
    with pytest.raises(UserError, match=r"found: a_0000\.nii\.gz.*found: b\.nii\.gz"):
        find_cases(images, labels, DATASET | {"channel_names": {"0": "T1"}})


def test_folders_and_dataset_json_are_checked(folders, tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist.*images"):
        find_cases(tmp_path / "nowhere", folders[1], DATASET)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"file is a file.*labels"):
        find_cases(folders[0], file, DATASET)
    with pytest.raises(UserError, match="file_ending"):
        find_cases(*folders, {"channel_names": {"0": "T1"}})


def test_phantom_with_regions(tmp_path):
    folder = write_phantom_dataset(
        tmp_path, dataset_id=1, cases=2, shape=(16, 16, 16), modality="mr2", regions=True, ignore_label=True
    )
    dataset = json.loads((folder / "dataset.json").read_text())
    assert allowed_labels(dataset) == {0, 1, 2, 3}
    assert ignore_value(dataset) == 3
    found, problems = find_cases(folder / "imagesTr", folder / "labelsTr", dataset)
    assert len(found) == 2
    assert not problems
    for files in found:
        check_case(files, labels_allowed=allowed_labels(dataset), ignore=ignore_value(dataset))


def test_no_ignore_label():
    dataset = {"labels": {"background": 0, "a": 1, "b": 4}}
    assert ignore_value(dataset) is None
    assert allowed_labels(dataset) == {0, 1, 4}


# Checking


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_truncated_files(folders, ending):
    files = write(
        folders, "case", ending=ending, image=RNG.normal(size=(24, 24, 24)), label=np.ones((24, 24, 24), "u1")
    )
    check(files)
    for path in (files.images[1], files.label):
        data = path.read_bytes()
        for keep in (len(data) // 2, 100, 0):
            path.write_bytes(data[:keep])
            message = refusal(files)
            assert f"{path} ({keep} bytes) cannot be read" in message
            assert "copy it again" in message
        path.write_bytes(data)


def test_files_of_another_format(good):
    path = good.images[0]
    for content in (b"DICM" * 300, gzip.compress(b"text" * 300)):
        path.write_bytes(content)
        assert f"{path} ({len(content)} bytes) cannot be read" in refusal(good)
    nib.save(nib.MGHImage(IMAGE.astype(np.float32), AFFINE), path.with_suffix(".mgz"))
    path.write_bytes(path.with_suffix(".mgz").read_bytes())
    assert "convert it anew" in refusal(good)


def test_missing_and_forbidden_files(good):
    good.label.rename(good.label.with_name("elsewhere"))
    assert f"{good.label} does not exist" in refusal(good)
    good.label.symlink_to("nowhere")
    assert f"{good.label} is a link to nowhere, which is not there" in refusal(good)


def test_permission(good, monkeypatch):
    good.images[0].chmod(0)
    if os.access(good.images[0], os.R_OK):  # root may read everything
        real = type(good.label).open

        def guarded(path, *arguments, **options):
            if path == good.images[0]:
                raise PermissionError(13, "Permission denied")
            return real(path, *arguments, **options)

        monkeypatch.setattr(type(good.label), "open", guarded)
    message = refusal(good)
    assert f"{good.images[0]} may not be read (Permission denied)" in message
    assert "chmod u+r" in message


def test_four_dimensions(good):
    for shape in ((*SHAPE, 2), (*SHAPE, 1)):
        save(good.images[1], np.resize(IMAGE, shape))
        message = refusal(good)
        assert str(good.images[1]) in message
        assert f"4 dimensions, shape {shape}" in message
        assert "file of its own" in message


def test_complex_and_colour(good):
    save(good.images[0], IMAGE.astype(np.complex64))
    assert f"{good.images[0]} has complex voxels; export one scalar value" in refusal(good)
    colour = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    save(good.images[0], colour)
    assert f"{good.images[0]} has colour (RGB) voxels" in refusal(good)


def test_shapes(good):
    save(good.images[1], IMAGE[:-1])
    message = refusal(good)
    assert f"{good.images[1]} has shape (8, 8, 7), but {good.label} has (9, 8, 7)" in message
    assert "nearest-neighbour" in message


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("codes", [(1, 1), (0, 1), (1, 0)])
def test_geometry(good, codes, place):
    for delta, fine in ((0.0005, True), (0.2, False)):
        moved = AFFINE.copy()
        moved[1, 3] += delta
        save(good.images[place], IMAGE, moved, codes)
        if fine:
            check(good)
        else:
            message = refusal(good)
            form = "sform" if codes[0] else "qform"
            assert f"{good.images[place]} ({form}) and {good.label} (sform) lie up to 0.2 mm apart" in message
            assert "copy the header" in message


def test_spacing_and_direction(good):
    for change in (np.diag([1, 1, 1.05, 1]), np.diag([-1, 1, 1, 1])):
        save(good.label, LABEL, AFFINE @ change)
        assert "mm apart" in refusal(good)


def test_no_orientation_in_the_header(good):
    save(good.images[0], IMAGE, AFFINE, (0, 0))
    assert "(no sform or qform)" in refusal(good)


def test_unusable_geometry(good):
    image = nib.Nifti1Image(IMAGE, AFFINE)
    image.header["srow_x"] = 0
    image.header["sform_code"] = 1
    data = bytearray(image.to_bytes())
    data[: image.header.sizeof_hdr] = image.header.binaryblock
    flat = good.images[0].with_suffix("").with_suffix(".nii")
    for values in ((0, 0, 0, 0), (np.nan, 0, 0, 0)):
        data[280:296] = np.asarray(values, np.float32).tobytes()
        flat.write_bytes(bytes(data))
        message = refusal(CaseFiles("case", (flat,), good.label))
        assert f"{flat} has no usable geometry" in message
        assert "correct its header" in message


def test_not_finite(good):
    values = IMAGE.astype(np.float32)
    values[0, 0, :3] = np.nan, np.inf, -np.inf
    save(good.images[1], values)
    assert f"{good.images[1]}: 3 of 504 voxels are NaN or infinite; replace them" in refusal(good)
    save(good.images[1], IMAGE)
    label = LABEL.astype(np.float32)
    label[1, 1, 1] = np.nan
    save(good.label, label)
    assert f"{good.label}: 1 of 504 voxels are NaN" in refusal(good)


def test_constant_image(good):
    save(good.images[0], np.full(SHAPE, -1024, np.int16))
    assert f"{good.images[0]}: all voxels have the value -1024; replace the image" in refusal(good)


def test_values_of_labels(good):
    label = LABEL.astype(np.int16)
    label[0, 0, :3] = 7, -1, 3  # 3 is "ignore"
    save(good.label, label)
    message = refusal(good)
    assert f"{good.label} has the value -1, 7, dataset.json has 0, 1, 2, 3" in message
    assert "correct the file" in message
    label = LABEL.astype(np.float64)
    save(good.label, label)
    check(good)
    label[0, 0, 0] = 1e9
    save(good.label, label)
    assert "1000000000" in refusal(good)
    label[0, :7, 0] = np.arange(7) + 0.25
    save(good.label, label)
    message = refusal(good)
    assert f"{good.label}: 7 voxels have values that are no whole numbers (0.25, 1.25, 2.25, 3.25, 4.25 and" in message
    assert "nearest-neighbour" in message


def test_label_without_foreground(good):
    save(good.label, np.where(LABEL > 1, 3, 0).astype(np.uint8))
    message = refusal(good)
    assert f"{good.label}: the label has no foreground (values: 0, 3); Dice is undefined, remove" in message
    save(good.label, LABEL * 0)
    assert "no foreground (values: 0)" in refusal(good)


def test_voxels_are_read_once_and_only_after_all_headers(good, monkeypatch):
    reads = []
    real = nib.arrayproxy.ArrayProxy.__array__

    def counted(proxy, *arguments, **options):
        reads.append(proxy.file_like.name)
        return real(proxy, *arguments, **options)

    monkeypatch.setattr(nib.arrayproxy.ArrayProxy, "__array__", counted)
    check(good)
    assert sorted(reads) == sorted(str(path) for path in (*good.images, good.label))
    reads.clear()
    save(good.images[1], IMAGE[:-1])
    refusal(good)
    assert not reads


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_other_formats(folders, ending):
    images, labels = folders
    dataset = DATASET | {"file_ending": ending, "channel_names": {"0": "CT"}}
    path, label_path = images / f"a b_0000{ending}", labels / f"a b{ending}"

    def put(path, values, origin=(1.0, 2.0, 3.0), **options):
        image = sitk.GetImageFromArray(values, **options)
        if image.GetDimension() == 3:
            image.SetOrigin(origin)
            image.SetSpacing((0.5, 0.5, 2.0))
        sitk.WriteImage(image, str(path))

    put(path, IMAGE)
    put(label_path, LABEL)
    [files], problems = find_cases(images, labels, dataset)
    assert not problems
    check(files)
    put(path, IMAGE, (1.0, 2.5, 3.0))
    assert "(direction and origin) lie up to 0.5 mm apart" in str(refusal(files)).replace(
        f" and {label_path} (direction and origin)", ""
    )
    put(path, IMAGE[1:])
    assert "shape (7, 8, 8)" in refusal(files)
    put(path, np.stack([IMAGE] * 3, axis=-1).astype(np.uint8), isVector=True)
    assert "3-component voxels" in refusal(files)
    put(path, np.stack([IMAGE] * 2), isVector=False)
    assert "4 dimensions" in refusal(files)
    values = IMAGE.astype(np.float32)
    values[0, 0, 0] = np.nan
    put(path, values)
    assert "1 of 504 voxels are NaN" in refusal(files)
    put(path, IMAGE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert f"{path} ({len(data) // 2} bytes) cannot be read" in refusal(files)
    path.write_bytes(b"junk")
    assert "(4 bytes) cannot be read" in refusal(files)
