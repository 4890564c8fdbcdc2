"""Versions of other packages that this one was written for."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from ima_seg.errors import UserError


def check_version(package: str, supported: str, *, title: str, needed: str = "") -> str:
    """The installed version of a ``package`` of pip, which is ``supported``: specifiers such as ``>=1.4,<1.7``.

    Messages call it by its ``title``, and say by what it is ``needed``.

    Raises:
        UserError: it is not installed, or in another version; names that and how to install a supported one.
    """
    remedy = f'pip install "{package}{supported}"'
    try:
        found = importlib.metadata.version(package)
        fits = SpecifierSet(supported).contains(found, prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{title} is not installed in this environment{needed}; {remedy}") from None
    except InvalidVersion:
        fits = False
    if not fits:
        raise UserError(f"{title} {found} is installed, supported is {supported}; {remedy}")
    return found
