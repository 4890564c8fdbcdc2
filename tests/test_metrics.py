import math
import time

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ima_seg.evaluate.measure import metrics
from ima_seg.evaluate.measure.metrics import case_metrics, measure_size, ssim

ONE = {"organ": (1,)}


def evaluate(prediction, reference, classes=ONE, spacing=(1.0, 1.0, 1.0), tolerance=1.0, ignore=None, axis=0):
    return case_metrics(
        prediction,
        reference,
        classes=classes,
        spacing_mm=spacing,
        nsd_tolerance_mm=tolerance,
        ignore_label=ignore,
        slice_axis=axis,
    )


def box(shape, *ranges, value=1):
    out = np.zeros(shape, np.int16)
    out[tuple(slice(*r) for r in ranges)] = value
    return out


def blobs(seed, shape=(12, 22, 18), classes=4):
    """Smooth random label map; touches the borders."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    return np.digitize(noise, np.quantile(noise, np.linspace(0.4, 1, classes)[:-1])).astype(np.uint8)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.9)])
def test_equals_monai(spacing):
    for seed in range(3):
        prediction, reference = blobs(seed), blobs(seed + 100)
        ours = evaluate(
            prediction, reference, {"1": (1,), "2": (2,), "3": (3,), "all": (1, 2, 3), "core": (2, 3)}, spacing, 1.5
        )
        groups = [(1,), (2,), (3,), (1, 2, 3), (2, 3)]
        p, r = (
            torch.from_numpy(np.stack([np.isin(m, g) for g in groups])[None].astype(np.float32))
            for m in (prediction, reference)
        )
        dice = compute_dice(p, r)[0]
        nsd = compute_surface_dice(p, r, [1.5] * 5, include_background=True, spacing=spacing)[0]
        hd = compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=spacing)[0]
        values = list(ours.classes.values())
        np.testing.assert_allclose([v.dice for v in values], dice.numpy(), rtol=1e-5)
        np.testing.assert_allclose([v.nsd for v in values], nsd.numpy(), rtol=1e-5)
        np.testing.assert_allclose([v.hd95_mm for v in values], hd.numpy(), rtol=1e-5)
        assert ours.dice == pytest.approx(float(dice.mean()), rel=1e-5)
        assert ours.nsd == pytest.approx(float(nsd.mean()), rel=1e-5)
        assert ours.hd95_mm == pytest.approx(float(hd.mean()), rel=1e-5)


@pytest.mark.parametrize("shape", [(10, 12, 14), (1, 30, 40), (3, 1, 400)])
def test_distances_equal_scipy(shape):
    rng = np.random.default_rng(0)
    spacing = (2.3, 1.1, 0.7)
    dense, sparse = rng.random(shape) < 0.4, rng.random(shape) < 0.01
    for points, other in ((dense & ~sparse, sparse), (sparse & ~dense, dense)):
        expected = distance_transform_edt(~other, sampling=spacing)[points]
        for order in "CF":
            found = metrics._distances(np.array(points, order=order), np.array(other, order=order), spacing)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    overlapping = metrics._distances(dense, sparse | dense, spacing)
    assert not overlapping.any() and len(overlapping) == np.count_nonzero(dense)


def test_organ_within_a_large_prediction():
    reference, prediction = (
        box((40, 40, 40), (15, 25), (15, 25), (15, 25)),
        box((40, 40, 40), (1, 39), (2, 39), (0, 39)),
    )
    organ = evaluate(prediction, reference, spacing=(1.0, 2.0, 0.5)).classes["organ"]
    p, r = (torch.from_numpy(m[None, None].astype(np.float32)) for m in (prediction, reference))
    hd = compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=(1.0, 2.0, 0.5))
    assert organ.hd95_mm == pytest.approx(float(hd), rel=1e-6)


def test_tolerance_includes_equality():
    """0.1 x 3 is not 0.3 in floating point."""
    reference, prediction = box((3, 3, 30), (0, 3), (0, 3), (2, 3)), box((3, 3, 30), (0, 3), (0, 3), (5, 6))
    assert evaluate(prediction, reference, spacing=(1.0, 1.0, 0.1), tolerance=0.3).nsd == 1.0


def test_shifted_cube():
    """A cube of 10 voxels shifted by two along Z, 3 mm apart: faces are 6 mm apart."""
    reference = box((30, 30, 30), (5, 15), (5, 15), (5, 15))
    prediction = box((30, 30, 30), (7, 17), (5, 15), (5, 15))
    result = evaluate(prediction, reference, spacing=(3.0, 1.0, 0.5), tolerance=6.0)
    organ = result.classes["organ"]
    assert organ.state == "ok"
    assert (organ.tp, organ.fp, organ.fn) == (800, 200, 200)
    assert organ.dice == pytest.approx(0.8)
    assert organ.hd95_mm == pytest.approx(6.0)  # the caps are over 5 % of the surface
    assert organ.nsd == 1.0
    assert organ.reference_ml == organ.prediction_ml == pytest.approx(1.5)
    assert organ.volume_error_ml == 0
    # Of the 488 surface voxels of each cube, the rims (36) of the eight common slices and nothing else lie on the other
    # surface: the inner 64 of the end slice inside the other cube are 0.5 mm or more from its sides.
    exact = evaluate(prediction, reference, spacing=(3.0, 1.0, 0.5), tolerance=0.0)
    assert exact.nsd == pytest.approx(8 * 36 / 488)
    slices = result.slice_dice
    assert slices is not None and slices.slices == 10 and slices.mean == pytest.approx(0.8)
    across = evaluate(prediction, reference, axis=1).slice_dice
    assert across is not None and across.slices == 10 and across.mean == pytest.approx(0.8)


def test_identical_and_full():
    reference = np.ones((4, 5, 6), np.uint8)
    result = evaluate(reference, reference)
    assert (result.dice, result.nsd, result.hd95_mm) == (1.0, 1.0, 0.0)


def test_empty():
    shape, spacing = (4, 10, 20), (5.0, 1.0, 2.0)
    full, empty = box(shape, (1, 2), (3, 5), (3, 5)), np.zeros(shape, np.int16)
    diagonal = math.sqrt(20**2 + 10**2 + 40**2)
    for prediction, reference, state in ((full, empty, "reference_empty"), (empty, full, "prediction_empty")):
        organ = evaluate(prediction, reference, spacing=spacing).classes["organ"]
        assert organ.state == state
        assert (organ.dice, organ.nsd) == (0.0, 0.0)
        assert organ.hd95_mm == pytest.approx(diagonal)
        assert organ.fp + organ.fn == 4
    result = evaluate(empty, empty)
    organ = result.classes["organ"]
    assert organ.state == "both_empty"
    assert organ.dice is organ.nsd is organ.hd95_mm is result.dice is result.nsd is result.hd95_mm is None
    assert result.slice_dice is None
    assert organ.reference_ml == organ.tp == 0
    # Means leave out classes without a value, and count those that are missing.
    mixed = evaluate(full, full, {"organ": (1,), "absent": (2,)})
    assert (mixed.dice, mixed.nsd, mixed.hd95_mm) == (1.0, 1.0, 0.0)
    missed = evaluate(
        full,
        np.where(full == 0, box(shape, (3, 4), (0, 1), (0, 1), value=2), full),
        {"organ": (1,), "lost": (2,)},
    )
    assert missed.dice == 0.5


def test_slice_dice_means_over_classes_in_the_reference():
    reference, prediction = np.zeros((3, 4, 4), int), np.zeros((3, 4, 4), int)
    reference[0, :2], reference[0, 2:] = 1, 2
    prediction[0, :2] = 1  # class 1 right, class 2 lost: 0.5
    reference[1, :2], prediction[1, 1:3] = 1, 1  # 0.5
    prediction[1, 3] = 2  # not in this slice of the reference
    prediction[2] = 1  # no foreground in the reference
    slices = evaluate(prediction, reference, {"a": (1,), "b": (2,)}).slice_dice
    assert slices is not None and slices.slices == 2 and slices.mean == pytest.approx(0.5)


def test_ignore_label():
    reference, prediction = blobs(1), blobs(2)
    ignored = np.zeros(reference.shape, bool)
    ignored[:, 5:12, 3:9] = True
    marked = np.where(ignored, 9, reference)
    cleaned_p, cleaned_r = np.where(ignored, 0, prediction), np.where(ignored, 0, reference)
    classes = {"1": (1,), "whole": (1, 2, 3)}
    assert evaluate(prediction, marked, classes, ignore=9) == evaluate(cleaned_p, cleaned_r, classes)
    assert evaluate(prediction, marked, classes) != evaluate(cleaned_p, cleaned_r, classes)


def test_single_slice_is_two_dimensional():
    """A square shifted by two pixels; the slice thickness, 999 mm for natural images, has no say."""
    reference = box((1, 30, 40), (0, 1), (5, 15), (5, 15))
    prediction = box((1, 30, 40), (0, 1), (5, 15), (7, 17))
    organ = evaluate(prediction, reference, spacing=(999.0, 1.0, 2.0), tolerance=1.0).classes["organ"]
    p, r = (torch.from_numpy(m[None].astype(np.float32)) for m in (prediction, reference))
    nsd = compute_surface_dice(p, r, [1.0], include_background=True, spacing=(1.0, 2.0))
    assert organ.nsd == pytest.approx(float(nsd), rel=1e-6) and organ.nsd < 1
    assert organ.hd95_mm == pytest.approx(4.0)
    lost = evaluate(np.zeros_like(reference), reference, spacing=(999.0, 1.0, 2.0)).classes["organ"]
    assert lost.hd95_mm == pytest.approx(math.hypot(30, 80))
    dot = np.ones((1, 1, 1), int)
    assert evaluate(dot, dot).hd95_mm == 0


def test_refuses_what_does_not_fit():
    good = np.zeros((2, 3, 4), int)
    with pytest.raises(ValueError, match="one shape"):
        evaluate(good, good[:1])
    with pytest.raises(ValueError, match="integer"):
        evaluate(good, good.astype(float))


def test_fast_enough():
    """An organ of 100 voxels a side in a large image; generous, for slow machines."""
    reference = box((150, 256, 256), (20, 120), (50, 150), (50, 150)).astype(np.uint8)
    prediction = np.roll(reference, (3, 5, 2), (0, 1, 2))
    start = time.perf_counter()
    evaluate(prediction, reference, spacing=(1.5, 0.8, 0.8))
    assert time.perf_counter() - start < 5


def images(shape, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    clean = np.stack([gaussian_filter(rng.normal(size=shape[1:]), 1) * 4 for _ in range(shape[0])])
    clean = clean.astype(np.float32)
    return clean, clean + rng.normal(scale=noise, size=shape).astype(np.float32)


def test_size():
    clean, adversarial = images((2, 9, 12, 10))
    delta = adversarial.astype(float) - clean
    scale, native = (200.0, 3.0), (1000.0, 12.0)
    size = measure_size(clean, adversarial, scale=scale, native_range=native, budget="slice")
    assert size.rms == pytest.approx(np.sqrt((delta**2).mean()))
    assert size.l2 == pytest.approx(np.linalg.norm(delta))
    assert size.linf == pytest.approx(np.abs(delta).max())
    assert size.l2_slice == pytest.approx(max(np.linalg.norm(delta[:, z]) for z in range(9)))
    native_rms = [np.sqrt((delta[c] ** 2).mean()) * scale[c] for c in range(2)]
    assert size.native_rms == pytest.approx(native_rms)
    assert size.native_linf == pytest.approx([np.abs(delta[c]).max() * scale[c] for c in range(2)])
    assert size.percent_rms == pytest.approx([100 * native_rms[c] / native[c] for c in range(2)])
    expected = [
        structural_similarity(clean[c], adversarial[c], win_size=7, data_range=native[c] / scale[c]) for c in range(2)
    ]
    assert size.ssim == pytest.approx(np.mean(expected), abs=1e-5)
    one = measure_size(clean[:1], adversarial[:1], scale=scale[:1], native_range=native[:1])
    assert one.l2_slice is None
    assert one.psnr_db == pytest.approx(peak_signal_noise_ratio(clean[0], adversarial[0], data_range=5.0), abs=1e-4)


def test_no_perturbation():
    clean, _ = images((1, 3, 8, 8))
    size = measure_size(clean, clean.copy(), scale=[1.0], native_range=[1.0])
    assert (size.rms, size.l2, size.linf, size.psnr_db, size.ssim) == (0, 0, 0, None, 1.0)


def test_range_of_zero():
    """Constant or nearly constant channels still give numbers that can be written."""
    clean = np.zeros((2, 4, 8, 8), np.float32)
    clean[0, 0, 0, 0] = 4
    size = measure_size(clean, clean + np.float32(0.5), scale=[2.0, 2.0], native_range=[0.0, 0.0])
    assert size.percent_rms == pytest.approx([100 / 8, 50])
    assert size.ssim is not None and math.isfinite(size.ssim)
    assert type(size).model_validate_json(size.model_dump_json()) == size


def test_size_refuses_what_does_not_fit():
    clean, _ = images((2, 3, 8, 8))
    with pytest.raises(ValueError, match="fit together"):
        measure_size(clean, clean, scale=[1.0], native_range=[1.0, 1.0])


@pytest.mark.parametrize("shape", [(9, 15, 11), (7, 7, 7), (40, 30)])
def test_ssim_equals_skimage(shape):
    (a,), (b,) = images((1, *shape), noise=0.5)
    assert ssim(a, b, data_range=3.0) == pytest.approx(
        structural_similarity(a, b, win_size=7, data_range=3.0), abs=1e-5
    )


def test_ssim_of_small_volumes():
    (a,), (b,) = images((1, 1, 20, 30), noise=0.5)
    flat = structural_similarity(a[0], b[0], win_size=7, data_range=3.0)
    assert ssim(a, b, data_range=3.0) == pytest.approx(flat, abs=1e-5)
    (a,), (b,) = images((1, 4, 3, 2), noise=0.5)
    assert -1 < ssim(a, b, data_range=3.0) < 1
    assert -1 <= ssim(a[:1, :1, :1], b[:1, :1, :1], data_range=3.0) < 1


def test_ssim_of_large_volumes(monkeypatch):
    (a,), (b,) = images((1, 48, 56, 64), noise=0.5)
    every = ssim(a, b, data_range=3.0)
    assert every == pytest.approx(structural_similarity(a, b, win_size=7, data_range=3.0), abs=1e-5)
    monkeypatch.setattr(metrics, "_SSIM_WINDOWS", 10_000)
    assert ssim(a, b, data_range=3.0) == pytest.approx(every, abs=5e-3)
