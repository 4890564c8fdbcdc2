"""Images that hold a number for "no image here", such as the lowest float32 outside of the field of view."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ima_seg.cases.raw import intensity_range, padding, warn_of_padding
from ima_seg.evaluate.attack.corruptions import CORRUPTIONS, corrupt
from ima_seg.evaluate.measure.metrics import measure_size
from ima_seg.nnunet.case import prepare_case

LOWEST = np.finfo(np.float32).min


def image(seed=0):
    """(1, Z, Y, X) of a CT, and where it lies within the field of view."""
    volume = np.random.default_rng(seed).normal(40, 300, (1, 12, 14, 16)).astype(np.float32).clip(-1024, 3071)
    inside = np.zeros(volume.shape, bool)
    inside[:, 2:-2, 3:-3, 3:-3] = True
    return volume, inside


@pytest.mark.parametrize("value", [LOWEST, np.finfo(np.float32).max, -1e30, 1e20])
def test_padding_is_told_from_intensities(value):
    volume, inside = image()
    padded = np.where(inside, volume, np.float32(value))
    assert padding(padded[0]) == np.float32(value)
    np.testing.assert_array_equal(intensity_range(padded), intensity_range(volume[inside][None]))


def test_what_scanners_write_is_no_padding():
    volume, inside = image()
    for value in (-1024, -2000, -3024, -32768, 0):
        assert padding(np.where(inside, volume, value)[0]) is None
    assert padding(volume[0] * 0) is None and padding(inside[0].astype(np.float32)) is None
    low, high = np.percentile(volume.reshape(1, -1), (0.5, 99.5), axis=1)
    np.testing.assert_array_equal(intensity_range(volume), high - low)


def test_sizes_are_those_of_the_image_alone():
    volume, inside = image()
    delta = np.where(inside, np.random.default_rng(1).normal(0, 10, volume.shape), 0).astype(np.float32)
    sizes = [
        measure_size(clean, clean + delta, scale=[1.0], native_range=intensity_range(clean))
        for clean in (np.where(inside, volume, LOWEST), np.where(inside, volume, volume[inside].min()))
    ]
    for size in sizes:
        assert 30 < size.psnr_db < 50 and 0.5 < size.ssim < 1
    assert sizes[0].ssim == pytest.approx(sizes[1].ssim, abs=1e-3) and sizes[0].rms == pytest.approx(sizes[1].rms)


@pytest.mark.parametrize("name", ["rician_noise", "gamma", "blur", "dose_noise"])
def test_corruptions_leave_the_padding_alone(name):
    volume, inside = image()
    assert name in CORRUPTIONS
    corrupted = corrupt(np.where(inside, volume, LOWEST), (1, 1, 1), name, 5, 0, "case")
    assert (corrupted[~inside] == LOWEST).all() and np.abs(corrupted[inside]).max() < 1e5
    assert (corrupted[inside] != volume[inside]).any()


def test_case_and_value_are_named(caplog):
    volume, inside = image()
    warn_of_padding("Müller 1", np.where(inside, volume, LOWEST))
    (message,) = caplog.messages
    assert message.startswith("Müller 1: the image holds -3.40282e+38 in ") and "taken for padding" in message
    warn_of_padding("Müller 1", volume)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("resampled", [False, True])
def test_the_network_sees_what_nnunet_makes_of_it(phantoms, resampled):
    model, case = phantoms.case("ct", index=3)
    padded = case.raw.image.copy()
    padded[:, :3] = LOWEST
    raw = replace(case.raw, image=padded)
    if resampled:
        raw.properties["spacing"] = [1.3 * size for size in raw.properties["spacing"]]
    again = prepare_case(raw, model)
    assert again.resampled == resampled and torch.isfinite(again.base).all() and again.base.abs().max() < 1e3
    assert 0 < again.native_range[0] < 1e4
    seen = again.network(model.window(step_size=0.5, mirroring=False), whole=True)[0](again.base)
    assert torch.allclose(seen, again.clean, atol=1e-4)
