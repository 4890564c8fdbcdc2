"""IMA training of classifiers."""

import pytest
import torch
import torch.nn.functional as F

from ima_seg import IMA, Classes, IMASettings, Target, UserError
from ima_seg.attacks import (
    class_quality,
)
from ima_seg.ops import perturbation_size
from tests.test_classification import SETTINGS, cross_entropy, make_ima, norms, problem

# --- training


@pytest.mark.parametrize("multilabel", [False, True])
def test_right_images_are_searched_and_wrong_ones_left_alone(multilabel):
    network, x, y, _ = problem(multilabel=multilabel)
    y = y.clone()
    y[5:] = 1 - y[5:] if multilabel else (y[5:] + 1) % 3
    ima = make_ima(Classes(3, multilabel))
    ima.ledger.register("abcdefgh")
    for record in ima.ledger.cases.values():
        record.margin = 0.3
    report = ima.step(network, x, y, "abcdefgh", loss=cross_entropy(y))
    right = torch.arange(8) < 5
    assert torch.equal(report.searched, right) and torch.equal(report.below, ~right) and not report.background.any()
    moved = perturbation_size(report.adversarial - x, "l2")
    assert (moved[5:] == 0).all() and (moved[:5] > 0).all()
    near = network.distance(x, y, "l2")[:5] < 0.25
    assert near.any() and report.crossed[:5][near].all()
    answers = network(report.adversarial)
    answers = (answers > 0).long() if multilabel else answers.argmax(1)
    changed = (answers != y).view(8, -1).any(1)
    assert torch.equal(changed[:5], report.crossed[:5])
    after = class_quality(network(report.adversarial).detach(), Target.from_raw(y, Classes(3, multilabel)))[0]
    before = class_quality(network(x).detach(), Target.from_raw(y, Classes(3, multilabel)))[0]
    assert (after > -0.05 * before)[:5].all(), "those that crossed stay next to the boundary"
    ima.end_epoch()
    margins = ima.ledger.get("abcdefgh")
    assert (margins[5:] == 0.3).all() and (margins[:5] != 0.3).all()
    assert [record.visits for record in ima.ledger.cases.values()] == [1] * 5 + [0] * 3


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradient_is_that_of_the_papers_loss(multilabel, batch_norm):
    network, x, y, _ = problem(multilabel=multilabel, batch_norm=batch_norm)
    y = y.clone()
    y[5:] = 1 - y[5:] if multilabel else (y[5:] + 1) % 3
    if batch_norm:
        network.norm.momentum = 0.0  # else the first pass would change what is right in evaluation mode
    beta = 0.3
    ima = make_ima(Classes(3, multilabel), SETTINGS.model_copy(update={"beta": beta}))
    report = ima.step(network, x, y, "abcdefgh", loss=cross_entropy(y))
    assert report.searched.tolist() == [True] * 5 + [False] * 3
    ours = [p.grad.clone() for p in network.parameters()]

    def each(logits):
        if multilabel:
            return F.binary_cross_entropy_with_logits(logits, y.float(), reduction="none").mean(1)
        return F.cross_entropy(logits, y, reduction="none")

    clean, adversarial = each(network(x)), each(network(report.adversarial))
    direct = (1 - beta) * clean.sum() / 8 + beta * adversarial[:5].sum() / 8
    for got, expected in zip(ours, torch.autograd.grad(direct, list(network.parameters())), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(report.adversarial_loss, adversarial.mean().detach())


def test_where_none_is_right_the_clean_loss_keeps_its_weight():
    network, x, y, _ = problem()
    y = (y + 1) % 3
    report = make_ima(Classes(3)).step(network, x, y, "abcdefgh", loss=cross_entropy(y))
    assert report.adversarial is None and report.below.all()
    got = network.weight.grad.clone()
    (expected,) = torch.autograd.grad(0.5 * cross_entropy(y)(network(x)), network.weight)
    torch.testing.assert_close(got, expected)


@norms
@pytest.mark.parametrize("multilabel,outputs", [(False, 2), (True, 1)])
def test_margins_settle_at_the_distance(norm, multilabel, outputs):
    network, x, y, _ = problem(multilabel=multilabel, outputs=outputs)
    x, y = (torch.cat([part, part[:1]]) for part in (x, y))
    y[8] = 1 - y[8]
    settings = SETTINGS.model_copy(update={"norm": norm, "delta": 0.02, "rule": "paper"})
    ima = make_ima(Classes(outputs, multilabel), settings)
    # L-infinity walks from a random start have most voxels at their bound: a little above the distance.
    true = network.distance(x[:8], y[:8], norm)
    for _ in range(60):
        ima.step(network, x, y, "abcdefghi", loss=cross_entropy(y))
        summary = ima.end_epoch()
    assert summary.equilibrium, "a network that does not train has fixed boundaries"
    margins = ima.ledger.get("abcdefghi")
    assert margins[8] == pytest.approx(0.02), "the margin of a wrong image does not move"
    assert (margins[:8] >= true - 0.001).all() and (margins[:8] <= true * 1.05 + 0.025).all()


def test_what_is_right_is_asked_of_the_network_that_is_searched():
    network, x, y, _ = problem(batch_norm=True)
    network.norm.running_mean.copy_(torch.tensor([100.0, 0, 0]))  # in evaluation mode it never answers 0
    y = network(x).argmax(1)
    running = network.norm.running_mean.clone()
    report = make_ima(Classes(3)).step(network, x, y, "abcdefgh", loss=cross_entropy(y))
    assert network.training and (y == 0).any()
    assert not report.searched[y == 0].any() and not torch.equal(network.norm.running_mean, running)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"criterion": "loss", "tau": 0.5}, "criterion is 'loss', which is for segmentations"),
        ({"criterion": "relative", "tau": 0.7}, "tau is 0.7"),
        ({"beta": 1}, "beta is 1"),
    ],
)
def test_settings_of_segmentations_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        make_ima(Classes(3), IMASettings(**values))


@pytest.mark.parametrize("dims", [2, 3])
def test_networks_of_monai_take_a_step(dims):
    from monai.networks.nets import DenseNet121, resnet10

    if dims == 2:
        network, x = DenseNet121(spatial_dims=2, in_channels=1, out_channels=3), torch.randn(3, 1, 40, 32)
    else:
        network = resnet10(spatial_dims=3, n_input_channels=2, num_classes=3, widen_factor=0.25)
        x = torch.randn(3, 2, 24, 16, 16)
    with torch.no_grad():
        network.eval()
        y = network(x).argmax(1)
        network.train()
    y[0] = (y[0] + 1) % 3
    ima = IMA.from_settings(
        IMASettings(steps=2, precision="fp32", share=1.0), labels=Classes(3), patch_voxels=x[0].numel(), epochs=10,
        image_channels=1,
    )  # fmt: skip
    state = {name: value.clone() for name, value in network.state_dict().items() if "running" not in name}
    report = ima.step(network, x, y, "abc", loss=cross_entropy(y))
    assert report.searched.tolist() == [False, True, True] and torch.isfinite(report.loss)
    assert torch.equal(report.adversarial[0], x[0]) and torch.equal(report.adversarial[:, 1:], x[:, 1:])
    assert (report.distance[1:] > 0).all() and network.training
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    assert all(torch.equal(state[n], v) for n, v in network.state_dict().items() if n in state and "tracked" not in n)
