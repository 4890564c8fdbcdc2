"""What counts as crossed: an absolute Dice, a share of the clean one, or a loss."""

import pytest
import torch

from ima_seg import IMASettings, UserError
from ima_seg.attacks import Problem, SearchSettings, boundary_search
from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.attacks.quality import loss_quality
from ima_seg.methods.ima_settings import AMAT
from ima_seg.ops import hard_dice
from ima_seg.types import Labels, Target
from tests.test_boundary import hyperplane_problem, trained_unet
from tests.test_ima import SETTINGS, batch_of_all_kinds, cross_entropy, make_ima

PRECISE = {"refine_steps": 30, "refine_tolerance": 1e-4}


def test_search_finds_where_the_loss_reaches_the_threshold():
    network, x, target = hyperplane_problem((9, 7))
    straight = network.weight.detach() / network.weight.detach().square().mean().sqrt()
    threshold = 0.8  # of the loss, counted from -1, where all is right
    low, high = torch.zeros(len(x)), torch.full((len(x),), 3.0)
    for _ in range(40):  # the loss rises along the way to the boundary, the shortest one
        middle = (low + high) / 2
        over = 1 + dice_ce_loss(network(x - middle.view(-1, 1, 1, 1) * straight), target).detach() > threshold
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    clean = -1 - dice_ce_loss(network(x), target).detach()
    searched = clean > -threshold
    assert searched.sum() > 0 and not torch.allclose(high, network.distance(x, "l2").detach(), rtol=0.1)
    found = boundary_search(
        Problem(network, x, target, precision="fp32"),
        3.0,
        threshold=torch.full((len(x),), -threshold),
        clean_quality=clean,
        searched=searched,
        settings=SearchSettings(steps=40, **PRECISE),
        quality=loss_quality,
        start=torch.zeros_like(x),
    )
    assert torch.equal(found.crossed, searched)
    loss = 1 + dice_ce_loss(network(found.adversarial), target).detach()
    torch.testing.assert_close(loss[searched], torch.full_like(loss[searched], threshold), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.distance[searched], high[searched], rtol=0.02, atol=0)


def test_loss_that_is_not_finite_is_no_quality():
    logits = torch.zeros(2, 2, 4, 4)
    logits[1, 0, 0, 0] = torch.nan
    quality, sane = loss_quality(logits, Target.from_raw(torch.zeros(2, 1, 4, 4), Labels(2)))
    assert sane.tolist() == [True, False] and torch.isfinite(quality).all() and quality[1] < -100


def test_a_perfect_patch_has_a_loss_of_0_whichever_classes_it_has():
    labels = torch.zeros(3, 1, 6, 6, dtype=torch.long)
    labels[0, 0, :3], labels[1, 0, :2], labels[1, 0, 4:] = 1, 1, 2
    logits = 8 * torch.nn.functional.one_hot(labels[:, 0], 3).permute(0, 3, 1, 2).float()
    quality, _ = loss_quality(logits, Target.from_raw(labels, Labels(3)))
    torch.testing.assert_close(quality, torch.zeros(3), rtol=0, atol=0.01)


@pytest.mark.parametrize(("criterion", "tau"), [("relative", 0.9), ("loss", 0.7)])
def test_a_step_leaves_patches_where_the_criterion_says(criterion, tau):
    network, x, y = batch_of_all_kinds()
    settings = SETTINGS.model_copy(update={"criterion": criterion, "tau": tau, "steps": 20, **PRECISE})
    ima = make_ima(settings)
    for case in "ab":
        ima.ledger.register([case])
        ima.ledger.cases[case].margin = 1.0
    target = Target.from_raw(y, Labels(2))
    clean = network(x).detach()
    report = ima.step(network, x, y, list("abcd"), loss=cross_entropy(y))
    after = network(report.adversarial).detach()
    assert report.searched[:2].all() and report.background[2] and report.crossed[:2].all()
    if criterion == "loss":
        assert report.below.tolist() == [False, False, False, True] and dice_ce_loss(clean, target)[3] > tau - 1
        torch.testing.assert_close(1 + dice_ce_loss(after, target)[:2], torch.full((2,), tau), rtol=0, atol=0.01)
    else:
        dice, limit = hard_dice(after, target)[:2], tau * hard_dice(clean, target)[:2]
        assert (dice < limit).all() and (dice > limit - 0.1).all()


def test_relative_to_nothing_is_below():
    network, x, y = batch_of_all_kinds()
    ima = make_ima(SETTINGS.model_copy(update={"criterion": "relative", "tau": 0.5}))
    reference = torch.zeros_like(y)
    reference[:, :, :1, :1] = 1  # a corner where the network predicts nothing
    report = ima.step(network, x, reference, list("abcd"), loss=cross_entropy(reference))
    assert report.below.all() and report.adversarial is None


def test_amat_never_moves_back():
    network, _, target = trained_unet(2)
    x, y = trained_unet(2)[1], target.onehot[:, 1].view(6, 1, 16, 16).long()
    ima = make_ima(AMAT.model_copy(update={"delta": 0.2, "eps_max": 2.0, "precision": "fp32"}))
    margins = [ima.ledger.get(list("abcdef"))]
    for _ in range(15):
        ima.step(network, x, y, list("abcdef"), loss=cross_entropy(y))
        ima.end_epoch()
        margins.append(ima.ledger.get(list("abcdef")))
    steps = torch.stack(margins).diff(dim=0)
    assert ((steps.abs() < 1e-6) | ((steps - 0.2).abs() < 1e-6)).all()
    assert (steps[-1].abs() < 1e-6).all() and (margins[-1] < 2.0).all(), "margins stand at the boundary"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": 1.2}, "above 0 and below 1"),
        ({"criterion": "relative", "tau": 0}, "above 0 and below 1"),
        ({"criterion": "loss", "tau": -1}, "must be above 0"),
        ({"criterion": "iou"}, "criterion = 'iou'"),
    ],
)
def test_thresholds_that_make_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        IMASettings.parse(values, source="here")
