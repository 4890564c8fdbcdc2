"""A trained nnU-Net v2 model folder, ready to be attacked: networks, plans, labels, without executing pickled code."""

from __future__ import annotations

import pydoc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ima_seg.cases.raw import CaseFiles
from ima_seg.errors import UserError
from ima_seg.nnunet import case
from ima_seg.nnunet.checkpoint import KEY, read_checkpoint
from ima_seg.nnunet.compat import check_nnunet_version, find_trainer
from ima_seg.nnunet.dataset import channel_names, foreground_classes, read_description
from ima_seg.nnunet.model import LoadedFolder
from ima_seg.types import Labels

#: Where classes that a plans file names may come from. Any importable name would let a model folder run what it likes.
_TRUSTED_MODULES = ("dynamic_network_architectures.", "torch.nn.", "nnunetv2.")


class SegmentationModel(LoadedFolder):
    """A model that prepares its cases; see :class:`LoadedFolder` for the rest."""

    def prepare(self, files: CaseFiles, *, device: torch.device | str = "cpu") -> case.PreparedCase:
        """Read and preprocess a case, with its segmentation by the previous stage if there is one."""
        raw = case.read_case(self, files.case, files.images, files.label)
        return case.prepare_case(raw, self, device=device, previous_stage=case.read_previous_stage(self, files, raw))


def load_model(
    folder: str | Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> SegmentationModel:
    """Load a model folder as ``nnUNetv2_predict_from_modelfolder`` does.

    Args:
        folder: holds plans.json, dataset.json and ``fold_*``.
        folds: names of the folds to average; default: all that hold ``checkpoint``.
        checkpoint: file name of the checkpoint in each fold.
        device: where to put the networks.
        trust: read checkpoints with full unpickling, and let the plans name any network class.

    Raises:
        UserError: a missing file or fold, a checkpoint or plans file that would run code, weights that do not fit.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    check_nnunet_version()
    root = Path(folder)
    plans_file, dataset_file = (_required(root, name) for name in ("plans.json", "dataset.json"))
    checkpoints = _fold_checkpoints(root, folds, checkpoint)
    plans, dataset_json = read_description(plans_file), read_description(dataset_file)
    read = [read_checkpoint(file, trust=trust) for file in checkpoints]
    first = read[0]
    name, trainer = str(first["init_args"]["configuration"]), str(first["trainer_name"])
    manager = PlansManager(plans)
    if name not in plans["configurations"]:
        raise UserError(f"{plans_file} has no configuration {name!r}, which {checkpoints[0]} was trained for")
    configuration = manager.get_configuration(name)
    if not trust:
        _check_architecture(configuration, plans_file)
    labels = manager.get_label_manager(dataset_json)
    heads = labels.num_segmentation_heads
    inputs = determine_num_input_channels(manager, configuration, dataset_json)
    try:
        builder = find_trainer(trainer)
    except RuntimeError:
        raise UserError(
            f"{checkpoints[0]} was trained by {trainer}, which this installation does not have; install the package it "
            "comes from or name its folder in nnUNet_extTrainer"
        ) from None
    networks = []
    for file, state in zip(checkpoints, read, strict=True):
        network = builder.build_network_architecture(manager, configuration, inputs, heads, False)
        try:
            network.load_state_dict(state["network_weights"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"{file} does not fit the network of {plans_file} ({reason}); is it of this folder?"
            ) from None
        networks.append(network.to(device).eval().requires_grad_(False))
    axes = first.get("inference_allowed_mirroring_axes")
    return SegmentationModel(
        folder=root,
        networks=networks,
        plans=manager,
        configuration=configuration,
        configuration_name=name,
        dataset_json=dataset_json,
        labels=Labels(outputs=heads, regions=labels.has_regions, ignore_label=labels.ignore_label),
        classes=foreground_classes(dataset_json),
        channels=channel_names(dataset_json),
        mirror_axes=None if axes is None else [int(axis) for axis in axes],
        trainer=trainer,
        files=[plans_file, dataset_file, *checkpoints],
        folds=[file.parent.name.removeprefix("fold_") for file in checkpoints],
        ima=first.get(KEY),
    )


def _required(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    if not (folder / name).is_file():
        raise UserError(
            f"model folder {folder} has no {name}; name the folder that nnUNetv2_train wrote, or a "
            "MONAI bundle with its configs"
        )
    return folder / name


def _fold_checkpoints(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> list[Path]:
    found = sorted(file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint}"))
    there = f"with {checkpoint} there are: {', '.join(found) or 'none'}"
    if folds is None:
        if not found:
            others = sorted({file.name for file in folder.glob("fold_*/checkpoint_*.pth")})
            raise UserError(
                f"no fold of {folder} has {checkpoint}; "
                + (f"there is {', '.join(others)}: choose with -chk" if others else "train a fold first")
            )
        # as nnU-Net: "all" only when asked for, or when there is nothing else
        folds = [name for name in found if name != "all"] or found
    for name in folds:
        if name not in found:
            raise UserError(f"fold {name} of {folder} was not trained or has no {checkpoint}; {there}")
    return [folder / f"fold_{name}" / checkpoint for name in folds]


def _check_architecture(configuration: Any, plans_file: Path) -> None:
    """Refuse plans that name code from outside of the packages that networks come from."""
    arguments = configuration.network_arch_init_kwargs
    named = [configuration.network_arch_class_name]
    named += [arguments[key] for key in configuration.network_arch_init_kwargs_req_import if arguments.get(key)]
    for name in named:
        if not _is_trusted(str(name)):
            raise UserError(
                f"{plans_file} names {name!r} as a part of the network, which is no module of "
                f"{', '.join(module.rstrip('.') for module in _TRUSTED_MODULES)}; if you trust its origin, pass "
                "--trust-checkpoint"
            )


def _is_trusted(name: str) -> bool:
    """Whether ``name`` is a network module of a trusted package, not something that the package itself imports."""
    if not name.startswith(_TRUSTED_MODULES):
        return False
    found = pydoc.locate(name)
    if found is None:  # moved; nnU-Net looks for the class's name in dynamic_network_architectures
        return True
    return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(_TRUSTED_MODULES)
