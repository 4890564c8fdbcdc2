"""``ima-seg doctor``, ``plans``, ``margins`` and ``export``: what surrounds a training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parsers(commands: Any) -> None:
    """Add the four commands to ``commands``, the result of ``add_subparsers``."""
    doctor = commands.add_parser("doctor", help="what nnU-Net sees here, and the remedy for everything wrong")
    doctor.add_argument("--ext-path", action="store_true", help="print only the folder to export as nnUNet_extTrainer")
    doctor.set_defaults(run=_doctor)

    plans = commands.add_parser("plans", help="a variant of a plans file: smaller network or batch, IMA settings")
    plans.add_argument("dataset", help="id or folder name of a preprocessed data set")
    plans.add_argument("-p", "--plans", default="nnUNetPlans", help="plans to start from (default: nnUNetPlans)")
    plans.add_argument(
        "-o", "--output", required=True, metavar="NAME", help="name of the variant, for nnUNetv2_train -p"
    )
    plans.add_argument("-c", "--configurations", nargs="+", help="which to change (default: all)")
    plans.add_argument("--features", type=int, help="feature maps of the first stage, doubled in each further one")
    plans.add_argument("--max-features", type=int, help="at most so many feature maps")
    plans.add_argument("--batch-size", type=int)
    plans.add_argument("--patch-size", type=int, nargs="+")
    plans.add_argument("--activation", help="of the network, such as SiLU, which makes trainings more robust")
    plans.add_argument("--set", dest="ima", nargs="+", default=[], metavar="KEY=VALUE", help="IMA settings to store")
    plans.set_defaults(run=_plans)

    margins = commands.add_parser("margins", help="print and plot the margins of a model")
    margins.add_argument("-f", "--folds", nargs="+", help="folds (default: all there are)")
    margins.add_argument(
        "--images", type=Path, help="folder of the training images: adds margins in native intensities"
    )
    margins.add_argument("-o", "--output", type=Path, help="folder for the plot (default: the fold's)")
    margins.set_defaults(run=_margins)

    export = commands.add_parser("export", help="a copy of a model that a stock nnU-Net predicts with")
    export.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    export.set_defaults(run=_export)
    for command in (margins, export):
        command.add_argument("model_folder", type=Path, help="TRAINER__PLANS__CONFIGURATION in nnUNet_results")
        command.add_argument("--trust-checkpoint", action="store_true", help="read checkpoints that execute code")


def _doctor(arguments: argparse.Namespace) -> int:
    from ima_seg.nnunet.doctor import ext_trainer_folder, run_doctor

    if arguments.ext_path:
        print(ext_trainer_folder())
        return 0
    return run_doctor()


def _plans(arguments: argparse.Namespace) -> None:
    from ima_seg.nnunet.plans import parse_assignments, write_plans

    names = ("configurations", "features", "max_features", "batch_size", "patch_size", "activation")
    changes = {name: getattr(arguments, name) for name in names}
    path = write_plans(
        arguments.dataset, arguments.plans, arguments.output, ima=parse_assignments(arguments.ima), **changes
    )
    print(f"wrote {path}; train with -p {arguments.output}")


def _margins(arguments: argparse.Namespace) -> None:
    from ima_seg.errors import plain
    from ima_seg.nnunet.margins import read_margins, show_margins

    found, left_out = read_margins(arguments.model_folder, arguments.folds, trust=arguments.trust_checkpoint)
    for fold in found:
        output = arguments.output and arguments.output / fold.folder.name
        show_margins(fold, images=arguments.images, output=output)
    for folder, reason in left_out.items():
        print(plain(f"no margins are shown of {folder.name}: {reason}"))


def _export(arguments: argparse.Namespace) -> None:
    from ima_seg.nnunet.export import export_model

    target = export_model(arguments.model_folder, arguments.output, trust=arguments.trust_checkpoint)
    print(f"wrote {target}; predict with: nnUNetv2_predict_from_modelfolder -i IMAGES -o OUT -m {target}")
