"""The versions of MONAI and of PyTorch Ignite, which its engines are made of, that are supported."""

from __future__ import annotations

from ima_seg.versions import check_version

#: By the name under which pip knows the package.
SUPPORTED = {"monai": ">=1.4,<1.7", "pytorch-ignite": ">=0.4.11,<0.6"}


def check_versions() -> None:
    """Refuse an environment without MONAI and Ignite, or with versions that this package was not written for."""
    for package, supported in SUPPORTED.items():
        check_version(package, supported, title=package, needed=", ima_seg.monai needs it")
