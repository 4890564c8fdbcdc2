"""Networks whose decision boundary is known, and small real ones."""

import math
import os

import torch
import torch.distributed as dist
from torch import nn


def leave() -> None:
    """End a spawned rank once all ranks are done, without torch's tear-down of its threads, which aborts at times."""
    dist.barrier()
    os._exit(0)


class Hyperplane(nn.Module):
    """Logits of every voxel follow one linear score ``<w, x>`` of the image, so all voxels flip at one hyperplane.

    The foreground mask is segmented perfectly while the score is positive and inverted when it is negative. The
    distance of x from the boundary is <w, x> / ||w||_2 (L2) or <w, x> / ||w||_1 (L-infinity), whatever the loss.
    ``weight`` is scaled so that the score is the L2 distance per voxel: far from saturating the softmax.
    """

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight / weight.norm() / math.sqrt(weight.numel()))  # (C, *S)
        self.register_buffer("sign", mask.float() * 2 - 1)  # (*S)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x * self.weight).flatten(1).sum(1)
        foreground = score.view(-1, *(1,) * self.sign.ndim) * self.sign
        return torch.stack([-foreground, foreground], 1)

    def distance(self, x: torch.Tensor, norm: str) -> torch.Tensor:
        """Per voxel, in the units of a margin."""
        score = (x * self.weight).flatten(1).sum(1)
        if norm == "linf":
            return score / self.weight.abs().sum()
        return score / self.weight.norm() / math.sqrt(self.weight.numel())


class Linear(nn.Module):
    """Logits W x; the L2 distance per voxel of class y's region from class k's is <w_y - w_k, x> / (||.||_2 sqrt N)."""

    def __init__(self, outputs: int, shape: tuple[int, ...], batch_norm: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, math.prod(shape)))
        self.norm = nn.BatchNorm1d(outputs) if batch_norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.flatten(1) @ self.weight.T)

    def distance(self, x: torch.Tensor, y: torch.Tensor, norm: str) -> torch.Tensor:
        """Of images (B, ...) with classes (B,), or labels (B, K), from the nearest boundary, per voxel; (B,)."""
        logits = self(x).detach()
        if y.ndim == 2:
            lead = torch.where(y.bool(), logits, -logits)
            slope = self.weight.detach().expand(len(x), -1, -1)
        else:
            lead = logits.gather(1, y[:, None]) - logits
            slope = self.weight.detach()[y][:, None] - self.weight.detach()
        length = slope.abs().sum(2) if norm == "linf" else slope.norm(dim=2) * math.sqrt(slope.shape[2])
        distance = lead / length
        if y.ndim == 1:
            distance = distance.scatter(1, y[:, None], torch.inf)
        return distance.amin(1)


class TinyUNet(nn.Module):
    """Two levels, any number of spatial dimensions; optionally a list of two heads, batch norm, dropout."""

    def __init__(
        self, dims: int, channels: int = 1, outputs: int = 3, heads: bool = False, batch_norm: bool = False
    ) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (
            (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
            if batch_norm
            else (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
        )[dims - 1]
        self.first = nn.Sequential(conv(channels, 8, 3, padding=1), norm(8, affine=True), nn.LeakyReLU(0.01))
        self.second = nn.Sequential(conv(8, 8, 3, stride=2, padding=1), norm(8, affine=True), nn.LeakyReLU(0.01))
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Sequential(nn.Dropout(0.5 if batch_norm else 0.0), conv(16, outputs, 1))
        self.low = conv(8, outputs, 1)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        first = self.first(x)
        second = self.second(first)
        full = self.last(torch.cat([first, self.up(second)], 1))
        return [full, self.low(second)] if self.heads else full
