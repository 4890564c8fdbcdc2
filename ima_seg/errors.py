"""The one exception that means "the user can fix this"."""

from __future__ import annotations


class UserError(ValueError):
    """A foreseeable mistake in the input.

    The message names what is wrong (file or setting), the offending value and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """
