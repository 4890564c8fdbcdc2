"""Files and folders that are either whole or absent."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ima_seg.errors import UserError

#: Bytes and levels that no JSON file we read comes near to: plans, descriptions of data sets and metadata.
LARGEST_JSON, DEEPEST_JSON = 64 << 20, 100


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is renamed to ``path``, on an exception it is removed.

    The temporary name keeps the suffix of ``path``, because many writers choose their format by it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(target.suffixes[-2:]) if target.name.endswith(".gz") else target.suffix
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=f".tmp{suffix}", dir=target.parent)
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
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
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


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` in one rename, empty where a row lacks a key; floats with 6 significant digits; none, no file."""
    if not rows:
        return
    buffer = io.StringIO()
    # Rows of a resumed training may be of a version that wrote fewer columns.
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, buffer.getvalue())
