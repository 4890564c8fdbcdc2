"""The methods that IMA is compared with, each against a direct calculation of its formula.

One file: each method's step beside the formula it is compared with, on one batch.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from ima_seg import methods
from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.errors import UserError
from ima_seg.methods.trades import divergence
from ima_seg.types import Classes, Labels, Target
from tests.models import Linear, TinyUNet

LABELS = Labels(3)
IDS = list("abcd")
EPS = 0.2


@pytest.fixture
def start(monkeypatch):
    """Attacks start at this fixed point instead of a random one: (B, 1, 12, 12)."""
    point = 0.05 * torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(
        "ima_seg.attacks.problem.random_start", lambda like, radius, norm, seeds, mask=None: point[-len(like) :]
    )
    return point


def problem(heads=False):
    torch.manual_seed(0)
    network = TinyUNet(2, heads=heads).eval()
    return network, torch.randn(4, 1, 12, 12), torch.randint(0, 3, (4, 1, 12, 12))


def training_loss(y):
    """Cross-entropy over all heads, the coarse ones weighted by half."""

    def loss(output, rows=slice(None)):
        if not isinstance(output, (list, tuple)):
            return F.cross_entropy(output, y[rows, 0])
        coarse = F.interpolate(y[rows].float(), output[1].shape[2:]).long()
        return F.cross_entropy(output[0], y[rows, 0]) + F.cross_entropy(output[1], coarse[:, 0]) / 2

    return loss


def full(output):
    return output[0] if isinstance(output, (list, tuple)) else output


def make(method, labels=LABELS, **settings):
    chosen = method.settings_class(**{"eps": EPS, "precision": "fp32", **settings})
    return method.from_settings(chosen, labels=labels, patch_voxels=144, epochs=10)


def refuse():
    raise AssertionError("no update within this step")


def step(method, network, x, y, update=refuse, **options):
    """Report and parameter gradients of one step."""
    network.zero_grad()
    report = method.step(network, x, y, IDS[: len(x)], loss=training_loss(y), update=update, **options)
    return report, [p.grad.clone() for p in network.parameters() if p.grad is not None]


def moved(delta, gradient, alpha, norm):
    """One projected step per sample, written out."""
    result = []
    for d, g in zip(delta, gradient, strict=True):
        if norm == "linf":
            result.append((d + alpha * g.sign()).clamp(-EPS, EPS))
            continue
        d = d + alpha * g / g.square().mean().sqrt()
        result.append(d * min(1.0, EPS / float(d.square().mean().sqrt())))
    return torch.stack(result)


def climbed(network, x, loss, start, steps, alpha, norm="l2"):
    """The perturbed batch after ``steps`` steps on the per-sample ``loss(logits, step)``, from ``start``."""
    delta = start.clone()
    for index in range(steps):
        leaf = (x + delta).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(full(network(leaf)), index).sum(), leaf)
        delta = moved(delta, gradient, alpha, norm)
    return x + delta


def gradients(network, value):
    network.zero_grad()
    value.backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def close(got, expected, atol=1e-6):
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_pgd_training(start, norm, beta):
    network, x, y = problem(heads=True)
    method = make(methods.PGDAT, steps=3, step_factor=2.0, beta=beta, norm=norm)
    report, got = step(method, network, x, y)
    target = Target.from_raw(y, LABELS)
    perturbed = climbed(network, x, lambda z, _: dice_ce_loss(z, target), start, 3, 2 * EPS / 3, norm)
    loss = training_loss(y)
    value = beta * loss(network(perturbed)) + (1 - beta) * loss(network(x))
    close(got, gradients(network, value))
    assert float(report.loss) == pytest.approx(value.item(), rel=1e-5)
    assert (report.passes.gradients, report.passes.forwards) == (12, 0)
    assert report.training == (4 if beta == 1 else 8)


def test_fgsm_training(start):
    network, x, y = problem()
    report, got = step(make(methods.FGSMAT, norm="linf"), network, x, y)
    target = Target.from_raw(y, LABELS)
    perturbed = climbed(network, x, lambda z, _: dice_ce_loss(z, target), start, 1, 1.25 * EPS, "linf")
    close(got, gradients(network, training_loss(y)(network(perturbed))))
    assert report.passes.gradients == 4


def test_segpgd_training_perturbs_the_second_half(start):
    network, x, y = problem()
    report, got = step(make(methods.SegPGDAT, steps=2), network, x, y)

    def segpgd(z, index):
        rows = y[2:, 0]
        each = F.cross_entropy(z, rows, reduction="none")
        share = index / 4  # (t - 1) / 2T, T = 2
        return torch.where(z.argmax(1) == rows, (1 - share) * each, share * each).mean((1, 2))

    perturbed = climbed(network, x[2:], segpgd, start[2:], 2, 4 * EPS / 2)
    close(got, gradients(network, training_loss(y)(network(torch.cat([x[:2], perturbed])))))
    assert report.passes.gradients == 4 and report.training == 4


def test_one_patch_is_perturbed_by_segpgd_training(start):
    network, x, y = problem()
    report, _ = step(make(methods.SegPGDAT, steps=2), network, x[:1], y[:1])
    assert report.passes.gradients == 2


def test_free_training_updates_both_sides_from_one_backward_pass_and_keeps_the_perturbation():
    network, x, y = problem(heads=True)
    other = copy.deepcopy(network)
    optimiser = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)

    def update():
        optimiser.step()
        optimiser.zero_grad()

    method = make(methods.FreeAT, replays=3, step_factor=0.5)
    for batch in (x, x.flip(0)):
        report = method.step(network, batch, y, IDS, loss=training_loss(y), update=update)
        update()

    optimiser, delta, values = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9), torch.zeros_like(x), []
    for batch in (x, x.flip(0)):
        for _ in range(3):
            leaf = (batch + delta).requires_grad_(True)
            value = training_loss(y)(other(leaf))
            optimiser.zero_grad()
            value.backward()
            delta = moved(delta, leaf.grad, 0.5 * EPS, "l2")
            optimiser.step()
            values.append(value.item())
    close(list(network.parameters()), list(other.parameters()))
    assert float(report.loss) == pytest.approx(sum(values[3:]) / 3, rel=1e-5)
    assert report.training == 12 and report.passes.total == 0


def test_free_training_starts_over_when_the_batch_has_another_shape():
    network, x, y = problem()
    method = make(methods.FreeAT, replays=2)
    step(method, network, x, y, update=lambda: None)
    _, got = step(method, network, x[:3], y[:3], update=network.zero_grad)
    fresh, expected = make(methods.FreeAT, replays=2), []
    _, expected = step(fresh, network, x[:3], y[:3], update=network.zero_grad)
    close(got, expected)


def test_trades(start):
    network, x, y = problem(heads=True)
    method = make(methods.TRADES, steps=2, step_factor=2.0, weight=6.0)
    report, got = step(method, network, x, y)

    def kl(clean, logits):
        p = clean.softmax(1)
        return (p * (p.log() - logits.softmax(1).log())).sum(1).mean((1, 2))

    clean = network(x)[0].detach()
    perturbed = climbed(network, x, lambda z, _: kl(clean, z), start, 2, EPS)
    output = network(x)
    value = training_loss(y)(output) + 6 * kl(output[0], network(perturbed)[0]).mean()
    close(got, gradients(network, value))
    assert float(report.loss) == pytest.approx(value.item(), rel=1e-4)
    assert (report.passes.gradients, report.passes.forwards, report.training) == (8, 4, 8)


def test_divergence_of_regions_and_ignored_voxels():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    raw = torch.randint(0, 2, (2, 4, 5, 5))
    found = divergence(b, Target.from_raw(raw, Labels(3, regions=True, ignore_label=9)), clean=a)
    p, q, counted = a.sigmoid(), b.sigmoid(), raw[:, 3:] == 0
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    expected = [each[i][counted[i].expand(3, 5, 5)].mean() for i in range(2)]
    torch.testing.assert_close(found, torch.stack(expected))
    labels = torch.randint(0, 4, (2, 1, 5, 5))
    found = divergence(b, Target.from_raw(labels, Labels(3, ignore_label=3)), clean=a)
    each = (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1)
    torch.testing.assert_close(found, torch.stack([each[i][labels[i, 0] != 3].mean() for i in range(2)]))


def test_temporal_ensembling_follows_the_mean_of_the_networks(start):
    network, x, y = problem()
    method = make(methods.TemporalEnsembling, steps=1, step_factor=1.0, momentum=0.75, weight=5.0, ramp=0.5)
    method.progress = 0.25
    assert method.weight == pytest.approx(5 * math.exp(-5 * 0.25))
    step(method, network, x, y)
    first = copy.deepcopy(network)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    state = copy.deepcopy(method.state_dict())
    _, got = step(method, network, x, y)

    mean = copy.deepcopy(network)
    for m, old, new in zip(mean.parameters(), first.parameters(), network.parameters(), strict=True):
        m.data = 0.75 * old.data + 0.25 * new.data
    target = Target.from_raw(y, LABELS)
    perturbed = climbed(network, x, lambda z, _: dice_ce_loss(z, target), start, 1, EPS)
    output = network(perturbed)
    distance = (output.softmax(1) - mean(x).softmax(1).detach()).square().sum(1).mean()
    close(got, gradients(network, training_loss(y)(output) + method.weight * distance))

    resumed = make(methods.TemporalEnsembling, steps=1, step_factor=1.0, momentum=0.75, weight=5.0, ramp=0.5)
    resumed.load_state_dict(state)
    resumed.progress = 0.25
    assert resumed.state_dict()["mean"].keys() == state["mean"].keys()
    _, again = step(resumed, network, x, y)
    close(again, got)


def cross_entropies(y):
    return lambda logits, step=0: F.cross_entropy(logits, y, reduction="none")


def classifier():
    network = Linear(3, (1, 12, 12))
    network.weight.data *= 0.1
    return network, torch.randn(4, 1, 12, 12), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("kind", [methods.PGDAT, methods.TRADES, methods.TemporalEnsembling])
def test_a_classifier_trains_on_the_loss_written_out(start, kind):
    network, x, y = classifier()
    method = make(kind, Classes(3), steps=2, step_factor=2.0)
    network.zero_grad()
    report = method.step(network, x, y, IDS, loss=lambda logits, rows: F.cross_entropy(logits, y[rows]))
    got = [p.grad.clone() for p in network.parameters()]
    clean = network(x).softmax(1).detach()
    if kind is methods.TRADES:
        perturbed = climbed(network, x, lambda z, _: (clean * (clean.log() - z.log_softmax(1))).sum(1), start, 2, EPS)
        logits = network(x)
        moved = (logits.softmax(1) * (logits.log_softmax(1) - network(perturbed).log_softmax(1))).sum(1).mean()
        value = F.cross_entropy(logits, y) + 6 * moved
    else:
        logits = network(climbed(network, x, cross_entropies(y), start, 2, EPS))
        value = F.cross_entropy(logits, y)
        if kind is methods.TemporalEnsembling:  # the mean of one network is that network
            value = value + 30 * math.exp(-5) * (logits.softmax(1) - clean).square().sum(1).mean()
    close(got, gradients(network, value), atol=1e-4)
    assert float(report.loss) == pytest.approx(value.item(), rel=1e-4)


def test_a_classifier_is_updated_from_each_replay():
    network, x, y = classifier()
    other, delta, values = copy.deepcopy(network), torch.zeros_like(x), []
    optimisers = [torch.optim.SGD(n.parameters(), 0.05) for n in (network, other)]

    def update():
        optimisers[0].step()
        optimisers[0].zero_grad()

    method = make(methods.FreeAT, Classes(3), replays=3, step_factor=0.5)
    report = method.step(network, x, y, IDS, loss=lambda logits, rows: F.cross_entropy(logits, y[rows]), update=update)
    update()
    for _ in range(3):
        leaf = (x + delta).requires_grad_(True)
        value = F.cross_entropy(other(leaf), y)
        optimisers[1].zero_grad()
        value.backward()
        delta = moved(delta, leaf.grad, 0.5 * EPS, "l2")
        optimisers[1].step()
        values.append(value.item())
    close(list(network.parameters()), list(other.parameters()))
    assert float(report.loss) == pytest.approx(sum(values) / 3, rel=1e-5)


def test_several_labels_of_an_image():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    target = Target.from_raw(torch.tensor([[0, 1, 1], [0, 0, 1]]), Classes(3, multilabel=True))
    p, q = a.sigmoid(), b.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(1)
    torch.testing.assert_close(divergence(b, target, clean=a), expected)


def test_what_a_method_cannot_do_is_explained():
    network, x, y = problem()
    with pytest.raises(UserError, match="SegPGDAT is for segmentations"):
        make(methods.SegPGDAT, Classes(3))
    with pytest.raises(UserError, match="FreeAT makes 4 updates from each batch; give update"):
        make(methods.FreeAT).step(network, x, y, IDS, loss=training_loss(y))
    with pytest.raises(UserError, match="3 case ids for a batch of 4"):
        make(methods.PGDAT).step(network, x, y, IDS[:3], loss=training_loss(y))
    with pytest.raises(UserError, match="no method 'pdgat'; the methods there are: ima, pgdat"):
        methods.make_method("pdgat", labels=LABELS, patch_voxels=144, epochs=1)


@pytest.mark.parametrize("name", [*methods.METHODS, *methods.PRESETS])
def test_every_method_takes_a_step(name):
    network, x, y = problem(heads=True)
    method = methods.make_method(name, labels=LABELS, patch_voxels=144, epochs=2)
    _, got = step(method, network, x, y, update=lambda: None)
    assert all(torch.isfinite(gradient).all() for gradient in got) and got


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_noise_is_within_its_size_and_leaves_masks_alone(norm):
    torch.manual_seed(0)
    settings = methods.NoiseSettings(eps=EPS, norm=norm)
    method = methods.NoiseAugmentation(settings, labels=LABELS, patch_voxels=64 * 64, image_channels=1)
    x, y, seen = torch.zeros(64, 2, 64, 64), torch.zeros(64, 1, 64, 64), []

    class Spy(torch.nn.Module):
        def forward(self, batch):
            seen.append(batch)
            return batch.sum()

    report = method.step(
        Spy(), x, y, [""] * 64, loss=lambda value, rows: value, update=refuse, backward=lambda value: None
    )
    (noisy,) = seen
    assert not noisy[:, 1].any() and report.passes.total == 0
    size = noisy[:, 0].square().mean((1, 2)).sqrt() if norm == "l2" else noisy[:, 0].abs().amax((1, 2))
    assert size.max() < EPS * 1.05 and size.std() == pytest.approx(EPS / math.sqrt(12), rel=0.3)


def test_sizes_in_the_l2_of_a_patch():
    settings = methods.PGDATSettings(eps=6.0, unit="l2")
    assert methods.PGDAT(settings, labels=LABELS, patch_voxels=144).eps == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eps": -1}, "must be positive"),
        ({"steps": 0}, "steps = 0"),
        ({"beta": 0}, "beta = 0"),
        ({"unit": "l2", "norm": "linf", "eps": 1}, "goes with norm 'l2'"),
        ({"unit": "l2"}, "give eps in that unit"),
        ({"delta": 1}, "unknown setting 'delta'"),
        ({"steps": True}, "no setting is a boolean"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        methods.PGDATSettings.parse(values, source="here")


def test_sizes_of_a_whole_patch_need_its_voxels():
    with pytest.raises(UserError, match="PGDAT: unit 'l2' is of a whole patch; give patch_voxels"):
        methods.PGDAT(methods.PGDATSettings(unit="l2", eps=5.0), labels=Labels(2))
    with pytest.raises(UserError, match="give epochs, or a ledger"):
        methods.IMA(methods.IMASettings(), labels=Labels(2))
