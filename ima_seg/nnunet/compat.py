"""Everything that depends on the version of nnU-Net: the range supported, and its private behaviour."""

from __future__ import annotations

import importlib.metadata
import re

from ima_seg.errors import UserError

#: The nnU-Net versions supported: from the first (inclusive) to the second (exclusive).
SUPPORTED_NNUNET = ("2.8", "2.9")


def check_nnunet_version() -> str:
    """The version of the installed nnU-Net, which is a supported one.

    Raises:
        UserError: nnU-Net is not installed, or is of a version that this package was not written for; names the
            version found and how to install a supported one.
    """
    first, end = SUPPORTED_NNUNET
    remedy = f'pip install "nnunetv2>={first},<{end}"'
    try:
        found = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"nnU-Net v2 is not installed in this environment; {remedy}") from None
    if not _release(first) <= _release(found) < _release(end):
        raise UserError(f"nnU-Net {found} is installed, supported is >={first},<{end}; {remedy}")
    return found


def _release(version: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) for a version that does not start with two numbers."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
