"""What training perturbs is what evaluation does: within body and clip range, images only, in every method."""

import pytest
import torch
import torch.nn.functional as F

from ima_seg import methods
from ima_seg.attacks import Problem, pgd
from ima_seg.errors import UserError
from ima_seg.types import Labels, Target, ThreatModel
from tests.models import TinyUNet

LOW, HIGH = -0.5, 0.8
#: A CT channel that is clipped, one that is masked, and the mask of a cascade.
GIVEN = {"image_channels": 2, "bounds": [(LOW, HIGH), None], "masked": [1]}


def batch(dims):
    torch.manual_seed(0)
    shape = (12,) * dims
    x = torch.randn(4, 3, *shape)
    # Augmentation leaves some voxels beyond the bounds.
    x[:, 0].clamp_(LOW - 0.2, HIGH + 0.2)
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[(slice(3, 9),) * dims] = True
    x[:, 1] *= inside
    y = torch.zeros(4, 1, *shape, dtype=torch.long)
    y[(slice(None), slice(None), *(slice(4, 8),) * dims)] = 1
    return TinyUNet(dims, channels=3, outputs=2).eval(), x, y, inside


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", [*methods.METHODS, *methods.PRESETS])
def test_every_method_perturbs_what_evaluation_does_and_nothing_else(name, norm, dims):
    network, x, y, inside = batch(dims)
    preset = methods.registry.preset(name)
    sizes = {"delta": 0.5, "eps_max": 0.9} if isinstance(preset, methods.IMASettings) else {"eps": 0.5}
    more = {"criterion": "loss", "tau": 100.0, "share": 1.0} if isinstance(preset, methods.IMASettings) else {}
    settings = preset.model_copy(update={"norm": norm, "precision": "fp32", **sizes, **more})
    method = methods.make_method(settings, labels=Labels(2), patch_voxels=2 * 12**dims, epochs=4, **GIVEN)
    seen = []

    def forward(module, given):
        seen.append(given.detach().clone())
        return module(given)

    method.step(
        network, x, y, list("abcd"), loss=lambda z, rows: F.cross_entropy(z, y[rows, 0]), forward=forward,
        update=lambda: None,
    )  # fmt: skip
    changed = [part - x for given in seen for part in given.split(4) if len(part) == 4]
    moved = torch.stack([difference.abs().amax(0) for difference in changed]).amax(0)
    assert moved[0][inside].max() > 0.05 and moved[1][inside].max() > 0.05, "the attack did something"
    assert not moved[2].any(), "masks are no images"
    assert not moved[:, ~inside].any(), "outside the body nothing is perturbed"
    for given in seen:
        for part in given.split(4):
            beyond = (part[:, 0] > x[:, 0].clamp_min(HIGH) + 1e-6) | (part[:, 0] < x[:, 0].clamp_max(LOW) - 1e-6)
            assert not beyond.any(), "clipped values reach no network"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_bounds_are_the_clipping_that_evaluation_attacks_through(norm):
    network, x, y, _ = batch(2)
    x[:, 0].clamp_(LOW, HIGH)
    target = Target.from_raw(y, Labels(2))

    def clipping(z):
        return network(torch.cat([z[:, :1].clamp(LOW, HIGH), z[:, 1:]], 1))

    found = []
    for model, bounds in ((network, ((LOW, HIGH),)), (clipping, ())):
        torch.manual_seed(1)
        problem = Problem(model, x, target, ThreatModel(norm, 1, bounds), precision="fp32")
        found.append(pgd(problem, 0.7, steps=5, keep="last").adversarial)
    assert (found[1][:, 0] > HIGH).any(), "some of the budget lies beyond the range"
    torch.testing.assert_close(found[0][:, 0], found[1][:, 0].clamp(LOW, HIGH), rtol=0, atol=1e-5)


def test_beyond_bounds_a_gradient_does_not_reach_the_perturbation():
    x = torch.tensor([[[0.0, 0.7, 0.9]]])
    problem = Problem(lambda z: torch.stack([z, -z], 1)[:, :, 0], x, Target.from_raw(torch.zeros(1, 1, 3), Labels(2)),
                      ThreatModel("l2", None, ((LOW, HIGH),)))  # fmt: skip
    delta = torch.tensor([[[0.1, 0.3, -0.05]]])
    # The last lies beyond the bounds already; it may move back, not further out.
    torch.testing.assert_close(problem.apply(delta), torch.tensor([[[0.1, 0.8, 0.85]]]))
    assert problem.through(torch.ones(1, 1, 3), delta).tolist() == [[[1.0, 0.0, 1.0]]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bounds": ((1.0, 1.0),)}, r"bounds of a channel are \(1.0, 1.0\)"),
        ({"bounds": ((float("nan"), 1.0),)}, "the first must be less"),
    ],
)
def test_bounds_that_leave_nothing_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ThreatModel(**values)


def test_a_masked_channel_must_exist():
    with pytest.raises(UserError, match="masked names channel 3, but the batch has 2 channels"):
        ThreatModel(masked=(3,)).support(torch.zeros(1, 2, 4))
