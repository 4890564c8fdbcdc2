"""A copy of a trained model that a stock nnU-Net, without this package, predicts with."""

from __future__ import annotations

import shutil
from pathlib import Path

from ima_seg.errors import UserError
from ima_seg.files import building_folder
from ima_seg.nnunet.checkpoint import (
    KEY,
    METHOD_KEY,
    TRAINED_KEY,
    checkpoint_files,
    read_checkpoint,
    require_model_folder,
    write_checkpoint,
)
from ima_seg.nnunet.compat import trainer_class
from ima_seg.nnunet.folder import load_model

STOCK_TRAINER = "nnUNetTrainer"
#: What nnU-Net's inference reads from a model folder, beside the checkpoints.
_REQUIRED = ("plans.json", "dataset.json")
_OPTIONAL = ("dataset_fingerprint.json", "postprocessing.pkl", "postprocessing.json")


def export_model(model_folder: str | Path, output: str | Path, *, trust: bool = False) -> Path:
    """Write a copy of ``model_folder`` whose checkpoints name ``nnUNetTrainer``.

    Inference needs the trainer only for the network architecture, which IMA leaves as it is; weights are copied as they
    are, averaged ones where the training averages them. The margin ledger (case ids of the training set) is left out.

    Args:
        model_folder: ``TRAINER__PLANS__CONFIGURATION`` in nnUNet_results, with ``fold_*`` inside.
        output: folder to make; nnU-Net's ``-m`` takes any name.
        trust: read checkpoints with full unpickling.

    Returns:
        ``output``.

    Raises:
        UserError: the output exists, the model cannot be loaded, or its trainer has another architecture.
    """
    source, target = Path(model_folder), Path(output)
    require_model_folder(source)
    files = checkpoint_files(source)
    if target.exists():
        raise UserError(f"{target} exists already; name a new folder with -o")
    target.parent.mkdir(parents=True, exist_ok=True)
    with building_folder(target) as folder:
        for name in (*_REQUIRED, *_OPTIONAL):
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
        for file in files:
            checkpoint = read_checkpoint(file, trust=trust)
            _check_architecture(str(checkpoint["trainer_name"]), file)
            # What cannot be loaded, stock nnU-Net cannot either.
            load_model(source, folds=[file.parent.name.removeprefix("fold_")], checkpoint=file.name, trust=trust)
            kept = {key: value for key, value in checkpoint.items() if key not in (KEY, METHOD_KEY, TRAINED_KEY)}
            write_checkpoint(folder / file.relative_to(source), {**kept, "trainer_name": STOCK_TRAINER})
    return target


def _check_architecture(trainer_name: str, file: Path) -> None:
    """Refuse a trainer whose network a stock nnU-Net would build differently."""
    if trainer_name == STOCK_TRAINER:
        return
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = trainer_class(trainer_name)
    if trainer is None:
        raise UserError(
            f"{file} was trained by {trainer_name}, which nnU-Net does not find here; set nnUNet_extTrainer to its "
            "folder. Nothing was exported"
        )
    if trainer.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise UserError(f"{file}: {trainer_name} builds a network of its own, which stock nnU-Net cannot; not exported")
