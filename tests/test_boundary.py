import copy
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ima_seg.attacks import Problem, SearchSettings, boundary_search, pgd
from ima_seg.errors import UserError
from ima_seg.ops import hard_dice, perturbation_size
from ima_seg.types import Labels, Target, ThreatModel
from tests.models import Hyperplane, TinyUNet

TAU = 0.6


def hyperplane_problem(shape, channels=1, batch=5):
    """A linear network, images at L2 distances 0.1, 0.2, ... from its boundary, and their reference."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(shape, generator=generator) < 0.4
    network = Hyperplane(torch.randn(channels, *shape, generator=generator), mask)
    x = torch.randn(batch, channels, *shape, generator=generator)
    weight = network.weight.detach()
    straight = weight / weight.square().mean().sqrt()  # a perturbation of size 1 straight away from the boundary
    shift = torch.arange(1, batch + 1) * 0.1 - network.distance(x, "l2").detach()
    x = x + shift.view(-1, *(1,) * (x.ndim - 1)) * straight
    return network, x, Target.from_raw(mask.expand(batch, 1, *shape).long(), Labels(2))


@pytest.fixture
def no_random_start(monkeypatch):
    """Starts at the clean image, so that the walk is a function of the sample alone."""
    monkeypatch.setattr(
        "ima_seg.attacks.problem.random_start", lambda like, radius, norm, seeds, mask=None: torch.zeros_like(like)
    )


def search(network, x, target, eps, norm="l2", image_channels=None, tau=TAU, **settings):
    eps = torch.as_tensor(eps, dtype=torch.float32).expand(len(x)).clone()
    output = network(x)
    clean = hard_dice((output[0] if isinstance(output, list) else output).detach(), target)
    return boundary_search(
        Problem(network, x, target, ThreatModel(norm, image_channels)),
        eps,
        threshold=torch.full_like(eps, tau),
        clean_quality=clean,
        settings=SearchSettings(**settings),
    )


@pytest.mark.parametrize("shape", [(41,), (9, 7), (5, 6, 4)])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("refine", ["root", "bisection"])
def test_finds_the_hyperplane_at_its_known_distance(shape, norm, refine, no_random_start):
    network, x, target = hyperplane_problem(shape)
    true = network.distance(x, norm).detach()
    found = search(network, x, target, 2 * true.max(), norm, refine=refine, refine_tolerance=0.01)
    assert found.crossed.all() and found.finite.all() and not found.stalled.any()
    # On the far side of the plane, by the tolerance at most.
    assert (found.distance >= true * (1 - 1e-4)).all()
    assert (found.distance <= true * 1.0102).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_from_a_random_start_no_crossing_is_nearer_than_the_hyperplane(norm):
    network, x, target = hyperplane_problem((9, 7))
    true = network.distance(x, norm).detach()
    found = search(network, x, target, 2 * true.max(), norm)
    assert found.crossed.all()
    assert (found.distance >= true * (1 - 1e-4)).all()
    assert (hard_dice(network(found.adversarial), target) < TAU).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_reaches_the_optimum_of_a_linear_network(norm):
    network, x, target = hyperplane_problem((9, 7))
    true = network.distance(x, norm).detach()
    for share, dice in ((0.999, 1.0), (1.001, 0.0)):
        hit = pgd(Problem(network, x, target, ThreatModel(norm)), true * share, steps=10, start=False)
        torch.testing.assert_close(hit.distance, true * share, rtol=1e-4, atol=0)
        assert (hard_dice(network(hit.adversarial), target) == dice).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_samples_within_budget_cross_and_others_stop_at_it(norm):
    network, x, target = hyperplane_problem((9, 7))
    true = network.distance(x, norm).detach()
    eps = (true[2] + true[3]) / 2
    found = search(network, x, target, eps, norm, steps=40)
    assert found.crossed.tolist() == [True, True, True, False, False]
    torch.testing.assert_close(found.distance[3:], eps.expand(2), rtol=1e-4, atol=0)
    dice = hard_dice(network(found.adversarial), target)
    assert ((dice < TAU) == found.crossed).all()
    torch.testing.assert_close(perturbation_size(found.adversarial - x, norm), found.distance, rtol=1e-4, atol=1e-6)


def test_budgets_are_each_samples_own_and_never_exceeded():
    network = TinyUNet(2)
    x = torch.randn(6, 1, 16, 16)
    target = Target.from_raw(torch.randint(0, 3, (6, 1, 16, 16)), Labels(3))
    eps = torch.linspace(0, 0.5, 6)
    for norm in ("l2", "linf"):
        found = search(network, x, target, eps, norm, tau=-1)
        assert (perturbation_size(found.adversarial - x, norm) <= eps * (1 + 1e-4) + 1e-7).all()
        assert not found.crossed.any()


def trained_unet(dims):
    """A network fitted to a bright blob for a few steps, so that it has a boundary of its own."""
    network, x, target = _trained_unet(dims)
    return copy.deepcopy(network), x.clone(), target


@functools.cache
def _trained_unet(dims):
    torch.manual_seed(0)
    network = TinyUNet(dims, outputs=2)
    shape = (16,) * dims
    labels = torch.zeros(6, 1, *shape, dtype=torch.long)
    labels[(slice(None), 0) + (slice(4, 11),) * dims] = 1
    x = labels + 0.5 * torch.randn(6, 1, *shape)
    optimiser = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(network(x), labels[:, 0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval(), x, Target.from_raw(labels, Labels(2))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_on_a_trained_network_the_answer_is_on_the_boundary(dims):
    network, x, target = trained_unet(dims)
    tolerance = 0.01
    found = search(network, x, target, 3.0, steps=20, refine_tolerance=tolerance)
    assert found.crossed.all()
    delta = found.adversarial - x
    assert (hard_dice(network(x + delta), target) < TAU).all()
    # Root and bisection of the paper's ten steps agree within the tolerance on the same walk.
    torch.manual_seed(1)
    root = search(network, x, target, 3.0, steps=20, refine_tolerance=tolerance)
    torch.manual_seed(1)
    bisection = search(network, x, target, 3.0, steps=20, refine="bisection", refine_tolerance=0.0)
    torch.testing.assert_close(root.distance, bisection.distance, rtol=1.1 * tolerance, atol=0)
    assert root.passes.forwards < bisection.passes.forwards
    assert root.passes.gradients == bisection.passes.gradients


def test_batched_equals_one_at_a_time(no_random_start):
    network, x, target = trained_unet(2)
    eps = torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0, 0.1])
    together = search(network, x, target, eps, steps=10)
    assert 0 < together.crossed.sum() < len(x)
    for i in range(len(x)):
        rows = torch.tensor([i])
        alone = search(network, x[rows], target[rows], eps[rows], steps=10)
        assert alone.crossed.item() == together.crossed[i].item()
        torch.testing.assert_close(alone.distance[0], together.distance[i], rtol=1e-3, atol=1e-6)


def test_shrinking_in_fixed_sizes_changes_nothing_but_the_passes(no_random_start):
    network, x, target = trained_unet(2)
    eps = torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0, 0.1])
    sizes = []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    exact = search(network, x, target, eps, steps=10)
    assert min(sizes) < 3, "crossed samples must leave the working batch"
    sizes.clear()
    fixed = search(network, x, target, eps, steps=10, multiple_of=3)
    torch.testing.assert_close(exact.distance, fixed.distance, rtol=1e-3, atol=1e-6)
    assert torch.equal(exact.crossed, fixed.crossed)
    assert set(sizes) == {6, 3}


@pytest.mark.parametrize("multiple_of", [1, 4])
def test_only_the_searched_samples_are_searched(no_random_start, multiple_of):
    network, x, target = trained_unet(2)
    eps = torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0, 0.1])
    clean = hard_dice(network(x).detach(), target)
    common = {"settings": SearchSettings(steps=10, multiple_of=multiple_of)}
    everything = boundary_search(
        Problem(network, x, target), eps, threshold=torch.full_like(eps, TAU), clean_quality=clean, **common
    )
    searched = torch.tensor([False, True, False, True, False, True])
    sizes = []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    some = boundary_search(
        Problem(network, x, target),
        eps,
        threshold=torch.full_like(eps, TAU),
        clean_quality=clean,
        searched=searched,
        **common,
    )
    torch.testing.assert_close(some.distance, everything.distance * searched, rtol=1e-3, atol=1e-6)
    assert torch.equal(some.crossed, everything.crossed & searched)
    assert torch.equal(some.adversarial[~searched], x[~searched])
    assert max(sizes) == (3 if multiple_of == 1 else 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_dtypes_are_searched_too(dtype):
    network, x, target = trained_unet(2)
    found = search(network.to(dtype), x.to(dtype), target, 3.0, steps=5)
    assert found.adversarial.dtype == dtype and found.crossed.all()


def test_crossed_samples_cost_nothing_more_and_passes_are_counted():
    network, x, target = hyperplane_problem((9, 7))
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found = search(network, x, target, 5.0, steps=20, refine_steps=0)
    calls = sum(seen) - len(x)  # the helper's own clean pass
    assert found.passes.total == calls
    assert found.crossed.all()
    assert calls < 5 * 21


def test_masks_of_a_cascade_are_never_perturbed():
    network = TinyUNet(2, channels=3)
    x = torch.randn(2, 3, 16, 16)
    target = Target.from_raw(torch.randint(0, 3, (2, 1, 16, 16)), Labels(3))
    found = search(network, x, target, 0.3, image_channels=1, tau=-1)
    assert torch.equal(found.adversarial[:, 1:], x[:, 1:])
    changed = found.adversarial[:, :1] - x[:, :1]
    # The size counts the perturbable channel alone.
    torch.testing.assert_close(perturbation_size(changed, "l2"), found.distance, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="image_channels is 4"):
        search(network, x, target, 0.3, image_channels=4)


def test_nan_of_one_sample_leaves_the_others_alone():
    network, x, target = trained_unet(2)

    class BreaksWhenMoved(torch.nn.Module):
        def forward(self, batch):
            logits = network(batch)
            moved = (batch[:, 0, 0, 0] != origin[: len(batch)]) if len(batch) == 6 else None
            broken = torch.zeros(len(batch), dtype=torch.bool) if moved is None else moved & victim
            return torch.where(broken.view(-1, 1, 1, 1), float("nan"), logits)

    origin, victim = x[:, 0, 0, 0], torch.tensor([False, False, True, False, False, False])
    found = search(BreaksWhenMoved(), x, target, 0.05, steps=3)
    assert found.finite.tolist() == [True, True, False, True, True, True]
    assert not found.crossed[2]
    assert torch.isfinite(found.adversarial).all()


def test_zero_gradients_are_counted_as_stalled():
    class Flat(torch.nn.Module):
        def forward(self, batch):
            return torch.stack([batch[:, 0] * 0, batch[:, 0] * 0 + 1], 1)

    x = torch.randn(2, 1, 8, 8)
    target = Target.from_raw(torch.ones(2, 1, 8, 8), Labels(2))
    found = search(Flat(), x, target, 0.5, steps=3)
    assert found.stalled.all() and not found.crossed.any() and found.finite.all()


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a device: reading a scalar, asking how many entries are nonzero."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
        self.count += function.overloadpacket.__name__ in waiting
        return function(*args, **(kwargs or {}))
