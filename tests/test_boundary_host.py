"""What a search leaves alone, refuses, costs the host, and finds beside others."""

import copy
import math

import pytest
import torch
from torch import nn

from ima_seg.attacks import Problem, SearchSettings, boundary_search, pgd
from ima_seg.attacks.network import autocast, frozen
from ima_seg.attacks.passes import Passes
from ima_seg.errors import UserError
from ima_seg.ops import hard_dice
from ima_seg.types import Labels, Target, ThreatModel
from tests.models import TinyUNet
from tests.test_boundary import TAU, HostReads, hyperplane_problem, search, trained_unet


def test_network_is_left_as_it_was_found():
    network = TinyUNet(2, batch_norm=True).train()
    network.first[0].weight.requires_grad_(False)
    network.second.eval()
    state = copy.deepcopy(network.state_dict())
    modes = [m.training for m in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    x = torch.randn(2, 1, 16, 16)
    target = Target.from_raw(torch.randint(0, 3, (2, 1, 16, 16)), Labels(3))
    network.eval()
    reference = search(network, x, target, 0.1, tau=-1).distance
    network.train()
    network.second.eval()
    eps = torch.full((2,), 0.1)
    boundary_search(
        Problem(network, x, target), eps, threshold=-eps, clean_quality=eps, settings=SearchSettings(steps=2)
    )
    assert all(torch.equal(a, b) for a, b in zip(state.values(), network.state_dict().values(), strict=True))
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    assert all(p.grad is None for p in network.parameters())
    assert torch.isfinite(reference).all()
    with pytest.raises(RuntimeError, match="boom"), frozen(network):
        raise RuntimeError("boom")
    assert [m.training for m in network.modules()] == modes


def graph_names(output: torch.Tensor) -> set[str]:
    found, front = set(), [output.grad_fn]
    while front:
        node = front.pop()
        if node is not None and node not in found:
            found.add(node)
            front += [parent for parent, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_activation_writes_into_a_norms_view_in_reduced_precision(dtype):
    torch.manual_seed(0)
    norm, free = nn.LeakyReLU(inplace=True), nn.LeakyReLU(inplace=True)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), norm, nn.Conv2d(4, 2, 3), nn.Dropout(), free
    )
    x = torch.randn(2, 1, 12, 12, requires_grad=True)

    def gradient() -> torch.Tensor:
        with autocast(dtype, x.device):
            output = network(x)
        assert any("CopySlices" in name for name in graph_names(output)) == norm.inplace
        return torch.autograd.grad(output.float().sin().sum(), x)[0]

    network.eval()
    expected = gradient()
    network.train()
    with pytest.raises(RuntimeError, match="boom"), frozen(network, dtype):
        assert norm.inplace == (dtype is None)
        assert free.inplace
        assert torch.equal(gradient(), expected)
        raise RuntimeError("boom")
    assert norm.inplace and free.inplace and network.training


def test_only_the_full_resolution_head_is_attacked():
    network = TinyUNet(2, outputs=2, heads=True)
    x = torch.randn(2, 1, 16, 16)
    target = Target.from_raw(torch.randint(0, 2, (2, 1, 16, 16)), Labels(2))
    passes = Passes(Problem(network, x, target))
    zero = torch.zeros_like(x)
    gradient = passes.at(zero).gradient()
    with torch.no_grad():
        network.low.weight.mul_(100)
    torch.testing.assert_close(passes.at(zero).gradient(), gradient)


def test_bad_batches_are_refused_by_name():
    network, x, target = hyperplane_problem((9, 7))
    with pytest.raises(UserError, match=r"eps has shape \(2,\) for a batch of 5"):
        pgd(Problem(network, x, target), torch.ones(2), steps=1)
    with pytest.raises(UserError, match=r"torch.int64"):
        pgd(Problem(network, x.long(), target), torch.ones(5), steps=1)
    with pytest.raises(UserError, match="'l1'"):
        ThreatModel("l1")
    with pytest.raises(UserError, match=r"-0\.5"):
        pgd(Problem(network, x, target), torch.tensor([1.0, -0.5, 1, 1, 1]), steps=1)
    with pytest.raises(UserError, match="nan"):
        pgd(Problem(network, x, target), math.nan, steps=1)
    with pytest.raises(UserError, match=r"eps is torch.int64"):
        pgd(Problem(network, x, target), torch.ones(5, dtype=torch.long), steps=1)
    with pytest.raises(UserError, match=r"5 samples of 63 voxels, the batch \(5, 1, 9, 6\)"):
        pgd(Problem(network, x[..., :-1], target), torch.ones(5), steps=1)
    with pytest.raises(UserError, match="reference is on meta"):
        elsewhere = target.map(lambda part: part.to("meta"))
        pgd(Problem(network, x, elsewhere), torch.ones(5), steps=1)
    with pytest.raises(UserError, match="inf"):
        pgd(Problem(network, x, target), math.inf, steps=1)
    with pytest.raises(UserError, match="not empty"):
        pgd(Problem(network, x[:0], target[:0]), torch.ones(0), steps=1)
    one = torch.ones(5)
    for name, value in (("threshold", one[:1]), ("clean_quality", one[:, None]), ("searched", one), ("start", one)):
        given = {"threshold": one * 0.6, "clean_quality": one, name: value}
        with pytest.raises(UserError, match=name):
            boundary_search(Problem(network, x, target), one, settings=SearchSettings(), **given)
    for setting in (
        {"steps": 0},
        {"multiple_of": 0},
        {"refine": "rot"},
        {"step_factor": 0.0},
        {"refine_tolerance": -1},
    ):
        with pytest.raises(UserError, match=next(iter(setting))):
            SearchSettings(**setting)
    with pytest.raises(UserError, match="bf17"):
        pgd(Problem(network, x, target, precision="bf17"), torch.ones(5), steps=1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_on_a_network_is_as_strong_as_foolboxs(norm):
    foolbox = pytest.importorskip("foolbox")
    ep = pytest.importorskip("eagerpy")
    network, x, target = trained_unet(2)
    from ima_seg.attacks.losses import dice_ce_loss

    eps = 0.3
    ours = pgd(Problem(network, x, target, ThreatModel(norm)), eps, steps=20, start=False, keep="last")
    base = foolbox.attacks.L2PGD if norm == "l2" else foolbox.attacks.LinfPGD

    class Attack(base):
        def get_loss_fn(self, model, labels):
            return lambda inputs: ep.astensor(dice_ce_loss(network(inputs.raw), target).sum())

    fmodel = foolbox.PyTorchModel(network, bounds=(-100, 100), device="cpu")
    attack = Attack(rel_stepsize=4 / 20, steps=20, random_start=False)
    radius = eps * (16 if norm == "l2" else 1)
    theirs = attack.run(fmodel, x, torch.zeros(6, dtype=torch.long), epsilon=radius)
    with torch.no_grad():
        mine = dice_ce_loss(network(ours.adversarial), target)
        other = dice_ce_loss(network(theirs.raw if hasattr(theirs, "raw") else theirs), target)
    torch.testing.assert_close(mine, other, rtol=0.02, atol=0.01)


def test_one_host_read_per_step():
    network, x, target = trained_unet(2)
    eps = torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0, 0.1])
    clean = hard_dice(network(x).detach(), target)
    settings = SearchSettings(steps=7, refine_steps=4)
    with HostReads() as reads:
        boundary_search(
            Problem(network, x, target),
            eps,
            threshold=torch.full_like(eps, TAU),
            clean_quality=clean,
            settings=settings,
        )
    # And one before the first, of the budgets.
    assert 1 + 7 <= reads.count <= 1 + 7 + 4


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_cuda_finds_the_hyperplane_and_waits_once_per_step(norm, no_random_start):
    import warnings

    network, x, target = hyperplane_problem((9, 7))
    true = network.distance(x, norm).detach()
    network, x = network.cuda(), x.cuda()
    target = Target.from_raw(target.onehot[:, 1].view(5, 1, 9, 7).long().cuda(), Labels(2))
    eps = torch.full((5,), float(2 * true.max()), device="cuda")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = boundary_search(
                Problem(network, x, target, ThreatModel(norm)),
                eps,
                threshold=torch.full_like(eps, TAU),
                clean_quality=torch.ones_like(eps),
                settings=SearchSettings(steps=20, multiple_of=2),
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    # The budgets are read once; the counts of each step come to the host beside the work.
    assert waits <= 3
    assert ((found.distance.cpu() / true - 1).abs() < 0.011).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_given_start_is_projected_and_searched_from(norm):
    network, x, target = hyperplane_problem((9, 7))
    weight = network.weight.detach()
    start = -(weight.sign() if norm == "linf" else weight).expand_as(x) * 100
    start[0] = 0  # no crossing from here in one step of a hundredth
    eps = torch.full((len(x),), 0.35)
    settings = SearchSettings(steps=1, step_factor=0.01)
    options = dict(threshold=torch.full_like(eps, TAU), clean_quality=torch.ones_like(eps), settings=settings)
    found = boundary_search(Problem(network, x, target, ThreatModel(norm)), eps, start=start, **options)
    distance = network.distance(x, norm)
    assert found.crossed.tolist() == [False, *(distance[1:] < 0.35).tolist()]
    torch.testing.assert_close(found.distance[found.crossed], distance[found.crossed], rtol=0.02, atol=1e-4)
    assert (found.distance[1:] <= 0.35 + 1e-5).all() and found.distance[0] < 0.01
    with pytest.raises(UserError, match=r"start is torch.float32 of shape \(5, 1, 9\)"):
        boundary_search(Problem(network, x, target, ThreatModel(norm)), eps, start=start[..., 0], **options)
