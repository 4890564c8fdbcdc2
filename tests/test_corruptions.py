"""The ladder of natural corruptions."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from ima_seg.data.phantom import draw_case
from ima_seg.errors import UserError
from ima_seg.evaluate.attack.corruptions import CORRUPTIONS, SEVERITIES, corrupt, default_corruptions

MR_NAMES = [name for name, item in CORRUPTIONS.items() if item.modality == "mr"]
ALL = list(CORRUPTIONS)


def phantom(modality, spacing=(1.0, 1.0, 1.0), shape=(35, 51, 35)):
    """Image (C, Z, Y, X) and spacing (Z, Y, X)."""
    case = draw_case(0, modality=modality, spacing=spacing, shape=shape)
    return np.stack([image.T for image in case.images]).astype(np.float32), spacing[::-1]


@pytest.fixture(scope="module")
def small():
    """A two-channel MR and a CT of an odd shape."""
    return {"mr": phantom("mr2"), "ct": phantom("ct")}


def pick(small, name):
    return small["ct" if CORRUPTIONS[name].modality == "ct" else "mr"]


def rms(a, b):
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.mark.parametrize("name", ALL)
def test_ladder_is_deterministic_grows_and_keeps_the_form(small, name):
    image, spacing = pick(small, name)
    before, state = image.copy(), torch.random.get_rng_state()
    ladder = [corrupt(image, spacing, name, severity, 3, "case_1") for severity in SEVERITIES]
    np.testing.assert_array_equal(image, before)
    assert torch.equal(state, torch.random.get_rng_state())
    for result in ladder:
        assert result.shape == image.shape
        assert result.dtype == np.float32
        assert np.isfinite(result).all()
    np.testing.assert_array_equal(ladder[2], corrupt(image, spacing, name, 3, 3, "case_1"))
    for channel in range(len(image)):
        sizes = [rms(result[channel], image[channel]) for result in ladder]
        width = np.ptp(np.percentile(image[channel], (0.5, 99.5)))
        assert sizes[0] > 0.002 * width
        assert all(small < large for small, large in itertools.pairwise(sizes)), sizes


@pytest.mark.parametrize("name", ALL)
def test_every_draw_is_monotone(small, name):
    image, spacing = pick(small, name)
    for case in range(6):
        sizes = [rms(corrupt(image, spacing, name, severity, 0, f"c{case}"), image) for severity in SEVERITIES]
        assert sizes == sorted(sizes), (case, sizes)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("blur", "low_resolution")])
def test_draws_depend_on_case_and_seed(small, name):
    image, spacing = pick(small, name)
    results = [corrupt(image, spacing, name, 3, seed, f"c{case}") for seed in (0, 1) for case in range(4)]
    # Signs have two draws, ghosts six (number and direction); anything else never comes twice.
    distinct = len({result.tobytes() for result in results})
    assert distinct == 2 if name in ("gamma", "hu_shift") else distinct >= 4 if name == "ghosting" else distinct == 8


@pytest.mark.parametrize("name", ALL)
def test_anisotropic_volume(name):
    modality = "ct" if CORRUPTIONS[name].modality == "ct" else "mr"
    image, spacing = phantom(modality, (0.8, 0.8, 4.0), (64, 64, 16))
    for case in range(4):
        sizes = [rms(corrupt(image, spacing, name, severity, 0, f"c{case}"), image) for severity in SEVERITIES]
        assert all(small < large for small, large in itertools.pairwise(sizes)), sizes


def test_anisotropic_volume_keeps_its_slices():
    rng = np.random.default_rng(0)
    image = np.zeros((1, 8, 32, 32), np.float32)
    image[0, 4] = rng.uniform(100, 200, (32, 32))
    for name in ("low_resolution", "ghosting"):
        result = corrupt(image, (6.0, 1.0, 1.0), name, 5, 0, "thick")
        assert rms(result[0, 4], image[0, 4]) > 1
        np.testing.assert_allclose(np.delete(result[0], 4, axis=0), 0, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_large_thin_and_flat_volumes_are_accepted(name):
    rng = np.random.default_rng(0)
    for shape, spacing in (((24, 256, 256), (3.0, 0.7, 0.7)), ((1, 40, 48), (999.0, 1.0, 1.0)), ((3, 5, 4), (1, 1, 1))):
        image = rng.uniform(0, 1000, (1, *shape)).astype(np.float32)
        result = corrupt(image, spacing, name, 5, 0, "x")
        assert result.shape == image.shape
        assert np.isfinite(result).all()
        assert rms(result, image) > 0


@pytest.mark.parametrize("name", MR_NAMES)
def test_constant_channel_survives(small, name):
    image, spacing = small["mr"]
    image = image.copy()
    for value in (0.0, 7.0, -3.0):
        image[1] = value
        result = corrupt(image, spacing, name, 5, 0, "constant")
        np.testing.assert_array_equal(result[1], image[1])
        assert rms(result[0], image[0]) > 0


@pytest.mark.parametrize("name", MR_NAMES)
def test_scale_and_negative_values(small, name):
    """The strength is relative to the image: another unit changes nothing else."""
    image, spacing = small["mr"]
    result = corrupt(image, spacing, name, 3, 0, "scale")
    scaled = corrupt(image * 0.001, spacing, name, 3, 0, "scale") * 1000
    np.testing.assert_allclose(scaled, result, rtol=1e-3, atol=0.5)
    assert np.isfinite(corrupt(image - image.mean(), spacing, name, 3, 0, "scale")).all()


@pytest.mark.parametrize("name", ["motion", "ghosting", "low_resolution", "bias_field", "blur", "gamma"])
def test_channels_share_the_geometry(small, name):
    image, spacing = small["mr"]
    twice = np.stack([image[0], 2 * image[0]])
    result = corrupt(twice, spacing, name, 4, 0, "twins")
    np.testing.assert_allclose(result[1], 2 * result[0], rtol=1e-3, atol=0.5)


def test_noise_differs_between_channels(small):
    image, spacing = small["mr"]
    result = corrupt(np.stack([image[0]] * 2), spacing, "rician_noise", 4, 0, "twins")
    assert rms(result[0], result[1]) > 0.01 * np.ptp(image[0])


def test_levels_mean_what_they_say(small):
    image, spacing = small["ct"]
    for severity, (noise, shift) in enumerate(
        zip(CORRUPTIONS["dose_noise"].levels, CORRUPTIONS["hu_shift"].levels, strict=True), 1
    ):
        difference = corrupt(image, spacing, "dose_noise", severity, 0, "levels") - image
        assert difference.std() == pytest.approx(noise, rel=0.01)
        assert abs(difference.mean()) < 0.05 * noise
        moved = corrupt(image, spacing, "hu_shift", severity, 0, "levels") - image
        np.testing.assert_allclose(np.abs(moved), shift, rtol=1e-4)
    mr, spacing = small["mr"]
    gain = corrupt(mr, spacing, "bias_field", 5, 0, "levels")[mr > 0] / mr[mr > 0]
    assert 1 / 2.71 < gain.min() < 0.6
    assert 1.7 < gain.max() < 2.71
    for name, item in CORRUPTIONS.items():
        assert item.name == name and item.description.endswith(".") and item.modality in ("mr", "ct", "any")
        assert len(item.levels) == len(SEVERITIES) and list(item.levels) == sorted(set(item.levels))


def test_movement_does_not_shift_the_image():
    """The centre of k-space is unmoved, so the organ stays where its label is."""
    z, y, x = np.meshgrid(*(np.arange(48) - 23.5,) * 3, indexing="ij")
    image = np.where(z**2 + y**2 + x**2 < 14**2, 1000, 0).astype(np.float32)[None]
    for case in range(5):
        moved = corrupt(image, (1, 1, 1), "motion", 4, 0, f"c{case}")[0]
        centre = [(axis * moved).sum() / moved.sum() for axis in (z, y, x)]
        assert np.abs(centre).max() < 0.5


def test_defaults_fit_the_modality():
    assert set(default_corruptions("ct")) == {"blur", "low_resolution", "dose_noise", "hu_shift"}
    assert set(default_corruptions("any")) == {"blur", "low_resolution"}
    assert set(default_corruptions("mr")) == {*MR_NAMES, "blur", "low_resolution"}
    assert {item.modality for item in CORRUPTIONS.values()} == {"mr", "ct", "any"}
    assert all(item.description.endswith(".") and item.unit for item in CORRUPTIONS.values())


def test_mistakes_are_explained(small, monkeypatch):
    image, spacing = small["mr"]
    with pytest.raises(UserError, match=r"'fog'.*rician_noise"):
        corrupt(image, spacing, "fog", 1, 0, "x")
    with pytest.raises(UserError, match=r"severity 6.*1 to 5"):
        corrupt(image, spacing, "blur", 6, 0, "x")
    monkeypatch.setitem(sys.modules, "torchio", None)
    with pytest.raises(UserError, match=r"pip install .*torchio"):
        corrupt(image, spacing, "blur", 1, 0, "x")
    assert corrupt(image, spacing, "rician_noise", 1, 0, "x").shape == image.shape


def test_case_ids_may_hold_anything(small):
    image, spacing = small["ct"]
    for case in ("a b", "<b>x</b>", "Ä", "\udcff"):
        assert corrupt(image, spacing, "hu_shift", 1, 0, case).shape == image.shape


def test_import_is_lazy():
    code = (
        "import sys, ima_seg.evaluate.attack.corruptions; sys.exit('torchio' in sys.modules or 'monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
