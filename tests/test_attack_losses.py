"""What attacks climb: losses and goals."""

import math
import pickle

import pytest
import torch

from ima_seg.attacks import GOALS, Problem, apgd, appear, disappear, pgd
from ima_seg.attacks.goals import lost_dice
from ima_seg.errors import UserError
from ima_seg.types import Labels, Target, ThreatModel
from tests.test_attacks import norms
from tests.test_boundary import trained_unet


def answers(logits, raw, labels):
    """(sample, probabilities, the reference's, lead of the best other, its class) of decisions in float64."""
    for b in range(len(logits)):
        for v in range(logits.shape[2]):
            z = logits[b, :, v].double()
            if labels.regions and not (labels.ignore_label is not None and raw[b, -1, v]):
                for k, value in enumerate(z.tolist()):
                    p = 1 / (1 + math.exp(-value))
                    y = 0 if raw[b, k, v] else 1
                    yield b, [p, 1 - p], y, -value if y == 0 else value, (k, y)
            elif not labels.regions and int(raw[b, 0, v]) < labels.outputs:
                y = int(raw[b, 0, v])
                p = z.softmax(0).tolist()
                lead = max(z[k].item() for k in range(len(z)) if k != y) - z[y].item()
                yield b, p, y, lead, y


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def expected_loss(name, p, y, lead, progress, weight):
    entropy = -math.log(p[y])
    onehot = [float(k == y) for k in range(len(p))]
    middle = [(a + b) / 2 for a, b in zip(p, onehot, strict=True)]
    share = progress / 2
    return {
        "ce": entropy,
        "margin": lead,
        "segpgd": entropy * (share if lead > 0 else 1 - share),
        "cospgd": entropy * p[y] / math.sqrt(sum(a * a for a in p)),
        "masked_ce": 0.0 if lead > 0 else entropy,
        "balanced_ce": entropy * weight,
        "js": (kl(p, middle) + kl(onehot, middle)) / 2,
    }[name]


@pytest.mark.parametrize("name", [name for name in GOALS if name != "dice_ce"])
@pytest.mark.parametrize("regions,outputs", [(False, 2), (False, 4), (True, 2)])
@pytest.mark.parametrize("ignore", [False, True])
def test_losses_equal_loops_over_the_voxels(name, regions, outputs, ignore):
    labels = Labels(outputs, regions, outputs if ignore else None)
    raw = torch.randint(0, 2 if regions else outputs + ignore, (2, outputs + ignore if regions else 1, 15))
    logits = (2 * torch.randn(2, outputs, 15)).requires_grad_(True)
    target, progress = Target.from_raw(raw, labels), 0.6
    decisions = list(answers(logits.detach(), raw, labels))
    expected = []
    for b in range(2):
        mine = [(p, y, lead) for sample, p, y, lead, _ in decisions if sample == b]
        classes = [answer for sample, _, _, _, answer in decisions if sample == b]
        rarest = min(classes.count(c) for c in classes)
        values = [
            expected_loss(name, p, y, lead, progress, rarest / classes.count(c))
            for (p, y, lead), c in zip(mine, classes, strict=True)
        ]
        expected.append(sum(values) / len(values))
    loss = GOALS[name].loss(logits, target, progress)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(gradient).all()
    if ignore:
        hidden = raw[:, -1:].bool() if regions else raw == outputs
        assert (gradient * hidden == 0).all()
        ignored = Target.from_raw(torch.ones_like(raw) if regions else torch.full_like(raw, outputs), labels)
        logits = logits.detach().requires_grad_(True)
        nothing = GOALS[name].loss(logits, ignored, progress)
        assert (nothing == 0).all() and (torch.autograd.grad(nothing.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("name", GOALS)
def test_saturated_logits_have_finite_losses_and_gradients(name):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])[None].requires_grad_(True)
    target = Target.from_raw(torch.zeros(1, 1, 3), Labels(3))
    loss = GOALS[name].loss(logits, target, 0.5)
    assert torch.isfinite(loss).all() and torch.isfinite(torch.autograd.grad(loss.sum(), logits)[0]).all()


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_targeted_goals_equal_loops_over_the_voxels(regions, ignore):
    outputs = 3
    labels = Labels(outputs, regions, outputs if ignore else None)
    raw = torch.randint(0, 2 if regions else outputs + ignore, (2, outputs + ignore if regions else 1, 15))
    raw[1, 0] = 0  # the second sample has none of it
    logits = torch.randn(2, outputs, 15)
    index, channel = (0, 0) if regions else (0, 1)
    target = Target.from_raw(raw, labels)
    for goal, inside in ((disappear(index), True), (appear(index), False)):
        goal = pickle.loads(pickle.dumps(goal))
        for b in range(2):
            climbed, hits, count = 0.0, 0, 0
            for v in range(15):
                skip = ignore and (raw[b, -1, v] == 1 if regions else raw[b, 0, v] == outputs)
                member = bool(raw[b, channel, v]) if regions else int(raw[b, 0, v]) == channel
                if skip or member != inside:
                    continue
                z = logits[b, :, v].tolist()
                ahead = z[channel] - (0 if regions else max(z[k] for k in range(outputs) if k != channel))
                climbed += min(-ahead, 0.5) if inside else 1 / (1 + math.exp(-ahead))
                hits += (ahead <= 0) if inside else (ahead > 0)
                count += 1
            torch.testing.assert_close(goal.loss(logits, target, 0.0)[b].item(), climbed / 15, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(goal.damage(logits, target)[b].item(), hits / max(count, 1))
    with pytest.raises(UserError, match="class_index is 3"):
        disappear(3).damage(logits, target)


@pytest.mark.parametrize("goal", [disappear(0), appear(0)], ids=lambda goal: goal.name)
def test_targeted_attacks_reach_their_goal(goal):
    network, x, target = trained_unet(2)
    clean = goal.damage(network(x).detach(), target)
    hit = apgd(Problem(network, x, target, goal=goal), 1.0, steps=20)
    assert (hit.damage > clean + 0.2).all()


@norms
@pytest.mark.parametrize("name", GOALS)
def test_every_loss_does_damage(name, norm):
    network, x, target = trained_unet(2)
    hit = pgd(Problem(network, x, target, ThreatModel(norm), GOALS[name]), 0.5, steps=10)
    clean = lost_dice(network(x).detach(), target)
    assert (hit.damage > clean + 0.2).all()


def test_a_class_appears_next_to_the_decision_although_most_voxels_are_far_from_it():
    """Most voxels can never flip but answer to the image ten times as strongly; the budget must not go to them."""

    class Ramp(torch.nn.Module):
        def forward(self, x):
            near = torch.arange(x.shape[2]) < 8
            score = torch.where(near, x[:, 0] - 0.3, 10 * x[:, 0] - 100)
            return torch.stack([torch.zeros_like(score), score], 1)

    x = torch.zeros(1, 1, 64)
    target = Target.from_raw(torch.zeros(1, 1, 64), Labels(2))
    hit = pgd(Problem(Ramp(), x, target, goal=appear(0)), torch.tensor([0.2]), steps=10, start=False)
    assert hit.damage.item() == pytest.approx(8 / 64)
