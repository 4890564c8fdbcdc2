"""NIfTI headers with any byte changed: refused in one line, or read alike by the check and by nnU-Net's readers."""

import gzip
import struct
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from ima_seg.cases.check import check_case, check_prepared, check_read
from ima_seg.cases.raw import CaseFiles
from ima_seg.errors import UserError

SHAPE = (9, 8, 7)
AFFINE = np.array([[-1.5, 0, 0, 40], [0, 1.5, 0, -200.5], [0, 0, 3, 12.25], [0, 0, 0, 1]])
RNG = np.random.default_rng(0)


@pytest.fixture
def files(tmp_path):
    files = CaseFiles("case", (tmp_path / "case_0000.nii",), tmp_path / "case.nii")
    for path, values in (
        (files.images[0], RNG.integers(1, 1000, SHAPE).astype(np.int16)),
        (files.label, RNG.integers(0, 3, SHAPE).astype(np.uint8)),
    ):
        image = nib.Nifti1Image(values, AFFINE)
        image.set_qform(AFFINE, 1)
        image.header.set_xyzt_units("mm")
        nib.save(image, path)
    return files


def refused(files):
    """The message, or ``None``."""
    try:
        check_case(files, labels_allowed={0, 1, 2})
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 900
        return str(error)


@pytest.mark.parametrize(
    ("offset", "form", "values", "text"),
    [
        (0, "i", [0], None),  # its size, which both libraries correct
        (40, "h", [9], "cannot be read"),  # dim[0]
        (40, "h", [-3], "cannot be read"),
        (40, "4h", [3, -9, 8, 7], "no usable geometry: shape (-9, 8, 7)"),
        (40, "4h", [3, 0, 8, 7], "no usable geometry: shape (0, 8, 7)"),
        (40, "4h", [3, 32767, 32767, 32767], "its header claims"),
        (40, "h", [2], "shape (9, 8)"),
        (70, "h", [0], "cannot be read"),  # datatype
        (70, "h", [1], "cannot be read"),
        (70, "h", [9999], "cannot be read"),
        (70, "h", [32], "has complex voxels"),
        (70, "h", [128], "has colour (RGB) voxels"),
        (70, "hh", [64, 64], "its header claims"),
        (108, "f", [np.nan], "cannot be read"),  # offset of the voxels
        (108, "f", [-400], "cannot be read"),
        (108, "f", [1e9], "cannot be read"),
        (112, "ff", [np.inf, 0], None),  # slope: no scaling at all to both libraries
        (112, "ff", [1, np.nan], "cannot be read"),
        (123, "B", [5], "its unit of length (xyzt_units) is 5, which is none"),
        (280, "4f", [np.nan] * 4, "no usable geometry"),  # first row of the sform
        (280, "4f", [0] * 4, "no usable geometry"),
        (344, "4s", [b"none"], "cannot be read"),  # magic
        (348, "4B", [1, 0, 0, 0], None),  # extensions follow, but for which there is no room
    ],
)
def test_fields_of_the_header(files, offset, form, values, text):
    path = files.images[0]
    data = bytearray(path.read_bytes())
    struct.pack_into(f"<{form}", data, offset, *values)
    path.write_bytes(data)
    message = refused(files)
    assert (message is None) == (text is None)
    if text is not None:
        assert str(path) in message and text in message


def test_any_byte_of_the_header(files):
    readers, right, kept, stopped = (SimpleITKIO(), NibabelIO()), 0, 0, 0
    for path, step in ((files.images[0], 1), (files.label, 5)):
        whole = path.read_bytes()
        for offset in range(0, 352, step):
            data = bytearray(whole)
            data[offset] ^= int(RNG.integers(1, 256))
            path.write_bytes(data)
            if refused(files) is not None:
                stopped += 1
                continue
            for reader in readers:
                image, properties = reader.read_images([str(files.images[0])])
                label, _ = reader.read_seg(str(files.label))
                try:
                    check_read(files, image, properties["spacing"])
                except UserError:
                    kept += 1
                    continue
                assert np.allclose(properties["spacing"], (3, 1.5, 1.5), rtol=0.01)
                for values, file in ((image, files.images[0]), (label, files.label)):
                    assert np.allclose(values[0].T, nib.load(file).get_fdata(dtype=np.float32), rtol=1e-4)
                right += 1
        path.write_bytes(whole)
    assert stopped > 40 and kept > 3 and right > 500  # every way is taken


@pytest.mark.parametrize("size", [2**31 - 1, -(2**31), -8, 0, 8, 40])
def test_extensions_of_any_size(files, size):
    """They lie between header and voxels, 16 bytes here, and say how long they are."""
    path = files.images[0]
    whole = path.read_bytes()
    data = bytearray(whole[:352] + struct.pack("<ii", size, 6) + bytes(8) + whole[352:])
    struct.pack_into("<f", data, 108, 368)
    data[348] = 1
    path.write_bytes(data)
    message = refused(files)
    assert message is None or f"{path} ({len(data)} bytes) cannot be read" in message


def test_gzip_under_the_wrong_name(files):
    plain, packed = files.images[0], files.images[0].with_suffix(".nii.gz")
    data = plain.read_bytes()
    packed.write_bytes(data)
    assert f"{packed} ({len(data)} bytes) cannot be read" in refused(replace(files, images=(packed,)))
    plain.write_bytes(gzip.compress(data))
    assert f"{plain} ({plain.stat().st_size} bytes) cannot be read" in refused(files)
    packed.write_bytes(gzip.compress(data))
    assert refused(replace(files, images=(packed,))) is None
    capital = packed.rename(packed.with_name("CASE_0000.NII.GZ"))
    assert refused(replace(files, images=(capital,))) is None
    capital.write_bytes(capital.read_bytes()[:-6])
    assert "cannot be read" in refused(replace(files, images=(capital,)))


def test_pairs_of_header_and_voxels(files, tmp_path):
    values = np.arange(200_000, dtype=np.int16).reshape(50, 50, 80)
    nib.save(nib.Nifti1Pair(values, AFFINE), tmp_path / "pair.hdr")
    nib.save(nib.Nifti1Image((values % 3).astype(np.uint8), AFFINE), files.label)
    for ending in (".hdr", ".img"):
        assert refused(replace(files, images=(tmp_path / f"pair{ending}",))) is None
    (tmp_path / "pair.img").write_bytes(b"few")
    for ending in (".hdr", ".img"):
        assert "cannot be read" in refused(replace(files, images=(tmp_path / f"pair{ending}",)))


def test_more_than_this_machine_has(files, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    assert f"{files.label} does not fit into memory" in refused(files)


@pytest.mark.parametrize("keep", [0, 1, 100, 347, 348, 352, 353, -1])
def test_truncated_anywhere(files, keep):
    for path in (files.images[0], files.label):
        whole = path.read_bytes()
        path.write_bytes(whole[:keep])
        assert f"{path} ({len(whole[:keep])} bytes) cannot be read" in refused(files)
        path.write_bytes(whole)


def test_spacing_that_only_pixdim_has(files):
    """To nnU-Net's readers pixdim is the spacing; nibabel's affine, and most viewers, follow the sform."""
    for path in (files.images[0], files.label):
        data = bytearray(path.read_bytes())
        struct.pack_into("<3f", data, 80, 2.0, 2.0, 3.0)
        path.write_bytes(data)
    assert refused(files) is None
    image, properties = NibabelIO().read_images([str(files.images[0])])
    with pytest.raises(UserError, match=r"reads a spacing of 2 x 2 x 3 mm, sorted, but its .form has 1\.5 x 1\.5 x"):
        check_read(files, image, properties["spacing"])


def test_what_readers_and_pre_processing_return_is_finite_and_an_image(files):
    image, spacing = np.ones((1, *SHAPE), np.float32), (1.5, 1.5, 3.0)
    image[0, 0, 0, :2] = 0, np.inf
    with pytest.raises(UserError, match=r"case_0000\.nii, as the model reads it: 1 of 504 voxels are NaN or infinite"):
        check_read(files, image, spacing)
    with pytest.raises(UserError, match="case: channel 0 after the model's pre-processing: 1 of 504 voxels are NaN"):
        check_prepared("case", image)
    with pytest.raises(UserError, match="all voxels have the value 0, so that the model sees nothing"):
        check_prepared("case", np.zeros((1, *SHAPE), np.float32))


@pytest.fixture(autouse=True)
def _quiet():
    """ITK says on the terminal what it finds odd."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    yield
    sitk.ProcessObject.SetGlobalWarningDisplay(True)
