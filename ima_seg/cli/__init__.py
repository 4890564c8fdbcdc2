"""The command ``ima-seg``: a module for each group of subcommands, which adds their parsers.

argparse, for click and typer have no option of any number of values (``--eps 0.1 0.2``), as nnU-Net's commands have.
What a subcommand needs is imported when it runs, so that help and completion are there at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ima_seg.cli import dataset, demo, evaluate, models
from ima_seg.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets ``run``, a function of the parsed arguments that returns the exit status."""
    import shtab

    from ima_seg import __version__

    parser = argparse.ArgumentParser(
        prog="ima-seg",
        description="Segmentation networks that tolerate imperfect images: what goes with "
        "nnUNetv2_train -tr nnUNetTrainerIMA.",
    )
    parser.add_argument("--version", action="version", version=f"ima-seg {__version__}")
    shtab.add_argument_to(parser, "--print-completion", help="a script that completes this command in your shell")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (demo, models, dataset, evaluate):
        module.add_parsers(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: a mistake that the message explains)."""
    parsed = make_parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed) or 0
    except UserError as error:
        print(f"ima-seg: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ima-seg: interrupted", file=sys.stderr)
        return 130
    return status
