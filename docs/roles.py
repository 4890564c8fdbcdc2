"""Docstrings name other objects by Sphinx roles; on the site these are links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turns ``:class:`Name``` into a link to the object, where the site has it, else into code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return

        def link(role: re.Match[str]) -> str:
            name = role[1]
            try:
                path = obj.resolve(name)
            except griffe.NameResolutionError:
                path = name
            shown = name.rsplit(".", 1)[-1] if name.startswith("ima_seg.") else name
            return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

        obj.docstring.value = _ROLE.sub(link, obj.docstring.value)
