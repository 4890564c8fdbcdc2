"""Makes links that leave docs/ work on the site: what pages refer to in the repository becomes part of it."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: Files of the repository that are carried into the site, at their own path.
CARRIED = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "benchmarks/README.md",
    "examples/classification.py", "examples/monai_bundle/docs/README.md",
)  # fmt: skip
#: Folders of which all files are carried, and which get a page that lists them.
FOLDERS = ("benchmarks/results", "benchmarks/results/robustness")

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is carried."""
    for folder in FOLDERS:
        files.append(File.generated(config, f"{folder}/index.md", content=_listing(ROOT / folder)))
    found = [ROOT / name for name in CARRIED]
    found += sorted(file for file in (ROOT / FOLDERS[0]).rglob("*") if file.is_file())
    for file in found:
        files.append(File.generated(config, file.relative_to(ROOT).as_posix(), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Turn links between places of the repository into links between places of the site."""
    here = page.file.src_uri
    home = here if here.startswith(("benchmarks/", *CARRIED)) else f"docs/{here}"

    def moved(link: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(home), link[1]))
        on_site = f"{place}/index.md" if place in FOLDERS else place.removeprefix("docs/")
        if on_site == place and files.get_file_from_path(place) is None:
            return link[1]  # mkdocs warns
        return posixpath.relpath(on_site, posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def _listing(folder: Path) -> str:
    names = sorted(name for name in os.listdir(folder) if (folder / name).is_file()) if folder.is_dir() else []
    names += sorted(
        f"{path.name}/{file.name}"
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and f"{FOLDERS[0]}/{path.name}" not in FOLDERS
        for file in path.iterdir()
    )
    items = "".join(f"- [{name}]({name})\n" for name in names) or "Nothing is stored here.\n"
    return f"# {folder.relative_to(ROOT).as_posix()}\n\n{items}"
