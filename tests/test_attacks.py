import pytest
import torch

from ima_seg.attacks import UNTARGETED, Goal, Problem, apgd, fgsm, ifgsm, pgd
from ima_seg.attacks.apgd import checkpoints, stage_lengths
from ima_seg.attacks.goals import lost_dice
from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.errors import UserError
from ima_seg.ops import perturbation_size
from ima_seg.types import Labels, Target, ThreatModel
from tests.models import TinyUNet
from tests.test_boundary import HostReads, hyperplane_problem, trained_unet

STEPS = 4
#: Of points of equal damage the last is kept.
LAST = Goal("last", UNTARGETED.loss, lambda logits, target: torch.zeros(len(logits)))


def red_apgd(problem, eps, **options):
    return apgd(problem, eps, red_eps=True, **options)


def one_step(problem, eps, *, steps, restarts=1):
    return fgsm(problem, eps)


def few_steps(problem, eps, *, steps, restarts=1):
    return ifgsm(problem, eps, steps=steps)


ATTACKS = {"fgsm": one_step, "ifgsm": few_steps, "pgd": pgd, "apgd": apgd, "red_apgd": red_apgd}
#: The same without a random start.
FROM_CLEAN = {
    "fgsm": ({}, one_step),
    "ifgsm": ({}, few_steps),
    "pgd": ({"start": False}, pgd),
    "apgd": ({"start": False}, apgd),
    "red_apgd": ({"start": False}, red_apgd),
}
attacks = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
from_clean = pytest.mark.parametrize("options,attack", FROM_CLEAN.values(), ids=FROM_CLEAN)
norms = pytest.mark.parametrize("norm", ["l2", "linf"])


def problem(dims=2, batch=3, channels=1, **options):
    network = TinyUNet(dims, channels=channels, **options).eval()
    x = torch.randn(batch, channels, *(8,) * dims)
    return network, x, Target.from_raw(torch.randint(0, 3, (batch, 1, *(8,) * dims)), Labels(3))


@attacks
@norms
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_budgets_are_each_samples_own_used_up_and_never_exceeded(attack, norm, dims):
    network, x, target = problem(dims)
    eps = torch.tensor([0.0, 0.1, 0.5])
    for goal in (UNTARGETED, LAST):
        hit = attack(Problem(network, x, target, ThreatModel(norm), goal), eps, steps=STEPS)
        size = perturbation_size(hit.adversarial - x, norm)
        torch.testing.assert_close(size, hit.distance)
        assert (size <= eps * (1 + 1e-5) + 1e-6).all()
    assert (size >= 0.9 * eps).all()


@from_clean
@norms
def test_the_hyperplane_is_crossed_at_its_distance_and_not_below(attack, options, norm):
    network, x, target = hyperplane_problem((9, 7))
    true = network.distance(x, norm).detach()
    for share, damage in ((0.999, 0.0), (1.001, 1.0)):
        hit = attack(Problem(network, x, target, ThreatModel(norm)), true * share, steps=10, **options)
        assert (hit.damage == damage).all()
        torch.testing.assert_close(hit.distance, true * share, rtol=1e-4, atol=0)
        assert torch.equal(lost_dice(network(hit.adversarial).detach(), target), hit.damage)


@from_clean
@norms
def test_batched_equals_one_at_a_time(attack, options, norm):
    network, x, target = trained_unet(2)
    x, target, eps = x[:3], target[torch.arange(3)], torch.tensor([0.1, 0.3, 0.6])
    problem = Problem(network, x, target, ThreatModel(norm))
    together = attack(problem, eps, steps=STEPS, **options)
    for i in range(3):
        row = torch.tensor([i])
        alone = attack(problem.select(row), eps[row], steps=STEPS, **options)
        torch.testing.assert_close(alone.adversarial[0], together.adversarial[i], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.trace[:, 0], together.trace[:, i], rtol=1e-3, atol=1e-4)


@attacks
def test_network_is_left_as_it_was_found(attack):
    network, x, target = problem(batch_norm=True)
    network.train()
    network.second.eval()
    network.first[0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    hit = attack(Problem(network, x, target), 0.1, steps=2)
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    assert all(p.grad is None for p in network.parameters()) and x.grad is None
    assert not hit.adversarial.requires_grad


@attacks
@norms
def test_only_the_support_of_the_image_channels_is_perturbed(attack, norm):
    network, x, target = problem(channels=3)
    support = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    support[..., 2:5, 3:7] = True
    eps = torch.full((3,), 0.2)
    hit = attack(Problem(network, x, target, ThreatModel(norm, 2), LAST, support=support), eps, steps=STEPS)
    delta = hit.adversarial - x
    assert torch.equal(hit.adversarial[:, 2:], x[:, 2:])
    assert (delta * ~support == 0).all()
    # The root mean square is over all voxels of the image channels, whatever the support.
    torch.testing.assert_close(perturbation_size(delta[:, :2], norm), hit.distance, rtol=1e-5, atol=1e-7)
    assert (hit.distance >= 0.9 * eps).all() and (hit.distance <= eps * (1 + 1e-5)).all()


def test_random_starts_are_as_large_within_a_support_as_without():
    x, eps = torch.randn(4, 1, 16), torch.full((4,), 0.3)
    target = Target.from_raw(torch.ones(4, 1, 16), Labels(2))
    support = torch.arange(16).view(1, 1, 16) < 3
    for norm in ("l2", "linf"):
        sizes = []
        for mask in (None, support):
            generator = torch.Generator().manual_seed(1)
            batch = Problem(lambda x: x, x, target, ThreatModel(norm), support=mask, generator=generator)
            delta = batch.random(eps)
            sizes.append(perturbation_size(delta, norm))
        assert (delta * ~support == 0).all()
        if norm == "l2":
            torch.testing.assert_close(*sizes)
    empty = Problem(lambda x: x, x, target, support=support & False)
    assert (empty.random(eps) == 0).all()


@pytest.mark.parametrize("support", [torch.ones(1, 1, 8, 8), torch.ones(1, 1, 7, 8).bool(), torch.ones(8, 8).bool()])
def test_a_support_that_does_not_fit_is_refused(support):
    network, x, target = problem()
    with pytest.raises(UserError, match=r"support is .* expected bool that broadcasts to \(3, 1, 8, 8\)"):
        pgd(Problem(network, x, target, support=support), torch.ones(3), steps=1)


def test_the_call_without_a_problem_is_refused_with_the_call_that_works():
    with pytest.raises(UserError, match=r"this is TinyUNet; write pgd\(Problem\(network, x, target, threat\), eps"):
        pgd(TinyUNet(2), 0.1, steps=1)


def test_attacks_without_a_step_are_refused():
    network, x, target = problem()
    with pytest.raises(UserError, match="steps is 0"):
        apgd(Problem(network, x, target), torch.ones(3), steps=0)
    with pytest.raises(UserError, match="restarts is 2"):
        pgd(Problem(network, x, target), torch.ones(3), steps=1, restarts=2, keep="last")


@from_clean
def test_zero_gradients_stall_and_are_counted(attack, options):
    class Flat(torch.nn.Module):
        def forward(self, batch):
            alive = (torch.arange(len(batch)) == 1).view(-1, 1, 1)  # only the second sample has a gradient
            return torch.stack([batch[:, 0] * alive, batch[:, 0] * 0], 1)

    _, x, _ = problem()
    target = Target.from_raw(torch.ones(3, 1, 8, 8), Labels(2))
    eps = torch.full((3,), 0.1)
    hit = attack(Problem(Flat(), x, target), eps, steps=STEPS, **options)
    assert hit.zero_gradient.tolist() == [1.0, 0.0, 1.0]
    assert torch.equal(hit.adversarial[::2], x[::2]) and torch.isfinite(hit.adversarial).all()
    torch.testing.assert_close(hit.distance, eps * torch.tensor([0.0, 1.0, 0.0]))


@attacks
@pytest.mark.parametrize("always", [False, True])
def test_nan_of_one_sample_leaves_the_others_alone(attack, always):
    network, x, target = problem()

    class Breaks(torch.nn.Module):
        def forward(self, batch):
            far = perturbation_size(batch - x, "l2") > (-1 if always else 0.02)
            return torch.where((far & (torch.arange(3) == 1)).view(-1, 1, 1, 1), torch.nan, network(batch))

    hit = attack(Problem(Breaks(), x, target, goal=LAST), 0.1, steps=STEPS)
    assert torch.isfinite(hit.adversarial).all()
    assert hit.distance[1] <= 0.02 and bool(hit.damage[1].isnan()) == always
    others = torch.tensor([0, 2])
    assert (hit.distance[others] > 0.09).all() and torch.isfinite(hit.damage[others]).all()
    assert torch.isfinite(hit.trace[:, others]).all()


@attacks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_precisions(attack, dtype):
    network, x, target = trained_unet(2)
    exact = attack(Problem(network, x, target, generator=torch.Generator().manual_seed(1)), 0.5, steps=STEPS)
    hit = attack(
        Problem(network.to(dtype), x.to(dtype), target, generator=torch.Generator().manual_seed(1)), 0.5, steps=STEPS
    )
    assert hit.adversarial.dtype == dtype and hit.damage.dtype == hit.distance.dtype == torch.float32
    assert abs(hit.damage.mean() - exact.damage.mean()) < 0.1
    cast = attack(Problem(network.float(), x, target, precision="bf16"), 0.5, steps=STEPS)
    assert cast.adversarial.dtype == torch.float32 and abs(cast.damage.mean() - exact.damage.mean()) < 0.1


@attacks
@norms
def test_the_point_of_most_damage_within_the_budget_is_returned(attack, norm):
    network, x, target = trained_unet(2)
    eps = torch.full((6,), 0.3)
    visited = []
    network.register_forward_hook(lambda _, inputs, output: visited.append((inputs[0].detach(), output.detach())))
    hit = attack(Problem(network, x, target, ThreatModel(norm)), eps, steps=6, restarts=2)
    assert hit.passes.total == 6 * len(visited)
    damages = []
    for point, logits in visited:
        inside = perturbation_size(point - x, norm) <= eps * (1 + 1e-4)
        damages.append(torch.where(inside, lost_dice(logits, target), -1.0))
    torch.testing.assert_close(hit.damage, torch.stack(damages).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(lost_dice(network(hit.adversarial), target), hit.damage, rtol=0, atol=0.02)
        assert (hit.damage >= lost_dice(network(x), target)).all()
    assert hit.trace.shape == (2 if attack is one_step else 7, 6)
    assert (hit.trace.diff(dim=0) >= 0).all()
    torch.testing.assert_close(hit.trace[-1], hit.damage)


@pytest.mark.parametrize("attack", [pgd, apgd, red_apgd])
def test_restarts_never_do_less_damage(attack):
    network, x, target = trained_unet(2)
    once, thrice = (
        attack(
            Problem(network, x, target, generator=torch.Generator().manual_seed(3)), 0.3, steps=STEPS, restarts=restarts
        )
        for restarts in (1, 3)
    )
    assert (thrice.damage >= once.damage).all() and (thrice.damage > once.damage).any()
    assert (thrice.trace >= once.trace).all()
    extra = 6 * (1 if attack is not red_apgd else len(stage_lengths(STEPS, True)))
    assert thrice.passes.gradients == 3 * once.passes.gradients == 6 * 3 * STEPS
    assert thrice.passes.forwards == once.passes.forwards + 2 * extra


def test_keeping_the_last_point_costs_gradient_passes_alone():
    network, x, target = problem()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    unmeasured = Goal("unmeasured", UNTARGETED.loss, lambda logits, target: 1 / 0)
    common = {"steps": STEPS, "start": False}
    hit = pgd(Problem(network, x, target, goal=unmeasured), 0.1, keep="last", **common)
    assert len(calls) == STEPS and (hit.passes.gradients, hit.passes.forwards) == (3 * STEPS, 0)
    assert hit.damage.isnan().all() and hit.trace.shape == (0, 3)
    torch.testing.assert_close(hit.adversarial, pgd(Problem(network, x, target, goal=LAST), 0.1, **common).adversarial)


@attacks
def test_the_host_never_waits_once_the_budgets_are_checked(attack):
    network, x, target = problem()
    support = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    with HostReads() as reads:
        attack(Problem(network, x, target, support=support), torch.ones(3), steps=STEPS, restarts=2)
    assert reads.count == 1


@norms
def test_apgd_climbs_at_least_as_high_as_pgd(norm):
    network, x, target = trained_unet(2)
    reached = {}
    climb = Goal("climb", UNTARGETED.loss, dice_ce_loss)  # its best point is that of greatest loss
    for name, attack in {"pgd": pgd, "apgd": apgd}.items():
        reached[name] = attack(
            Problem(network, x, target, ThreatModel(norm), climb), 0.3, steps=30, start=False
        ).damage.mean()
    assert reached["apgd"] >= reached["pgd"]


def test_checkpoints_and_stages_follow_the_papers():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert stage_lengths(300, True) == [(2.0, 90), (1.5, 90), (1.0, 120)]
    assert stage_lengths(3, True) == [(1.0, 3)]
    assert all(sum(length for _, length in stage_lengths(n, True)) == n for n in range(1, 40))
