"""Downloaded tar archives: checked against their sum, unpacked without trusting what they hold."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path, PurePosixPath

from ima_seg.errors import UserError
from ima_seg.files import file_hash

ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz")
#: gzip can make 1000 of 1; images and label maps that are compressed already make hardly more than they are.
_LARGEST_RATIO = 200


def is_archive(path: Path) -> bool:
    """Return whether the name of ``path`` ends like a tar archive's."""
    return path.name.lower().endswith(ARCHIVE_ENDINGS)


def check_md5(path: Path, expected: str) -> None:
    """Compare the MD5 sum of ``path`` with ``expected`` (32 hexadecimal digits).

    Raises:
        UserError: they differ.
    """
    found = file_hash(path, "md5")
    if found != expected:
        raise UserError(
            f"{path}: MD5 sum {found}, expected {expected}: the download is damaged or is another "
            "version; download it again, or skip the check (--no-verify) if you trust the file"
        )


def unpack_single_folder(archive: Path, into: Path) -> Path:
    """Unpack an archive that holds one top-level folder into an empty folder; return the folder that was unpacked.

    Only plain files and folders are unpacked, with plain permissions. File-manager litter (``._name``, ``.DS_Store``)
    is left out.

    Raises:
        UserError: the archive cannot be read, is cut short, does not hold exactly one top-level folder, or holds an
            entry that is no plain file or folder or that points outside (absolute or ``..``).
    """
    try:
        with tarfile.open(archive) as tar:
            members, total = [], 0
            for member in tar:
                total += member.size
                if total > _LARGEST_RATIO * archive.stat().st_size:
                    raise UserError(f"{archive}: it unpacks to more than {_LARGEST_RATIO} times its size: get it anew")
                if not _is_litter(member.name):
                    _refuse_unsafe(archive, member)
                    members.append(member)
            tops = {PurePosixPath(member.name).parts[0] for member in members if PurePosixPath(member.name).parts}
            if len(tops) != 1:
                held = ", ".join(sorted(tops)[:4]) or "nothing"
                raise UserError(f"{archive}: it holds {held}, not one folder: give the archive as it was downloaded")
            # Python 3.10 before 3.10.12 has no filter; _refuse_unsafe has left nothing that needs it.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
            tar.extractall(into, members=members)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: damaged or no tar archive ({error}): download it again") from error
    folder = into / tops.pop()
    if not folder.is_dir():
        raise UserError(f"{archive}: it holds the single file {folder.name}, not a folder: give the original archive")
    return folder


def _is_litter(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith("._") or path.name == ".DS_Store" or "__MACOSX" in path.parts


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name
    if outside or not (member.isfile() or member.isdir()):
        kind = "points outside the archive" if outside else "is neither a plain file nor a folder"
        raise UserError(f"{archive}: the entry {member.name!r} {kind}: do not trust this archive, get it elsewhere")
