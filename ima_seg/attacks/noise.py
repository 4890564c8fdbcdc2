"""Random perturbations of a given size: the weakest adversary, and the floor that every attack must beat."""

from __future__ import annotations

import torch

from ima_seg.attacks.problem import Problem, attack
from ima_seg.attacks.result import AttackResult, Best
from ima_seg.ops import per_row, perturbation_size
from ima_seg.types import Norm


def scaled_to(delta: torch.Tensor, eps: torch.Tensor, norm: Norm) -> torch.Tensor:
    """``delta`` (B, C, *S) scaled to the sizes ``eps`` (B,); a sample that is zero throughout stays zero."""
    size = perturbation_size(delta, norm)
    return delta * per_row(torch.where(size > 0, eps / size, 0.0), delta).to(delta.dtype)


@attack
def gaussian_noise(problem: Problem, eps: torch.Tensor, *, restarts: int = 1) -> AttackResult:
    """White Gaussian noise scaled to exactly ``eps`` within the support: its RMS (l2) or its largest value (linf).

    ``restarts``: how many draws; the one of most damage is kept. The clean image is not among them: noise that does
    good is a finding too. The trace has a row for each draw.
    """
    best = Best(problem, eps, restarts - 1)
    for draw in range(restarts):
        noise = problem.supported(problem.zero().normal_(generator=problem.generator))
        best.look(scaled_to(noise, eps, problem.threat.norm), draw)
    return best.result()


@attack
def uniform_noise(problem: Problem, eps: torch.Tensor, *, restarts: int = 1) -> AttackResult:
    """Uniform white noise: scaled to the RMS ``eps`` (l2), or drawn from the box [-eps, eps] (linf).

    Otherwise as :func:`gaussian_noise`.
    """
    best = Best(problem, eps, restarts - 1)
    for draw in range(restarts):
        noise = problem.supported(problem.zero().uniform_(-1.0, 1.0, generator=problem.generator))
        l2 = problem.threat.norm == "l2"
        best.look(scaled_to(noise, eps, "l2") if l2 else noise * per_row(eps, noise).to(noise), draw)
    return best.result()
