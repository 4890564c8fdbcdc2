"""``run.json`` of an evaluation that begins: its models, cases and circumstances."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from ima_seg.cases.raw import CaseFiles, CaseProblem
from ima_seg.evaluate.attack.conditions import conditions
from ima_seg.evaluate.run import EvaluationSettings, ModelInfo, Run
from ima_seg.evaluate.subject import Model
from ima_seg.files import file_hash
from ima_seg.ops import describe_backend

_PACKAGES = ("ima-seg", "nnunetv2", "torch", "monai", "torchio", "numpy", "scipy", "nibabel", "SimpleITK")


def describe_run(
    loaded: Mapping[str, Model],
    settings: EvaluationSettings,
    cases: Sequence[CaseFiles],
    problems: Sequence[CaseProblem],
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
        models=[_model_info(name, model, Path(images), cases) for name, model in loaded.items()],
        dataset=first.dataset or Path(images).resolve().parent.name,
        classes=list(first.classes),
        images=str(Path(images).resolve()),
        labels=str(Path(labels).resolve()),
        cases=sorted({case.case for case in cases} | {problem.case for problem in problems}),
        conditions={
            name: [condition.key for condition in conditions(settings, model=name, models=list(loaded))]
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _model_info(name: str, model: Model, images: Path, cases: Sequence[CaseFiles]) -> ModelInfo:
    root, known = model.folder, model.training_cases(images)
    if known is not None:
        known = {files.case: known[files.case] for files in cases if files.case in known}
    hashes = {
        str(file.relative_to(root) if file.is_relative_to(root) else file): file_hash(file) for file in model.files
    }
    return ModelInfo(name=name, folder=str(root), sha256=hashes, training_cases=known, **model.card())
