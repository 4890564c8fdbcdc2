"""Image files that are damaged, named otherwise, claim too much or mean other lengths: refused, each in one line.

One file: every way in which a file of a case can be wrong, made by the same few writers.
"""

import gzip
import json
import os
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from ima_seg.cases.check import check_case
from ima_seg.cases.find import find_cases, listed_cases
from ima_seg.cases.raw import CaseFiles
from ima_seg.cases.write import save_adversarial
from ima_seg.errors import UserError
from ima_seg.nnunet.reading import read_image

SHAPE, AFFINE = (9, 8, 7), np.diag([1.0, 1.5, 3.0, 1.0])
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 1000, SHAPE).astype(np.int16)
LABEL = RNG.integers(0, 3, SHAPE).astype(np.uint8)


@pytest.fixture
def case(tmp_path):
    """A function: ending -> a good case."""

    def write(ending=".nii.gz"):
        files = CaseFiles("case", (tmp_path / f"case_0000{ending}",), tmp_path / f"case{ending}")
        for path, values in zip((*files.images, files.label), (IMAGE, LABEL), strict=True):
            if ending.startswith(".nii"):
                nib.save(nib.Nifti1Image(values, AFFINE), path)
            else:
                sitk.WriteImage(sitk.GetImageFromArray(values.transpose()), str(path), True)
        return files

    return write


def refusal(files):
    with pytest.raises(UserError) as caught:
        check_case(files, labels_allowed={0, 1, 2})
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def header(path, offset, form, *values):
    """Overwrite a part of a .nii.gz's header."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(f"<{form}", data, offset, *values)
    path.write_bytes(gzip.compress(bytes(data)))


def touch(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_files_that_look_like_cases_do_not_vanish(tmp_path):
    images = ("a_0000.NII.GZ", "b_0000.nii", "c_0000.mha", "good_0000.nii.gz", "good_0000.nii", "p.md", "d_0000.png")
    images = touch(tmp_path / "images", *images)
    labels = ("a.NII.GZ", "b.nii", "c.nii.gz", "good.nii.gz", "good.nii", "dataset.json", ".e.nii")
    labels = touch(tmp_path / "labels", *labels)
    (images / "f_0000.nii.gz").mkdir()
    found, problems = find_cases(images, labels, channels=1, endings=[".nii.gz"])
    messages = {problem.case: problem.message for problem in problems}
    assert [files.case for files in found] == ["good"] and list(messages) == ["a", "b", "c", "f"]
    assert f"{labels / 'a.NII.GZ'}, {images / 'a_0000.NII.GZ'} are not taken" in messages["a"]
    assert f"{labels / 'b.nii'}, {images / 'b_0000.nii'} are not taken" in messages["b"]
    assert f"{images / 'c_0000.mha'} is not taken" in messages["c"]
    assert all("rename what is only spelt otherwise" in messages[case] for case in "abc")


def test_files_of_one_name_in_two_formats_that_a_bundle_reads(tmp_path):
    images = touch(tmp_path / "images", "a.nii.gz", "b.nii.gz", "b.nii", "c.NII", "d.nii")
    labels = touch(tmp_path / "labels", "a.nii", "b.nii", "d.nii", "d.nii.gz")
    found, problems = find_cases(images, labels, channels=1, endings=(".nii.gz", ".nii"), one_name=True)
    assert [files.case for files in found] == ["a"]
    messages = {problem.case: problem.message for problem in problems}
    assert list(messages) == ["b", "c", "d"]
    assert f"{images / 'b'} is there with two endings (.nii.gz, .nii)" in messages["b"]
    assert f"{images / 'c.NII'} is not taken: the model reads CASE.nii.gz" in messages["c"]
    assert "is there with two endings" in messages["d"]


@pytest.mark.parametrize("damage", ["checksum", "length", "behind"])
def test_gzip_is_read_to_its_checksum(case, damage):
    files = case()
    for path in (files.images[0], files.label):
        whole = path.read_bytes()
        place = {"checksum": len(whole) - 8, "length": len(whole) - 4}.get(damage)
        changed = whole + b"behind" if place is None else bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]])
        path.write_bytes(changed)
        assert f"{path} ({len(changed)} bytes) cannot be read" in refusal(files)
        path.write_bytes(whole)


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_damaged_voxels_that_itk_passes_over(case, ending):
    files = case(ending)
    check_case(files, labels_allowed={0, 1, 2})
    path = files.images[0]
    whole = path.read_bytes()
    for place in (-1, -7, -40, -300):
        changed = bytearray(whole)
        changed[place] ^= 16
        path.write_bytes(changed)
        assert f"{path} ({len(whole)} bytes) cannot be read" in refusal(files)


def test_a_header_may_not_claim_more_than_the_file_can_hold(case, monkeypatch):
    monkeypatch.setattr("ima_seg.cases.check._Header.read", lambda header: pytest.fail("memory was taken"))
    files = case()
    for path in (files.images[0], files.label):
        header(path, 40, "4h", 3, 1000, 1000, 1000)
        header(path, 70, "hh", 64, 64)  # float64
    assert "its header claims 8000000000 bytes of voxels, it can hold" in refusal(files)
    for ending, sizes, claimed in (
        (".mha", (b"DimSize = 9 8 7", b"DimSize = 9000 8000 700"), 9000 * 8000 * 700 * 2),
        (".nrrd", (b"sizes: 9 8 7", b"sizes: 9000 8000 700"), 9000 * 8000 * 700 * 2),
    ):
        files = case(ending)
        for path in (files.images[0], files.label):
            path.write_bytes(path.read_bytes().replace(*sizes))
        message = refusal(files)
        assert f"claims {claimed // (2 if str(files.label) in message.split(' ')[0] else 1)} bytes" in message


@pytest.mark.parametrize("ending", [".tif", ".bmp"])
def test_neither_may_the_header_of_a_picture(tmp_path, ending):
    import tifffile
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from PIL import Image

    path = tmp_path / f"a_0000{ending}"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    plans = SimpleNamespace(image_reader_writer_class=NaturalImage2DIO)
    assert read_image(plans, [path], channels=1).values.shape == (1, 1, 8, 8)
    if ending == ".bmp":
        data = bytearray(path.read_bytes())
        struct.pack_into("<ii", data, 18, 9_000, 9_000)
        path.write_bytes(data)
    else:
        with tifffile.TiffFile(path, mode="r+") as file:
            for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                file.pages[0].tags[tag].overwrite(9_000, dtype="I")
    with pytest.raises(UserError, match=r"its header claims \d+ bytes"):
        read_image(plans, [path], channels=1)


def test_sparse_labels_may_be_compressed_as_far_as_deflate_can(case):
    files = case()
    shape = (200, 200, 200)
    image, label = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    image[0, 0, 0] = label[0, 0, 0] = 1
    for path, values in ((files.images[0], image), (files.label, label)):
        nib.save(nib.Nifti1Image(values, AFFINE), path)
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9))
    assert files.label.stat().st_size * 1000 < 8_000_000
    check_case(files, labels_allowed={0, 1})


def test_only_regular_files_are_opened(case):
    files = case()
    path = files.images[0]
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is a pipe" in refusal(files)
    path.unlink()
    path.mkdir()
    assert f"{path} is a folder" in refusal(files)


def test_values_that_float32_cannot_hold(case):
    files = case()
    path = files.images[0]
    values = IMAGE.astype(np.float64)
    values[0, 0, :3] = -1e39
    nib.save(nib.Nifti1Image(values, AFFINE), path)
    assert f"{path}: the value -1e+39 is infinite in float32" in refusal(files)
    nib.save(nib.Nifti1Image(IMAGE, AFFINE), path)
    header(path, 112, "ff", 1e38, 0)
    message = refusal(files)
    assert f"{path}: the value {IMAGE.max()}e" not in message and "correct the scaling (scl_slope)" in message


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("code", "text"),
    [
        (1, "is metre: to ITK the spacing is 1000 x 1500 x 3000 mm, to nibabel 1 x 1.5 x 3 mm"),
        (3, "is micron: to ITK the spacing is 0.001 x 0.0015 x 0.003 mm, to nibabel 1 x 1.5 x 3 mm"),
        (5, "is 5, which is none"),
        (0, None),
        (2 | 8, None),
    ],
)
def test_lengths_are_in_mm(case, place, code, text):
    files = case()
    path = (files.images[0], files.label)[place]
    header(path, 123, "B", code)
    if text is None:
        check_case(files, labels_allowed={0, 1, 2})
    else:
        message = refusal(files)
        assert f"{path}: its unit of length (xyzt_units) {text}" in message and "set the unit to mm" in message


def test_labels_with_a_scaling_are_what_readers_return(case):
    """127/127 is not exactly 1 in float64; nnU-Net's readers return float32."""
    files = case()
    nib.save(nib.Nifti1Image(LABEL * 127, AFFINE), files.label)
    header(files.label, 112, "ff", 1 / 127, 0)
    assert not set(np.unique(nib.load(files.label).get_fdata())) <= {0.0, 1.0, 2.0}
    check_case(files, labels_allowed={0, 1, 2})
    nib.save(nib.Nifti1Image(LABEL * 0.9999999, AFFINE), files.label)
    check_case(files, labels_allowed={0, 1, 2})
    nib.save(nib.Nifti1Image(LABEL * 0.99, AFFINE), files.label)
    assert "no whole numbers (0.99, 1.98)" in refusal(files)


def test_compressed_voxels_that_end_too_early(case):
    files = case(".mha")
    path = files.images[0]
    data = path.read_bytes()
    start = data.index(b"LOCAL\n") + 6
    cut = zlib.compressobj()
    path.write_bytes(data[:start] + cut.compress(IMAGE.tobytes()) + cut.flush(zlib.Z_SYNC_FLUSH))
    assert "end too early" in refusal(files)


def dataset_json(folder, **entries):
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": entries}))
    return path


def test_cases_that_a_dataset_json_names(tmp_path, monkeypatch):
    """Absolute, with variables, or relative to the data set: as nnU-Net's own function resolves them."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    monkeypatch.setenv("WHERE", str(tmp_path / "variable"))
    entries = {
        "b": {"images": ["../x/b.nii.gz"], "label": "labels/b.nii.gz"},
        "a": {"images": ["/data/a.nii.gz"], "label": "$WHERE/a.nii.gz"},
    }
    path = dataset_json(tmp_path, **entries, c={"images": ["c0.mha", "c1.mha"], "label": "c.mha"})
    found, problems = listed_cases(path, tmp_path, channels={1})
    theirs = get_filenames_of_train_images_and_targets(str(tmp_path))
    assert [files.case for files in found] == ["a", "b"]
    for files in found:
        assert [str(image) for image in files.images] == theirs[files.case]["images"]
        assert str(files.label) == theirs[files.case]["label"]
    assert [problem.case for problem in problems] == ["c"] and "names 2 image files" in problems[0].message
    assert len(listed_cases(path, tmp_path, channels={1}, limit=1)[0]) == 1
    with pytest.raises(UserError, match=r"relative to the data set's folder in nnUNet_raw; set that variable"):
        listed_cases(path, None, channels={1})


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"images": "a.nii.gz", "label": "b"}, ": dataset.a.images is 'a.nii.gz': input should be a valid list"),
        ({"images": [], "label": "b"}, ": dataset.a.images is []: list should have at least 1 item"),
        ({"images": ["a"]}, " is without 'dataset.a.label'"),
        (None, ": dataset.a is None: input should be"),
    ],
)
def test_entries_of_a_dataset_json_that_are_none(tmp_path, entry, text):
    with pytest.raises(UserError) as caught:
        listed_cases(dataset_json(tmp_path, a=entry), tmp_path, channels={1})
    assert f"{tmp_path / 'dataset.json'}{text}" in str(caught.value) and "an entry is" in str(caught.value)


def test_where_cases_may_come_from(tmp_path):
    for source, text in (
        (tmp_path, "is a folder of images; name that of the labels, too, with -gt"),
        (tmp_path / "dataset.json", "does not exist; name folders with -i and -gt"),
    ):
        with pytest.raises(UserError, match=text):
            listed_cases(source, tmp_path, channels={1})
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r'names no files \(it has no "dataset"\); name folders with -i and -gt'):
        listed_cases(tmp_path / "dataset.json", tmp_path, channels={1})


def test_the_models_own_dataset_json_stands_in_for_folders(tmp_path, monkeypatch):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    from ima_seg.nnunet.model import LoadedFolder

    dataset_json(tmp_path, a={"images": ["a.nii.gz"], "label": "l/a.nii.gz"})
    plans = SimpleNamespace(image_reader_writer_class=SimpleITKIO)
    model = SimpleNamespace(folder=tmp_path, dataset="Dataset001_A", channels=["CT"], plans=plans)
    monkeypatch.setenv("nnUNet_raw", "/raw")
    raw = Path("/raw/Dataset001_A")
    assert LoadedFolder.find_cases(model, None, None)[0] == [CaseFiles("a", (raw / "a.nii.gz",), raw / "l/a.nii.gz")]
    [files] = LoadedFolder.find_cases(model, tmp_path / "dataset.json", None)[0]
    assert files.images == (tmp_path / "a.nii.gz",)
    monkeypatch.setenv("nnUNet_raw", "")
    with pytest.raises(UserError, match="set that variable"):
        LoadedFolder.find_cases(model, None, None)
    with pytest.raises(UserError, match="name the folder of the images, too, with -i"):
        LoadedFolder.find_cases(model, None, tmp_path)


def test_adversarial_files_of_two_cases_never_have_one_name(tmp_path):
    for case in ("one", "two"):
        (tmp_path / case).mkdir()
        nib.save(nib.Nifti1Image(IMAGE, AFFINE), tmp_path / case / "t1.nii.gz")
    images = [
        save_adversarial([tmp_path / case / "t1.nii.gz"], np.zeros((1, *SHAPE[::-1])), tmp_path / "out", case)[0][0]
        for case in ("one", "two")
    ]
    assert [path.name for path in images] == ["one_0000.nii.gz", "two_0000.nii.gz"]
