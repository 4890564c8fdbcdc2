"""README and docs: their snippets run, their commands parse, their tables name what there is.

Blocks marked ``python`` are executed, those of a page in order, in one namespace, in an empty folder; a block marked
``text`` right after one is what it prints. HTML comments before a block, which readers do not see, change that:

- ``<!-- setup: NAME -->``: what :data:`SETUPS` prepares, before this block;
- ``<!-- not run: REASON -->``: the block is only compiled.

Of blocks marked ``bash`` the commands of ima-seg, nnU-Net, the benchmarks and make are parsed by their own parsers.

One file: everything that a page can promise is checked by the same reading of the pages.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from ima_seg.attacks.registry import ATTACKS, GROUPS, SPECIAL
from ima_seg.evaluate.attack.corruptions import CORRUPTIONS
from ima_seg.evaluate.report.flags import SENTENCES
from ima_seg.methods import METHODS
from ima_seg.methods.ima_settings import IMASettings
from ima_seg.methods.settings import TrainingSettings, load_settings

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
#: Pages outside docs, whose links mkdocs does not check.
ASIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
_NOTE = re.compile(r"<!-- (setup|not run): (.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line in the file, and the comments that stand directly before it."""

    page: Path
    line: int
    language: str
    text: str
    notes: dict[str, str]


def blocks(page: Path) -> list[Block]:
    source, found, end = page.read_text(encoding="utf-8"), [], 0
    for fence in _FENCE.finditer(source):
        before, notes = source[end : fence.start()], {}
        while note := _NOTE.search(before):
            notes[note[1]], before = note[2], before[: note.start()]
        indent = fence["indent"]
        text = "".join(line.removeprefix(indent) for line in fence["body"].splitlines(keepends=True))
        line = source.count("\n", 0, fence.start("body")) + 1
        # Expected output stands directly below what prints it.
        language = "output" if fence["language"] == "text" and not before.strip() else fence["language"]
        found.append(Block(page, line, language, text, notes))
        end = fence.end()
    return found


def of(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- Python ----------------------------------------------------------------------------------------------------------


def _models(request: pytest.FixtureRequest, folder: Path) -> None:
    """Two small models of a phantom data set, and one case of it."""
    phantoms = request.getfixturevalue("phantoms")
    for alias, seed in (("MODEL_A", 0), ("MODEL_B", 1)):
        (folder / alias).symlink_to(phantoms.model("mr3d", seed=seed), target_is_directory=True)
    case = sorted(phantoms.labels("mr3d").iterdir())[0]
    for target, files in (
        ("imagesTs", phantoms.images("mr3d").glob(f"{case.name.removesuffix('.nii.gz')}_0*")),
        ("labelsTs", [case]),
    ):
        (folder / target).mkdir()
        for file in files:
            (folder / target / file.name).symlink_to(file)


SETUPS = {"models": _models}


@pytest.mark.parametrize("page", of("python")[1:], ids=name)  # README has its own test, below
def test_python_runs(page, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = ""
    namespace = {"__name__": "page"}
    # Pages may register attacks and methods of their own.
    with mock.patch.dict(ATTACKS), mock.patch.dict(METHODS):
        for block in blocks(page):
            for setup in block.notes.get("setup", "").split():
                SETUPS[setup](request, tmp_path)
            if block.language == "output":
                assert printed == block.text, f"{name(page)}:{block.line}"
            if block.language != "python":
                continue
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            if "not run" not in block.notes:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(code, namespace)
                printed = output.getvalue()


def test_readme_example_is_short_and_its_margins_grow(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = [block.text for block in blocks(ROOT / "README.md") if block.language == "python"]
    assert len(example.splitlines()) <= 25
    names: dict[str, object] = {}
    exec(example, names)
    assert re.search(r"median margin 0\.\d+ SD per voxel", capsys.readouterr().out)
    ledger = names["ima"].ledger
    margins = ledger.get([f"case_{i}" for i in range(8)])
    assert (margins > ledger.delta).all() and margins.isfinite().all()


def test_few_blocks_are_not_run():
    skipped = [block for page in PAGES for block in blocks(page) if "not run" in block.notes]
    assert len(skipped) <= 2 and all("GPU" in block.notes["not run"] for block in skipped)


# --- commands --------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """The command line was understood."""


def commands(block: Block) -> list[list[str]]:
    """The words of each command of ours in a block: without variables before it, comments, ``$(...)`` around it."""
    joined = block.text.replace("\\\n", " ")
    inner = re.findall(r"\$\(([^()]+)\)", joined)
    found = []
    for line in [*joined.splitlines(), *inner]:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words[:1] == ["torchrun"] and "ima_seg.cli" in words:
            words = ["ima-seg", *words[words.index("ima_seg.cli") + 1 :]]
        if words and (re.match(r"ima-seg$|make$|nnUNetv2_", words[0]) or words[:1] == ["python"]):
            found.append(words)
    return found


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program itself parse its arguments, and go no further."""
    program, *arguments = words
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    if program == "python":
        if arguments[0] == "-m":
            monkeypatch.setattr(sys, "argv", arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__")
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    elif program == "ima-seg":
        from ima_seg.cli import main

        main(arguments)
    else:
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=program)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        entry.load()()


@pytest.mark.parametrize("page", of("bash"), ids=name)
def test_commands_parse(page, monkeypatch):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    # Identifiers and folders of the examples.
    for variable in re.findall(r"\$(\w+)", page.read_text()):
        monkeypatch.setenv(variable, "0")
    for block in blocks(page):
        for words in commands(block) if block.language == "bash" else ():
            words = [os.path.expandvars(word) for word in words]
            where = f"{name(page)}:{block.line}: {shlex.join(words)}"
            if words[0] == "make":
                assert set(words[1:]) <= targets, where
                continue
            with monkeypatch.context() as patch:
                try:
                    parse(words, patch)
                except Parsed:
                    continue
                except SystemExit as error:
                    pytest.fail(f"{where}: exit status {error.code}")
            pytest.fail(f"{where}: nothing was parsed")


@pytest.mark.parametrize("page", of("toml"), ids=name)
def test_settings_files_are_valid(page, tmp_path):
    sections = {section: method.settings_class for section, method in METHODS.items()}
    file = tmp_path / "settings.toml"
    for block in blocks(page):
        if block.language == "toml":
            file.write_text(block.text)
            for section in re.findall(r"^\[(\w+)\]$", block.text, re.MULTILINE) or ["ima"]:
                load_settings(sections[section](), file=str(file))


# --- what tables name ------------------------------------------------------------------------------------------------


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in text.splitlines() if line.startswith("|")][2:]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_settings_table_has_every_setting_with_its_default():
    listed = [*rows("settings.md", "IMA"), *rows("settings.md", "Of every method")]
    table = {key: row[1].strip() for row in listed for key in codes(row[0])}
    assert set(table) == set(IMASettings.model_fields)
    for key, field in IMASettings.model_fields.items():
        default = f'`"{field.default}"`' if isinstance(field.default, str) else str(field.default)
        if field.default is None:
            default = "none" if key == "teacher" else "nnU-Net's"
        assert table[key] == default, key


def test_settings_of_the_other_methods():
    shared = {*TrainingSettings.model_fields, "eps"}
    table = {
        codes(section)[0]: dict(re.findall(r"`(\w+)` ([\d.]+)", text))
        for section, text in rows("settings.md", "Other methods")
    }
    table["te"] |= table["pgdat"]
    kinds = [method.settings_class for method in METHODS.values() if method.settings_class is not IMASettings]
    assert set(table) == {kind.section for kind in kinds}
    for kind in kinds:
        own = {key: str(field.default) for key, field in kind.model_fields.items() if key not in shared}
        assert table[kind.section] == own, kind.section


def test_every_attack_corruption_and_trainer_is_named():
    import nnunet_trainers

    named = {code for row in rows("howto/evaluate.md", "Attacks") for cell in row for code in codes(cell)}
    assert {*ATTACKS, *SPECIAL, *GROUPS} <= named
    text = (DOCS / "howto/evaluate.md").read_text()
    assert not {corruption for corruption in CORRUPTIONS if f"`{corruption}`" not in text}
    listed: list[str] = []
    for row in rows("howto/train.md", "Trainers"):
        for code in codes(" ".join(row)):
            if code.startswith("nnUNetTrainer"):
                listed.append(code)
            elif code.startswith("_"):  # of the same trainer
                listed.append(listed[-1].split("_")[0] + code)
            elif code.isdigit():  # of the same task
                listed.append(listed[-1].rstrip("0123456789") + code)
    assert set(listed) == set(nnunet_trainers.__all__)


def test_every_check_of_the_report_is_explained():
    names = set(SENTENCES)
    assert len(names) == 21
    explained = {part for row in rows("howto/report.md", "Checks") for part in row[0].split(", ")}
    assert explained == {part for name in names for part in name.split(", ")}


# --- links and figures -----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    found = re.findall(r"^#+ (.+)$", re.sub(_FENCE, "", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", ASIDE, ids=name)
def test_links_outside_the_site_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}#{anchor}"


def test_figures_are_those_of_the_script(tmp_path, monkeypatch):
    """A short training draws the figures that are stored, and pages show each of them, light and dark."""
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    monkeypatch.setattr(figures, "CASES", 4)
    figures.main(["-o", str(tmp_path), "--standard", "60", "--epochs", "2", "--iterations", "2"])
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {file.name for file in (DOCS / "figures").iterdir()}
    shown = {link for page in PAGES for link in re.findall(r"figures/([\w-]+\.svg)", page.read_text())}
    assert shown == drawn


def test_site_builds(tmp_path):
    """Every page, every link and anchor between pages, every name of the API."""
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    from mkdocs.__main__ import cli

    with pytest.raises(SystemExit) as done:
        cli(["build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path / "site")])
    assert not done.value.code
    page = (tmp_path / "site" / "api" / "training.html").read_text()
    assert 'id="ima_seg.methods.ima.IMA.step"' in page and ":class:" not in page
    results = (tmp_path / "site" / "results.html").read_text()
    assert 'href="benchmarks/results/robustness/index.html"' in results
