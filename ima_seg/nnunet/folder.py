"""A trained nnU-Net v2 model folder, ready to be attacked: networks, plans, labels, without executing pickled code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ima_seg.cases.raw import CaseFiles
from ima_seg.errors import UserError
from ima_seg.nnunet import case, leaks
from ima_seg.nnunet.checkpoint import KEY, read_checkpoint, require_model_folder
from ima_seg.nnunet.compat import check_nnunet_version
from ima_seg.nnunet.dataset import channel_names, foreground_classes
from ima_seg.nnunet.description import read_configuration, read_dataset
from ima_seg.nnunet.model import LoadedFolder
from ima_seg.nnunet.parts import check_architecture, network_builder, require_parts
from ima_seg.types import Labels
from ima_seg.weights import misfit


class SegmentationModel(LoadedFolder):
    """A model that prepares its cases; see :class:`LoadedFolder` for the rest."""

    def prepare(self, files: CaseFiles, *, device: torch.device | str = "cpu") -> case.PreparedCase:
        """Read and preprocess a case, with its segmentation by the previous stage if there is one."""
        raw = case.read_case(self, files.case, files.images, files.label)
        return case.prepare_case(raw, self, device=device, previous_stage=case.read_previous_stage(self, files, raw))

    def training_cases(self, images: Path) -> dict[str, str] | None:
        """See :func:`ima_seg.nnunet.leaks.training_cases`."""
        return leaks.training_cases(self, images)


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
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    check_nnunet_version()
    root = Path(folder)
    plans_file, dataset_file = require_model_folder(root)
    checkpoints = _fold_checkpoints(root, folds, checkpoint)
    dataset_json = read_dataset(dataset_file)
    read = [read_checkpoint(file, trust=trust) for file in checkpoints]
    first = read[0]
    name, trainer = first["init_args"]["configuration"], first["trainer_name"]
    plans = read_configuration(plans_file, name, channels=len(channel_names(dataset_json)))
    require_parts(plans, plans["configurations"][name], plans_file)
    manager = PlansManager(plans)
    configuration = manager.get_configuration(name)
    check_architecture(configuration, plans_file, trust=trust)
    build, sketch = network_builder(
        manager, configuration, dataset_json, trainer=trainer, checkpoint=checkpoints[0], file=plans_file
    )
    names = [file.parent.name.removeprefix("fold_") for file in checkpoints]
    networks = []
    for file, state in zip(checkpoints, read, strict=True):
        if wrong := misfit(sketch, state["network_weights"]):
            raise UserError(f"{file} does not fit the network of {plans_file} ({wrong}); is it of this folder?")
        network = build()
        network.load_state_dict(state["network_weights"])
        networks.append(network.to(device).eval().requires_grad_(False))
    labels = manager.get_label_manager(dataset_json)
    axes = first["inference_allowed_mirroring_axes"]
    if axes is not None and not set(axes) <= set(range(len(configuration.patch_size))):
        raise UserError(
            f"{checkpoints[0]}: inference_allowed_mirroring_axes is {axes}, for patches of "
            f"{len(configuration.patch_size)} axes; it is damaged, or of another configuration"
        )
    return SegmentationModel(
        folder=root,
        networks=networks,
        plans=manager,
        configuration=configuration,
        configuration_name=name,
        dataset_json=dataset_json,
        labels=Labels(
            outputs=labels.num_segmentation_heads, regions=labels.has_regions, ignore_label=labels.ignore_label
        ),
        classes=foreground_classes(dataset_json),
        channels=channel_names(dataset_json),
        mirror_axes=axes,
        trainer=trainer,
        files=[plans_file, dataset_file, *checkpoints],
        folds=names,
        ima=first.get(KEY),
        ledgers={fold: state[KEY] for fold, state in zip(names, read, strict=True) if state.get(KEY)},
    )


def _fold_checkpoints(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> list[Path]:
    files = [file for file in folder.glob(f"fold_*/{checkpoint}") if file.is_file()]
    found = sorted(file.parent.name.removeprefix("fold_") for file in files)
    there = f"with {checkpoint} there are: {', '.join(found) or 'none'}"
    if folds is None:
        if not found:
            others = sorted({file.name for file in folder.glob("fold_*/checkpoint_*.pth") if file.is_file()})
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
