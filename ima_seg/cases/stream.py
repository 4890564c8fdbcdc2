"""What image files hold, read to the end: nothing damaged, nothing larger than the file can be, one message for all."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ima_seg.errors import UserError

#: How many bytes one byte may stand for: deflate's limit, and that of zstd, which TIFF may use.
_EXPANSION, _EXPANSION_TIFF = 1032, 1 << 15
_BLOCK = 1 << 20
#: Headers of .mha and .nrrd in front of a zlib or gzip stream.
_BEFORE_STREAM = re.compile(
    rb"ObjectType(?=.*?\nCompressedData\s*=\s*True).*?\nElementDataFile\s*=\s*LOCAL\r?\n"
    rb"|NRRD0(?=.*?\nencoding:\s*gz(?:ip)?\r?\n).*?\n\r?\n",
    re.DOTALL | re.IGNORECASE,
)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of whatever zlib, gzip, numpy, nibabel and ITK raise which file it is and what to do.

    Raises:
        UserError: instead of any other exception.
    """
    try:
        yield
    except Exception as error:
        raise (error if isinstance(error, UserError) else _unreadable(path, error)) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read ({error.strerror}); give yourself permission, chmod u+r")
    if path.is_symlink() and not path.exists():
        return UserError(f"{path} is a link to {path.readlink()}, which is not there; mend the link or remove the case")
    if isinstance(error, FileNotFoundError) or not path.exists():
        return UserError(f"{path} does not exist; add it or remove the case")
    if isinstance(error, MemoryError):
        return UserError(f"{path} does not fit into memory; use a machine with more")
    detail = " ".join(str(error).split()) or type(error).__name__
    size = path.stat().st_size
    return UserError(
        f"{path} ({size} bytes) cannot be read, it is truncated or not of the format its name says ({detail[-200:]}); "
        "copy it again from its source or convert it anew"
    )


def require_room(path: Path, claimed: int) -> None:
    """Before memory is taken: a file that is too small for the bytes of voxels that its header claims.

    Raises:
        ValueError: it cannot hold them, however well they are compressed.
        MemoryError: this machine cannot.
    """
    name, size = path.name.lower(), path.stat().st_size
    if name.endswith((".mhd", ".nhdr", ".hdr")):  # the voxels lie in a file beside it
        size = sum(file.stat().st_size for file in path.parent.iterdir() if file.name.startswith(path.stem))
    most = size * (1 if name.endswith(".nii") else _EXPANSION_TIFF if ".tif" in path.suffix.lower() else _EXPANSION)
    if claimed > most:
        raise ValueError(f"its header claims {claimed} bytes of voxels, it can hold {most} at most")
    if hasattr(os, "sysconf") and claimed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise MemoryError


def nifti_voxels(path: Path, stored: Any) -> npt.NDArray[Any]:
    """The voxels of nibabel's array proxy, with the header's scaling, from a stream that is read to its checksum."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        where = (stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
        values: npt.NDArray[Any] = np.asanyarray(type(stored)(stream, where))
        while stream.read(_BLOCK):
            pass
    return values


def require_whole_stream(path: Path) -> None:
    """Check the checksum of compressed voxels in .mha and .nrrd, which ITK passes over.

    Raises:
        ValueError: they end too early.
        zlib.error: they are damaged.
    """
    with path.open("rb") as file:
        found = _BEFORE_STREAM.match(file.read(_BLOCK))
        if found is None:
            return
        file.seek(found.end())
        stream = zlib.decompressobj(wbits=47)  # zlib or gzip
        while not stream.eof:
            block = stream.unconsumed_tail or file.read(_BLOCK)
            if not block:
                raise ValueError("its compressed voxels end too early")
            stream.decompress(block, _BLOCK)
