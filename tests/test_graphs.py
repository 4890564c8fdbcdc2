"""Captured passes, with a stand-in for the capture where there is no GPU; the scale of the loss in float16."""

import logging

import pytest
import torch
import torch.nn.functional as F

from ima_seg.attacks import GOALS, GraphedPasses, Problem, SearchSettings, apgd, boundary_search, pgd
from ima_seg.attacks.passes import LossScale, Passes
from ima_seg.ops import hard_dice
from ima_seg.types import Labels, Target
from tests.models import TinyUNet


class Replayed(GraphedPasses):
    """Computes anew what a graph would replay, from the same held tensors into the same outputs."""

    replays = 0

    def _obstacle(self, problem):
        return None

    def _record(self, work, device):
        outputs = work()

        def replay():
            self.replays += 1
            for other in self._captured.values():  # graphs share their memory
                for held in () if other is None else other.outputs:
                    held.fill_(torch.nan)
            for held, new in zip(outputs, work(), strict=True):
                assert held.dtype == new.dtype == torch.float32
                held.copy_(new)

        return outputs, replay


def problem(regions=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = Labels(2, regions=True, ignore_label=9) if regions else Labels(3, ignore_label=3)
    raw = torch.randint(0, 2 if regions else 4, (5, 3 if regions else 1, 16, 16), generator=generator)
    return torch.randn(5, 1, 16, 16, generator=generator), Target.from_raw(raw, labels)


def attacks(network, x, target):
    eps = torch.linspace(0.0, 0.4, 5)
    support = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.7

    def seeded(**options):
        return Problem(network, x, target, precision="fp32", generator=torch.Generator().manual_seed(1), **options)

    yield pgd(seeded(), eps, steps=3)
    yield pgd(seeded(support=support), eps, steps=3, keep="last")
    yield apgd(seeded(), eps, steps=5)
    # Its loss changes with the progress of the attack, which a graph holds in a tensor.
    yield pgd(seeded(goal=GOALS["segpgd"]), eps, steps=4)
    clean = hard_dice(network(x).detach(), target)
    yield boundary_search(seeded(), eps, threshold=clean * 0.8, clean_quality=clean, settings=SearchSettings(steps=6))


@pytest.mark.parametrize("regions", [False, True])
def test_replayed_passes_find_what_the_passes_themselves_find(regions):
    network, graphs = TinyUNet(2, outputs=2 if regions else 3).eval(), Replayed()
    for seed in (0, 1):
        x, target = problem(regions, seed)
        expected = list(attacks(network, x, target))
        with graphs:
            found = list(attacks(network, x, target))
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.adversarial, plain.adversarial, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.distance, plain.distance)
    # Four attacks on one shape, and what is left of the batch when samples have crossed.
    assert 3 < len(graphs) < 9 and graphs.replays > 20


def test_a_batch_and_a_support_may_change_in_place():
    network, graphs = TinyUNet(2).eval(), Replayed()
    x, target = problem()
    for change in (
        lambda: None,
        lambda: x.copy_(torch.randn_like(x)),
        lambda: target.reference.copy_(target.reference.flip(0)),
    ):
        change()
        for support in (None, torch.arange(16) < 5, torch.arange(16) > 9):
            support = None if support is None else support.expand(1, 1, 16, 16)
            given = Problem(network, x, target, support=support)
            expected = pgd(given, 0.3, steps=3, start=False)
            with graphs:
                found = pgd(given, 0.3, steps=3, start=False)
            torch.testing.assert_close(found.adversarial, expected.adversarial, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2


def test_weights_may_change_in_place_and_be_exchanged():
    network, graphs = TinyUNet(2).eval(), Replayed()
    x, target = problem()
    for change in (
        lambda: None,
        lambda: network.last[1].weight.data.mul_(-2),
        lambda: setattr(network.last[1], "weight", torch.nn.Parameter(torch.randn(3, 16, 1, 1))),
    ):
        change()
        (expected, *_), (found, *_) = list(attacks(network, x, target)), ([*_run(graphs, network, x, target)])
        torch.testing.assert_close(found.adversarial, expected.adversarial)


def _run(graphs, network, x, target):
    with graphs:
        yield from attacks(network, x, target)


def test_what_cannot_be_captured_runs_as_always_and_the_log_says_why(caplog):
    network = TinyUNet(2).eval()
    x, target = problem()

    class Refuses(Replayed):
        def _record(self, work, device):
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    expected = next(iter(attacks(network, x, target)))
    for graphs, why in ((Refuses(), "not permitted when stream is capturing"), (GraphedPasses(), "CUDA device")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ima_seg.attacks"), graphs:
            found = next(iter(attacks(network, x, target)))
        assert torch.equal(found.adversarial, expected.adversarial) and len(graphs) == 0
        assert [why in record.message for record in caplog.records] == [True], "once"


def test_the_number_of_graphs_is_bounded(monkeypatch, caplog):
    monkeypatch.setattr("ima_seg.attacks.graphs.MOST_CAPTURES", 2)
    network, graphs = TinyUNet(2).eval(), Replayed()
    for size in (8, 12, 16):
        target = Target.from_raw(torch.ones(2, 1, size, size), Labels(3))
        with graphs:
            pgd(Problem(network, torch.randn(2, 1, size, size), target), torch.ones(2), steps=1)
    assert len(graphs) == 2 and "2 have been captured" in caplog.text


class Flushes(torch.autograd.Function):
    """The identity, whose gradient passes through float16 at ``share`` of its size."""

    @staticmethod
    def forward(ctx, x, share):
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * ctx.share).half().float(), None


@pytest.mark.parametrize("share", [2.0**-29, 2.0**20])
def test_float16_gradients_that_vanish_or_leave_the_range_come_back(share):
    network = TinyUNet(2).eval().requires_grad_(False)
    x, target = problem()
    flushed = Problem(lambda image: network(Flushes.apply(image, share)), x, target, precision="fp32")
    passes, zero = Passes(flushed), flushed.zero()
    expected = Passes(Problem(network, x, target, precision="fp32")).at(zero).gradient()
    first = passes.at(zero).gradient()
    assert (first == 0).all() or not torch.isfinite(first).all(), "else there is nothing to guard"
    passes.scale = LossScale(passes.scale.scale, 256, follows=True)
    for _ in range(8):
        gradient = passes.at(zero).gradient()
        assert torch.isfinite(gradient).all()
    direction = torch.nn.functional.cosine_similarity(gradient.flatten(1), expected.flatten(1))
    assert (direction > 0.99).all()


def test_a_step_skipped_for_its_scale_is_not_taken_for_a_gradient_of_zero():
    network = TinyUNet(2).eval().requires_grad_(False)
    x, target = problem()
    model = lambda image: network(Flushes.apply(image.float(), 2.0**20))  # noqa: E731
    clean = hard_dice(network(x), target)
    found = boundary_search(
        Problem(model, x.half(), target, precision="fp32"),
        0.2,
        threshold=clean * 0,
        clean_quality=clean,
        settings=SearchSettings(steps=8),
    )
    assert found.finite.all() and not found.stalled.any() and (found.distance > 0.05).all()


def test_a_gradient_that_is_not_finite_at_any_scale_is_not_hidden():
    scale = LossScale(torch.tensor([4.0, 4.0]), 4, follows=True)
    broken = torch.tensor([[[torch.nan, 1.0]], [[1.0, 1.0]]])
    assert (scale.checked(broken)[0] == 0).all() and scale.scale.tolist() == [0.0625, 4.0]
    for _ in range(4):
        gradient = scale.checked(broken)
    assert gradient[0].isnan().any() and torch.equal(gradient[1], broken[1])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "auto", "fp16"])
def test_cuda_graphs_find_what_passes_find(precision):
    network = TinyUNet(2).cuda().eval()
    graphs = GraphedPasses()
    for seed in (0, 1):
        x, target = problem(seed=seed)
        x, target = x.cuda(), target.map(torch.Tensor.cuda)
        given = Problem(network, x, target, precision=precision)
        expected = pgd(given, 0.2, steps=5, start=False)
        with graphs:
            found = pgd(given, 0.2, steps=5, start=False)
        torch.testing.assert_close(found.damage, expected.damage, atol=0.02, rtol=0)
        torch.testing.assert_close(found.distance, expected.distance, rtol=1e-3, atol=0)
    assert len(graphs) == 1


def test_training_with_graphs_falls_back_where_there_are_none(caplog):
    from ima_seg import IMA, IMASettings
    from tests.test_boundary import trained_unet

    reports = []
    for graphs in ("off", "on"):
        network, x, target = trained_unet(2)
        y = target.onehot[:, 1].view(6, 1, 16, 16).long()
        settings = IMASettings(delta=0.3, eps_max=1.0, precision="fp32", cuda_graphs=graphs)
        ima = IMA.from_settings(settings, labels=Labels(2), patch_voxels=256, epochs=5)
        torch.manual_seed(0)
        reports.append(ima.step(network, x, y, list("abcdef"),
                                loss=lambda out, rows, y=y: F.cross_entropy(out, y[rows, 0])))  # fmt: skip
    assert torch.equal(reports[0].adversarial, reports[1].adversarial)
    assert "CUDA device" in caplog.text
