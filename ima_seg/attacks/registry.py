"""All attacks by name, as the command line and the records know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ima_seg.attacks.apgd import apgd
from ima_seg.attacks.noise import gaussian_noise, uniform_noise
from ima_seg.attacks.pgd import fgsm, ifgsm, pgd
from ima_seg.attacks.problem import Eps, Problem
from ima_seg.attacks.result import AttackResult
from ima_seg.attacks.square import square
from ima_seg.attacks.vafa import vafa

#: Square makes so many queries per gradient step of the other attacks.
QUERIES_PER_STEP = 10


@dataclass(frozen=True)
class AttackSpec:
    """An attack with its fixed options.

    Attributes:
        run: the attack, a function of a problem and a budget.
        kind: ``white``: gradients of the model; ``black``: its outputs; ``noise``: neither.
        summary: one line for ``--help`` and the report.
        goal: a key of :data:`ima_seg.attacks.GOALS`; the goal of its problem, unless another is wanted.
        lengths: its arguments that say how long it runs, of ``steps``, ``queries`` and ``restarts``.
    """

    run: Callable[..., AttackResult]
    kind: Literal["white", "black", "noise"]
    summary: str
    goal: str = "dice_ce"
    lengths: tuple[str, ...] = ("steps", "restarts")

    def __call__(self, problem: Problem, eps: Eps, *, steps: int, restarts: int) -> AttackResult:
        """Attack ``problem``, with its goal, for as long as ``steps`` and ``restarts`` mean to this attack."""
        lengths = {"steps": steps, "queries": QUERIES_PER_STEP * steps, "restarts": restarts}
        return self.run(problem, eps, **{name: lengths[name] for name in self.lengths})


_SEA = partial(apgd, red_eps=True)

ATTACKS: dict[str, AttackSpec] = {
    "fgsm": AttackSpec(fgsm, "white", "one gradient step of full length (Goodfellow 2015)", lengths=()),
    "ifgsm": AttackSpec(ifgsm, "white", "gradient steps from the clean image (Kurakin 2017)", lengths=("steps",)),
    "pgd": AttackSpec(pgd, "white", "gradient steps from a random start (Madry 2018)"),
    "apgd-ce": AttackSpec(apgd, "white", "adaptive steps, cross-entropy (Croce & Hein 2020)", "ce"),
    "apgd-margin": AttackSpec(apgd, "white", "adaptive steps, margin loss (Croce & Hein 2020)", "margin"),
    "apgd-dice": AttackSpec(apgd, "white", "adaptive steps, Dice + CE"),
    "segpgd": AttackSpec(pgd, "white", "PGD, correct voxels first (Gu 2022)", "segpgd"),
    "cospgd": AttackSpec(pgd, "white", "PGD, weighted by alignment with the label (Agnihotri 2024)", "cospgd"),
    "sea-masked-ce": AttackSpec(_SEA, "white", "SEA, voxels still correct (Croce 2024)", "masked_ce"),
    "sea-balanced-ce": AttackSpec(_SEA, "white", "SEA, classes balanced (Croce 2024)", "balanced_ce"),
    "sea-js": AttackSpec(_SEA, "white", "SEA, Jensen-Shannon divergence (Croce 2024)", "js"),
    "vafa": AttackSpec(vafa, "white", "quantisation of block frequencies (Hanif 2023)"),
    "square": AttackSpec(
        square, "black", "random search, outputs only (Andriushchenko 2020)", lengths=("queries", "restarts")
    ),
    "gaussian": AttackSpec(gaussian_noise, "noise", "Gaussian noise of the same size", lengths=("restarts",)),
    "uniform": AttackSpec(uniform_noise, "noise", "uniform noise of the same size", lengths=("restarts",)),
}

#: Names that stand for several attacks.
GROUPS: dict[str, list[str]] = {
    "apgd": ["apgd-ce", "apgd-margin"],
    "sea": ["sea-masked-ce", "sea-balanced-ce", "sea-js"],
    "noise": ["gaussian", "uniform"],
}

#: Names that the evaluation handles itself, for they need more than one model, label or budget.
SPECIAL: dict[str, str] = {
    "transfer": "PGD on each of the other models, given to this one",
    "minimal": "the smallest perturbation that breaks the case, by boundary search up to the largest eps",
    "disappear": "PGD towards losing each class of --target",
    "appear": "PGD towards each class of --target everywhere else",
    "patch-pgd": "baseline: PGD on each patch for itself, without the sliding window",
}
