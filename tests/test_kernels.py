"""Triton kernels against the reference in float64; in Triton's interpreter where there is no GPU.

One file: every kernel is compared with its reference on the same set of layouts.
"""

import itertools
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ima_seg.errors import UserError
from ima_seg.ops import backend, reference
from ima_seg.types import Labels, Target

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
#: Odd sizes, one to three spatial dimensions, one sample, one voxel, several blocks per row.
SHAPES = [(3, 1, 7), (1, 2, 5, 3), (4, 1, 3, 5, 2), (2, 1, 1), (2, 1, 2049), (1, 1, 71, 73)]
norms = pytest.mark.parametrize("norm", ["l2", "linf"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels with every buffer they are given full of NaN (or nonsense, for integers)."""
    from ima_seg.ops import kernels

    class Poisoned:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def _poison(tensor):
            return tensor.fill_(math.nan if tensor.is_floating_point() else 77)

        def empty(self, *size, **options):
            return self._poison(torch.empty(*size, **options))

        def empty_like(self, *like, **options):
            made = torch.empty_like(*like, **options)
            return made if made.device.type == "meta" else self._poison(made)

    monkeypatch.setattr(kernels, "torch", Poisoned())
    return kernels


def close(ours, exact, rtol=2e-5, atol=1e-6):
    torch.testing.assert_close(ours.double(), exact.double(), rtol=rtol, atol=atol, equal_nan=True)


def double(*tensors):
    return [None if t is None else t.double() if t.is_floating_point() else t for t in tensors]


def masks(shape):
    """None, a whole mask, one shared by samples, one shared by channels."""
    return [None, torch.rand(shape) < 0.6, torch.rand(1, *shape[1:]) < 0.6, torch.rand(shape[0], 1, *shape[2:]) < 0.6]


@norms
@shapes
def test_step(kernels, norm, shape):
    delta, gradient = torch.randn(shape, device=DEVICE) * 0.1, torch.randn(shape, device=DEVICE)
    alpha, eps = torch.rand(shape[0], device=DEVICE) * 0.2, torch.rand(shape[0], device=DEVICE) * 0.2
    eps[0] = 0
    image = torch.randn(shape, device=DEVICE)
    low, high = torch.full_like(eps, -0.5), torch.full_like(eps, 1.0)
    for mask, boxed in itertools.product(masks(shape), (False, True)):
        mask = None if mask is None else mask.to(DEVICE)
        box = (image, low, high) if boxed else (None, None, None)
        ours, length = kernels.gradient_step(delta, gradient, alpha, eps, norm, mask, *box)
        exact, size = reference.gradient_step(*double(delta, gradient, alpha, eps), norm, mask, *double(*box))
        close(ours, exact)
        close(length, size)


@norms
def test_step_leaves_samples_without_usable_gradient(kernels, norm):
    delta = torch.full((5, 1, 3000), 0.05, device=DEVICE)
    gradient = torch.randn(5, 1, 3000, device=DEVICE)
    gradient[1], gradient[2, 0, 0], gradient[3, 0, 2999] = 0, math.nan, math.inf
    eps = torch.full((5,), 1.0, device=DEVICE)
    ours, length = kernels.gradient_step(delta, gradient, eps * 0.1, eps, norm, None, None, None, None)
    assert torch.equal(ours[1:4], delta[1:4])
    assert not torch.equal(ours[0], delta[0]) and not torch.equal(ours[4], delta[4])
    assert length[1] == 0 and not torch.isfinite(length[2:4]).any() and torch.isfinite(length[[0, 4]]).all()


@norms
@shapes
def test_interpolation(kernels, norm, shape):
    inner, outer = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    share = torch.rand(shape[0], device=DEVICE)
    share[0] = 1.0
    ours, length = kernels.interpolate(inner, outer, share, norm)
    exact, size = reference.interpolate(*double(inner, outer, share), norm)
    close(ours, exact)
    close(length, size)
    assert torch.equal(ours[0], outer[0]), "the ends are exact"


@norms
@shapes
def test_random_start(kernels, norm, shape):
    like, radius = torch.zeros(shape, device=DEVICE), torch.rand(shape[0], device=DEVICE)
    seeds = torch.randint(2**62, (shape[0],), device=DEVICE)
    for mask in masks(shape):
        mask = None if mask is None else mask.to(DEVICE)
        ours = kernels.random_start(like, radius, norm, seeds, mask)
        close(ours, reference.random_start(*double(like, radius), norm, seeds, mask), rtol=1e-4, atol=1e-5)
    alone = kernels.random_start(like[-1:], radius[-1:], norm, seeds[-1:], None)
    assert torch.equal(alone[0], kernels.random_start(like, radius, norm, seeds, None)[-1]), "whatever the batch"


SCENES = {
    "two classes": (Labels(2), (3, 7)),
    "five classes": (Labels(5), (2, 5, 3)),
    "ignore label": (Labels(3, ignore_label=3), (2, 4, 5, 3)),
    "several blocks": (Labels(3), (2, 61, 67)),
    "300 classes": (Labels(300), (1, 40)),
    "one region": (Labels(1, regions=True), (2, 9)),
    "regions": (Labels(3, regions=True), (2, 6, 5)),
    "regions, ignore": (Labels(2, regions=True, ignore_label=9), (2, 3, 4, 5)),
}
scenes = pytest.mark.parametrize("labels, size", SCENES.values(), ids=SCENES)


def scene(labels, size):
    batch, *space = size
    if labels.regions:
        raw = torch.randint(0, 2, (batch, labels.outputs + (labels.ignore_label is not None), *space))
    else:
        # Beyond the classes: the ignore label, and values of no class.
        raw = torch.randint(0, labels.outputs + 2, (batch, 1, *space))
    logits = torch.randn(batch, labels.outputs, *space) * 4
    logits.flatten(2)[:, :, 0] = 1.0  # a tie
    target = Target.from_raw(raw, labels)
    return logits.to(DEVICE), target.map(lambda part: part.to(DEVICE))


@scenes
def test_loss_and_its_gradient(kernels, labels, size):
    logits, target = scene(labels, size)
    arguments = (target.reference, target.known)
    loss, sums, voxels = kernels.dice_ce(logits, *arguments)
    exact, exact_sums, exact_voxels = reference.dice_ce(logits.double(), *arguments)
    close(loss, exact)
    close(sums, exact_sums, atol=1e-5)
    close(voxels, exact_voxels)
    upstream = torch.randn(len(logits), device=DEVICE) * 10
    ours = kernels.dice_ce_backward(upstream, logits, *arguments, sums, voxels)
    gradient = reference.dice_ce_backward(upstream.double(), logits.double(), *arguments, exact_sums, exact_voxels)
    close(ours, gradient)


@scenes
def test_counts(kernels, labels, size):
    logits, target = scene(labels, size)
    counts, finite = kernels.hard_counts(logits, target.reference, target.known)
    expected, _ = reference.hard_counts(logits.double(), target.reference, target.known)
    assert counts.dtype == torch.int64 and torch.equal(counts, expected)
    assert finite.all()
    logits[-1].view(-1)[-1] = math.inf
    _, finite = kernels.hard_counts(logits, target.reference, target.known)
    assert not finite[-1] and finite[:-1].all()


def layouts(image):
    """The same values in other memory layouts."""
    batch, channels, *space = image.shape
    yield image.to(memory_format=torch.channels_last if len(space) == 2 else torch.channels_last_3d)
    padded = image.new_zeros(batch, channels + 2, *space)
    padded[:, 1:-1] = image
    yield padded[:, 1:-1]  # some channels of a larger batch
    yield image.transpose(2, 3).contiguous().transpose(2, 3)
    wide = image.new_zeros(batch, channels, *space[:-1], space[-1] * 2)
    wide[..., ::2] = image
    yield wide[..., ::2]  # gaps between voxels


@norms
@pytest.mark.parametrize("space", [(5, 4), (3, 4, 5)])
def test_memory_layouts(kernels, norm, space):
    delta, gradient = torch.randn(2, 3, *space, device=DEVICE), torch.randn(2, 3, *space, device=DEVICE)
    values = torch.rand(2, device=DEVICE)
    mask, seeds = torch.rand(1, 1, *space, device=DEVICE) < 0.5, torch.tensor([5, 7], device=DEVICE)
    none = (None, None, None)
    expected, _ = reference.gradient_step(delta, gradient, values, values, norm, mask, *none)
    for d, g in itertools.product(layouts(delta), layouts(gradient)):
        close(kernels.gradient_step(d, g, values, values, norm, mask, *none)[0], expected)
        close(kernels.interpolate(d, g, values, norm)[0], reference.interpolate(delta, gradient, values, norm)[0])
    noise = reference.random_start(delta, values, norm, seeds, mask)
    for like in layouts(delta):
        close(kernels.random_start(like, values, norm, seeds, mask), noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [Labels(3, ignore_label=3), Labels(3, regions=True)], ids=["classes", "regions"])
def test_memory_layouts_of_logits(kernels, labels):
    logits, target = scene(labels, (2, 4, 5))
    arguments = (target.reference, target.known)
    exact = reference.dice_ce(logits, *arguments)
    upstream = torch.ones(2, device=DEVICE)
    gradient = reference.dice_ce_backward(upstream, logits, *arguments, *exact[1:])
    for other in layouts(logits):
        close(kernels.dice_ce(other, *arguments)[0], exact[0])
        ours = kernels.dice_ce_backward(upstream, other, *arguments, *exact[1:])
        close(ours, gradient)
        assert torch.equal(kernels.hard_counts(other, *arguments)[0], reference.hard_counts(logits, *arguments)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(kernels, dtype):
    logits, target = scene(Labels(3), (2, 61, 67))
    logits = logits.to(dtype)
    arguments = (target.reference, target.known)
    loss, sums, voxels = kernels.dice_ce(logits, *arguments)
    exact = reference.dice_ce(logits.double(), *arguments)
    close(loss, exact[0])
    upstream = torch.ones(2, device=DEVICE) * 1000
    ours = kernels.dice_ce_backward(upstream, logits, *arguments, sums, voxels)
    assert ours.dtype == dtype
    gradient = reference.dice_ce_backward(upstream.double(), logits.double(), *arguments, *exact[1:])
    close(ours, gradient, rtol=torch.finfo(dtype).eps, atol=1e-6)
    # Squares of 300 overflow float16, sums of many of anything lose their end.
    gradient = torch.full((1, 1, 5000), 300.0, device=DEVICE, dtype=dtype)
    delta, one = torch.zeros(1, 1, 5000, device=DEVICE), torch.ones(1, device=DEVICE)
    ours, length = kernels.gradient_step(delta, gradient, one, one, "l2", None, None, None, None)
    close(length, torch.tensor([300.0], device=DEVICE))
    close(ours, torch.ones_like(delta))


@pytest.mark.gpu  # the interpreter copies what it is given
def test_offsets_are_64_bit(kernels):
    """The second sample starts at 2**31 elements; nothing in between is touched."""
    rows = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 1, 16), (2**31, 16, 1))
    rows.copy_(torch.randn(2, 1, 16))
    one = torch.ones(2, device=DEVICE)
    none = (None, None, None, None)
    ours, _ = kernels.gradient_step(rows, rows, one, one * 2, "l2", *none)
    close(ours, reference.gradient_step(*double(rows, rows, one, one * 2), "l2", *none)[0], rtol=1e-3)


@norms
def test_ops_run_the_kernels_when_asked_to_and_say_so(norm, caplog, monkeypatch):
    from ima_seg import ops

    backend._note.cache_clear()
    x, gradient, eps = (
        torch.zeros(2, 1, 9, device=DEVICE),
        torch.randn(2, 1, 9, device=DEVICE),
        torch.ones(2, device=DEVICE),
    )
    called = []
    from ima_seg.ops import kernels

    real = kernels.gradient_step
    monkeypatch.setattr(kernels, "gradient_step", lambda *a: called.append(1) or real(*a))
    with caplog.at_level(logging.INFO, "ima_seg.ops"):
        with ops.use_backend("triton"):
            stepped, _ = ops.gradient_step(x, gradient, alpha=eps * 0.1, eps=eps, norm=norm)
        with ops.use_backend("reference"):
            plain, _ = ops.gradient_step(x, gradient, alpha=eps * 0.1, eps=eps, norm=norm)
    assert called == [1]
    close(stepped, plain)
    assert [r.message.split(":")[1].split()[0] for r in caplog.records] == ["triton", "reference"]


def test_a_backend_asked_for_never_gives_way(monkeypatch):
    from ima_seg import ops

    x, one = torch.zeros(1, 1, 4, dtype=torch.float64, device=DEVICE), torch.ones(1, device=DEVICE)
    with ops.use_backend("triton"), pytest.raises(UserError, match="float64"):
        ops.gradient_step(x, x, alpha=one, eps=one, norm="l2")
    monkeypatch.setenv("IMA_OPS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not GPU:
        with pytest.raises(UserError, match="CUDA"):
            ops.gradient_step(x.float(), x.float(), alpha=one, eps=one, norm="l2")
    monkeypatch.setattr(backend, "_triton_installed", lambda: False)
    with pytest.raises(UserError, match="pip install triton"):
        ops.gradient_step(x.float(), x.float(), alpha=one, eps=one, norm="l2")
    with pytest.raises(UserError, match="pip install triton"), ops.use_backend("triton"):
        pass
    monkeypatch.setenv("IMA_OPS", "cuda")
    with pytest.raises(UserError, match="reference, triton"):
        ops.gradient_step(x.float(), x.float(), alpha=one, eps=one, norm="l2")


@norms
def test_an_attack_on_kernels_finds_what_it_finds_on_the_reference(norm):
    from ima_seg import ThreatModel
    from ima_seg.attacks import Problem, pgd
    from ima_seg.ops import use_backend
    from tests.models import TinyUNet

    network = TinyUNet(2).to(DEVICE)
    x = torch.randn(3, 1, 16, 16, device=DEVICE)
    target = Target.from_raw(torch.randint(0, 3, (3, 1, 16, 16), device=DEVICE), Labels(3))
    eps = torch.tensor([0.0, 0.1, 0.3], device=DEVICE)
    found = []
    for name in ("reference", "triton"):
        with use_backend(name):
            generator = torch.Generator(DEVICE).manual_seed(1)
            found.append(
                pgd(Problem(network, x, target, ThreatModel(norm), precision="fp32", generator=generator), eps, steps=4)
            )
    close(found[1].damage, found[0].damage, atol=0.02)
    close(found[1].distance, found[0].distance, rtol=1e-3)
    close(found[1].adversarial, found[0].adversarial, atol=0.05)


def test_kernels_compile_for_a_gpu(tmp_path):
    """Interpreted kernels may still be refused by the compiler, which needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 11


def test_nan_in_a_perturbation_is_not_made_a_number(kernels):
    delta, one = torch.full((1, 1, 9), math.nan, device=DEVICE), torch.ones(1, device=DEVICE)
    for norm in ("l2", "linf"):
        assert not torch.isfinite(kernels.interpolate(delta, delta * 0, one * 0.3, norm)[1]).any()
        for box in ((None, None, None), (torch.zeros_like(delta), one, one)):
            stepped, _ = kernels.gradient_step(delta, torch.ones_like(delta), one, one, norm, None, *box)
            assert stepped.isnan().all()
