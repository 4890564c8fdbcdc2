"""What makes a step cheaper: the start along the clean gradient."""

import pytest
import torch

from ima_seg import IMASettings
from ima_seg.attacks import Problem
from ima_seg.methods.course import Course
from ima_seg.methods.ima_settings import FAST
from ima_seg.ops import perturbation_size
from ima_seg.types import Labels, Target
from tests.test_ima import SETTINGS, batch_of_all_kinds, cross_entropy, make_ima

MIXED = SETTINGS.model_copy(update={"start": "mixed"})


def counted(network):
    """Numbers of samples that pass through ``network``, one entry per pass."""
    passes = []
    network.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    return passes


@pytest.mark.parametrize("settings", [SETTINGS, MIXED], ids=["random", "mixed"])
def test_parameter_gradients_are_those_of_the_two_losses(settings):
    network, x, y = batch_of_all_kinds()
    report = make_ima(settings).step(network, x, y, list("abcd"), loss=cross_entropy(y))
    got = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    for batch in (x, report.adversarial):
        (cross_entropy(y)(network(batch)) * 0.5).backward()
    for ours, parameter in zip(got, [p for p in network.parameters() if p.grad is not None], strict=True):
        assert torch.equal(ours, parameter.grad)
    assert not x.requires_grad and x.grad is None
    assert not report.adversarial.requires_grad


def test_the_free_gradient_takes_no_pass():
    for settings in (SETTINGS, MIXED):
        network, x, y = batch_of_all_kinds()
        passes = counted(network)
        report = make_ima(settings).step(network, x, y, list("abcd"), loss=cross_entropy(y))
        assert sum(passes) == 2 * len(x) + report.passes.total, "the two training passes and what the report says"
        # A patch without foreground climbs its own loss, one step.
        only = make_ima(settings).step(network, x[2:3], y[2:3], ["c"], loss=cross_entropy(y[2:3]))
        assert only.passes.gradients == 1 and only.passes.forwards == 0
        assert only.distance == pytest.approx(settings.delta, rel=1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("spoiled", [0.0, float("nan"), float("inf")])
def test_starts_stay_within_the_budget_and_are_random_without_a_usable_gradient(norm, spoiled):
    torch.manual_seed(0)
    ima = make_ima(MIXED.model_copy(update={"norm": norm}))
    x, gradient = torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6)
    gradient[1] = spoiled
    gradient[2, 0, 0, 0] = spoiled
    eps = torch.tensor([0.1, 0.3, 0.6, 0.0])
    target = Target.from_raw(torch.zeros(4, 1, 6, 6), ima.labels)
    start = ima._free_step(Problem(torch.nn.Identity(), x, target, ima.threat), gradient, eps)
    size = perturbation_size(start, norm)
    assert torch.isfinite(start).all() and (size <= eps * (1 + 1e-5)).all()
    assert size[0] > 0 and size[3] == 0
    cosine = torch.nn.functional.cosine_similarity(start.flatten(1), gradient.nan_to_num(0, 0, 0).flatten(1))
    assert cosine[0] > 0.7 and size[1] > 0 and cosine[1] < 0.5
    if spoiled == 0:
        assert cosine[2] > 0.7, "a single zero spoils nothing"
    else:
        assert size[2] > 0 and cosine[2] < 0.5


def test_the_scale_of_the_loss_does_not_matter():
    network, x, y = batch_of_all_kinds()
    reports = []
    for scale in (1.0, 65536.0):
        torch.manual_seed(0)
        report = make_ima(MIXED).step(
            network,
            x,
            y,
            list("abcd"),
            loss=cross_entropy(y),
            backward=lambda value, scale=scale: (value * scale).backward(),
        )
        reports.append(report)
    torch.testing.assert_close(reports[0].adversarial, reports[1].adversarial, rtol=1e-3, atol=1e-4)


def test_beta_one_has_no_clean_gradient_and_starts_at_random():
    network, x, y = batch_of_all_kinds()
    report = make_ima(MIXED.model_copy(update={"beta": 1.0})).step(network, x, y, list("abcd"), loss=cross_entropy(y))
    assert report.passes.gradients > 0 and (report.distance[:3] > 0).all()


def test_channels_that_are_no_images_stay_as_they_are():
    from tests.models import TinyUNet

    network, x = TinyUNet(2, channels=3), torch.randn(2, 3, 8, 8)
    y = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    report = make_ima(MIXED, Labels(3), image_channels=2).step(network, x, y, ["a", "b"], loss=cross_entropy(y))
    assert report.background.all() and torch.equal(report.adversarial[:, 2], x[:, 2])
    torch.testing.assert_close(perturbation_size(report.adversarial[:, :2] - x[:, :2], "l2"), report.distance)


@pytest.mark.parametrize("start", ["random", "mixed"])
def test_history_counts_every_pass(start):
    network, x, y = batch_of_all_kinds()
    ima = make_ima(SETTINGS.model_copy(update={"start": start}))
    passes, course = counted(network), Course(ima, native={}, log=print, warn=print)
    for _ in range(2):
        course.tally.add(ima.step(network, x, y, list("abcd"), loss=cross_entropy(y)))
    row = course.end_epoch(seconds=1.0)
    assert row["searched_share"] == 0.5 and row["visits"] == 4
    assert row["passes_per_sample"] == pytest.approx(sum(passes) / 8 - 2), "all but the two training passes"
    assert row["passes_per_sample"] == row["forwards_per_sample"] + row["gradients_per_sample"]


def test_the_fast_trainer_has_the_fast_settings():
    import nnunet_trainers

    assert nnunet_trainers.nnUNetTrainerIMA_fast.preset == FAST
    assert FAST.steps <= IMASettings().steps and "nnUNetTrainerIMA_fast" in nnunet_trainers.__all__
