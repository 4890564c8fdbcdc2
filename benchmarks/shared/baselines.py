"""What ops are compared with, plainly written: by the benchmarks for their speed, by the tests for their numbers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ima_seg import Labels, ops
from ima_seg.types import Norm

#: Inputs by the names of the arguments of the op.
Tensors = dict[str, torch.Tensor]
Results = tuple[torch.Tensor, ...]


def rms(image: torch.Tensor) -> torch.Tensor:
    """Broadcasts over ``image`` (B, C, *S)."""
    return ops.per_row(image.flatten(1).norm(dim=1) / math.sqrt(image[0].numel()), image)


def plain_step(norm: Norm, inputs: Tensors) -> Results:
    delta, gradient = inputs["delta"], inputs["gradient"]
    alpha, eps = (ops.per_row(inputs[name], delta) for name in ("alpha", "eps"))
    if "mask" in inputs:
        gradient = gradient * inputs["mask"]
    if norm == "l2":
        size = rms(gradient)
        delta = delta + alpha * (gradient / size.clamp_min(1e-12))
        delta = delta * (eps / rms(delta).clamp_min(1e-12)).clamp_max(1)
    else:
        size = gradient.flatten(1).abs().amax(1)
        delta = (delta + alpha * gradient.sign()).clamp(-eps, eps)
    if "image" in inputs:
        image, low, high = inputs["image"], *(ops.per_row(inputs[name], delta) for name in ("low", "high"))
        delta = (image + delta).clamp(low, high) - image
    return delta, size.flatten()


def plain_start(norm: Norm, inputs: Tensors) -> Results:
    like, radius = inputs["like"], ops.per_row(inputs["radius"], inputs["like"])
    if norm == "linf":
        return (torch.empty_like(like).uniform_(-1, 1) * radius,)
    noise = torch.randn_like(like)
    return (noise * (radius * torch.rand_like(radius) / rms(noise)),)


def plain_interpolation(norm: Norm, inputs: Tensors) -> Results:
    inner, outer = inputs["inner"], inputs["outer"]
    point = inner + ops.per_row(inputs["share"], inner) * (outer - inner)
    return point, rms(point).flatten() if norm == "l2" else point.flatten(1).abs().amax(1)


def plain_dice_ce(inputs: Tensors) -> torch.Tensor:
    logits, labels = inputs["logits"], inputs["labels"]
    probabilities = logits.softmax(1).flatten(2)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).flatten(2).to(logits.dtype)
    overlap, total = (probabilities * truth).sum(2), probabilities.sum(2) + truth.sum(2)
    dice = ((2 * overlap + ops.SMOOTH) / (total + ops.SMOOTH))[:, 1:].mean(1)
    return F.cross_entropy(logits, labels, reduction="none").flatten(1).mean(1) - dice


def plain_counts(inputs: Tensors) -> Results:
    """Counts, and whether logits are finite, which an attack has to know as well."""
    logits, classes = inputs["logits"], inputs["logits"].shape[1]
    predicted, true = (
        F.one_hot(each.flatten(1), classes)[..., 1:].bool() for each in (logits.argmax(1), inputs["labels"])
    )
    counts = torch.stack([(predicted & true).sum(1), predicted.sum(1), true.sum(1)], -1)
    return counts, torch.isfinite(logits).flatten(1).all(1)


def independent_dice_ce(logits: torch.Tensor, raw: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Dice + CE sample by sample, in float64, from the raw target, regions and ignored voxels too; (B,)."""
    losses = []
    for scores, truth in zip(logits.double().flatten(2), raw.flatten(2), strict=True):
        if labels.regions:
            known = truth[-1] == 0 if labels.ignore_label is not None else torch.ones_like(truth[0], dtype=torch.bool)
            true = truth[: labels.outputs].double()
            p = 1 / (1 + (-scores).exp())
            entropy = -(true * p.log() + (1 - true) * (1 - p).log()).mean(0)
        else:
            known = truth[0] != labels.ignore_label if labels.ignore_label is not None else truth[0] >= 0
            true = torch.stack([(truth[0] == k).double() for k in range(labels.outputs)])
            p = scores.exp() / scores.exp().sum(0)
            entropy = -(true * p.log()).sum(0)
        p, true = (each[0 if labels.regions else 1 :, known] for each in (p, true))
        dice = (2 * (p * true).sum(1) + 1e-5) / (p.sum(1) + true.sum(1) + 1e-5)
        losses.append(entropy[known].mean() - dice.mean())
    return torch.stack(losses)
