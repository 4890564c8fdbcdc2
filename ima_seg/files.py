"""Files and folders that are either whole or absent."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ima_seg.errors import UserError, plain

#: Bytes and levels that no JSON file we read comes near to: plans, descriptions of data sets and metadata.
LARGEST_JSON, DEEPEST_JSON = 64 << 20, 100


#: Of a name that we give a temporary file or folder: ``.NAME.HOST-PID.xxxxxxxx.tmp.SUFFIX``, formerly without owner.
_TEMPORARY = re.compile(
    r"\..+?\.(?:(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,9})\.)?[a-z0-9_]{8}\.tmp(?:\.\w+){0,2}", re.DOTALL
)
#: No temporary file is written for so long, seconds.
_LONGEST_WRITE = 86_400


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _prefix(target: Path) -> str:
    # Names may have 255 bytes.
    return f".{target.name[:50]}.{_host()}-{os.getpid()}."


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where asking is killing
        return True
    with suppress(ProcessLookupError):
        with suppress(PermissionError):
            os.kill(pid, 0)
        return True
    return False


def remove_stale(folder: Path) -> None:
    """Remove temporary files and folders of this module that killed processes left in ``folder``.

    Those of this machine go when their process is gone, those of others after a day.
    """
    for path in folder.glob(".*.tmp*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError):  # another process may remove it, too
            mine = found["host"] == _host()
            if not _is_alive(int(found["pid"])) if mine else time.time() - path.lstat().st_mtime > _LONGEST_WRITE:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system within names ``path``: those of writing name no file, others a temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(path.parent / _prefix(path))):
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is renamed to ``path``, on an exception it is removed.

    The temporary name keeps the suffix of ``path``, because many writers choose their format by it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(target.suffixes[-2:]) if target.name.endswith(".gz") else target.suffix
    with naming(target):
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=f".tmp{suffix}", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` in one rename."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_regular(path: Path) -> None:
    """Refuse what is there but no regular file (nor a link to one), which may wait for ever or never end.

    Raises:
        UserError: ``path`` is a folder, a named pipe, a device or a socket; a missing file is left to who reads it.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, a device or a socket"
        raise UserError(f"{path} is {kind}, not a regular file; name the file itself, or a copy of it")


def file_hash(path: Path, kind: str = "sha256") -> str:
    """SHA-256, or another sum that :mod:`hashlib` has, of a file, in hexadecimal."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, *, missing: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; see :func:`load_json`.

    Raises:
        UserError: it holds something else, or what :func:`load_json` refuses.
    """
    contents = load_json(path, missing=missing, remedy=remedy)
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds no JSON object; {remedy}")
    return contents


def load_json(path: Path, *, missing: str, remedy: str) -> Any:
    """What a JSON file holds, UTF-8.

    Raises:
        UserError: there is no such file (the message goes on with ``missing``), or no JSON (``remedy``),
            or one that is too large or nested too deeply to be meant.
    """
    require_regular(path)
    if not path.exists():
        raise UserError(f"{path} {missing}")
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST_JSON} of any such file; {remedy}")
    try:
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not valid JSON ({reason}); {remedy}") from None
    level: list[Any] = [contents] if _holds(contents) else []
    for _ in range(DEEPEST_JSON):  # what is deeper cannot be copied or printed either
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item) if _holds(x)]
    if level:
        raise UserError(f"{path} is nested more than {DEEPEST_JSON} levels deep; {remedy}")
    return contents


def _holds(item: Any) -> bool:
    return isinstance(item, dict | list)


@contextmanager
def building_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``target``; on success it becomes ``target``, on an exception it is removed.

    Args:
        target: the folder to appear; its parent must exist.
        replace: put it in the place of an existing ``target``, which is removed only once the new one is in place.

    Raises:
        UserError: ``target`` appeared meanwhile and ``replace`` is false.
    """
    remove_stale(target.parent)
    work = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".tmp", dir=target.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        if target.exists():
            if not replace:
                raise UserError(f"{target} exists already: remove it or choose another name")
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` with a header, empty where a row lacks a key; floats with 6 significant digits.

    Texts that a spreadsheet takes for a formula get an apostrophe in front, and control characters are spelled out.
    """
    buffer = io.StringIO()
    # Rows of a resumed training may be of a version that wrote fewer columns.
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([[_cell(name) for name in names], *([_cell(row.get(name)) for name in names] for row in rows)])
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{plain(value)}" if value.startswith(("=", "+", "-", "@")) else plain(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write :func:`csv_text` of ``rows`` in one rename; without rows no file."""
    if rows:
        write_text(path, csv_text(rows))
