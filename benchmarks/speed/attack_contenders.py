"""PGD of this package, of other libraries and of a plain loop, on the same problem, and the passes none can do without.

Every contender gets the same network, batch, budget, number of steps and step length, starts at the clean image and
climbs the same loss, per-sample Dice plus cross-entropy. The libraries are made for classifiers of images in [0, 1];
``wrapper`` says what it takes to run each here, and only what is named there is added. Wrapping is not timed.

One file: the contenders stand side by side, so that one sees that all get the same.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import math
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ima_seg import Labels, Target, ThreatModel
from ima_seg.attacks import GraphedPasses, pgd
from ima_seg.attacks import Problem as Given
from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.attacks.network import Precision, frozen
from ima_seg.types import Norm

#: Lengths of all steps together, in budgets: this package's default.
STEP_FACTOR = 4.0


@dataclass(frozen=True)
class Problem:
    """What is attacked and how.

    Attributes:
        network: (B, C, *S) -> logits of all deep-supervision heads, the full resolution first.
        x: batch (B, C, *S), z-scored.
        target: its reference.
        norm: of the perturbation.
        eps: budget, RMS per voxel (l2) or largest absolute value (linf).
        steps: of the attack.
    """

    network: nn.Module
    x: torch.Tensor
    target: Target
    norm: Norm = "l2"
    eps: float = 0.0
    steps: int = 10

    @property
    def radius(self) -> float:
        """The budget as norm of the whole perturbation of a sample, as the other libraries count."""
        return ThreatModel(self.norm).to_total(self.eps, self.x[0].numel())

    @property
    def step_length(self) -> float:
        """Norm of a whole step."""
        return STEP_FACTOR * self.radius / self.steps

    def loss(self, images: torch.Tensor) -> torch.Tensor:
        """The loss of each sample, (B,), of the full-resolution head."""
        return dice_ce_loss(self.network(images)[0], self.target)


Attack = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to attack.

    Attributes:
        name: in the tables.
        make: the attack on a problem, ready to be called; it returns the perturbed batch.
        wrapper: what it takes to run it on z-scored images with a label per voxel.
        package: what must be installed, None where nothing else is needed.
        module: what is imported from the package.
        norms: that it has.
    """

    name: str
    make: Callable[[Problem], Attack]
    wrapper: str
    package: str | None = None
    module: str = ""
    norms: tuple[str, ...] = ("l2", "linf")

    @property
    def peer(self) -> bool:
        """Whether this is somebody else's code."""
        return not self.name.startswith("ima-seg")

    @property
    def version(self) -> str | None:
        """Of the package; None where it is not installed."""
        if self.package is None:
            return ""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def floor(problem: Problem) -> Attack:
    """The passes alone: as many forwards, losses and input gradients as there are steps, in float32."""

    def run() -> torch.Tensor:
        with frozen(problem.network):
            for _ in range(problem.steps):
                leaf = problem.x.clone().requires_grad_(True)
                torch.autograd.grad(problem.loss(leaf).sum(), leaf)
        return problem.x

    return run


def plain_loop(problem: Problem) -> Attack:
    """PGD as one writes it in PyTorch; what all others are compared with."""
    one_per_sample = (-1, *(1,) * (problem.x.ndim - 1))

    def run() -> torch.Tensor:
        x, radius, length = problem.x, problem.radius, problem.step_length
        delta = torch.zeros_like(x)
        for _ in range(problem.steps):
            delta.requires_grad_(True)
            (gradient,) = torch.autograd.grad(problem.loss(x + delta).sum(), delta)
            with torch.no_grad():
                if problem.norm == "linf":
                    delta = (delta + length * gradient.sign()).clamp(-radius, radius)
                else:
                    delta = delta + length * gradient / gradient.flatten(1).norm(dim=1).view(one_per_sample)
                    size = delta.flatten(1).norm(dim=1).view(one_per_sample)
                    delta = delta * (radius / size).clamp(max=1)
        return x + delta

    return run


def ours(precision: Precision) -> Callable[[Problem], Attack]:
    """``ima_seg.attacks.pgd`` in ``precision``, as training calls it; with its own precision, on CUDA, in graphs."""

    def make(problem: Problem) -> Attack:
        eps = torch.full((len(problem.x),), problem.eps, device=problem.x.device)
        given = Given(problem.network, problem.x, problem.target, ThreatModel(problem.norm), precision=precision)
        captured = precision == "auto" and problem.x.is_cuda
        graphs = GraphedPasses() if captured else contextlib.nullcontext()

        def run() -> torch.Tensor:
            with graphs:
                hit = pgd(given, eps, steps=problem.steps, step_factor=STEP_FACTOR, start=False, keep="last")
                return hit.adversarial

        return run

    return make


class LossAsClassifier(nn.Module):
    """A classifier of images in [0, 1] with one label per image, whose cross-entropy rises with the loss of a problem.

    Its two logits are 0 and the loss plus a constant. The cross-entropy of class 0 then is log(1 + exp(loss + 2)): its
    gradient is that of the loss times a positive factor per sample, which a normalised step does not see. The loss is
    above -1, so that class 1 always wins and every point counts as adversarial.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem, self.network = problem, problem.network
        # Wide enough that clipping to [0, 1] never cuts into the ball.
        self.low = float(problem.x.min()) - problem.radius
        self.width = float(problem.x.max()) + problem.radius - self.low
        # torchattacks' L2 step takes 4D input: 5D broadcasts along the wrong axis.
        self.flat = (*problem.x.shape[:2], -1, problem.x.shape[-1])
        self.training = problem.network.training

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Images -> [0, 1]."""
        return ((x - self.low) / self.width).reshape(self.flat)

    def stretch(self, inputs: torch.Tensor) -> torch.Tensor:
        """[0, 1] -> images."""
        return (inputs * self.width + self.low).reshape(self.problem.x.shape)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        loss = self.problem.loss(self.stretch(inputs))
        return torch.stack([torch.zeros_like(loss), loss + 2], 1)


def _torchattacks(problem: Problem) -> Attack:
    torchattacks = importlib.import_module("torchattacks")
    classifier = LossAsClassifier(problem)
    kind = torchattacks.PGDL2 if problem.norm == "l2" else torchattacks.PGD
    attack = kind(
        classifier, eps=problem.radius / classifier.width, alpha=problem.step_length / classifier.width,
        steps=problem.steps, random_start=False,
    )  # fmt: skip
    labels = torch.zeros(len(problem.x), dtype=torch.long, device=problem.x.device)
    return lambda: classifier.stretch(attack(classifier.squeeze(problem.x), labels))


def _foolbox(problem: Problem) -> Attack:
    import eagerpy
    import foolbox

    base = foolbox.attacks.L2PGD if problem.norm == "l2" else foolbox.attacks.LinfPGD

    class OwnLoss(base):  # type: ignore[misc, valid-type]
        def get_loss_fn(self, model: Any, labels: Any) -> Callable[[Any], Any]:
            return lambda inputs: eagerpy.astensor(problem.loss(inputs.raw).sum())

    with warnings.catch_warnings(record=True):  # it warns of networks in training mode, past any filter
        model = foolbox.PyTorchModel(problem.network, bounds=(-math.inf, math.inf), device=problem.x.device)
    attack = OwnLoss(abs_stepsize=problem.step_length, rel_stepsize=1.0, steps=problem.steps, random_start=False)
    labels = torch.zeros(len(problem.x), dtype=torch.long, device=problem.x.device)
    return lambda: attack.run(model, problem.x, labels, epsilon=problem.radius)


def _art(problem: Problem) -> Attack:
    evasion = importlib.import_module("art.attacks.evasion")
    classification = importlib.import_module("art.estimators.classification")

    class FullResolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = problem.network
            self.training = problem.network.training

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images)[0]

    estimator = classification.PyTorchClassifier(
        FullResolution(), loss=lambda logits, _: dice_ce_loss(logits, problem.target).sum(), clip_values=None,
        input_shape=tuple(problem.x.shape[1:]), nb_classes=problem.target.labels.outputs,
        device_type="gpu" if problem.x.device.type == "cuda" else "cpu",
    )  # fmt: skip
    norm = 2 if problem.norm == "l2" else math.inf
    attack = evasion.ProjectedGradientDescentPyTorch(
        estimator, norm=norm, eps=problem.radius, eps_step=problem.step_length, max_iter=problem.steps,
        num_random_init=0, batch_size=len(problem.x), verbose=False,
    )  # fmt: skip
    unused = torch.zeros(len(problem.x), 1)

    def run() -> torch.Tensor:
        images = attack._generate_batch(problem.x, unused, None, problem.radius, problem.step_length)
        return torch.from_numpy(images).to(problem.x.device)

    return run


def _adv_lib(problem: Problem) -> Attack:
    try:
        attacks = importlib.import_module("adv_lib.attacks")
    except ModuleNotFoundError as error:
        if error.name != "visdom":
            raise
        # It imports this plotting library at once and needs it for plots alone.
        sys.modules["visdom"] = types.ModuleType("visdom")
        attacks = importlib.import_module("adv_lib.attacks")
    classifier = LossAsClassifier(problem)
    labels = torch.zeros(len(problem.x), dtype=torch.long, device=problem.x.device)

    def run() -> torch.Tensor:
        inputs = attacks.pgd_linf(
            classifier, classifier.squeeze(problem.x), labels, problem.radius / classifier.width,
            steps=problem.steps + 1, random_init=False, absolute_step_size=problem.step_length / classifier.width,
        )  # fmt: skip
        return classifier.stretch(inputs)

    return run


AS_CLASSIFIER = "affine map into [0, 1]; network and loss behind a classifier of two classes, as its loss is fixed"
CONTENDERS = [
    Contender("ima-seg fp32", ours("fp32"), "none"),
    Contender("ima-seg default", ours("auto"), "none"),
    Contender("plain loop", plain_loop, "none; written for this comparison"),
    Contender(
        "torchattacks", _torchattacks, f"{AS_CLASSIFIER}; 3D batches viewed as 2D, its L2 step fails on 5D input",
        "torchattacks", "torchattacks",
    ),
    Contender(
        "foolbox", _foolbox, "subclass with own loss; infinite bounds; `run`, as calling it needs an own criterion too",
        "foolbox", "foolbox",
    ),
    Contender(
        "ART", _art, "own loss; its `_generate_batch`, as `generate` adds two forwards to score one label per image",
        "adversarial-robustness-toolbox", "art",
    ),
    Contender(
        "adv-lib", _adv_lib, f"{AS_CLASSIFIER}; one more step and pass, as it returns the point before its last step; "
        "no L2", "adv-lib", "adv_lib", ("linf",),
    ),
]  # fmt: skip


class OneHead(nn.Module):
    """Logits -> the list of heads that a network with deep supervision returns."""

    def forward(self, logits: torch.Tensor) -> list[torch.Tensor]:
        return [logits]


def alters(contender: Contender, device: torch.device) -> list[str]:
    """What an attack leaves changed on a network in training: gradients, flags, batch-norm statistics.

    The network is in training mode, but for one batch norm that is frozen, and its parameters hold gradients.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), OneHead(),
    ).to(device)  # fmt: skip
    network.train()
    network[1].eval()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = torch.randn(2, 1, 8, 8, device=device)
    target = Target.from_raw((x > 0).long(), Labels(2))
    norm: Norm = "l2" if "l2" in contender.norms else "linf"
    flags = [module.training for module in network.modules()]
    statistics = [buffer.clone() for buffer in network.buffers()]
    contender.make(Problem(network, x, target, norm, 0.1, 2))()
    changed = []
    if any(p.grad is None or not torch.equal(p.grad, torch.ones_like(p)) for p in network.parameters()):
        changed.append("parameter gradients")
    if flags != [module.training for module in network.modules()]:
        changed.append("train/eval flags")
    if any(not torch.equal(a, b) for a, b in zip(statistics, network.buffers(), strict=True)):
        changed.append("batch-norm statistics")
    return changed
