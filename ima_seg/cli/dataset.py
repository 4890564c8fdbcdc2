"""``ima-seg dataset``: phantom, decathlon, list."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ima_seg.errors import UserError


def add_parsers(subparsers: Any) -> None:
    """Add ``dataset`` and its subcommands to ``subparsers``, the result of ``add_subparsers``."""
    text = "make or convert an nnU-Net data set"
    parser = subparsers.add_parser("dataset", help=text, description=text)
    commands = parser.add_subparsers(dest="dataset_command", metavar="COMMAND", required=True)

    def add(name: str, text: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        parser.set_defaults(run=run)
        return parser

    parser = add("phantom", "write a synthetic data set", _run_phantom)
    parser.add_argument("-d", "--dataset-id", type=int, default=990, metavar="ID", help="nnU-Net id (default: 990)")
    parser.add_argument("--name", default="Phantom", help="data set name (default: Phantom)")
    parser.add_argument("--flavour", default="mr", help="a phantom of 'ima-seg dataset list' (default: mr)")
    parser.add_argument("--cases", type=int, default=20, metavar="N", help="training cases (default: 20)")
    parser.add_argument("--test-cases", type=int, default=0, metavar="N", help="test cases (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole set (default: 0)")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("X", "Y", "Z"), help="voxels (default: the flavour's)")
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm (default: the flavour's)")
    parser.add_argument("--regions", action="store_true", help="nested regions instead of exclusive labels")
    parser.add_argument("--ignore-label", action="store_true", help="sparse annotation with an ignore label")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where to write (default: nnUNet_raw)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing phantom of this id and name")
    text = "convert a downloaded task of the Medical Segmentation Decathlon into nnUNet_raw"
    parser = add("decathlon", text, _run_decathlon)
    parser.add_argument("path", type=Path, help="the folder TaskNN_Name or its .tar archive")
    parser.add_argument("-d", "--dataset-id", type=int, metavar="ID", help="nnU-Net id (default: the task's number)")
    parser.add_argument("-np", "--num-processes", type=int, metavar="N", help="worker processes")
    parser.add_argument("--no-verify", action="store_true", help="skip the checksum and the check for missing cases")
    add("list", "list the known data sets", _run_list)


def _run_phantom(args: argparse.Namespace) -> None:
    from ima_seg.data import recipes
    from ima_seg.data.naming import dataset_folder_name, raw_root, taken_by_other
    from ima_seg.data.phantom import write_phantom_dataset

    flavours = recipes.flavours()
    if args.flavour not in flavours:
        raise UserError(f"flavour {args.flavour!r} is unknown: use one of {', '.join(flavours)}")
    flavour = flavours[args.flavour]
    root: Path = args.output or raw_root()
    others = taken_by_other(args.dataset_id, dataset_folder_name(args.dataset_id, args.name))
    if others and args.output is None:
        raise UserError(f"dataset id {args.dataset_id} is taken by {others[0]}: choose another id (-d)")
    folder = write_phantom_dataset(
        root,
        **{name: getattr(args, name) for name in ("dataset_id", "name", "cases", "test_cases", "seed", "overwrite")},
        modality=flavour.modality,
        spacing=tuple(args.spacing or flavour.spacing),
        shape=tuple(args.shape or flavour.shape),
        regions=flavour.regions or args.regions,
        ignore_label=flavour.ignore_label or args.ignore_label,
    )
    print(f"wrote {folder}: {args.cases} training and {args.test_cases} test cases")
    if args.output is not None:
        print(f"next: export nnUNet_raw={root.resolve()}")
    _print_next(args.dataset_id)


def _run_decathlon(args: argparse.Namespace) -> None:
    from ima_seg.nnunet.decathlon import convert_decathlon

    folder = convert_decathlon(
        args.path, dataset_id=args.dataset_id, num_processes=args.num_processes, verify=not args.no_verify
    )
    print(f"wrote {folder}")
    _print_next(int(folder.name[7:10]))


def _print_next(dataset_id: int) -> None:
    print(f"next: nnUNetv2_plan_and_preprocess -d {dataset_id} --verify_dataset_integrity")


def _run_list(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from ima_seg.data import recipes

    table = Table(title="data sets")
    for heading in ("name", "what", "cases", "licence", "cap and step of the noise (L2)", "the same (RMS per voxel)"):
        table.add_column(heading)
    for name in recipes.list_recipes():
        recipe = recipes.load_recipe(name)
        cases = "any" if recipe.decathlon is None else str(recipe.decathlon.training_cases)
        noise = rms = ""
        if recipe.adversarial is not None:
            noise = f"{recipe.adversarial.eps_max_l2:g} / {recipe.adversarial.delta_l2:g}"
            rms = f"{recipe.eps_max_rms:.4f} / {recipe.delta_rms:.4f}"
        table.add_row(name, recipe.title, cases, recipe.licence, noise, rms)
    Console().print(table)
    print("phantoms: ima-seg dataset phantom --flavour NAME, without the prefix phantom_")
    print("decathlon tasks: download from http://medicaldecathlon.com, then ima-seg dataset decathlon PATH")
