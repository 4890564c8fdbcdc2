"""``run.json`` of an evaluation that begins: its models, cases and circumstances."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ima_seg.cases.files import CaseFiles
from ima_seg.evaluate.attack.conditions import conditions
from ima_seg.evaluate.run import EvaluationSettings, ModelInfo, Run
from ima_seg.evaluate.subject import Model
from ima_seg.monai.bundle import BundleModel
from ima_seg.nnunet.folder import SegmentationModel
from ima_seg.nnunet.margins import restore_ledger
from ima_seg.ops import describe_backend

_PACKAGES = ("ima-seg", "nnunetv2", "torch", "monai", "torchio", "numpy", "scipy", "nibabel", "SimpleITK")


def describe_run(
    loaded: Mapping[str, Model],
    settings: EvaluationSettings,
    cases: Sequence[CaseFiles],
    *,
    images: str | Path,
    labels: str | Path,
    device: torch.device,
    dtype: torch.dtype | None,
    command: str,
) -> Run:
    """What ``run.json`` holds; ``dtype`` is that of the attacks' passes, ``None`` for float32."""
    first = next(iter(loaded.values()))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Run(
        settings=settings,
        models=[_model_info(name, model) for name, model in loaded.items()],
        dataset=_dataset(first) or Path(images).resolve().parent.name,
        classes=list(first.classes),
        images=str(Path(images).resolve()),
        labels=str(Path(labels).resolve()),
        cases=[case.case for case in cases],
        conditions={
            name: [(c.attack, c.eps, c.severity) for c in conditions(settings, model=name, models=list(loaded))]
            for name in loaded
        },
        channels=first.channels,
        modality_native_unit="HU" if first.is_single_ct else "original intensity units",
        command=command,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=name,
        versions={
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
            "passes of the attacks": str(dtype or torch.float32).removeprefix("torch."),
            "ops of the attacks": describe_backend(device),
        },
        machine=f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    )


def _dataset(model: Model) -> str:
    if not isinstance(model, SegmentationModel):
        return ""
    return str(model.plans.plans.get("dataset_name") or model.dataset_json.get("name") or "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _model_info(name: str, model: Model) -> ModelInfo:
    if isinstance(model, BundleModel):
        return ModelInfo(
            name=name,
            folder=str(model.folder),
            bundle=f"{model.name} {model.version}",
            configuration=model.inferer_name,
            checkpoint=model.weights.name,
            sha256=model.sha256(),
            patch_size=model.patch_size,
            parameters=sum(parameter.numel() for parameter in model.network.parameters()),
        )
    assert isinstance(model, SegmentationModel)
    network = [float(value) for value in model.configuration.spacing]
    return ModelInfo(
        name=name,
        folder=str(model.folder),
        trainer=model.trainer,
        plans=str(model.plans.plans_name),
        configuration=model.configuration_name,
        folds=model.folds,
        checkpoint=model.files[-1].name,
        sha256=model.sha256(),
        patch_size=[int(size) for size in model.configuration.patch_size],
        spacing=network,
        mirror_axes=model.mirror_axes,
        parameters=sum(parameter.numel() for parameter in model.networks[0].parameters()),
        ima=None if model.ima is None else _margins(model.ima),
    )


def _margins(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of the training of nnUNetTrainerIMA, from its state in the checkpoint."""
    ledger = restore_ledger(state)
    return {
        "norm": state["settings"]["norm"],
        "delta": ledger.delta,
        "eps_max": ledger.eps_max,
        "margins": {case: record.margin for case, record in ledger.cases.items()},
        "history": [dict(row) for row in state["history"]],
    }
