"""What all methods share beside their step: a share of the batch, a teacher, quality as searched, warnings."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ima_seg import IMA, IMASettings, Labels, UserError, methods
from ima_seg.attacks.network import mode_matters
from ima_seg.methods.course import Course
from tests.models import TinyUNet

LABELS = Labels(3)
#: Everything is searched, by a network that has learnt nothing.
EASY = {"criterion": "loss", "tau": 50.0, "steps": 2, "precision": "fp32", "delta": 0.05}


def problem(size=6, **options):
    torch.manual_seed(0)
    network = TinyUNet(2, **options)
    y = torch.zeros(size, 1, 12, 12, dtype=torch.long)
    y[:, :, 3:7, 3:9], y[:, :, 7:9, 3:9] = 1, 2
    return network, torch.randn(size, 1, 12, 12) + y, y


def cross_entropy(y):
    return lambda output, rows: F.cross_entropy(output, y[rows, 0])


def step(method, network, x, y, **options):
    network.zero_grad()
    ids = [f"case_{row}" for row in range(len(x))]
    report = method.step(network, x, y, ids, loss=cross_entropy(y), **options)
    return report, [p.grad.clone() for p in network.parameters() if p.grad is not None]


def gradients(network, value):
    network.zero_grad()
    value.backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def make(**settings):
    return IMA.from_settings(IMASettings(**{**EASY, **settings}), labels=LABELS, patch_voxels=144, epochs=20)


@pytest.mark.parametrize(("share", "count"), [(0.5, 3), (0.2, 2), (1.0, 6)])
def test_a_share_of_the_batch_is_attacked_and_all_of_it_trained_on(share, count):
    network, x, y = problem()
    method = make(share=share)
    report, got = step(method, network, x, y)
    rows = report.searched.nonzero()[:, 0]
    moved = (report.adversarial - x).abs().flatten(1).amax(1) > 0
    assert len(rows) == count and torch.equal(moved, report.searched)
    value = cross_entropy(y)(network(x), slice(None)) / 2
    value = value + cross_entropy(y)(network(report.adversarial[rows]), rows) / 2
    close(got, gradients(network, value))
    assert report.training == len(x) + count
    assert method.end_epoch().visits == count, "the others were not visited"


def test_every_sample_has_its_turn():
    network, x, y = problem()
    method, turns = make(share=0.3), torch.zeros(6)
    for _ in range(60):
        turns += step(method, network, x, y)[0].searched
    assert turns.sum() == 60 * 2 and (turns > 8).all()


@pytest.mark.parametrize("name", ["pgdat", "fgsmat", "noise", "te"])
def test_fixed_budgets_take_a_share_as_well(name):
    network, x, y = problem()
    settings = methods.registry.preset(name).model_copy(update={"beta": 0.3, "share": 0.5, "precision": "fp32"})
    if name == "te":
        settings = settings.model_copy(update={"weight": 0.0})
    method = methods.make_method(settings, labels=LABELS, patch_voxels=144, epochs=2)
    seen = []

    def forward(module, given):
        seen.append(given.detach().clone())
        return module(given)

    report, got = step(method, network, x, y, forward=forward)
    perturbed = seen[-1]
    rows = (perturbed[:, None] - x[None]).flatten(2).norm(dim=2).argmin(1)
    assert len(perturbed) == 3 and len(rows.unique()) == 3 and report.training == 9
    value = 0.7 * cross_entropy(y)(network(x), slice(None)) + 0.3 * cross_entropy(y)(network(perturbed), rows)
    close(got, gradients(network, value))


def test_a_share_without_a_clean_loss_is_refused():
    with pytest.raises(UserError, match=r"share is 0\.5 and beta 1.*set beta below 1"):
        methods.PGDATSettings.parse({"share": 0.5}, source="here")


@pytest.mark.parametrize("name", ["ima", "pgdat", "trades", "noise"])
def test_a_teacher_adds_its_divergence_to_every_loss(name):
    network, x, y = problem()
    torch.manual_seed(5)
    teacher = TinyUNet(2)
    before = copy.deepcopy(teacher.state_dict())
    preset = methods.registry.preset(name)
    fast = EASY if name == "ima" else {"precision": "fp32"}
    found = []
    for weight in (None, 1e-6, 2.0):
        torch.manual_seed(1)
        given = {} if weight is None else {"teacher": teacher}
        settings = preset.model_copy(update={**fast, "teacher_weight": weight or 1.0})
        method = methods.make_method(settings, labels=LABELS, patch_voxels=144, epochs=2, **given)
        found.append(step(method, network, x, y))
    (plain, base), (_, nearly), (taught, held) = found
    for a, b in zip(base, nearly, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert taught.passes.forwards == plain.passes.forwards + len(x)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    if name == "noise":
        # All of the loss is on the noisy batch: that of the teacher's predictions of the clean one comes on top.
        torch.manual_seed(1)
        noisy = []
        method.step(network, x, y, [""] * 6, loss=cross_entropy(y),
                    forward=lambda module, batch: (noisy.append(batch), module(batch))[1])  # fmt: skip
        p, q = teacher(x).softmax(1), network(noisy[-1]).log_softmax(1)
        kl = (p * (p.log() - q)).sum(1).mean()
        close(held, gradients(network, cross_entropy(y)(network(noisy[-1]), slice(None)) + 2 * kl))


def test_a_teacher_that_is_named_must_be_given():
    with pytest.raises(UserError, match="name the teacher 'standard'; give its network as teacher as well"):
        methods.make_method(IMASettings(teacher="standard"), labels=LABELS, patch_voxels=144, epochs=1)


def test_a_loss_that_takes_no_rows_is_explained():
    network, x, y = problem()
    with pytest.raises(UserError, match=r"lambda output, rows: criterion\(output, y\[rows\]\)"):
        make().step(network, x, y, list("abcdef"), loss=lambda output: output.sum())


def test_networks_that_are_others_in_training_are_known():
    drop = torch.nn.Dropout
    assert not mode_matters(TinyUNet(2)) and mode_matters(TinyUNet(2, batch_norm=True))
    assert mode_matters(torch.nn.Sequential(drop(0.1))) and not mode_matters(torch.nn.Sequential(drop(0.0)))
    assert mode_matters(torch.nn.InstanceNorm2d(3, track_running_stats=True))
    assert mode_matters(torch.nn.MultiheadAttention(4, 1, dropout=0.1))
    assert not mode_matters(torch.nn.MultiheadAttention(4, 1))
    assert mode_matters(lambda x: x)
    from monai.networks.layers import DropPath

    assert mode_matters(DropPath(0.2)) and not mode_matters(DropPath(0.0))


def test_quality_is_that_of_the_network_which_is_searched():
    """In training mode, batch norm and dropout make another network: cases would cross at no distance."""
    network, x, y = problem(batch_norm=True)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy(y)(network(x), slice(None)).backward()
        optimiser.step()
    network.eval()
    with torch.no_grad():
        loss = methods.ima.loss_quality(network(x), methods.ima.Target.from_raw(y, LABELS))[0]
    network.train()
    # A threshold that just some of the patches meet in evaluation mode.
    method = make(tau=float(-loss.median()), eps_max=5.0, delta=1.0)
    report, _ = step(method, network, x, y)
    assert torch.equal(report.below, loss < -method.settings.tau)
    assert network.training and not (report.crossed & (report.distance < 1e-3)).any()


def warned(settings, *, below, background=0.0, epoch=1, cases=4, margin=None):
    """The warnings of an epoch in which this share of the patches cannot be searched."""
    said = []
    method = make(**settings)
    method.ledger.register(f"case_{index}" for index in range(cases))
    method.ledger.epoch = epoch
    if margin is not None:
        for record in method.ledger.cases.values():
            record.margin = margin
    size = 20
    ids = [f"case_{index % cases}" for index in range(size)]
    lost = torch.arange(size) < below * size
    empty = torch.arange(size) >= (1 - background) * size
    counts = ~lost & ~empty
    method.ledger.record(ids, crossed=torch.zeros(size, dtype=torch.bool), distance=torch.zeros(size), counts=counts,
                         below=lost, background=empty)  # fmt: skip
    course = Course(method, native={}, log=lambda text: None, warn=said.append)
    course.start_epoch(epoch)
    report = {"patches": size, "below": int(lost.sum()), "background": int(empty.sum()), "searched": int(counts.sum())}
    rest = dict.fromkeys(("training", "forwards", "gradients", "dropped", "finite", "nonfinite", "stalled",
                          "clean_loss", "adversarial_loss"), 0.0)  # fmt: skip
    course.tally.totals = lambda: {**rest, **report}
    course.end_epoch(1.0)
    return said


def test_it_says_early_what_goes_wrong():
    dice = {"criterion": "dice", "tau": 0.45}
    assert warned(dice, below=0.2) == []
    (few,) = warned(dice, below=0.3)
    assert few.startswith("30% of the patches with foreground have a Dice below tau = 0.45") and "'relative'" in few
    assert warned(dice, below=0.3, epoch=0) == [], "a network from scratch knows nothing yet"
    # A quarter of those with foreground, not of all.
    assert "40% of the patches" in warned(dice, below=0.2, background=0.5)[0]
    share, never = warned(dice, below=1.0)
    assert share.startswith("100%")
    assert never == (
        "4 cases have never been searched, for all patches with foreground had crossed without perturbation: "
        "case_0, case_1, case_2, case_3"
    )
    (cap,) = warned({**dice, "eps_max": 0.2}, below=0.0, margin=0.2)
    assert cap.startswith("100% of the margins are at the cap of 0.2 SD per voxel") and "raise eps_max" in cap


def test_shrinking_margins_are_said():
    method = make(criterion="dice", tau=0.45, eps_max=1.0)
    for margin in (0.5, 0.5, 0.5, 0.5, 0.5, 0.3):
        method.ledger.register(["a"])
        method.ledger.cases["a"].margin = margin
        method.ledger.cases["a"].visits = 1
        summary = method.ledger.step()
    assert summary.shrinking
    row = {"epoch": 5, "background_share": 0.0, "below_tau_share": 0.0, "at_cap_share": 0.0, "margin_q50": 0.3,
           "shrinking": True, "nonfinite_gradients": 0, "zero_gradients": 0}  # fmt: skip
    assert any("has lost a quarter in 5 epochs, to 0.3" in text for text in method.warnings(row))


@pytest.mark.parametrize("rule", ["mean", "majority"])
def test_rules_that_are_gone_are_refused_by_name(rule):
    with pytest.raises(UserError, match=f"rule = '{rule}': it was removed.*use 'quantile'"):
        IMASettings.parse({"rule": rule}, source="plans")


@pytest.mark.parametrize("values", [{"crossing_share": 0.0}, {"crossing_share": 1.0}, {"share": 0.0}, {"ema": 1.0},
                                    {"teacher_weight": 0.0}, {"teacher": ""},
                                    {"training_precision": "fp16"}])  # fmt: skip
def test_options_that_make_no_sense_are_refused(values):
    (name,) = values
    with pytest.raises(UserError, match=f"here: {name} = "):
        IMASettings.parse(values, source="here")
