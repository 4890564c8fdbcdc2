"""The one exception that means "the user can fix this"."""

from __future__ import annotations

import sys
from types import TracebackType


class UserError(ValueError):
    """A foreseeable mistake in the input.

    The message names what is wrong (file or setting), the offending value and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """


def plain(text: object) -> str:
    """``text`` on one line, with everything spelled out that acts on a terminal: control characters, escape sequences,
    marks of direction.
    """
    line = " ".join(str(text).splitlines())
    return "".join(c if c.isprintable() or c == "\u00a0" else c.encode("unicode_escape").decode() for c in line)


def show_plainly() -> None:
    """From now on an uncaught :class:`UserError` ends the program with its message alone, without a traceback.

    For programs whose command line is not ours (``nnUNetv2_train``). Other exceptions are shown as before.
    """
    previous = sys.excepthook
    if getattr(previous, "_shows_user_errors", False):
        return

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if isinstance(value, UserError):
            print(f"ima-seg: error: {plain(value)}", file=sys.stderr)
        else:
            previous(kind, value, trace)

    hook._shows_user_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
