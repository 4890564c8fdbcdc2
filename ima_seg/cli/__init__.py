"""The command ``ima-seg``: a module for each group of subcommands, which adds their parsers.

argparse, for click and typer have no option of any number of values (``--eps 0.1 0.2``), as nnU-Net's commands have.
What a subcommand needs is imported when it runs, so that help and completion are there at once.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from ima_seg.cli import dataset, demo, evaluate, models
from ima_seg.errors import UserError, plain

#: What helps against errors of the system.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there and run it again (an evaluation with --resume)"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions or name another place"),
}


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
        print(f"ima-seg: error: {plain(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        parts = (error.filename, error.strerror or error, _REMEDIES.get(error.errno or 0))
        print(f"ima-seg: error: {plain(': '.join(str(part) for part in parts if part))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ima-seg: interrupted", file=sys.stderr)
        return 130
    return status
