"""Classifiers, against a linear one whose boundary is known."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from ima_seg import IMA, Classes, IMASettings, Labels, Target, ThreatModel, UserError
from ima_seg.attacks import (
    GOALS,
    UNTARGETED,
    Problem,
    SearchSettings,
    apgd,
    boundary_search,
    class_quality,
    disappear,
    fgsm,
    gaussian_noise,
    ifgsm,
    minimal_norm,
    passes,
    pgd,
    square,
    uniform_noise,
    vafa,
)
from ima_seg.attacks.losses import class_ce_loss
from ima_seg.attacks.passes import begin
from ima_seg.ops import perturbation_size
from tests.models import Linear
from tests.test_graphs import Replayed

SETTINGS = IMASettings(
    eps_max=2.0, delta=0.1, steps=10, start="random", refine_steps=8, refine_tolerance=0.01, share=1.0, precision="fp32"
)
SHAPE = (1, 6, 5)
norms = pytest.mark.parametrize("norm", ["l2", "linf"])


def problem(batch=8, multilabel=False, outputs=3, **options):
    """A linear network, images and what it answers, so that all are right."""
    network, x = Linear(outputs, SHAPE, **options), torch.randn(batch, *SHAPE)
    classes = Classes(outputs, multilabel)
    logits = network.eval()(x)
    y = (logits > 0).long() if multilabel else logits.argmax(1)
    network.train()
    return network, x, y, Target.from_raw(y, classes)


def search(network, x, target, eps, norm="l2", **options):
    clean = class_quality(network(x).detach(), target)[0]
    settings = SearchSettings(steps=40, refine_steps=10, refine_tolerance=0.01)
    return boundary_search(
        Problem(network, x, target, ThreatModel(norm), precision="fp32"),
        eps,
        threshold=torch.zeros_like(clean),
        clean_quality=clean,
        settings=settings,
        **options,
    )


def cross_entropy(y):
    if y.ndim == 2:
        return lambda logits, rows=slice(None): F.binary_cross_entropy_with_logits(logits, y[rows].to(logits.dtype))
    return lambda logits, rows=slice(None): F.cross_entropy(logits, y[rows])


def make_ima(classes, settings=SETTINGS):
    return IMA.from_settings(settings, labels=classes, patch_voxels=math.prod(SHAPE), epochs=10)


# --- targets, losses, qualities --------------------------------------------------------------------------------------


def test_classes_may_come_as_a_column_of_any_dtype():
    y = torch.tensor([2, 0, 1])
    wanted = Target.from_raw(y, Classes(3)).reference
    for raw in (y[:, None], y.float(), y.to(torch.uint8)):
        assert torch.equal(Target.from_raw(raw, Classes(3)).reference, wanted)
    many = Target.from_raw(torch.tensor([299]), Classes(300))
    assert many.onehot[0, :, 0].nonzero().item() == 299


@pytest.mark.parametrize(
    ("raw", "classes", "message"),
    [
        (torch.zeros(2, 1, 4, 4), Classes(2), r"shape \(2, 1, 4, 4\); expected classes"),
        (torch.zeros(2, 2), Classes(2), r"expected classes \(B,\) or \(B, 1\)"),
        (torch.zeros(2), Classes(2, multilabel=True), r"expected labels \(B, 2\)"),
        (torch.tensor([0, 3]), Classes(3), "holds 3; its classes are 0 to 2"),
        (torch.tensor([-1]), Classes(3), "holds -1"),
        (torch.tensor([[0.5, 1]]), Classes(2, multilabel=True), r"holds 0.5; labels are 0 or 1"),
    ],
)
def test_references_that_are_none(raw, classes, message):
    with pytest.raises(UserError, match=message):
        Target.from_raw(raw, classes)


def test_a_single_label_is_enough_but_not_a_single_class():
    assert Classes(1, multilabel=True).regions
    with pytest.raises(UserError, match="classes need 2 or more"):
        Classes(1)


@pytest.mark.parametrize("multilabel", [False, True])
def test_loss_and_quality_equal_float64_written_out(multilabel):
    _, _, y, target = problem(multilabel=multilabel, outputs=4)
    z = 5 * torch.randn(8, 4, dtype=torch.float64)
    loss, quality = [], []
    for row, answer in zip(z.tolist(), y.tolist(), strict=True):
        if multilabel:
            signed = [v if a else -v for v, a in zip(row, answer, strict=True)]
            loss.append(sum(math.log1p(math.exp(-v)) for v in signed) / 4)
            quality.append(min(signed))
        else:
            loss.append(math.log(sum(math.exp(v) for v in row)) - row[answer])
            quality.append(row[answer] - max(v for k, v in enumerate(row) if k != answer))
    expected = torch.tensor(loss, dtype=torch.float64)
    torch.testing.assert_close(class_ce_loss(z, target), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(UNTARGETED.loss(z.float(), target, 0.0), expected.float())
    torch.testing.assert_close(GOALS["ce"].loss(z.float(), target, 0.0), expected.float())
    torch.testing.assert_close(class_quality(z, target)[0], torch.tensor(quality))
    assert class_ce_loss(z.bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize("goal", ["margin", "segpgd", "cospgd", "masked_ce", "balanced_ce", "js"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_every_loss_is_that_of_an_image_of_one_voxel(goal, multilabel):
    _, _, y, target = problem(multilabel=multilabel, outputs=4)
    voxel = Target.from_raw(y[..., None] if multilabel else y[:, None, None], Labels(4, regions=multilabel))
    z = torch.randn(8, 4)
    torch.testing.assert_close(GOALS[goal].loss(z, target, 0.4), GOALS[goal].loss(z[..., None], voxel, 0.4))


def test_a_tie_is_wrong_where_the_prediction_is_another():
    target = Target.from_raw(torch.tensor([0, 1]), Classes(2))
    quality, _ = class_quality(torch.zeros(2, 2), target)
    assert quality[0] == 0 and -1e-5 < quality[1] < 0
    assert GOALS["ce"].damage(torch.zeros(2, 2), target).tolist() == [0, 1]
    labels = Target.from_raw(torch.tensor([[0], [1]]), Classes(1, multilabel=True))
    quality, _ = class_quality(torch.zeros(2, 1), labels)
    assert quality[0] == 0 and quality[1] < 0


def test_logits_that_are_not_finite_are_no_quality():
    target = Target.from_raw(torch.tensor([0, 1, 1]), Classes(2))
    logits = torch.tensor([[math.nan, 0.0], [math.inf, math.inf], [0.0, 1.0]])
    quality, sane = class_quality(logits, target)
    assert sane.tolist() == [False, False, True] and torch.isfinite(quality).all() and (quality[:2] < -100).all()


def test_outputs_that_fit_no_classifier_are_named():
    network, x, _, target = problem()
    with pytest.raises(UserError, match=r"shape \(8, 3, 1\); the reference of a classifier expects.*\(8, 3\)"):
        pgd(Problem(lambda x: network(x)[..., None], x, target), torch.ones(8), steps=1)
    with pytest.raises(UserError, match="8 samples of classes"):
        pgd(Problem(network, x[:4], target), torch.ones(4), steps=1)
    with pytest.raises(UserError, match="those of a segmentation"):
        pgd(Problem(network, x, target, goal=disappear(0)), torch.ones(8), steps=1)


# --- attacks

ATTACKS = {
    "fgsm": (fgsm, {}),
    "ifgsm": (ifgsm, {"steps": 8}),
    "pgd": (pgd, {"steps": 8}),
    "apgd": (apgd, {"steps": 12}),
    "square": (square, {"queries": 300}),
    "vafa": (vafa, {"steps": 8}),
}


@norms
@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("attack,options", [v for k, v in ATTACKS.items() if k != "vafa"], ids=[*ATTACKS][:-1])
def test_attacks_reduce_accuracy_within_the_budget_but_not_below_the_distance(attack, options, norm, multilabel):
    network, x, y, target = problem(multilabel=multilabel)
    true = network.distance(x, y, norm)
    near = attack(Problem(network, x, target, ThreatModel(norm)), 0.99 * true, **options)
    assert (near.damage == 0).all(), "no image has a boundary nearer than its distance"
    # A random search is weaker, and the way that the mean loss takes is not the shortest to the nearest boundary.
    eps = true * (2.5 if attack is square else 1.3)
    hit = attack(Problem(network, x, target, ThreatModel(norm)), eps, **options)
    assert (perturbation_size(hit.adversarial - x, norm) <= eps * (1 + 1e-4)).all()
    logits = network(hit.adversarial)
    answers = (logits > 0).long() if multilabel else logits.argmax(1)
    wrong = (answers != y).view(8, -1).float().mean(1)
    torch.testing.assert_close(hit.damage, wrong)
    assert (wrong > 0).float().mean() >= 0.85


def test_two_classes_are_confused_exactly_at_the_distance():
    network, x, y, target = problem(outputs=2)
    for norm in ("l2", "linf"):
        true = network.distance(x, y, norm)
        for attack, options in ((fgsm, {}), (ifgsm, {"steps": 8}), (pgd, {"steps": 8, "start": False})):
            for share, damage in ((0.999, 0), (1.001, 1)):
                hit = attack(Problem(network, x, target, ThreatModel(norm)), share * true, **options)
                assert (hit.damage == damage).all(), (norm, attack, share)


def test_noise_and_vafa_take_classifiers():
    network, x, y, target = problem()
    for attack, options in ((gaussian_noise, {"restarts": 3}), (uniform_noise, {}), (vafa, {"steps": 3})):
        hit = attack(Problem(network, x, target), 0.5, **options)
        expected = (network(hit.adversarial).argmax(1) != y).float()
        torch.testing.assert_close(hit.damage, expected)


@pytest.mark.parametrize("multilabel", [False, True])
def test_batched_equals_one_at_a_time(multilabel):
    network, x, _, target = problem(multilabel=multilabel)
    network, x = network.double(), x.double()  # the bracket of the boundary closes differently by rounding
    eps = torch.linspace(0.1, 1.0, 8)
    together = search(network, x, target, eps, start=torch.zeros_like(x))
    attacked = apgd(Problem(network, x, target), eps, steps=5, start=False)
    for i in range(8):
        row = torch.tensor([i])
        alone = search(network, x[row], target[row], eps[row], start=torch.zeros_like(x[row]))
        torch.testing.assert_close(alone.adversarial[0], together.adversarial[i], rtol=1e-4, atol=1e-5)
        assert alone.crossed[0] == together.crossed[i]
        alone = apgd(Problem(network, x[row], target[row]), eps[row], steps=5, start=False)
        torch.testing.assert_close(alone.adversarial[0], attacked.adversarial[i], rtol=1e-4, atol=1e-5)


@norms
@pytest.mark.parametrize("multilabel,outputs", [(False, 2), (True, 1)])
def test_search_finds_the_boundary_at_its_distance_in_few_forwards(norm, multilabel, outputs):
    network, x, y, target = problem(multilabel=multilabel, outputs=outputs)
    true = network.distance(x, y, norm)
    found = search(network, x, target, 2 * true, norm, start=torch.zeros_like(x))
    assert found.crossed.all()
    assert (found.distance >= true * (1 - 1e-4)).all() and (found.distance <= true * 1.0102).all()
    refining = found.passes.forwards / 8
    assert refining <= 4, "a quality that is linear along the way has its root by regula falsi at once"


def test_minimal_norm_measures_the_distance():
    network, x, y, target = problem(outputs=2)
    true = network.distance(x, y, "l2")
    y = torch.cat([y[:7], 1 - y[7:]])
    target = Target.from_raw(y, Classes(2))
    clean = class_quality(network(x).detach(), target)[0]
    found = minimal_norm(Problem(network, x, target), 3 * true, threshold=torch.zeros(8), clean_quality=clean, rounds=8)
    assert found.broken.all() and found.foreground.all() and found.crossing[7] == 0
    torch.testing.assert_close(found.crossing[:7], true[:7], rtol=0.02, atol=0)


def test_captured_passes_do_the_same(monkeypatch):
    network, x, _, target = problem()
    given = Problem(network, x, target)
    plain = pgd(given, 0.6, steps=5, start=False)
    with Replayed() as graphs:
        captured = [pgd(given, 0.6, steps=5, start=False) for _ in range(2)]
    assert graphs.replays > 0
    for result in captured:
        torch.testing.assert_close(result.adversarial, plain.adversarial)


def test_scale_of_the_loss_in_float16_begins_at_one(monkeypatch):
    network, x, _, target = problem()
    given = Problem(network, x, target, precision="fp32")
    seen = []
    monkeypatch.setattr(
        passes,
        "begin",
        lambda problem, delta, scale, progress: seen.append(scale) or begin(problem, delta, scale, progress),
    )
    passes.Passes(given).at(given.zero())
    assert torch.equal(seen[0], torch.ones(8)), "the loss is no mean over voxels, whose number would overflow"


def test_targets_and_goals_can_be_sent_to_other_processes():
    target = problem()[3]
    assert pickle.loads(pickle.dumps(target)).labels == Classes(3) != Labels(3)
