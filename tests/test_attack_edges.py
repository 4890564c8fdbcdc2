"""Every attack on inputs at the edge of what numbers can say: finite, within the budget, and never an exception."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from ima_seg.attacks import Problem, SearchSettings, boundary_search, class_quality, minimal_norm
from ima_seg.attacks.problem import LARGEST, SMALLEST
from ima_seg.attacks.registry import ATTACKS
from ima_seg.errors import UserError
from ima_seg.evaluate.attack.conditions import Condition
from ima_seg.evaluate.attack.execution import Attacker
from ima_seg.ops import hard_counts, hard_dice
from ima_seg.types import Classes, Labels, Target, ThreatModel
from tests.evaluation_runs import evaluated, failures, records, settings
from tests.folder_data import write_cases, write_model
from tests.models import TinyUNet

SHAPE = (8, 8)


def broken(when):
    return lambda logits, moved: torch.where(when(moved), math.nan, logits)


def same(logits, moved):
    return logits


IMAGE = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
LOWEST = torch.finfo(torch.bfloat16).min
#: What becomes of the logits (K, *S) of an image that was moved so far, the image, and the budget. Samples are
#: independent, so that all are attacked as one batch.
EDGES = {
    "none of these": (same, IMAGE, 0.1),
    "no budget": (same, IMAGE, 0.0),
    "tiny budget": (same, IMAGE * 0, 1e-25),
    "smallest budget": (same, IMAGE * 0, SMALLEST),
    "large budget": (same, IMAGE, 1e6),
    "largest budget": (same, IMAGE, LARGEST),
    "NaN when moved": (broken(lambda moved: moved > 0), IMAGE, 0.1),
    "NaN far away": (broken(lambda moved: moved > 0.05), IMAGE, 0.1),
    "NaN everywhere": (broken(lambda moved: moved >= 0), IMAGE, 0.1),
    "infinite when moved": (lambda logits, moved: logits / (moved == 0), IMAGE, 0.1),
    "equal logits": (lambda logits, moved: logits * 0, IMAGE, 0.1),
    "no gradient": (lambda logits, moved: logits.detach(), IMAGE, 0.1),
    "tiny gradient": (lambda logits, moved: logits * 1e-30, IMAGE, 0.1),
    "huge logits": (lambda logits, moved: logits.tanh() * 1e38, IMAGE, 0.1),
    "logits that overflow float16": (lambda logits, moved: (logits.half() * 1e4).float(), IMAGE, 0.1),
    "constant image": (same, IMAGE * 0 + 3, 0.1),
    "lowest number as padding": (same, torch.where(IMAGE < 0, LOWEST, IMAGE), 0.1),
    "NaN in the image": (same, torch.where(IMAGE > 2, math.nan, IMAGE), 0.1),
}
#: Whose clean logits are not finite.
HOPELESS = ("NaN everywhere", "NaN in the image", "lowest number as padding")
#: Which do not look at the clean image.
NOISE = ("gaussian", "uniform")


class Edges(torch.nn.Module):
    """A small network, and what becomes of its logits."""

    def __init__(self, x):
        super().__init__()
        self.network, self.x = TinyUNet(2, channels=2).eval(), x

    def forward(self, batch):
        rows = self.rows(batch)
        moved = (batch.detach() - self.x[rows]).float().flatten(1).abs().amax(1)
        logits = self.network(batch.float())
        changes = [change for change, *_ in EDGES.values()]
        return torch.stack([changes[row](logits[i], moved[i]) for i, row in enumerate(rows)])

    def rows(self, batch):
        """Which of the samples the batch holds: part of a batch is told by the constant in its last channel."""
        return batch[:, -1, 0, 0].long().tolist()


def minimal(problem, eps, *, steps, restarts):
    with torch.no_grad():
        clean = hard_dice(problem.network(problem.x), problem.target)
    return minimal_norm(
        problem, eps, threshold=clean * 0.5, clean_quality=clean, steps=steps, rounds=2, restarts=restarts
    )


RUNS = {**ATTACKS, "minimal": minimal}


@pytest.mark.parametrize("norm, dtype", [("l2", torch.float32), ("linf", torch.float32), ("l2", torch.bfloat16)])
@pytest.mark.parametrize("name", RUNS)
def test_results_are_finite_and_within_the_budget(name, norm, dtype):
    torch.manual_seed(0)
    names, count = list(EDGES), len(EDGES)
    images = torch.stack([image for _, image, _ in EDGES.values()])
    rows = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, *SHAPE)
    x = torch.cat([images, rows], 1).to(dtype)
    network = Edges(x)
    target = Target.from_raw(torch.randint(0, 3, (count, 1, *SHAPE)), Labels(3))
    eps = torch.tensor([budget for *_, budget in EDGES.values()])
    hit = RUNS[name](Problem(network, x, target, ThreatModel(norm, 1)), eps, steps=2, restarts=2)

    assert hit.adversarial.dtype == dtype and torch.equal(hit.adversarial.isfinite(), x.isfinite())
    delta = (hit.adversarial.double() - x.double())[:, :1].nan_to_num().flatten(1)
    size = delta.square().mean(1).sqrt() if norm == "l2" else delta.abs().amax(1)
    # The sum of image and perturbation is rounded to what the batch can hold.
    image = images.flatten(1).nan_to_num().masked_fill(images.flatten(1) == LOWEST, 0).abs().amax(1).double()
    rounding = torch.finfo(dtype).eps
    over = size > eps.double() * (1 + max(1e-5, rounding)) + rounding * torch.where(eps > SMALLEST, image, 0)
    assert not over.any(), [(names[i], float(size[i])) for i in over.nonzero()]
    measured = torch.tensor([edge != "NaN in the image" for edge in names])
    torch.testing.assert_close(hit.distance[measured].double(), size[measured], rtol=1e-4, atol=0)
    # What is handed out was looked at: where its damage is known, its logits are finite.
    with torch.no_grad():
        finite = hard_counts(network(hit.adversarial), target)[1]
    unknown = hit.damage.isnan()
    wrong = ~finite & ~unknown
    assert not wrong.any(), [names[i] for i in wrong.nonzero()]
    assert not hit.damage.isinf().any() and not hit.trace.isinf().any()
    hopeless = torch.tensor([edge in HOPELESS for edge in names])
    if name not in NOISE:
        assert not (unknown & ~hopeless).any(), [names[i] for i in (unknown & ~hopeless).nonzero()]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_budgets_that_are_none_are_refused(attack):
    target = Target.from_raw(torch.zeros(1, 1, *SHAPE), Labels(3))
    problem = Problem(TinyUNet(2), IMAGE[None], target)
    for eps in (-0.1, math.nan, math.inf, 1e13, 1e308):
        with pytest.raises(UserError, match=r"a budget is 0 or positive, and at most 1e\+12"):
            attack(problem, eps, steps=1, restarts=1)


def test_of_noise_the_finite_draw_of_most_damage_is_returned():
    """Of two draws the second breaks the network; so it is not the one, whatever its order."""
    x = torch.randn(3, 1, *SHAPE)
    for broken_draw in (0, 1):
        draws = []

        def network(batch, broken_draw=broken_draw, draws=draws):
            draws.append(batch)
            return torch.stack([batch[:, 0], -batch[:, 0]], 1) * (math.nan if len(draws) - 1 == broken_draw else 1)

        target = Target.from_raw(torch.ones(3, 1, *SHAPE), Labels(2))
        hit = ATTACKS["gaussian"](Problem(network, x, target), 0.1, steps=1, restarts=2)
        torch.testing.assert_close(hit.adversarial, draws[1 - broken_draw])
        assert (hit.distance > 0.09).all() and torch.isfinite(hit.damage).all()


@pytest.mark.parametrize("restarts", [1, 2])
def test_the_smallest_perturbation_of_what_is_broken_is_none(restarts):
    x = torch.randn(3, 1, *SHAPE)
    target = Target.from_raw(torch.randint(0, 3, (3, 1, *SHAPE)), Labels(3))
    problem = Problem(TinyUNet(2).eval(), x, target)
    one = torch.ones(3)
    hit = minimal_norm(problem, 0.1, threshold=one, clean_quality=0 * one, steps=2, rounds=2, restarts=restarts)
    assert hit.broken.all() and (hit.crossing == 0).all() and (hit.distance == 0).all()
    assert torch.equal(hit.adversarial, x)
    classes = Target.from_raw(torch.zeros(3, dtype=torch.int64), Classes(3))
    judged = Problem(lambda batch: batch.flatten(1)[:, :3], x, classes)
    nobody = torch.zeros(3, dtype=torch.bool)
    found = boundary_search(
        judged, 0.1, threshold=0 * one, clean_quality=class_quality(judged.network(x), classes)[0],
        settings=SearchSettings(steps=2), searched=nobody,
    )  # fmt: skip
    assert not found.crossed.any() and torch.equal(found.adversarial, x)


def test_a_boundary_without_distance_is_found():
    """The clean image lies on the boundary; ever smaller budgets end at the smallest there is."""
    target = Target.from_raw(torch.ones(3, 1, *SHAPE), Labels(2))

    def network(batch):
        score = batch.sum((1, 2, 3)).view(-1, 1, 1) + 0 * batch[:, 0]
        return torch.stack([0 * score, score + 1e-20], 1)

    problem = Problem(network, torch.zeros(3, 1, *SHAPE), target)
    one = torch.ones(3)
    hit = minimal_norm(problem, 0.1, threshold=0.5 * one, clean_quality=one, steps=3, rounds=30)
    assert torch.isfinite(hit.adversarial).all() and (hit.crossing >= 0).all() and (hit.distance <= 1e-10).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_finite_however_large_they_are(dtype):
    target = Target.from_raw(torch.ones(3, 1, 16, 16), Labels(2))
    logits = torch.full((3, 2, 16, 16), torch.finfo(dtype).max, dtype=dtype)
    logits[1, 0, 3, 3], logits[2, 1, 4, 5] = math.nan, -math.inf
    assert hard_counts(logits, target)[1].tolist() == [True, False, False]


def test_outputs_that_are_not_finite_are_never_scored(tmp_path):
    model = write_model(tmp_path / "model")
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    for name, weight in checkpoint["network_weights"].items():
        if "seg_layers" in name:
            weight.fill_(3e38)
    torch.save(checkpoint, file)
    data, out = write_cases(tmp_path, "a"), tmp_path / "out"
    with contextlib.suppress(UserError):  # there is nothing to report
        evaluated({"M": model}, data, out, settings())
    (failure,) = failures(out)
    assert failure.message.startswith(f"a: {model} gives outputs that are NaN or infinite, which predict nothing")
    assert records(out) == {}


def test_an_attack_that_saw_nothing_finite_is_no_result():
    """Noise that breaks the network at each draw returns the clean image, whose Dice is not that of noise."""
    problem = Problem(lambda batch: torch.stack([batch[:, 0]] * 2, 1) * math.nan, torch.zeros(1, 1, 4, 4),
                      Target.from_raw(torch.ones(1, 1, 4, 4), Labels(2)))  # fmt: skip
    result = ATTACKS["gaussian"](problem, 0.1, steps=1, restarts=1)
    assert result.distance == 0 and result.damage.isnan()
    stage = SimpleNamespace(problem=problem, case=SimpleNamespace(model=SimpleNamespace(folder="MODEL")))
    attacker = Attacker(settings(), torch.device("cpu"))
    with pytest.raises(UserError, match=r"gaussian at 0\.1 per voxel: .* outputs of MODEL are not finite; try --prec"):
        attacker._check(Condition("noise", "gaussian", 0.1), stage, result, 0.1)
