"""Preparing a case: what the network sees is what nnU-Net's own inference sees, and perturbations find the way back."""

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from ima_seg.nnunet.case import prepare_case
from tests.evaluation_data import FLAVOURS


def predictor(folder, *, mirroring=True):
    stock = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=mirroring, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(folder), ("0",))
    return stock


def stock_input(stock, files):
    """Preprocessed (C, *S) and properties by nnU-Net alone."""
    preprocessor = stock.configuration_manager.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case(
        files, None, stock.plans_manager, stock.configuration_manager, stock.dataset_json
    )
    return torch.from_numpy(np.asarray(data)), properties


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_logits_and_segmentation_equal_those_of_nnunets_predictor(phantoms, flavour, monkeypatch):
    model, case = phantoms.case(flavour, index=4)
    stock = predictor(model.folder)
    files = [str(file) for file in sorted(phantoms.images(flavour).glob(f"{case.raw.case}_0*.nii.gz"))]
    data, _ = stock_input(stock, files)
    assert torch.equal(case.clean[0], data)
    # The predictor blends in half precision; in single precision it shows what it means to compute.
    monkeypatch.setattr(torch, "half", torch.float32)
    expected = stock.predict_logits_from_preprocessed_data(data)
    window = model.window(step_size=0.5, mirroring=True)
    logits = case.network(window, whole=True)(case.base)[0]
    assert (logits - expected).abs().max() < 1e-4
    (segmentation,) = stock.predict_from_files_sequential([files], None)
    assert (case.predict(window, case.base) != segmentation).mean() < 1e-4


@pytest.mark.parametrize("flavour", ["mr3d", "mr2d", "regions", "ct"])
def test_a_perturbed_case_written_and_read_again_is_the_same_network_input(phantoms, flavour):
    """Through z-scoring with new statistics and CT clipping: exactly what a stock nnU-Net will see."""
    model, case = phantoms.case(flavour, index=3)
    delta = torch.randn_like(case.base[:, : case.image_channels]) * 0.3 + 0.1
    if case.support is not None:
        delta = delta * case.support
    perturbed = case.base.clone()
    perturbed[:, : case.image_channels] += delta
    image = (case.raw.image + case.native_delta(case.delta(perturbed))).astype(np.float32)
    again = prepare_case(case.raw, model, image=image)
    window = model.window(step_size=0.5, mirroring=False)
    seen = case.network(window, whole=True)[0](perturbed)
    assert not case.resampled
    assert torch.allclose(seen, again.clean, atol=2e-4)
    assert not torch.allclose(seen, case.clean, atol=1e-2)
    back = case.from_native(case.native_delta(case.delta(perturbed)))
    assert torch.allclose(back, case.delta(perturbed), atol=1e-4)


def test_a_resampled_case_goes_back_approximately_and_stays_inside_the_mask(phantoms):
    model, case = phantoms.case("coarse")
    assert case.resampled and case.support is not None
    smooth = torch.nn.functional.avg_pool3d(torch.randn_like(case.base), 5, stride=1, padding=2) * 2
    perturbed = case.base + smooth * case.support
    native = case.native_delta(case.delta(perturbed))
    assert native.shape == case.raw.image.shape
    back = case.from_native(native)
    assert (back - case.delta(perturbed)).square().mean().sqrt() < 0.25 * smooth.square().mean().sqrt()
    window = model.window(step_size=0.5, mirroring=False)
    seen = case.network(window, whole=True)[0](case.base)
    assert torch.allclose(seen, case.clean, atol=1e-5)


def test_gradient_passes_through_the_normalisation(phantoms):
    """A constant added to a z-scored image changes nothing, so its gradient has no mean; clipped CT has none."""
    model, case = phantoms.case("mr3d")
    network = case.network(model.window(step_size=0.5, mirroring=False), whole=True)
    x = case.base.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(x)[:, 1].sum(), x)
    assert gradient.mean().abs() < 1e-3 * gradient.abs().mean()
    model, case = phantoms.case("ct")
    network = case.network(model.window(step_size=0.5, mirroring=False), whole=True)
    x = case.base.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(x)[:, 1].sum(), x)
    low, high = case.scales[0].bounds
    outside = (case.base < low - 1e-6) | (case.base > high + 1e-6)
    assert outside.any() and (gradient[outside] == 0).all() and gradient[~outside].abs().min() >= 0
    assert gradient[~outside].abs().sum() > 0


def test_slices_of_a_stack_are_the_volume(phantoms):
    model, case = phantoms.case("mr2d")
    window = model.window(step_size=0.5, mirroring=False)
    whole = case.network(window, whole=True)(case.base)
    slices = case.network(window, whole=False)(case.base[0].movedim(1, 0))
    assert torch.allclose(whole[0].movedim(1, 0), slices, atol=1e-4)
    assert case.target(slices=True).onehot.sum() == case.target().onehot.sum()


def test_reference_and_export_keep_the_geometry_of_the_file(phantoms):
    for flavour in ("regions", "coarse"):
        model, case = phantoms.case(flavour)
        stored = nibabel.load(phantoms.labels(flavour) / f"{case.raw.case}.nii.gz")
        assert np.array_equal(case.raw.reference, np.asarray(stored.dataobj).transpose(2, 1, 0))
        segmentation = case.predict(model.window(step_size=0.5, mirroring=False), case.base)
        assert segmentation.shape == case.raw.reference.shape
        assert set(np.unique(segmentation)) <= {0, 1, 2}
