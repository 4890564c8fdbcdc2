"""One file: attacks without gradients share their table and their networks."""

import copy
import functools

import numpy as np
import pytest
import torch

from ima_seg.attacks import UNTARGETED, Goal, Problem, gaussian_noise, minimal_norm, square, uniform_noise, vafa
from ima_seg.attacks.passes import forward
from ima_seg.attacks.square import _bump_pair, _edges, _Search
from ima_seg.attacks.vafa import _Quantised, block_transform, join, split
from ima_seg.errors import UserError
from ima_seg.ops import hard_dice, perturbation_size
from ima_seg.types import Labels, Target, ThreatModel
from tests.models import TinyUNet
from tests.test_boundary import HostReads, hyperplane_problem, trained_unet

SHAPES = [(40,), (16, 12), (8, 10, 6)]


def unbreakable(problem, eps, **options):
    """All searches of ``minimal_norm``, none of which can cross."""
    ones = torch.ones(len(problem))
    return minimal_norm(problem, eps, threshold=-ones, clean_quality=ones, steps=3, rounds=3, **options)


ATTACKS = {
    "gaussian": functools.partial(gaussian_noise, restarts=3),
    "uniform": functools.partial(uniform_noise, restarts=3),
    "square": functools.partial(square, queries=12, restarts=2),
    "vafa": functools.partial(vafa, steps=4, restarts=2),
    "minimal": unbreakable,
}
#: Forwards and gradients per sample; minimal: clean, one per search, and the last point of each search.
PASSES = {"gaussian": (3, 0), "uniform": (3, 0), "square": (25, 0), "vafa": (3, 8), "minimal": (7, 9)}

every_attack = pytest.mark.parametrize("name", ATTACKS)
every_norm = pytest.mark.parametrize("norm", ["l2", "linf"])


def problem(shape, channels=1, batch=3):
    network = TinyUNet(len(shape), channels=channels).eval()
    x = torch.randn(batch, channels, *shape)
    return network, x, Target.from_raw(torch.randint(0, 3, (batch, 1, *shape)), Labels(3))


def moved(network, x):
    """A goal whose damage is how far the logits are from the clean ones, so that every perturbation does some."""
    with torch.no_grad():
        clean = network(x)
    return Goal("moved", UNTARGETED.loss, lambda logits, target: (logits - clean).abs().flatten(1).mean(1))


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@every_attack
@every_norm
@pytest.mark.parametrize("shape", SHAPES)
def test_the_budget_is_never_exceeded_and_is_used(name, norm, shape):
    network, x, target = problem(shape)
    eps = torch.tensor([0.0, 0.1, 0.3])
    hit = ATTACKS[name](Problem(network, x, target, ThreatModel(norm), moved(network, x)), eps)
    size = perturbation_size(hit.adversarial - x, norm)
    torch.testing.assert_close(hit.distance, size, rtol=1e-4, atol=1e-6)
    assert (size <= eps * (1 + 1e-4) + 1e-7).all()
    if name == "uniform" and norm == "linf":
        assert (size >= 0.9 * eps).all()
    elif name in ("gaussian", "uniform", "square"):
        torch.testing.assert_close(size, eps, rtol=1e-4, atol=1e-6)
    else:
        assert (size[1:] >= 0.6 * eps[1:]).all()
    torch.testing.assert_close(
        moved(network, x).damage(network(hit.adversarial), target), hit.damage, rtol=1e-3, atol=1e-5
    )
    assert (hit.damage[1:] > 0).all()
    assert (hit.passes.forwards, hit.passes.gradients) == tuple(3 * count for count in PASSES[name])
    assert (hit.trace.diff(dim=0) >= 0).all()
    torch.testing.assert_close(hit.trace[-1], hit.damage, rtol=1e-3, atol=1e-5)
    assert hit.zero_gradient.shape == (3,) and (name in ("vafa", "minimal") or (hit.zero_gradient == 0).all())


@every_attack
@every_norm
def test_a_seed_repeats_an_attack_and_another_does_not(name, norm):
    network, x, target = problem((16, 12))

    # Of equals the last point counts.
    goal = Goal("equal", UNTARGETED.loss, lambda logits, target: torch.ones(3))

    def attack(seed):
        return ATTACKS[name](
            Problem(network, x, target, ThreatModel(norm), goal, generator=seeded(seed)), 0.3
        ).adversarial

    assert torch.equal(attack(1), attack(1))
    assert not torch.equal(attack(1), attack(2))


@every_attack
@every_norm
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_changes_outside_the_support_and_other_channels(name, norm, shape):
    network, x, target = problem(shape, channels=3)
    support = torch.zeros(1, 1, *shape, dtype=torch.bool)
    support[(0, 0) + (slice(2, 5),) * len(shape)] = True
    support = support | torch.tensor([False, False, True]).view(3, 1, *(1,) * len(shape))
    hit = ATTACKS[name](Problem(network, x, target, ThreatModel(norm, 2), moved(network, x), support=support), 0.05)
    change = hit.adversarial - x
    assert (change[:, 2:] == 0).all()
    assert (change[:, :2][~support.expand(3, 2, *shape)] == 0).all()
    assert (change.flatten(1).abs().amax(1) > 0).all()
    # The size is that over all voxels of the perturbable channels.
    torch.testing.assert_close(perturbation_size(change[:, :2], norm), hit.distance, rtol=1e-3, atol=1e-6)
    assert (hit.distance <= 0.05 * (1 + 1e-4)).all()
    if name in ("gaussian", "square"):
        torch.testing.assert_close(hit.distance, torch.full((3,), 0.05), rtol=1e-4, atol=0)
    nothing = ATTACKS[name](Problem(network, x, target, ThreatModel(norm), support=support & False), 0.05)
    assert torch.equal(nothing.adversarial, x)


@every_attack
def test_the_network_is_left_as_it_was_found(name):
    network = TinyUNet(2, batch_norm=True).train()
    network.first[0].weight.requires_grad_(False)
    state = copy.deepcopy(network.state_dict())
    _, x, target = problem((16, 12))
    ATTACKS[name](Problem(network, x, target), 0.3)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), network.state_dict().values(), strict=True))
    assert all(module.training for module in network.modules())
    assert [p.requires_grad for p in network.parameters()] == [False] + [True] * (len(list(network.parameters())) - 1)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "minimal"])
@pytest.mark.parametrize("when", ["always", "moved"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stay_in_their_row(name, when, value):
    network, x, target = problem((16, 12))
    victim = torch.tensor([False, True, False])

    class Broken(torch.nn.Module):
        def forward(self, batch):
            changed = (batch != x).flatten(1).any(1) if when == "moved" else True
            return torch.where((victim & changed).view(-1, 1, 1, 1), value, network(batch))

    whole = ATTACKS[name](Problem(network, x, target, generator=seeded()), 0.3)
    hit = ATTACKS[name](Problem(Broken(), x, target, generator=seeded()), 0.3)
    assert torch.equal(hit.adversarial[~victim], whole.adversarial[~victim])
    assert torch.equal(hit.damage[~victim], whole.damage[~victim])
    assert torch.equal(hit.adversarial[victim], x[victim])
    # The clean image is not among the draws of noise.
    assert torch.isfinite(hit.damage[victim]).item() == (when == "moved" and name not in ("gaussian", "uniform"))


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "minimal"])
@every_norm
def test_no_attack_waits_for_the_device_once_it_runs(name, norm):
    network, x, target = problem((16, 12))
    support = torch.zeros(1, 1, 16, 12, dtype=torch.bool)
    support[..., 3:9, 3:9] = True
    with HostReads() as reads:
        ATTACKS[name](Problem(network, x, target, ThreatModel(norm), support=support), 0.3)
    assert reads.count == 1  # of the budgets, before anything runs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_attack
def test_other_floating_dtypes_are_attacked_too(name, dtype):
    network, x, target = problem((16, 12))
    hit = ATTACKS[name](Problem(network.to(dtype), x.to(dtype), target), 0.3)
    assert hit.adversarial.dtype == dtype and hit.damage.dtype == torch.float32
    assert (hit.distance <= 0.3 * 1.01).all()


@every_attack
def test_bad_arguments_are_refused_by_name(name):
    network, x, target = problem((16, 12))
    with pytest.raises(UserError, match=r"eps has shape \(2,\)"):
        ATTACKS[name](Problem(network, x, target), torch.ones(2))
    with pytest.raises(UserError, match="restarts is 0"):
        ATTACKS[name](Problem(network, x, target), torch.ones(3), restarts=0)


def test_noise_has_the_distribution_that_it_names():
    network, x, target = problem((64, 64), batch=1)
    goal = moved(network, x)
    gauss = gaussian_noise(Problem(network, x, target, ThreatModel("l2"), goal), 0.5).adversarial - x
    flat = uniform_noise(Problem(network, x, target, ThreatModel("linf"), goal), 0.5).adversarial - x
    # Mean of squares, and of fourth powers over its square: 3 for a Gaussian; a third, and 9 / 5 for a box.
    for noise, second, fourth in ((gauss, 0.25, 3.0), (flat, 0.25 / 3, 1.8)):
        torch.testing.assert_close(noise.square().mean().item(), second, rtol=0.05, atol=0)
        torch.testing.assert_close(
            (noise**4).mean().item() / noise.square().mean().item() ** 2, fourth, rtol=0.1, atol=0
        )


@every_norm
@pytest.mark.parametrize("dims", [2, 3])
def test_square_does_more_damage_than_noise_of_as_many_queries(norm, dims):
    network, x, target = trained_unet(dims)
    problem = Problem(network, x, target, ThreatModel(norm))
    noise = gaussian_noise(problem, 0.3, restarts=60)
    found = square(problem, 0.3, queries=60)
    assert found.damage.mean() > 1.5 * noise.damage.mean()


@every_norm
def test_square_reaches_a_hyperplane_that_noise_does_not(norm):
    network, x, target = hyperplane_problem((5, 6, 4))
    problem, eps = Problem(network, x, target, ThreatModel(norm)), 2.5 * network.distance(x, norm).detach()
    assert (square(problem, eps, queries=1000).damage == 1).all()
    assert (gaussian_noise(problem, eps, restarts=300).damage < 1).all()


@every_norm
def test_square_keeps_what_raises_the_loss_and_proposes_one_window_at_a_time(norm):
    network, x, target = trained_unet(2)
    x, target, eps = x[:1], target[torch.tensor([0])], 0.3
    losses, points = [], []

    def loss(logits, target, progress):
        losses.append(UNTARGETED.loss(logits, target, progress).item())
        return UNTARGETED.loss(logits, target, progress)

    goal = Goal("recorded", loss, lambda logits, target: UNTARGETED.loss(logits, target, 0.0))
    network.register_forward_pre_hook(lambda _, inputs: points.append(inputs[0] - x))
    hit = square(Problem(network, x, target, ThreatModel(norm), goal), torch.tensor([eps]), queries=40)
    losses, points = torch.tensor(losses), points[1:]  # the clean one first
    assert len(losses) == len(points) == 40 and losses.max() > losses[0]
    torch.testing.assert_close(hit.trace[1:, 0], torch.cummax(losses, 0).values, rtol=1e-5, atol=1e-6)
    for query in range(1, 40):
        before = points[losses[:query].argmax()]
        changed = ((points[query] - before).abs() > 1e-5).sum().item()
        # A tenth of the voxels from the second query on, in l2 taken from another tenth; the rest at most rescaled.
        assert 1 <= changed <= (25 if norm == "linf" else 50)
        sizes = points[query].abs() if norm == "linf" else perturbation_size(points[query], norm)
        torch.testing.assert_close(sizes, torch.full_like(sizes, eps), rtol=1e-4, atol=0)


def test_windows_hold_the_share_of_the_voxels_that_the_schedule_says():
    assert _edges((100, 100), 0.04, 1) == (20, 20)
    assert _edges((32, 32, 32), 1 / 64, 1) == (8, 8, 8)
    # An axis too short for its edge: what is left goes to the others.
    assert _edges((3, 80, 80), 0.25, 1) == (2, 49, 49)
    assert _edges((16, 16), 1e-6, 3) == (3, 3) and _edges((16, 16), 1e-6, 1) == (1, 1)
    assert _edges((1, 2), 0.8, 3) == (1, 1)


@pytest.mark.parametrize("edges", [(6,), (4, 6), (4, 3, 5)])
def test_a_pair_of_bumps_is_antisymmetric_and_highest_in_its_middles(edges):
    for axis, edge in enumerate(edges):
        pair = _bump_pair(edges, axis)
        assert pair.shape == edges
        torch.testing.assert_close(pair.norm().item(), 1.0)
        first, second = pair.split([edge // 2, edge - edge // 2], axis)
        assert (first > 0).all() and (second < 0).all()
        middle = tuple((edge // 2 if a == axis else e) // 2 for a, e in enumerate(edges))
        assert first[middle] == first.max()


def test_bumps_fall_off_as_in_the_paper():
    # n = 2: rings of 1 + 1/4 + 1/9, 1/4 + 1/9 and 1/9 around the middle of a half of 5 voxels.
    pair = _bump_pair((10,), 0)
    rings = torch.tensor([1 / 9, 13 / 36, 49 / 36, 13 / 36, 1 / 9], dtype=torch.float64)
    torch.testing.assert_close(pair[:5], rings / rings.norm() / 2**0.5)


def test_windows_lie_where_there_is_support_and_anywhere_without():
    network, x, target = problem((16, 12), batch=200)
    eps = torch.ones(200)
    support = torch.zeros(1, 1, 16, 12, dtype=torch.bool)
    support[..., 15, 4] = True
    search = _Search(Problem(network, x, target, support=support), eps)
    place = search._place(search._window((3, 5)))
    assert place.shape == (200, 1, 15)
    assert (place == 15 * 12 + 4).any(2).all() and place.max() < 16 * 12
    search = _Search(Problem(network, x, target), eps)
    place = search._place(search._window((3, 5)))
    assert (place % 12).amin() == 0 and (place % 12).amax() == 11 and place.amin() == 0 and place.amax() // 12 == 15
    assert (place[..., 0] % 12 <= 12 - 5).all()


@pytest.mark.parametrize("shape", [(21,), (13, 16), (9, 8, 11), (1, 17, 5)])
def test_blocks_are_transformed_as_by_scipy_and_back(shape):
    fft = pytest.importorskip("scipy.fft")
    image = torch.randn(2, 3, *shape)
    edges = tuple(min(8, length) for length in shape)
    coefficients = block_transform(split(image, edges), edges)
    back = block_transform(coefficients, edges, inverse=True)
    torch.testing.assert_close(join(back, shape), image, rtol=0, atol=1e-5)
    # The first block, and the last, which is padded with its edge voxels.
    pads = [(0, 0), (0, 0)] + [(0, -length % edge) for length, edge in zip(shape, edges, strict=True)]
    padded = np.pad(image.numpy(), pads, mode="edge")
    for last in (False, True):
        window = tuple(slice(-edge, None) if last else slice(edge) for edge in edges)
        expected = fft.dctn(padded[(..., *window)], axes=range(2, image.ndim), norm="ortho")
        index = (..., *((-1 if last else 0, slice(None)) * len(edges)))
        torch.testing.assert_close(coefficients[index], torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


@every_norm
def test_vafa_sets_the_scale_of_its_steps_from_the_budget(norm):
    network, x, target = problem((20, 24))
    support = torch.zeros(1, 1, 20, 24, dtype=torch.bool)
    support[..., 4:16, :] = True
    quantised = _Quantised(Problem(network, x, target, ThreatModel(norm), support=support), 8)
    eps = torch.tensor([0.01, 0.1, 0.2])
    q = quantised.uniform_step(eps, 1.5).view(-1, *(1,) * (quantised.coefficients.ndim - 1))
    torch.testing.assert_close(perturbation_size(quantised.perturbation(q), norm), 1.5 * eps, rtol=2e-3, atol=0)


def test_a_quantised_coefficient_moves_to_the_smoothly_rounded_multiple():
    network, x, target = problem((8, 8))
    quantised = _Quantised(Problem(network, x, target), 8)
    z = quantised.coefficients / 0.7
    rounded = z - torch.sin(2 * torch.pi * z) / (2 * torch.pi)
    image = join(block_transform(0.7 * rounded, (8, 8), inverse=True), (8, 8))
    perturbation = quantised.perturbation(torch.full_like(z, 0.7))
    torch.testing.assert_close(x + perturbation, image, rtol=0, atol=1e-5)


@every_norm
@pytest.mark.parametrize("dims", [2, 3])
def test_vafa_does_damage_and_leaves_empty_blocks_alone(norm, dims):
    network, x, target = trained_unet(dims)
    corner = (slice(None), slice(None)) + (slice(8),) * dims
    x[corner] = 0
    hit = vafa(Problem(network, x, target, ThreatModel(norm)), 0.3, steps=20)
    clean = 1 - hard_dice(forward(network, x, None).detach(), target)
    noise = gaussian_noise(Problem(network, x, target, ThreatModel(norm)), 0.3)
    assert (hit.damage > clean + 0.02).all() and hit.damage.mean() > noise.damage.mean() + 0.02
    assert hit.adversarial[corner].abs().max() < 1e-6
    assert (hit.distance > 0.2).all() and (hit.zero_gradient == 0).all()


def smallest(network, x, target, eps, norm, threshold=0.6, clean=None, support=None, generator=None, **options):
    if clean is None:
        clean = hard_dice(forward(network, x, None).detach(), target)
    return minimal_norm(
        Problem(network, x, target, ThreatModel(norm), support=support, generator=generator),
        float(eps),
        threshold=torch.full((len(x),), threshold),
        clean_quality=clean,
        **options,
    )


@every_norm
@pytest.mark.parametrize("shape", [(41,), (9, 7), (5, 6, 4)])
def test_minimal_norm_finds_the_distance_of_a_hyperplane(norm, shape):
    network, x, target = hyperplane_problem(shape)
    true = network.distance(x, norm).detach()
    hit = smallest(network, x, target, 2 * true.max(), norm)
    assert hit.broken.all() and hit.foreground.all()
    assert (hit.crossing >= true * (1 - 1e-4)).all() and (hit.crossing <= 1.02 * true).all()
    torch.testing.assert_close(hit.distance, hit.crossing, rtol=1e-4, atol=1e-6)
    assert (hit.damage == 1).all() and (hard_dice(network(hit.adversarial), target) < 0.6).all()


@every_norm
def test_minimal_norm_reports_what_it_cannot_break_within_the_budget(norm):
    network, x, target = hyperplane_problem((9, 7))
    true = network.distance(x, norm).detach()
    hit = smallest(network, x, target, (true[2] + true[3]) / 2, norm)
    assert hit.broken.tolist() == [True, True, True, False, False]
    assert torch.isinf(hit.crossing[3:]).all() and (hit.damage[3:] == 0).all()
    assert (hit.crossing[:3] <= 1.02 * true[:3]).all()


def test_samples_that_are_broken_or_empty_from_the_start_are_not_searched():
    network, x, target = hyperplane_problem((9, 7))
    clean = torch.tensor([0.1, float("nan"), 1.0, 0.59, 1.0])
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    hit = smallest(network, x, target, 2.0, "l2", clean=clean, rounds=2)
    assert hit.broken.tolist() == [True, False, True, True, True]
    assert hit.foreground.tolist() == [True, False, True, True, True]
    assert hit.crossing[0] == hit.crossing[3] == 0 and torch.isinf(hit.crossing[1])
    still = torch.tensor([0, 1, 3])
    assert torch.equal(hit.adversarial[still], x[still]) and (hit.distance[still] == 0).all()
    assert sum(seen) == hit.passes.total and sum(size == 5 for size in seen) == 3


def test_more_rounds_find_a_nearer_boundary_of_a_network_and_never_lose_one():
    network, x, target = trained_unet(2)
    few = smallest(network, x, target, 3.0, "l2", rounds=2, generator=seeded())
    many = smallest(network, x, target, 3.0, "l2", rounds=10, generator=seeded())
    assert few.broken.all() and (many.crossing < 0.7 * few.crossing).all()
    assert (hard_dice(network(many.adversarial).detach(), target) < 0.6).all()
    support = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    support[..., 2:8, 2:8] = True
    part = smallest(network, x, target, 3.0, "l2", rounds=10, threshold=0.8, support=support, generator=seeded())
    assert part.broken.all() and ((part.adversarial - x)[~support.expand_as(x)] == 0).all()
