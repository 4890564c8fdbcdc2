"""Random numbers that depend on a seed and a position alone: Philox-4x32 with ten rounds.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A sample's numbers follow from its
own seed, so they are the same in every batch it is part of, on every device and in every backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
#: The third word of the counter tells streams of one seed apart: the noise, and the share of the radius.
NOISE, SHARE = 0, 1

#: Counters at a time.
PIECE = 2**16

_WORD = 0xFFFFFFFF


def philox(seeds: torch.Tensor, counters: torch.Tensor, stream: int) -> torch.Tensor:
    """(B,) int64 seeds, (M,) int64 counters -> (B, M, 4) int64, each a 32-bit word."""
    key0, key1 = (seeds & _WORD)[:, None], (seeds >> 32 & _WORD)[:, None]
    zero = torch.zeros_like(counters)[None] + torch.zeros_like(key0)
    a, b = (counters & _WORD)[None] + zero, (counters >> 32 & _WORD)[None] + zero
    c, d = zero + stream, zero
    for _ in range(ROUNDS):
        # Products of 32-bit words wrap in int64, but their bits are right.
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _WORD) ^ b ^ key0,
            second & _WORD,
            (first >> 32 & _WORD) ^ d ^ key1,
            first & _WORD,
        )
        key0, key1 = key0 + WEYL[0] & _WORD, key1 + WEYL[1] & _WORD
    return torch.stack([a, b, c, d], -1)


def uniform(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """32-bit words -> uniform in the open interval (0, 1), multiples of 2**-24 that float32 holds exactly."""
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def uniform_field(seeds: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, size) uniform in (0, 1)."""
    return _field(seeds, size, dtype, lambda u: u)


def normal_field(seeds: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, size) standard normal, by the transform of Box and Muller from pairs of uniform numbers."""

    def transform(u: torch.Tensor) -> torch.Tensor:
        radius = (-2 * u[..., 0::2].log()).sqrt()
        angle = 2 * torch.pi * u[..., 1::2]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    return _field(seeds, size, dtype, transform)


def shares(seeds: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B,) uniform in (0, 1), from another stream than the fields."""
    return uniform(philox(seeds, torch.zeros(1, dtype=torch.int64, device=seeds.device), SHARE)[:, 0, 0], dtype)


def _field(
    seeds: torch.Tensor, size: int, dtype: torch.dtype, transform: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """(B, size) values, four from each counter, in pieces: the words take many times the memory of the values."""
    field = torch.empty((len(seeds), size), dtype=dtype, device=seeds.device)
    for first in range(0, size, 4 * PIECE):
        place = field[:, first : first + 4 * PIECE]
        counters = torch.arange(first // 4, (first + place.shape[1] + 3) // 4, device=seeds.device)
        values = transform(uniform(philox(seeds, counters, NOISE), dtype))
        place.copy_(values.flatten(1)[:, : place.shape[1]])
    return field
