"""The command ``ima-seg``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ima_seg.errors import UserError


def _parser() -> argparse.ArgumentParser:
    from ima_seg import __version__
    from ima_seg.cli.dataset import add_dataset_parser
    from ima_seg.cli.evaluate import add_evaluate_parsers

    parser = argparse.ArgumentParser(
        prog="ima-seg",
        description="Segmentation networks that tolerate imperfect images: what goes with "
        "nnUNetv2_train -tr nnUNetTrainerIMA.",
    )
    parser.add_argument("--version", action="version", version=f"ima-seg {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="the whole way on a phantom data set, in minutes")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo_output"), help="default: demo_output")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="what nnU-Net sees here, and the remedy for everything wrong")
    doctor.add_argument("--ext-path", action="store_true", help="print only the folder to export as nnUNet_extTrainer")
    doctor.set_defaults(run=_doctor)

    add_dataset_parser(commands)
    add_evaluate_parsers(commands)

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
    plans.add_argument("--set", dest="ima", nargs="+", default=[], metavar="KEY=VALUE", help="IMA settings to store")
    plans.set_defaults(run=_plans)

    margins = commands.add_parser("margins", help="print and plot the margins of a model")
    margins.add_argument("model_folder", type=Path, help="TRAINER__PLANS__CONFIGURATION in nnUNet_results")
    margins.add_argument("-f", "--folds", nargs="+", help="folds (default: all there are)")
    margins.add_argument(
        "--images", type=Path, help="folder of the training images: adds margins in native intensities"
    )
    margins.add_argument("-o", "--output", type=Path, help="folder for the plot (default: the fold's)")
    margins.add_argument("--trust-checkpoint", action="store_true", help="read checkpoints that execute code")
    margins.set_defaults(run=_margins)

    export = commands.add_parser("export", help="a copy of a model that a stock nnU-Net predicts with")
    export.add_argument("model_folder", type=Path, help="TRAINER__PLANS__CONFIGURATION in nnUNet_results")
    export.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    export.add_argument("--trust-checkpoint", action="store_true", help="read checkpoints that execute code")
    export.set_defaults(run=_export)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from ima_seg.cli.demo import run_demo

    run_demo(arguments.output)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from ima_seg.nnunet.doctor import ext_trainer_folder, run_doctor

    if arguments.ext_path:
        print(ext_trainer_folder())
        return 0
    return run_doctor()


def _plans(arguments: argparse.Namespace) -> int:
    from ima_seg.nnunet.plans import parse_assignments, write_plans

    path = write_plans(
        arguments.dataset,
        arguments.plans,
        arguments.output,
        configurations=arguments.configurations,
        features=arguments.features,
        max_features=arguments.max_features,
        batch_size=arguments.batch_size,
        patch_size=arguments.patch_size,
        ima=parse_assignments(arguments.ima),
    )
    print(f"wrote {path}; train with -p {arguments.output}")
    return 0


def _margins(arguments: argparse.Namespace) -> int:
    from ima_seg.nnunet.margins import read_margins, show_margins

    for fold in read_margins(arguments.model_folder, arguments.folds, trust=arguments.trust_checkpoint):
        output = arguments.output and arguments.output / fold.folder.name
        show_margins(fold, images=arguments.images, output=output)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ima_seg.nnunet.export import export_model

    target = export_model(arguments.model_folder, arguments.output, trust=arguments.trust_checkpoint)
    print(f"wrote {target}; predict with: nnUNetv2_predict_from_modelfolder -i IMAGES -o OUT -m {target}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: a mistake that the message explains)."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except UserError as error:
        print(f"ima-seg: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ima-seg: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
