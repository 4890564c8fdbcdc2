"""Variants of an nnU-Net plans file: smaller networks and batches, and an ``ima`` section with settings."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, PositiveInt

from ima_seg.data.naming import folders_with_id
from ima_seg.errors import UserError
from ima_seg.files import write_text
from ima_seg.methods.ima_settings import IMASettings
from ima_seg.nnunet.description import read_plans
from ima_seg.validation import validated


class _Stages(BaseModel):
    n_stages: int = Field(ge=1, le=256)
    features_per_stage: list[PositiveInt] = Field(min_length=1)
    strides: list[list[PositiveInt]] = Field(min_length=1)


class _Architecture(BaseModel):
    arch_kwargs: _Stages


class _Configuration(BaseModel):
    """What is changed of a configuration."""

    architecture: _Architecture


#: Of torch.nn, with their arguments in plans.
ACTIVATIONS: Mapping[str, Mapping[str, Any]] = {
    "LeakyReLU": {"inplace": True},
    "SiLU": {},
    "GELU": {},
    "Softplus": {},
}


def preprocessed_folder(dataset: str) -> Path:
    """The folder of ``dataset`` (``4``, ``004`` or ``Dataset004_Name``) in ``nnUNet_preprocessed``.

    Raises:
        UserError: the variable is not set, or there is no such data set, or more than one.
    """
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise UserError(
            "the environment variable nnUNet_preprocessed is not set; `ima-seg doctor` tells what is missing"
        )
    if dataset.startswith("Dataset"):
        found = [Path(root) / dataset] if (Path(root) / dataset).is_dir() else []
    elif dataset.isdigit():
        found = folders_with_id(int(dataset), Path(root))
    else:
        raise UserError(f"dataset is {dataset!r}; give its id (4) or its folder name (Dataset004_Hippocampus)")
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"data sets {dataset} in {root}: {names}; expected one, run nnUNetv2_plan_and_preprocess -d first"
        )
    return found[0]


def vary_plans(
    plans: Mapping[str, Any],
    name: str,
    *,
    configurations: Sequence[str] | None = None,
    features: int | None = None,
    max_features: int | None = None,
    batch_size: int | None = None,
    patch_size: Sequence[int] | None = None,
    activation: str | None = None,
    ima: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A copy of ``plans`` under ``name``, with changes that need no new preprocessing.

    Args:
        plans: contents of a plans file.
        name: name of the variant; nnU-Net's ``-p``.
        configurations: which to change; default all that state a patch size.
        features: feature maps of the first stage, doubled in each further one.
        max_features: at most so many feature maps.
        batch_size: patches per batch.
        patch_size: voxels per axis; each must be divisible by the network's total stride.
        activation: of :data:`ACTIVATIONS`. The names of the weights stay what they are, and nnU-Net, without this
            package, predicts with the plans.
        ima: settings of IMA training, stored in the section ``ima``.

    Raises:
        UserError: an unknown configuration, a patch size that the network cannot take, or invalid settings.
    """
    for what, number in (("features", features), ("max_features", max_features), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise UserError(f"{what} is {number}; it must be at least 1")
    varied = copy.deepcopy(dict(plans))
    varied["plans_name"] = name
    known = [c for c, values in varied["configurations"].items() if "patch_size" in values]
    for configuration in configurations or known:
        if configuration not in known:
            raise UserError(f"configuration {configuration!r} is not in the plans; there are: {', '.join(known)}")
        values = varied["configurations"][configuration]
        network = None
        if features or max_features or activation or patch_size is not None:
            source, remedy = f"plans: configuration {configuration}", "only networks of stages can be changed"
            network = validated(_Configuration, values, source=source, remedy=remedy).architecture.arch_kwargs
        if network and (features or max_features):
            before = network.features_per_stage
            first, most = features or before[0], max_features or max(before)
            varied_features = [min(first * 2**n, most) for n in range(network.n_stages)]
            values["architecture"]["arch_kwargs"]["features_per_stage"] = varied_features
        if activation:
            _activate(values["architecture"], activation, configuration)
        if batch_size is not None:
            values["batch_size"] = batch_size
        if network and patch_size is not None:
            strides = [math.prod(steps) for steps in zip(*network.strides, strict=False)]
            if len(patch_size) != len(strides) or any(size % s for size, s in zip(patch_size, strides, strict=True)):
                raise UserError(
                    f"patch size {list(patch_size)} does not fit {configuration}: axes must be multiples of {strides}"
                )
            values["patch_size"] = list(patch_size)
    if ima:
        varied["ima"] = {**(varied.get("ima") or {}), **ima}
        IMASettings.parse(varied["ima"], source="--set")
    return varied


def _activate(architecture: dict[str, Any], activation: str, configuration: str) -> None:
    """Exchange the activation of a network's description."""
    if activation not in ACTIVATIONS:
        raise UserError(f"activation is {activation!r}; there are: {', '.join(ACTIVATIONS)}")
    kwargs = architecture["arch_kwargs"]
    if "nonlin" not in kwargs:
        raise UserError(
            f"plans: the network of configuration {configuration} takes no activation (arch_kwargs has no nonlin)"
        )
    kwargs["nonlin"], kwargs["nonlin_kwargs"] = f"torch.nn.{activation}", dict(ACTIVATIONS[activation])


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["tau=0.7", "norm=linf"]`` as settings, values read as YAML scalars.

    Raises:
        UserError: an item without ``=``.
    """
    values = {}
    for item in assignments:
        key, separator, value = item.partition("=")
        if not separator:
            raise UserError(f"--set {item}: expected KEY=VALUE")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {item}: {value!r} is neither a number nor a name") from None
    return values


def write_plans(dataset: str, source: str, name: str, **changes: Any) -> Path:
    """Write the variant ``name`` of the plans ``source`` of a preprocessed data set; see :func:`vary_plans`.

    Raises:
        UserError: there is no such plans file, or ``name`` exists with other contents.
    """
    folder = preprocessed_folder(dataset)
    origin, target = folder / f"{source}.json", folder / f"{name}.json"
    if not origin.exists():
        names = sorted(p.stem for p in folder.glob("*lans*.json"))
        raise UserError(f"plans {origin} do not exist; there are: {', '.join(names) or 'none'}")
    varied = vary_plans(read_plans(origin), name, **changes)
    if target.exists() and read_plans(target) != varied:
        raise UserError(f"plans {target} exist with other contents; choose another name with -o, or remove them")
    write_text(target, json.dumps(varied, indent=4) + "\n")
    return target
