"""What the benchmarks share that train a small 2D network by nnU-Net and attack slices of cases set apart."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ima_seg.attacks import Problem, pgd
from ima_seg.nnunet.checkpoint import read_checkpoint
from ima_seg.ops import hard_dice
from ima_seg.types import Labels, Target, ThreatModel


def training_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of every script that trains from a standard model: its data, folders, model and device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("-w", "--work", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, required=True, help="final checkpoint of a standard model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def seeded_trainer(
    dataset: str,
    *,
    plans: str,
    seed: int,
    pretrained: Path | None,
    name: str = "nnUNetTrainerIMA",
    fold: int = 0,
    device: str = "cpu",
) -> Any:
    """nnU-Net's trainer object with the settings of the environment, heads included where it starts ``pretrained``."""
    from nnunetv2.run.run_training import get_trainer_from_args

    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    trainer = get_trainer_from_args(dataset, "2d", fold, name, plans, device=torch.device(device))
    trainer.initialize()
    if pretrained is not None:
        trainer.network.load_state_dict(read_checkpoint(pretrained)["network_weights"])
    return trainer


def validation_slices(
    dataset: str, configuration: Any, skip: int, cases: int, fold: int = 0, part: str = "val"
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Slices with foreground of ``cases`` validation cases after ``skip``, padded or cropped to the patch.

    Returns:
        Images (N, C, H, W), references (N, 1, H, W), and the case of each slice.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    from ima_seg.nnunet.plans import preprocessed_folder

    folder = preprocessed_folder(dataset)
    names = json.loads((folder / "splits_final.json").read_text())[fold][part][skip : skip + cases]
    data = folder / configuration.data_identifier
    images, references, owners = [], [], []
    for name in names:
        image, reference, _, _ = infer_dataset_class(str(data))(str(data), [name]).load_case(name)
        image, reference = torch.from_numpy(np.array(image)), torch.from_numpy(np.array(reference))
        for z in range(image.shape[1]):
            if (reference[:, z] > 0).any():
                images.append(fit(image[:, z].float(), configuration.patch_size))
                references.append(fit(reference[:, z].clamp_min(0).long(), configuration.patch_size))
                owners.append(name)
    return torch.stack(images), torch.stack(references), owners


def fit(slice_: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Pad with zeros or crop, centred, to ``size``."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        spare = wanted - slice_.shape[axis]
        padding = (spare // 2, spare - spare // 2)
        slice_ = torch.nn.functional.pad(slice_, (0, 0, *padding) if axis == -2 else padding)
    return slice_


def robust_dice(
    network: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    labels: Labels,
    levels: Sequence[float],
) -> list[list[float]]:
    """Dice of each slice at each level (L2 of a slice), levels first."""
    radius = 1 / math.sqrt(x[0].numel())
    result = []
    for level in levels:
        torch.manual_seed(0)
        scores: list[float] = []
        for start in range(0, len(x), 64):
            batch, target = x[start : start + 64], Target.from_raw(y[start : start + 64], labels)
            if level:
                problem = Problem(network, batch, target, ThreatModel("l2"), precision="fp32")
                batch = pgd(problem, level * radius, steps=20, keep="last").adversarial
            with torch.no_grad():
                scores += hard_dice(network(batch), target).tolist()
        result.append(scores)
    return result
