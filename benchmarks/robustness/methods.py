"""What the robustness table compares, how long each trains, and how it is evaluated."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

#: The method that the others are compared with, and the one that has learnt nothing about attacks.
OURS, STANDARD = "ima", "standard"
#: Budgets per voxel (RMS) of the paper's noise levels for the hippocampus, L2 1, 5, 10 and 15 on a slice of 56x40.
LEVELS = {level: level / math.sqrt(56 * 40) for level in (1, 5, 10, 15)}


@dataclass(frozen=True)
class Method:
    """A way to train: a trainer and what it sets beyond its defaults.

    Attributes:
        trainer: its name.
        settings: by profile-independent name.
        steps: whether it takes the number of gradient steps of the profile.
    """

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: bool = False


METHODS: dict[str, Method] = {
    # Without adversarial loss the step is nnUNetTrainer's own; this way its length can be set.
    STANDARD: Method("nnUNetTrainerIMA", {"beta": 0.0}),
    "noise": Method("nnUNetTrainerNoise", {"eps": round(2 * LEVELS[15], 4)}),
    **{
        f"pgdat-{level}": Method("nnUNetTrainerPGDAT", {"eps": round(size, 4)}, steps=True)
        for level, size in LEVELS.items()
    },
    # Large noise alone can keep a network from learning at all, hence the mixtures with the clean loss.
    **{
        f"pgdat-{level}-half": Method("nnUNetTrainerPGDAT", {"eps": round(LEVELS[level], 4), "beta": 0.5}, steps=True)
        for level in (5, 10, 15)
    },
    "fgsmat": Method("nnUNetTrainerFGSMAT", {"eps": round(LEVELS[5], 4)}),
    "freeat": Method("nnUNetTrainerFreeAT", {"eps": round(LEVELS[5], 4), "replays": 4}),
    "segpgdat": Method("nnUNetTrainerSegPGDAT", {"eps": round(LEVELS[5], 4)}, steps=True),
    "trades": Method("nnUNetTrainerTRADES", {"eps": round(LEVELS[5], 4)}, steps=True),
    "trades-1": Method("nnUNetTrainerTRADES", {"eps": round(LEVELS[5], 4), "weight": 1.0}, steps=True),
    "te": Method("nnUNetTrainerTE", {"eps": round(LEVELS[5], 4)}, steps=True),
    "amat": Method("nnUNetTrainerAMAT"),
    OURS: Method("nnUNetTrainerIMA"),
    # The threshold is what trades clean Dice for robust Dice; 0.6 is the paper's.
    **{
        f"ima-tau-{percent}": Method("nnUNetTrainerIMA", {"criterion": "dice", "tau": percent / 100})
        for percent in (30, 60)
    },
    "ima-fast": Method("nnUNetTrainerIMA_fast"),
}


@dataclass(frozen=True)
class Profile:
    """How much of everything.

    Attributes:
        plans: by configuration, the name of the plans, and how they differ from nnUNetPlans (arguments of
            ``write_plans``).
        training: settings that all trainings share.
        steps: gradient steps of the trainings with PGD; None leaves each its own.
        protocols: by configuration, name -> arguments of ``ima-seg evaluate``.
    """

    plans: dict[str, tuple[str, dict[str, Any]]]
    training: dict[str, Any]
    steps: int | None
    protocols: dict[str, dict[str, list[str]]]


def _paper(steps: int, limit: list[str]) -> list[str]:
    levels = [str(level) for level in LEVELS]
    return ["--attack", "pgd", "--budget", "slice", "--unit", "l2", "--eps", *levels, "--steps", str(steps),
            "--disable_tta", *limit]  # fmt: skip


def _protocols(
    cases: tuple[int | None, int | None], steps: tuple[int, int], l2: list[float], linf: list[float], flat: bool
) -> dict[str, list[str]]:
    """The paper's protocol, which is one of 2D, and ours, for so many cases and steps each."""
    paper, worst = (["--limit", str(count)] if count else [] for count in cases)
    return {
        **({"paper": _paper(steps[0], paper)} if flat else {}),
        "worst-l2": _worst("l2", l2, steps[1], worst),
        "worst-linf": _worst("linf", linf, steps[1], worst),
    }


def _worst(norm: str, eps: list[float], steps: int, limit: list[str]) -> list[str]:
    return ["--attack", "pgd", "apgd-dice", "apgd-ce", "segpgd", "square", "--norm", norm, "--eps", *map(str, eps),
            "--steps", str(steps), "--disable_tta", *limit]  # fmt: skip


#: Plans of networks that two CPU cores can train.
SMALL = {
    "2d": ("nnUNetPlans_small", {"features": 16, "max_features": 128, "batch_size": 32}),
    "3d_fullres": (
        "nnUNetPlans_small3d",
        {"features": 12, "max_features": 96, "batch_size": 2},
    ),
}
#: nnU-Net's own.
FULL = {name: ("nnUNetPlans", {}) for name in ("2d", "3d_fullres")}
#: Budgets of 3D are smaller: per voxel, its boundaries are nearer.
PROFILES: dict[str, Profile] = {
    # A trial: about eight minutes on one core for each method in 2D, from a pretrained model.
    "quick": Profile(
        plans=SMALL,
        training={"epochs": 12, "iterations_per_epoch": 30, "val_iterations_per_epoch": 1, "save_every": 1},
        steps=5,
        protocols={
            "2d": _protocols((12, 6), (20, 5), [0.05, 0.15], [0.05], flat=True),
            "3d_fullres": _protocols((None, 5), (20, 5), [0.02, 0.05, 0.1], [0.02], flat=False),
        },
    ),
    # About a quarter of an hour on one core for each method in 2D, from a pretrained model.
    "cpu": Profile(
        plans=SMALL,
        training={"epochs": 20, "iterations_per_epoch": 40, "val_iterations_per_epoch": 1, "save_every": 1},
        steps=5,
        protocols={
            "2d": _protocols((16, 8), (20, 5), [0.05, 0.15], [0.05], flat=True),
            "3d_fullres": _protocols((None, 8), (20, 5), [0.02, 0.05, 0.1], [0.02], flat=False),
        },
    ),
    "gpu": Profile(
        plans=FULL,
        training={"epochs": 250},
        steps=None,
        protocols={
            "2d": _protocols((None, None), (20, 50), [0.02, 0.05, 0.1, 0.2, 0.3], [0.02, 0.05, 0.1, 0.2], flat=True),
            "3d_fullres": _protocols(
                (None, None), (20, 50), [0.02, 0.05, 0.1, 0.2, 0.3], [0.02, 0.05, 0.1, 0.2], flat=False
            ),
        },
    ),
}


def plans_of(profile: Profile, configuration: str) -> tuple[str, dict[str, Any]]:
    """Name of the plans and what they change.

    Raises:
        SystemExit: the profile has none for this configuration.
    """
    if configuration not in profile.plans:
        sys.exit(f"there are no plans for {configuration!r}; the configurations are: {', '.join(profile.plans)}")
    return profile.plans[configuration]


#: Ends the names of trainings that take as much computation as ours.
MATCHED = "-matched"
#: nnU-Net's.
ITERATIONS = 250


def method_of(name: str) -> Method:
    """The method of a training, matched or not."""
    return METHODS[name.removesuffix(MATCHED)]


def matched_iterations(ours: dict[str, Any], wanted: float, cost: float) -> int:
    """Iterations per epoch with which a training takes as much computation as ours.

    Args:
        ours: settings of our training.
        wanted: standard passes per patch that it took.
        cost: standard passes per patch of the other training.
    """
    return max(round(ours.get("iterations_per_epoch", ITERATIONS) * wanted / cost), 1)


def settings_of(name: str, profile: Profile, iterations: int | None = None) -> dict[str, Any]:
    """The settings file of a training; ``iterations`` per epoch where they are not the profile's."""
    method, training = method_of(name), dict(profile.training)
    if "replays" in method.settings and "iterations_per_epoch" in training:
        training["iterations_per_epoch"] //= method.settings["replays"]
    steps = {"steps": profile.steps} if method.steps and profile.steps is not None else {}
    matched = {} if iterations is None else {"iterations_per_epoch": iterations}
    return {**training, **steps, **method.settings, **matched}


def protocols_of(configuration: str, profile: Profile) -> dict[str, list[str]]:
    """The protocols that a configuration is evaluated by."""
    return profile.protocols[configuration]
