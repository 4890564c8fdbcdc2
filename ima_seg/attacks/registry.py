"""All attacks by name, as the command line and the records know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ima_seg.attacks.apgd import apgd
from ima_seg.attacks.base import AttackResult
from ima_seg.attacks.losses import GOALS
from ima_seg.attacks.noise import gaussian_noise, uniform_noise
from ima_seg.attacks.pgd import fgsm, ifgsm, pgd
from ima_seg.attacks.square import square
from ima_seg.attacks.vafa import vafa

#: Square makes so many queries per gradient step of the other attacks.
QUERIES_PER_STEP = 10


@dataclass(frozen=True)
class AttackSpec:
    """An attack with its fixed options.

    Attributes:
        run: the attack; the signature is that of :func:`ima_seg.attacks.pgd`.
        kind: ``white``: gradients of the model; ``black``: its outputs; ``noise``: neither.
        summary: one line for ``--help`` and the report.
        length: settings -> the argument that says how long it runs.
    """

    run: Callable[..., AttackResult]
    kind: Literal["white", "black", "noise"]
    summary: str
    length: Callable[[int, int], Mapping[str, int]] = field(
        default=lambda steps, restarts: {"steps": steps, "restarts": restarts}
    )


def _no_start(steps: int, restarts: int) -> dict[str, int]:
    """Without a random start a restart would repeat itself."""
    return {"steps": steps}


def _queries(steps: int, restarts: int) -> dict[str, int]:
    return {"queries": QUERIES_PER_STEP * steps, "restarts": restarts}


def _draws(steps: int, restarts: int) -> dict[str, int]:
    return {"restarts": restarts}


def _white(run: Callable[..., AttackResult], summary: str, **options: Any) -> AttackSpec:
    return AttackSpec(partial(run, **options) if options else run, "white", summary)


ATTACKS: dict[str, AttackSpec] = {
    "fgsm": AttackSpec(fgsm, "white", "one gradient step of full length (Goodfellow 2015)", _draws),
    "ifgsm": AttackSpec(ifgsm, "white", "gradient steps from the clean image (Kurakin 2017)", _no_start),
    "pgd": _white(pgd, "gradient steps from a random start (Madry 2018)"),
    "apgd-ce": _white(apgd, "adaptive steps, cross-entropy (Croce & Hein 2020)", goal=GOALS["ce"]),
    "apgd-margin": _white(apgd, "adaptive steps, margin loss (Croce & Hein 2020)", goal=GOALS["margin"]),
    "apgd-dice": _white(apgd, "adaptive steps, Dice + CE", goal=GOALS["dice_ce"]),
    "segpgd": _white(pgd, "PGD, correct voxels first (Gu 2022)", goal=GOALS["segpgd"]),
    "cospgd": _white(pgd, "PGD, weighted by alignment with the label (Agnihotri 2024)", goal=GOALS["cospgd"]),
    "sea-masked-ce": _white(apgd, "SEA, voxels still correct (Croce 2024)", goal=GOALS["masked_ce"], red_eps=True),
    "sea-balanced-ce": _white(apgd, "SEA, classes balanced (Croce 2024)", goal=GOALS["balanced_ce"], red_eps=True),
    "sea-js": _white(apgd, "SEA, Jensen-Shannon divergence (Croce 2024)", goal=GOALS["js"], red_eps=True),
    "vafa": _white(vafa, "quantisation of block frequencies (Hanif 2023)"),
    "square": AttackSpec(square, "black", "random search, outputs only (Andriushchenko 2020)", _queries),
    "gaussian": AttackSpec(gaussian_noise, "noise", "Gaussian noise of the same size", _draws),
    "uniform": AttackSpec(uniform_noise, "noise", "uniform noise of the same size", _draws),
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
