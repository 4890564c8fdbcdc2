"""The house is as it is drawn: arrows run one way, no circles, files that can be read in one go."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST, LONG = 400, 300
#: A file that is long says why in its head, in a sentence that begins so.
REASON = "One file:"


def files(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_contracts_hold():
    """Those in pyproject.toml: layers, no circle, who may know nnU-Net, MONAI and torch."""
    pytest.importorskip("importlinter", reason="the dev extra is not installed")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[done.stdout.find("Contracts\n") :]


def test_the_picture_in_contributing_is_that_of_the_contract():
    settings = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r'name = "Arrows run one way"\ntype = "layers"\nlayers = \[(.*?)\]', settings, re.DOTALL)
    expected = [re.findall(r"(?:ima_seg\.)?(\w+)", line) for line in re.findall(r'"(.+)"', layers[1])]
    picture = re.search(r"<!-- house -->\n```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    drawn = [re.findall(r"\[(\w+)\]", line) for line in picture[1].splitlines()]
    assert [row for row in drawn if row] == [[name for name in row if name != "ima_seg"] for row in expected]
    rooms = {folder.name for folder in (ROOT / "ima_seg").iterdir() if (folder / "__init__.py").is_file()}
    assert rooms <= {name for row in drawn for name in row}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_files_can_be_read_in_one_go():
    too_long, unexplained = [], []
    for file in files("*.py", "*.j2", "*.css", "*.js"):
        text = file.read_text(encoding="utf-8")
        lines = text.count("\n")
        head = (ast.get_docstring(ast.parse(text)) or "") if file.suffix == ".py" else text[:500]
        if lines > LONGEST:
            too_long.append(f"{file.relative_to(ROOT)}: {lines}")
        elif lines > LONG and REASON not in head:
            unexplained.append(f"{file.relative_to(ROOT)}: {lines}")
    assert not too_long, f"more than {LONGEST} lines; split them"
    assert not unexplained, f"more than {LONG} lines and no sentence '{REASON} ...' in their head"


def test_an_installation_makes_nothing_else_importable(tmp_path):
    """Not what lies beside the packages in the repository, whose names others have, too."""
    code = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n) is not None))"
    others = [folder.name for folder in ROOT.iterdir() if folder.is_dir() and folder.name.isidentifier()]
    ours = {"ima_seg", "nnunet_trainers"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, *others], cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    assert ours <= set(others) and set(done.stdout.split()) == ours
