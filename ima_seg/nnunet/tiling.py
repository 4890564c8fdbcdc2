"""nnU-Net's sliding window as a differentiable network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

from ima_seg.attacks.tiling import Tiling


class SlidingWindow(Tiling):
    """Logits as nnU-Net predicts them: its tiles and its Gaussian weights; arguments of :class:`Tiling`."""

    def _steps(self, size: Sequence[int]) -> list[list[int]]:
        steps: list[list[int]] = compute_steps_for_sliding_window(tuple(size), self.patch_size, self.step_size)
        return steps

    def _importance(self, device: torch.device) -> torch.Tensor:
        """nnU-Net's weights, rounded to half precision as it does."""
        weights: torch.Tensor = compute_gaussian(
            self.patch_size, sigma_scale=1 / 8, value_scaling_factor=10, device=device
        )
        return weights.float()
