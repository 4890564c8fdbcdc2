"""What makes a step cheaper: the start from the clean gradient, and the rest of steady cases."""

import pytest
import torch

from ima_seg import IMASettings, UserError
from ima_seg.methods.history import EpochTally, history_row
from ima_seg.methods.ledger import MarginLedger
from ima_seg.methods.settings import FAST
from ima_seg.ops import hard_dice, perturbation_size
from ima_seg.types import Labels, Target
from tests.test_boundary import hyperplane_problem, trained_unet
from tests.test_ima import SETTINGS, batch_of_all_kinds, cross_entropy, make_ima
from tests.test_ledger import visit

GRADIENT = SETTINGS.model_copy(update={"start": "gradient"})
PLACED_EXACTLY = {"refine_steps": 10, "refine_tolerance": 0.01}
MIXED = SETTINGS.model_copy(update={"start": "mixed"})


def counted(network):
    """Numbers of samples that pass through ``network``, one entry per pass."""
    passes = []
    network.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    return passes


def grow(ima, margins):
    ima.ledger.register(margins)
    for case, margin in margins.items():
        ima.ledger.cases[case].margin = margin


@pytest.mark.parametrize("settings", [SETTINGS, GRADIENT, MIXED], ids=["random", "gradient", "mixed"])
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
    for settings in (SETTINGS, GRADIENT, MIXED):
        network, x, y = batch_of_all_kinds()
        passes = counted(network)
        report = make_ima(settings).step(network, x, y, list("abcd"), loss=cross_entropy(y))
        assert sum(passes) == 2 * len(x) + report.passes.total, "the two training passes and what the report says"
        # A patch without foreground climbs its own loss, one step.
        only = make_ima(settings).step(network, x[2:3], y[2:3], ["c"], loss=cross_entropy(y[2:3]))
        assert only.passes.gradients == 1 and only.passes.forwards == 0
        assert only.distance == pytest.approx(settings.delta, rel=1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_hyperplane_is_found_along_the_clean_gradient_in_one_step(norm):
    network, x, target = hyperplane_problem((9, 7))
    y = target.onehot[:, 1].view(5, 1, 9, 7).long()
    distance = network.distance(x, norm).detach()
    eps = float(distance[2]) * 1.01
    settings = IMASettings(
        norm=norm, start="gradient", steps=1, eps_max=10.0, delta=eps, precision="fp32", **PLACED_EXACTLY
    )
    report = make_ima(settings).step(network, x, y, list("abcde"), loss=cross_entropy(y))
    assert report.crossed.tolist() == [True, True, True, False, False]
    torch.testing.assert_close(report.distance[:3], distance[:3], rtol=0.02, atol=1e-4)
    torch.testing.assert_close(report.distance[3:], torch.full((2,), eps), rtol=1e-3, atol=0)
    assert report.passes.gradients == 5, "the first pass finds those that cross; the others make their step"


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("spoiled", [0.0, float("nan"), float("inf")])
def test_starts_stay_within_the_budget_and_are_random_without_a_usable_gradient(norm, spoiled):
    torch.manual_seed(0)
    ima = make_ima(GRADIENT.model_copy(update={"norm": norm}))
    x, gradient = torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6)
    gradient[1] = spoiled
    gradient[2, 0, 0, 0] = spoiled
    eps = torch.tensor([0.1, 0.3, 0.6, 0.0])
    start = ima._free_step(x, gradient, 4.0 * eps / 5, eps, None)
    size = perturbation_size(start, norm)
    assert torch.isfinite(start).all() and (size <= eps * (1 + 1e-5)).all()
    assert size[0] == pytest.approx(0.08, rel=1e-4) and size[3] == 0
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
        report = make_ima(GRADIENT).step(
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
    report = make_ima(GRADIENT.model_copy(update={"beta": 1.0})).step(
        network, x, y, list("abcd"), loss=cross_entropy(y)
    )
    assert report.passes.gradients > 0 and (report.distance[:3] > 0).all()


def test_channels_that_are_no_images_stay_as_they_are():
    from tests.models import TinyUNet

    network, x = TinyUNet(2, channels=3), torch.randn(2, 3, 8, 8)
    y = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    report = make_ima(GRADIENT, Labels(3), image_channels=2).step(network, x, y, ["a", "b"], loss=cross_entropy(y))
    assert report.background.all() and torch.equal(report.adversarial[:, 2], x[:, 2])
    torch.testing.assert_close(perturbation_size(report.adversarial[:, :2] - x[:, :2], "l2"), report.distance)


# --- steady cases ----------------------------------------------------------------------------------------------------


def steady(ledger, cases, epochs=6):
    """Cross at the margin, so that it does not move."""
    for _ in range(epochs):
        for case in cases:
            visit(ledger, case, ledger.get([case]).item())
        ledger.step()


def test_steady_cases_rest_except_in_every_nth_epoch():
    ledger = MarginLedger(delta=0.04, eps_max=1.0, steady_interval=3)
    names = [f"case{i}" for i in range(30)]
    assert not ledger.resting(names).any(), "nothing is known yet"
    steady(ledger, names, epochs=ledger.patience - 1)
    assert not ledger.resting(names).any()
    steady(ledger, names, epochs=1)
    searched = []
    for _ in range(6):
        rests = ledger.resting(names)
        searched.append(~rests)
        steady(ledger, [name for name, resting in zip(names, rests.tolist(), strict=True) if not resting], epochs=1)
    total = torch.stack(searched).sum(0)
    assert (total == 2).all(), "twice in six epochs"
    assert all(0 < share.float().mean() < 0.7 for share in searched), "spread over the epochs"
    assert not MarginLedger(delta=0.04, eps_max=1.0).resting(names).any()


def test_a_margin_that_moves_ends_the_rest():
    ledger = MarginLedger(delta=0.04, eps_max=1.0, steady_interval=1000)
    steady(ledger, "a")
    assert ledger.resting("a").all()
    visit(ledger, "a")
    ledger.step()
    assert not ledger.resting("a").any()


def test_resting_is_the_same_after_resuming_and_old_states_load():
    first = MarginLedger(delta=0.04, eps_max=1.0, steady_interval=2)
    steady(first, "abcdef")
    state = first.state_dict()
    second = MarginLedger(delta=0.04, eps_max=1.0, steady_interval=2)
    second.load_state_dict(state)
    for _ in range(4):
        assert torch.equal(first.resting("abcdef"), second.resting("abcdef"))
        for ledger in (first, second):
            visit(ledger, "a", 0.03)
        assert first.step() == second.step()
    assert first.table() == second.table()
    old = {key: value for key, value in state.items() if key != "recent"}
    third = MarginLedger(delta=0.04, eps_max=1.0, steady_interval=2)
    third.load_state_dict(old)
    assert [row["margin"] for row in third.table()] == state["margin"].tolist()
    assert not third.resting("abcdef").any()


def test_an_interval_below_one_is_refused():
    with pytest.raises(UserError, match="steady_interval is 0; it must be at least 1"):
        MarginLedger(delta=0.1, eps_max=1.0, steady_interval=0)


@pytest.mark.parametrize("start", ["random", "gradient", "mixed"])
def test_patches_of_resting_cases_are_perturbed_but_move_no_margin(start, monkeypatch):
    network, x, target = trained_unet(2)
    y = target.onehot[:, 1].view(6, 1, 16, 16).long()
    ima = make_ima(SETTINGS.model_copy(update={"start": start, "steady_interval": 4, **PLACED_EXACTLY}))
    ids = list("abcdef")
    rests = torch.tensor([True, True, False, True, False, False])
    monkeypatch.setattr(ima.ledger, "resting", lambda case_ids, device=None: rests)
    grow(ima, {case: 0.3 for case in ids})
    passes = counted(network)
    report = ima.step(network, x, y, ids, loss=cross_entropy(y))
    assert torch.equal(report.resting, rests) and torch.equal(report.searched, ~rests)
    torch.testing.assert_close(report.distance[rests], torch.full((3,), 0.3), rtol=1e-3, atol=0)
    torch.testing.assert_close(perturbation_size(report.adversarial - x, "l2"), report.distance, rtol=1e-3, atol=1e-5)
    assert sum(passes) == 12 + report.passes.total
    damaged = hard_dice(network(report.adversarial), Target.from_raw(y, Labels(2))) < hard_dice(network(x), target)
    assert damaged[rests].any(), "a perturbation, not noise"
    assert ima.end_epoch().visits == 3
    assert (ima.ledger.get(["a", "b", "d"]) == 0.3).all()
    assert (ima.ledger.get(["c", "e", "f"]) != 0.3).all()


def test_a_batch_of_resting_cases_costs_one_gradient_at_most(monkeypatch):
    network, x, target = trained_unet(2)
    y = target.onehot[:, 1].view(6, 1, 16, 16).long()
    for start in ("random", "gradient", "mixed"):
        ima = make_ima(SETTINGS.model_copy(update={"start": start, "background_steps": 0}))
        monkeypatch.setattr(ima.ledger, "resting", lambda case_ids, device=None: torch.ones(6, dtype=torch.bool))
        report = ima.step(network, x, y, list("abcdef"), loss=cross_entropy(y))
        assert (report.passes.gradients, report.passes.forwards) == (6, 0)
        assert (report.distance > 0).all()


@pytest.mark.parametrize("start", ["random", "gradient", "mixed"])
def test_history_counts_resting_patches_and_every_pass(start, monkeypatch):
    network, x, target = trained_unet(2)
    y = target.onehot[:, 1].view(6, 1, 16, 16).long()
    ima = make_ima(SETTINGS.model_copy(update={"start": start}))
    rests = torch.tensor([True, True, False, True, False, False])
    monkeypatch.setattr(ima.ledger, "resting", lambda case_ids, device=None: rests)
    passes, tally = counted(network), EpochTally()
    for _ in range(2):
        tally.add(ima.step(network, x, y, list("abcdef"), loss=cross_entropy(y)))
    row = history_row(ima.end_epoch(), tally.totals(), seconds=1.0)
    assert row["resting_share"] == row["searched_share"] == 0.5 and row["visits"] == 6
    assert row["passes_per_sample"] == pytest.approx(sum(passes) / 12 - 2), "all but the two training passes"
    assert row["passes_per_sample"] == row["forwards_per_sample"] + row["gradients_per_sample"]


def test_the_fast_trainer_has_the_fast_settings():
    import nnunet_trainers

    assert nnunet_trainers.nnUNetTrainerIMA_fast.preset == FAST
    assert FAST.steps <= IMASettings().steps and "nnUNetTrainerIMA_fast" in nnunet_trainers.__all__
