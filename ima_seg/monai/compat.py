"""The versions of MONAI and of PyTorch Ignite, which its engines are made of, that are supported."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

from ima_seg.errors import UserError

#: By the name under which pip knows the package.
SUPPORTED = {"monai": ">=1.4,<1.7", "pytorch-ignite": ">=0.4.11,<0.6"}


def check_versions() -> None:
    """Refuse an environment without MONAI and Ignite, or with versions that this package was not written for.

    Raises:
        UserError: names the package, the version found and how to install a supported one.
    """
    for package, supported in SUPPORTED.items():
        remedy = f'pip install "{package}{supported}"'
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"{package} is not installed in this environment, ima_seg.monai needs it; {remedy}"
            ) from None
        if not SpecifierSet(supported).contains(found, prereleases=True):
            raise UserError(f"{package} {found} is installed, supported is {supported}; {remedy}")
