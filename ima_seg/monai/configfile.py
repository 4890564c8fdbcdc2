"""A bundle's config as a file: read as plain data, within limits, before anything acts on what it says."""

from __future__ import annotations

from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml

from ima_seg.errors import UserError
from ima_seg.files import read_json, require_regular

_NAMES = ("inference.json", "inference.yaml", "inference.yml")
#: What no config comes near to: bytes; keys and values, with what YAML's aliases repeat; levels; characters of one.
_LARGEST, MOST_ITEMS, DEEPEST, _LONGEST = 1 << 20, 10_000, 50, 4_000


class Refused(Exception):
    """What a config may do only if it is trusted; the words for it follow the config's name."""


def shown(value: Any) -> str:
    """A value of a config in a message; the beginning of lists in lists, which may repeat each other without end."""
    brief = Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 2, 200, 200
    return " ".join(brief.repr(value).split())


def find_config(root: Path) -> Path:
    """The config of a bundle's inference.

    Raises:
        UserError: there is none.
    """
    file = next((found for name in _NAMES if (found := root / "configs" / name).exists()), None)
    if file is None:
        raise UserError(f"{root} has no configs/{', '.join(_NAMES)}; name the folder of a MONAI bundle")
    return file


def read_config(file: Path) -> dict[str, Any]:
    """A config, JSON or YAML, as it is written: no expression, reference or ``%macro`` in it is followed.

    Raises:
        UserError: it is no mapping, or larger than any config.
    """
    require_regular(file)
    if file.stat().st_size > _LARGEST:
        raise _too("large", f"{file.stat().st_size} bytes, at most {_LARGEST}", file)
    if file.suffix == ".json":
        contents = read_json(file, missing="does not exist", remedy="correct it")
    else:
        contents = _read_yaml(file)
    level: list[Any] = [contents]
    items = 0
    for _ in range(DEEPEST):
        level = [inner for item in level for inner in _inside(item)]
        items += len(level)
        if items > MOST_ITEMS:
            raise _too("large", f"more than {MOST_ITEMS} values", file)
        if any(isinstance(item, str) and len(item) > _LONGEST for item in level):
            raise _too("large", f"a text of more than {_LONGEST} characters", file)
    if level:
        raise _too("deep", f"more than {DEEPEST} levels", file)
    return contents


def _inside(item: Any) -> list[Any]:
    return [*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else []


def _read_yaml(file: Path) -> dict[str, Any]:
    """YAML of a size that its events tell, before aliases (``*name``) and merges (``<<``) repeat anything."""
    text = file.read_text(encoding="utf-8-sig")
    items = 0
    sizes: dict[str | None, int] = {}
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, yaml.SafeLoader):
        before = items
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise UserError(f"{file}: *{event.anchor} is not defined, or within itself; write its value out")
            items += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, items))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            items += 1
            sizes[anchor] = items - before
        elif isinstance(event, yaml.ScalarEvent):
            items += 1
            sizes[event.anchor] = 1
            if len(event.value) > _LONGEST:
                raise _too("large", f"a text of more than {_LONGEST} characters", file)
        if items > MOST_ITEMS:
            raise _too("large", f"more than {MOST_ITEMS} values, with those that aliases repeat", file)
        if len(opened) > DEEPEST:
            raise _too("deep", f"more than {DEEPEST} levels", file)
    contents = yaml.load(text, yaml.SafeLoader)
    if not isinstance(contents, dict):
        raise UserError(f"{file} holds {type(contents).__name__}, not the items of a config; correct it")
    return contents


def _too(what: str, why: str, file: Path) -> UserError:
    return UserError(f"{file} is too {what} for the config of a bundle ({why}); is it one?")
