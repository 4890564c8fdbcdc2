"""Steps, points between, masks and boxes; what torch is told of all ops.

One file: the ops on images share their inputs, and each refusal stands beside what it refuses.
"""

import itertools
import math

import pytest
import torch

from benchmarks.shared.baselines import plain_step
from ima_seg.errors import UserError
from ima_seg.ops import (
    dice_ce,
    draw_seeds,
    gradient_step,
    hard_counts,
    interpolate,
    perturbation_size,
    project,
    random_start,
)
from ima_seg.types import Labels, Target, ThreatModel
from tests.test_ops_logits import KINDS, scene

SHAPES = [(3, 1, 7), (1, 2, 5, 3), (4, 1, 3, 5, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_step_equals_float64_reference_sample_by_sample(shape, norm):
    delta, gradient = torch.randn(shape) * 0.1, torch.randn(shape)
    alpha, eps = torch.rand(shape[0]) * 0.2, torch.rand(shape[0]) * 0.2
    ours, _ = gradient_step(delta.clone(), gradient, alpha=alpha, eps=eps, norm=norm)
    inputs = {"delta": delta, "gradient": gradient, "alpha": alpha, "eps": eps}
    for i in range(shape[0]):
        expected, _ = plain_step(norm, {name: value[i : i + 1].double() for name, value in inputs.items()})
        torch.testing.assert_close(ours[i : i + 1].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_step_leaves_samples_without_usable_gradient(norm):
    delta = torch.full((4, 1, 6), 0.05)
    gradient = torch.randn(4, 1, 6)
    gradient[1], gradient[2, 0, 0], gradient[3, 0, 5] = 0, float("nan"), float("inf")
    eps = torch.full((4,), 1.0)
    moved, _ = gradient_step(delta, gradient, alpha=eps * 0.1, eps=eps, norm=norm)
    assert torch.equal(moved[1:], delta[1:])
    assert not torch.equal(moved[0], delta[0])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_zero_budget_gives_no_perturbation(norm):
    delta, zero = torch.zeros(2, 1, 4, 4), torch.zeros(2)
    assert gradient_step(delta, torch.randn(2, 1, 4, 4), alpha=zero + 1, eps=zero, norm=norm)[0].abs().max() == 0
    assert random_start(delta, zero, norm, draw_seeds(2, delta.device)).abs().max() == 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projection_keeps_what_is_inside_and_reaches_the_sphere_outside(norm):
    delta = torch.randn(2, 1, 8, 8)
    delta[0] *= 0.1 / perturbation_size(delta, norm)[0]
    delta[1] *= 0.9 / perturbation_size(delta, norm)[1]
    before = delta.clone()
    project(delta, torch.tensor([0.5, 0.5]), norm)
    torch.testing.assert_close(delta[0], before[0])
    torch.testing.assert_close(perturbation_size(delta, norm)[1], torch.tensor(0.5))


def test_size_is_root_mean_square_so_it_carries_over_between_patch_sizes():
    threat = ThreatModel("l2")
    assert threat.from_total(15, 56 * 40) == pytest.approx(0.317, abs=5e-4)
    assert threat.to_total(threat.from_total(15, 56 * 40), 40 * 56 * 40) == pytest.approx(94.87, abs=0.01)
    assert ThreatModel("linf").to_total(0.3, 1000) == 0.3
    assert perturbation_size(torch.full((1, 2, 9, 9), -0.2), "l2").item() == pytest.approx(0.2)


# What is refused. A value given instead of one of these is named.


def step_arguments():
    x, per_sample = torch.zeros(2, 3, 4, 5), torch.full((2,), 0.1)
    image = torch.rand_like(x)
    return {"delta": x, "gradient": x + 1, "alpha": per_sample, "eps": per_sample, "norm": "l2", "mask": x == 0,
            "image": image, "box": (per_sample * 0, per_sample + 1)}  # fmt: skip


def call_step(arguments):
    positional = [arguments.pop("delta"), arguments.pop("gradient")]
    return gradient_step(*positional, **arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("delta", torch.zeros(2, 3, 4, 5, dtype=torch.int64), r"delta is torch.int64 of shape \(2, 3, 4, 5\)"),
        (
            "delta",
            torch.zeros(2, 3),
            r"delta is torch.float32 of shape \(2, 3\); expected floating point \(B, C, \*S\)",
        ),
        ("gradient", torch.zeros(2, 3, 4, 5, dtype=torch.int32), "gradient is torch.int32"),
        ("gradient", torch.zeros(2, 3, 5, 4), r"gradient is torch.float32 of shape \(2, 3, 5, 4\); .*\(2, 3, 4, 5\)"),
        ("gradient", torch.zeros(1, 3, 4, 5), r"gradient is torch.float32 of shape \(1, 3, 4, 5\)"),
        ("gradient", torch.zeros(2, 3, 4, 5, device="meta"), "gradient is on meta, the batch on cpu"),
        ("eps", torch.ones(3), r"eps is torch.float32 of shape \(3,\) for a batch of 2"),
        ("eps", torch.tensor(0.1), r"eps is torch.float32 of shape \(\) for a batch of 2"),
        ("eps", torch.ones(2, dtype=torch.int64), "eps is torch.int64"),
        ("eps", torch.ones(2, device="meta"), "eps is on meta"),
        ("alpha", torch.ones(2, 1), r"alpha is torch.float32 of shape \(2, 1\)"),
        ("alpha", torch.ones(2, dtype=torch.int32), "alpha is torch.int32"),
        ("mask", torch.ones(2, 3, 4, 5), "mask is torch.float32"),
        ("mask", torch.ones(2, 3, 4, 5, dtype=torch.uint8), "mask is torch.uint8"),
        ("mask", torch.ones(3, 4, 5, dtype=torch.bool), r"mask is torch.bool of shape \(3, 4, 5\)"),
        ("mask", torch.ones(2, 2, 4, 5, dtype=torch.bool), r"mask .*\(2, 2, 4, 5\); .*broadcasts to \(2, 3, 4, 5\)"),
        ("mask", torch.ones(2, 3, 4, 5, dtype=torch.bool, device="meta"), "mask is on meta"),
        ("image", None, "give image and box together"),
        ("box", None, "give image and box together"),
        ("image", torch.zeros(2, 3, 4, 6), r"image is torch.float32 of shape \(2, 3, 4, 6\)"),
        ("image", torch.zeros(2, 3, 4, 5, dtype=torch.uint8), "image is torch.uint8"),
        ("image", torch.zeros(2, 3, 4, 5, device="meta"), "image is on meta"),
        ("box", (torch.zeros(2), torch.ones(1)), r"high is torch.float32 of shape \(1,\)"),
        ("box", (torch.zeros(2, dtype=torch.int64), torch.ones(2)), "low is torch.int64"),
        ("box", (torch.zeros(2, device="meta"), torch.ones(2)), "low is on meta"),
    ],
)
def test_a_step_refuses_what_does_not_fit(name, value, message):
    call_step(step_arguments())
    with pytest.raises(UserError, match=message):
        call_step({**step_arguments(), name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inner", torch.zeros(2, 1, 4, dtype=torch.int64), "inner is torch.int64"),
        ("outer", torch.zeros(2, 1, 5), r"outer is torch.float32 of shape \(2, 1, 5\)"),
        ("outer", torch.zeros(2, 1, 4, device="meta"), "outer is on meta"),
        ("share", torch.zeros(3), r"share is torch.float32 of shape \(3,\)"),
        ("share", torch.zeros(2, dtype=torch.int64), "share is torch.int64"),
        ("share", torch.zeros(2, device="meta"), "share is on meta"),
    ],
)
def test_an_interpolation_refuses_what_does_not_fit(name, value, message):
    arguments = {"inner": torch.zeros(2, 1, 4), "outer": torch.ones(2, 1, 4), "share": torch.ones(2), "norm": "l2"}
    interpolate(**arguments)
    with pytest.raises(UserError, match=message):
        interpolate(**{**arguments, name: value})


# Masks, boxes, points between


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_masked_step_is_the_step_of_the_gradient_with_zeros(norm):
    delta, gradient = torch.randn(3, 2, 4, 5) * 0.1, torch.randn(3, 2, 4, 5)
    alpha, eps = torch.full((3,), 0.05), torch.full((3,), 0.1)
    for mask in (torch.rand(3, 2, 4, 5) < 0.5, torch.rand(1, 1, 4, 5) < 0.5, torch.rand(3, 1, 1, 1) < 2):
        ours, size = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm, mask=mask)
        expected, wanted = gradient_step(delta, gradient * mask, alpha=alpha, eps=eps, norm=norm)
        assert torch.equal(ours, expected) and torch.equal(size, wanted)
    # What is masked may be anything.
    gradient[0, 0, 0, 0] = math.nan
    mask = torch.ones(3, 2, 4, 5, dtype=torch.bool)
    mask[0, 0, 0, 0] = False
    ours, size = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm, mask=mask)
    assert ours.isfinite().all() and size.isfinite().all() and not torch.equal(ours[0], delta[0])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_box_bounds_the_image_and_moves_what_lies_outside_no_further_out(norm):
    image = torch.rand(3, 1, 8, 8) * 1.4 - 0.2  # some voxels lie outside [0, 1] already
    delta, gradient = torch.zeros_like(image), torch.randn_like(image)
    alpha, eps = torch.full((3,), 0.5), torch.tensor([0.0, 0.3, 0.5])
    low, high = torch.tensor([0.0, 0.0, 0.2]), torch.tensor([1.0, 1.0, 0.6])
    free, size = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm)
    ours, same = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm, image=image, box=(low, high))
    assert torch.equal(size, same), "the box is no matter of the gradient"
    assert ours[0].abs().max() == 0
    assert (perturbation_size(ours, norm) <= eps * (1 + 1e-5)).all(), "it takes nothing out of the ball"
    for i in range(3):
        x, d, f = (each[i].flatten().tolist() for each in (image, ours, free))
        for value, moved, wanted in zip(x, d, f, strict=True):
            least, most = min(float(low[i]), value), max(float(high[i]), value)
            assert least - 1e-6 <= value + moved <= most + 1e-6
            assert moved == pytest.approx(min(max(wanted, least - value), most - value), abs=1e-6)
    everything = (torch.full((3,), -math.inf), torch.full((3,), math.inf))
    boxed, _ = gradient_step(delta, gradient, alpha=alpha, eps=eps, norm=norm, image=image, box=everything)
    assert torch.equal(boxed, free)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_interpolation_is_exact_at_both_ends_and_gives_the_size(norm):
    inner, outer = torch.randn(4, 2, 5, 3), torch.randn(4, 2, 5, 3)
    share = torch.tensor([0.0, 1.0, 0.25, 0.75])
    point, size = interpolate(inner, outer, share, norm)
    assert torch.equal(point[0], inner[0]) and torch.equal(point[1], outer[1])
    weight = share.double().view(4, 1, 1, 1)
    expected = (1 - weight) * inner.double() + weight * outer.double()
    torch.testing.assert_close(point.double(), expected, rtol=1e-6, atol=1e-6)
    assert size.dtype == torch.float32
    torch.testing.assert_close(size, perturbation_size(point, norm))


def test_ops_change_nothing_that_they_are_given():
    arguments = step_arguments()
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)] + list(arguments["box"])
    before = [t.clone() for t in tensors]
    call_step(arguments)
    interpolate(tensors[0], tensors[1], tensors[2], "l2")
    random_start(tensors[0], tensors[2], "linf", torch.tensor([1, 2]), tensors[4])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# Registered operators


def samples():
    """Name of an operator -> arguments, in several layouts, dtypes and choices of what is optional."""
    for norm, space, dtype in itertools.product(
        ("l2", "linf"), ((7,), (4, 5), (3, 2, 4)), (torch.float32, torch.bfloat16)
    ):
        x, y = (torch.randn(2, 3, *space).to(dtype) for _ in range(2))
        one, mask, seeds = torch.ones(2), torch.rand(2, 1, *space) < 0.5, torch.tensor([3, 4])
        none = (None,) * 3
        yield "gradient_step", (x, y, one, one, norm, None, *none)
        yield "gradient_step", (x, y.float(), one, one, norm, mask, y, one * 0, one)
        yield "random_start", (x, one, norm, seeds, mask)
        yield "interpolate", (x, y, one * 0.3, norm)
        if len(space) > 1:
            last = torch.channels_last if len(space) == 2 else torch.channels_last_3d
            yield "gradient_step", (x.to(memory_format=last), y, one, one, norm, mask, *none)
            yield "gradient_step", (x, y.to(memory_format=last), one, one, norm, None, *none)
            turned = y.mT.contiguous().mT
            yield "gradient_step", (x[:, 1:], turned[:, 1:], one, one, norm, None, *none)
            yield "gradient_step", (turned, x, one, one, norm, None, *none)
            yield "random_start", (x.to(memory_format=last), one, norm, seeds, None)
            yield "interpolate", (x.to(memory_format=last), y, one * 0.3, norm)
    for labels, space, dtype in itertools.product(
        KINDS.values(), ((5,), (4, 5)), (torch.float32, torch.bfloat16, torch.float64)
    ):
        logits, raw = scene(labels, space, dtype=dtype)
        target = Target.from_raw(raw, labels)
        rest = (target.reference, target.known)
        layouts = [logits, logits.to(memory_format=torch.channels_last)] if len(space) == 2 else [logits]
        for each in layouts:
            yield "dice_ce", (each.requires_grad_(), *rest)
            yield "hard_counts", (each.detach(), *rest)
            loss, sums, voxels = torch.ops.ima_seg.dice_ce(each.detach(), *rest)
            yield "dice_ce_backward", (torch.ones_like(loss), each.detach(), *rest, sums, voxels)


@pytest.mark.parametrize(
    "name", ["gradient_step", "random_start", "interpolate", "dice_ce", "dice_ce_backward", "hard_counts"]
)
def test_operators_are_what_torch_was_told(name):
    given = [arguments for each, arguments in samples() if each == name]
    operator = getattr(torch.ops.ima_seg, name).default
    for arguments in given:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    # Tracing takes long: a few that differ in what is optional, dtype and layout.
    for arguments in (*given[:2], given[-1]):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_ops_compile_without_a_break_and_give_the_same(norm):
    target = Target.from_raw(torch.randint(0, 3, (2, 1, 6, 5)), Labels(3))
    weight = torch.randn(3, 1, 3, 3)

    def search(x, gradient, eps, seeds, mask, box):
        still = x.detach()  # the loss alone is differentiable
        delta = random_start(still, eps, norm, seeds, mask)
        stepped, size = gradient_step(delta, gradient, alpha=eps, eps=eps, norm=norm, mask=mask, image=still, box=box)
        point, length = interpolate(delta, stepped, eps, norm)
        logits = torch.nn.functional.conv2d(x + point, weight, padding=1)
        return dice_ce(logits, target), *hard_counts(logits, target), stepped, size, length

    x, gradient, eps = torch.randn(2, 1, 6, 5), torch.randn(2, 1, 6, 5), torch.full((2,), 0.1)
    rest = (gradient, eps, torch.tensor([3, 4]), torch.rand(1, 1, 6, 5) < 0.7, (eps * -10, eps * 10))
    found = []
    for function in (search, torch.compile(search, fullgraph=True, backend="aot_eager")):
        image = x.clone().requires_grad_()
        loss, *others = function(image, *rest)
        found.append([loss, *others, *torch.autograd.grad(loss.sum(), image)])
    assert found[0][-1].abs().max() > 0
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected)


def test_norms_dtypes_and_devices_that_do_not_fit_are_named():
    one, x = torch.ones(2), torch.zeros(2, 1, 4)
    with pytest.raises(UserError, match="'l1'; the norms there are: l2, linf"):
        gradient_step(x, x, alpha=one, eps=one, norm="l1")
    with pytest.raises(UserError, match=r"outer torch\.bfloat16"):
        interpolate(x, x.bfloat16(), one, "l2")
    with pytest.raises(UserError, match="not empty"):
        random_start(x[:0], one[:0], "l2", torch.zeros(0, dtype=torch.int64))
    regions = torch.zeros(2, 1, 4, dtype=torch.bool)
    with pytest.raises(UserError, match="known is on meta"):
        dice_ce(x, Target(regions, regions.to("meta"), Labels(1, True, 5)))


def test_interpolation_of_narrow_dtypes_is_rounded_once():
    inner, outer = torch.zeros(1, 1, 3, dtype=torch.bfloat16), torch.full((1, 1, 3), 100.0, dtype=torch.bfloat16)
    point, size = interpolate(inner, outer, torch.tensor([0.3]), "l2")
    assert point.dtype == torch.bfloat16 and size.item() == pytest.approx(30.0)
