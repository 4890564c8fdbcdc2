"""One attack on one case: the budget, the seed, the memory, and what is noted about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch

from ima_seg.attacks import GOALS, UNTARGETED, AttackResult, Problem, appear, disappear, minimal_norm, pgd
from ima_seg.attacks.network import full_resolution
from ima_seg.attacks.passes import Passes
from ima_seg.attacks.registry import ATTACKS
from ima_seg.attacks.tiling import Tiling
from ima_seg.errors import UserError
from ima_seg.evaluate.attack.conditions import Condition
from ima_seg.evaluate.attack.patchwise import patch_pgd
from ima_seg.evaluate.attack.problem import Stage, make_stage, native_scale, per_voxel
from ima_seg.evaluate.run import Budget, EvaluationSettings
from ima_seg.evaluate.subject import Case, Window
from ima_seg.ops import hard_dice, perturbation_size, project
from ima_seg.types import PassCount, ThreatModel

#: A perturbation may exceed its budget by rounding only.
BUDGET_TOLERANCE = 1e-3
#: Points of the trace that a record keeps, at most.
TRACE_POINTS = 100

_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Found:
    """A perturbed case and what is known about its making; the rest as in :class:`ima_seg.evaluate.records.Record`."""

    perturbed: torch.Tensor  # (1, C + extra, *S), in the layout of Case.base
    eps_network: float
    passes: PassCount  # over the whole volume
    breaking_rms: float | None = None
    trace: list[float] = field(default_factory=list)
    zero_gradient: float | None = None


class Attacker:
    """Runs conditions of a run with ``settings`` on prepared cases, through networks on ``device``."""

    def __init__(self, settings: EvaluationSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.threat = ThreatModel(settings.norm)

    def run(self, condition: Condition, case: Case, window: Window) -> Found:
        """Attack ``case``; kinds ``white``, ``black``, ``noise``, ``targeted`` and ``minimal``."""
        if condition.kind == "minimal":
            return self._minimal(condition, case, window)
        assert condition.eps is not None
        settings = self.settings
        lengths: dict[str, Any] = {"steps": settings.steps, "restarts": settings.restarts}
        stage = self._stage(condition, case, window, settings.budget)
        eps = per_voxel(condition.eps, settings.unit, stage)
        name, _, organ = condition.attack.partition(":")
        attack: Callable[[Problem, float], AttackResult] = partial(pgd, **lengths)
        goal = UNTARGETED
        if condition.attack == "patch-pgd":
            if not isinstance(window, Tiling):
                raise UserError(
                    f"attack 'patch-pgd' needs an inferer of tiles, {case.model.folder} has none: leave it out"
                )
            if case.model.is_2d:
                stage = self._stage(condition, case, window, "slice")
            attack = partial(patch_pgd, window=window, normalise=case.network(window, whole=False)[0], **lengths)
        elif condition.kind == "targeted":
            goal = (disappear if name == "disappear" else appear)(list(case.model.classes).index(organ))
        else:
            attack = partial(ATTACKS[condition.attack], **lengths)
            goal = GOALS[ATTACKS[condition.attack].goal]
        stage = replace(stage, problem=replace(stage.problem, goal=goal))
        result = stage.run(attack, eps)
        self._check(condition, stage, result, eps)
        count = len(stage.problem)
        return Found(
            perturbed=case.within(stage.volume(result.adversarial)),
            eps_network=eps,
            trace=[] if condition.kind == "targeted" else _trace(result, stage),
            # A targeted loss has no gradient once all of its voxels have flipped, or where there are none.
            zero_gradient=float(result.zero_gradient.mean()) if condition.kind == "white" else None,
            passes=PassCount(round(result.passes.forwards / count), round(result.passes.gradients / count)),
        )

    @torch.no_grad()
    def repeat_difference(self, case: Case, window: Window) -> float:
        """How much the same input gradient differs when it is computed twice, as a share of its largest value."""
        problem = make_stage(case, window, self.threat, "volume", precision=self.settings.precision).problem
        # Passes of their own for each, for the scale of a loss follows what it has seen.
        first, second = (Passes(problem).at(problem.zero()).gradient() for _ in range(2))
        return float((first - second).abs().max() / first.abs().max().clamp_min(1e-30))

    def transfer(self, condition: Condition, source: Case, window: Window, case: Case,
                 own: Window, log: Callable[[str], None]) -> Found:  # fmt: skip
        """PGD on ``source``, the same case as another model sees it, given to ``case``."""
        made = within_memory(window, lambda: self.run(Condition("white", "pgd", condition.eps), source, window), log)
        for seen in (source, case):
            native_scale(seen)
        delta = case.from_native(source.native_delta(source.delta(made.perturbed)))
        stage = make_stage(case, own, self.threat, self.settings.budget)
        assert condition.eps is not None
        eps = per_voxel(condition.eps, self.settings.unit, stage)
        batch = stage.problem.supported(delta[None] if stage.budget == "volume" else delta.movedim(1, 0))
        # resampling between the two networks' grids, and other normalisations, change its size
        batch = project(batch.contiguous(), stage.problem.budgets(eps), self.threat.norm)
        perturbed = case.base.clone()
        perturbed[:, : case.image_channels] += stage.volume(batch)
        return Found(case.within(perturbed), eps, made.passes)

    def _minimal(self, condition: Condition, case: Case, window: Window) -> Found:
        """The smallest breaking perturbation of the whole volume, up to the largest budget of the run."""
        settings = self.settings
        eps = per_voxel(max(settings.eps), settings.unit, make_stage(case, window, self.threat, settings.budget))
        stage = self._stage(condition, case, window, "volume")
        problem = stage.problem
        with torch.no_grad():
            clean = hard_dice(full_resolution(problem.network(problem.x)), problem.target)
        if not bool(clean > 0):
            return Found(case.base, eps, PassCount(forwards=1))
        threshold = settings.broken_below * clean
        result = minimal_norm(problem, eps, threshold=threshold, clean_quality=clean, steps=settings.steps, rounds=8)
        self._check(condition, stage, result, eps)
        perturbed = case.within(result.adversarial)
        size = perturbation_size(problem.difference(perturbed), "l2")
        return Found(
            perturbed=perturbed,
            eps_network=eps,
            breaking_rms=float(size) if bool(result.broken[0]) else None,
            trace=_trace(result, stage),
            zero_gradient=float(result.zero_gradient.mean()),
            passes=result.passes,
        )

    def _stage(self, condition: Condition, case: Case, window: Window, budget: Budget) -> Stage:
        """Its randomness depends on seed, case, attack and budget alone, not on what ran before."""
        text = f"{self.settings.seed}|{case.raw.case}|{condition.attack}|{condition.eps}"
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        generator = torch.Generator(self.device).manual_seed(seed)
        return make_stage(case, window, self.threat, budget, precision=self.settings.precision, generator=generator)

    def _check(self, condition: Condition, stage: Stage, result: AttackResult, eps: float) -> None:
        largest, x = float(result.distance.max()), stage.problem.x
        # image + perturbation is rounded where the image has large values
        rounding = 2 * torch.finfo(x.dtype).eps * float(x.abs().max())
        if largest > eps * (1 + BUDGET_TOLERANCE) + rounding:
            raise RuntimeError(f"{condition.attack} exceeded its budget: {largest:g} > {eps:g} per voxel")
        if bool(result.damage.isnan().any()):
            raise UserError(
                f"{condition.attack} at {eps:g} per voxel: wherever it looked, the outputs of "
                f"{stage.case.model.folder} are not finite; try --precision fp32, or a smaller eps"
            )


def _trace(result: AttackResult, stage: Stage) -> list[float]:
    """Mean lowest Dice so far over the samples with foreground, by step, thinned out to a hundred points."""
    has_foreground = stage.problem.target.foreground.flatten(1).any(1)
    dice = 1 - result.trace[:, has_foreground].mean(1)
    # NaN throughout where no sample has any.
    dice = dice[torch.isfinite(dice)]
    chosen = torch.linspace(0, len(dice) - 1, min(len(dice), TRACE_POINTS), device=dice.device).round().long()
    return [round(value, 5) for value in dice[chosen].tolist()]


def within_memory(window: Window, work: Callable[[], _Out], log: Callable[[str], None]) -> _Out:
    """``work()``, with the tile batch halved as long as the memory does not suffice.

    Raises:
        UserError: one tile at a time is still too much.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            # CUDA, its libraries, the CPU's allocator and numpy each have their own way of saying it.
            words = ("allocate memory", "out of memory", "ALLOC_FAILED")
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not known and all(word not in str(error) for word in words):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
        # outside of the except block, so that the traceback no longer holds the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if window.tile_batch == 1:
            raise UserError(
                f"out of memory with one tile at a time ({reason}); the volume itself may be too large for the device: "
                "use one with more memory, or -device cpu, or fewer models and folds at once"
            )
        window.tile_batch //= 2
        log(f"out of memory: going on with {window.tile_batch} tiles at a time")
