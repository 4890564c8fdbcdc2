"""What the gradient of a whole volume through nnU-Net's sliding window costs, in memory and in time.

    python -m benchmarks.speed.whole_volume [--device cpu|cuda] [--sizes 64 96 128] [--patch 64]

One step is the blended logits of a volume, their loss, and the loss's gradient with respect to the image. First the
gradient is compared with that of one autograd graph over all tiles; nothing is reported where they differ. Memory:
peak of one step on cubes of growing size and the same patch, each in a process of its own, everything but network and
program counted; its growth is that from one size to the next, per added voxel, in units of an image plus its logits.
A single tile is not blended, so that the first growth holds the start of blending too. The one graph over all tiles is
measured as well where it is small. Time: one step on T tiles against T times two forwards and one
input gradient of the bare network on one tile (the first forward keeps no graph). The two alternate in one run; the
ratio is the median over pairs. Tables go to standard output, all to ``benchmarks/results/whole_volume_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from benchmarks.shared.measuring import alternate, number_of_process, peak_memory, provenance, ratio, store
from ima_seg import Labels, Target
from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.nnunet.tiling import SlidingWindow

CLASSES = 3
FEATURES = 4
#: Bytes per voxel of an image of one channel and its logits, both float32.
UNIT = 4 * (1 + CLASSES)
#: The cube on which a step is timed: size, patch, feature maps of the first stage.
TIMED = {"cpu": (72, 48, 8), "cuda": (256, 128, 32)}
#: The one graph over all tiles is built for at most this many.
MOST_TILES = 8

Gradient = Callable[[SlidingWindow, torch.Tensor], torch.Tensor]


def make(patch: int, features: int, device: torch.device, **options: Any) -> SlidingWindow:
    """nnU-Net's plain U-Net behind the sliding window."""
    torch.manual_seed(0)
    stages = 3
    network = PlainConvUNet(
        1, stages, [features * 2**i for i in range(stages)], torch.nn.Conv3d, 3, [1] + [2] * (stages - 1), 2, CLASSES,
        2, True, torch.nn.InstanceNorm3d, {"affine": True}, nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    return SlidingWindow([network.to(device)], patch_size=(patch,) * 3, **options)


def volume(size: int, device: torch.device) -> tuple[torch.Tensor, Target]:
    """A random image and its reference."""
    torch.manual_seed(1)
    y = torch.randint(0, CLASSES, (1, 1, *(size,) * 3), dtype=torch.uint8, device=device)
    return torch.randn(y.shape, device=device), Target.from_raw(y, Labels(CLASSES))


def one_graph(window: SlidingWindow, x: torch.Tensor) -> torch.Tensor:
    """The blended logits with one autograd graph over all tiles: what needs no thought, but memory."""
    gaussian, weight = window._weights(x.shape, x.device)
    logits = x.new_zeros((1, CLASSES, *x.shape[2:]))
    for batch in window._batches(x.shape):
        for index in batch:
            for part in window._passes(x[index][None]):
                logits[index] += part[0] * gaussian
    return logits * weight


def gradient(network: Gradient, window: SlidingWindow, x: torch.Tensor, target: Target) -> torch.Tensor:
    """One step: forward, loss, input gradient."""
    leaf = x.detach().requires_grad_(True)
    loss = dice_ce_loss(network(window, leaf), target).sum()
    return torch.autograd.grad(loss, leaf)[0]


def ours(window: SlidingWindow, x: torch.Tensor) -> torch.Tensor:
    """The blended logits, tile by tile."""
    logits: torch.Tensor = window(x)
    return logits


def difference(device: torch.device) -> float:
    """Largest difference of the two gradients, in units of the largest gradient; overlap, mirroring, batches.

    In double precision: in single, a batch's other order of summation moves activations across the kink at zero.
    """
    window = make(16, 8, device, mirror_axes=(0, 2), tile_batch=3).double()
    x, target = volume(28, device)
    x = x.double()
    assert window.tiles(x.shape) == 27
    expected = gradient(one_graph, window, x, target)
    return float((gradient(ours, window, x, target) - expected).abs().max() / expected.abs().max())


def peak(size: int, patch: int, way: str, device: torch.device) -> float:
    """Memory in bytes at the peak of one step on a cube, its image and reference included."""
    window = make(patch, FEATURES, device)
    if device.type == "cpu":
        gradient(ours, window, *volume(patch, device))  # what libraries allocate once for all
    with peak_memory(device) as needed:
        x, target = volume(size, device)
        assert gradient(ours if way == "tiles" else one_graph, window, x, target).isfinite().all()
    return needed.mib * 2**20


def memory(sizes: list[int], patch: int, device: torch.device) -> list[dict[str, Any]]:
    """Peaks of all sizes, in processes of their own, and their growth from one to the next."""
    rows: list[dict[str, Any]] = []
    window = make(patch, FEATURES, torch.device("cpu"))
    for size in sorted(sizes):
        tiles = window.tiles(torch.Size((1, 1, *(size,) * 3)))
        row: dict[str, Any] = {"size": size, "tiles": tiles, "image_and_logits_mib": round(size**3 * UNIT / 2**20, 1)}
        for way in ("tiles", "one graph")[: 1 + (tiles <= MOST_TILES)]:
            step = number_of_process(__file__, "--device", device.type, "--peak", str(size), str(patch), way)
            key = way.replace(" ", "_")
            row[f"{key}_mib"] = round(step / 2**20, 1)
            if rows:
                grown = (row[f"{key}_mib"] - rows[-1][f"{key}_mib"]) * 2**20 / (size**3 - rows[-1]["size"] ** 3)
                row[f"{key}_bytes_per_voxel"] = round(grown, 1)
                row[f"{key}_growth"] = round(grown / UNIT, 2)
        rows.append(row)
        print("|", " | ".join(str(row.get(key, "")) for key in MEMORY_COLUMNS), "|", flush=True)
    return rows


MEMORY_COLUMNS = {
    "size": "cube", "tiles": "tiles", "image_and_logits_mib": "image + logits, MiB", "tiles_mib": "step, MiB",
    "tiles_growth": "growth, x (image + logits)", "one_graph_mib": "one graph, MiB", "one_graph_growth": "its growth",
}  # fmt: skip


def seconds(size: int, patch: int, features: int, pairs: int, device: torch.device) -> dict[str, Any]:
    """Time of a step and of its bare network passes, pair by pair."""
    window = make(patch, features, device)
    x, target = volume(size, device)
    tiles = window.tiles(x.shape)
    tile = x[..., :patch, :patch, :patch].contiguous()
    outer = torch.randn(1, CLASSES, *tile.shape[2:], device=device)
    network = window.networks[0]

    def bare() -> None:
        for _ in range(tiles):
            with torch.no_grad():
                network(tile)
            leaf = tile.detach().requires_grad_(True)
            torch.autograd.grad(network(leaf), leaf, outer)

    jobs: dict[str, Callable[[], Any]] = {"step": lambda: gradient(ours, window, x, target), "bare": bare}
    took = alternate(jobs, pairs, device)
    return {
        "size": size, "patch": patch, "features": features, "tiles": tiles, "pairs": pairs,
        **ratio(took["step"], took["bare"]), "bare_seconds": round(statistics.median(took["bare"]), 3),
    }  # fmt: skip


def main() -> None:
    """Check, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="edges of the cubes, voxels")
    parser.add_argument("--patch", type=int, default=64, help="edge of the patch for the memory, voxels")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peak", nargs=3, metavar=("SIZE", "PATCH", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.peak:
        print(peak(int(options.peak[0]), int(options.peak[1]), options.peak[2], device))
        return
    off = difference(device)
    if not off < 1e-6:
        sys.exit(
            f"the gradient differs from that of one graph over all tiles by {off:.1e} of its maximum; not measured"
        )
    print(f"Gradient as of one graph over all tiles, to {off:.1e} of its maximum\n")
    print("|", " | ".join(MEMORY_COLUMNS.values()), "|\n" + "|---" * len(MEMORY_COLUMNS) + "|")
    result: dict[str, Any] = {"gradient_difference": off, "patch": options.patch, "features": FEATURES}
    result["memory"] = memory(options.sizes, options.patch, device)
    print("\n| cube | patch | features | tiles | step / bare passes | min-max |\n|---|---|---|---|---|---|")
    row = result["time"] = seconds(*TIMED[device.type], options.pairs, device)
    cells = [row[key] for key in ("size", "patch", "features", "tiles", "ratio", "ratio_min_max")]
    print("|", " | ".join(map(str, cells)), "|")
    store("whole_volume", device, result | provenance(__file__, device))


if __name__ == "__main__":
    main()
