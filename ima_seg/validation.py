"""What files hold, held to a pydantic model of what they must hold."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ima_seg.errors import UserError

_MEMBERS = ("int", "float", "str", "bool", "constrained-int")
M = TypeVar("M", bound=BaseModel)


def validated(kind: type[M], contents: Any, *, source: str | Path, remedy: str) -> M:
    """``contents`` as a ``kind``.

    Raises:
        UserError: one line with ``source``, the first key that is wrong, its value, how many more there are, and
            ``remedy``.
    """
    try:
        return kind.model_validate(contents)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"{source}{_explain(first)}{more}; {remedy}") from None


def _explain(item: Any) -> str:
    """What goes behind the name of the file."""
    # pydantic adds the members of unions to the path.
    key = ".".join(str(part) for part in item["loc"] if "[" not in str(part) and part not in _MEMBERS)
    if item["type"] == "missing":
        return f" is without {key!r}"
    message = " ".join(item["msg"].removeprefix("Value error, ").split())
    if not key or item["type"] == "value_error":
        return f": {key}{': ' if key else ''}{message}"
    return f": {key} is {_shown(item['input'])}: {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())[:100]
