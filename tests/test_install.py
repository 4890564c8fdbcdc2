"""Does an installed ima-seg make its trainers known to nnU-Net, and does it leave nothing behind?

The environments built here take what is heavy (PyTorch, nnU-Net) from the running one, through links.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DISCOVERY = ROOT / "nnunet_trainers" / "discovery" / "_ima_seg_nnunet"
VARIABLE = "nnUNet_extTrainer"

PROBE = """
import contextlib, io, json, os, pickle, sys
early = sorted({name.partition(".")[0] for name in sys.modules})
with contextlib.redirect_stdout(io.StringIO()):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
    import ima_seg, nnunet_trainers, nnunetv2
    names = nnunet_trainers.__all__
    found = {name: find(name) for name in [*names, "nnUNetTrainer", "nnUNetTrainer_5epochs", *sys.argv[1:]]}
print(json.dumps({
    "early": early,
    "variable": os.environ.get("nnUNet_extTrainer"),
    "ima_seg": ima_seg.__file__,
    "nnunet_trainers": nnunet_trainers.__file__,
    "nnunetv2": nnunetv2.__path__[0],
    "modules": {name: cls.__module__ for name, cls in found.items()},
    "installed": all(found[name] is getattr(nnunet_trainers, name) for name in names),
    "pickles": all(pickle.loads(pickle.dumps(found[name])) is found[name] for name in names),
}))
"""


class Environment:
    """A virtual environment at ``path`` that sees the distributions of the running one except ``hidden``."""

    def __init__(self, path: Path, hidden: Iterable[str] = ()) -> None:
        self.path = path
        venv.create(path / "venv", with_pip=True, symlinks=True)
        self.python = path / "venv" / "bin" / "python"
        (self.site_packages,) = (path / "venv" / "lib").glob("python*/site-packages")
        borrowed = path / "borrowed"
        borrowed.mkdir()
        self._borrow(borrowed, (*hidden, "_ima_seg", "ima_seg", "nnunet_trainers", "pip", "_virtualenv"))
        (self.site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
        # Before Python 3.12 a new environment has setuptools of its own, too old to stand beside the borrowed one.
        for old in (*self.site_packages.glob("setuptools*"), self.site_packages / "pkg_resources"):
            shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def _borrow(target: Path, hidden: tuple[str, ...]) -> None:
        spec = importlib.util.find_spec("nnunetv2")  # may be an editable clone, which lies in no site-packages folder
        assert spec is not None and spec.origin is not None
        sources = [Path(spec.origin).parent]
        for folder in sys.path:
            if Path(folder).name == "site-packages":
                sources += Path(folder).iterdir()
        for source in sources:
            name = source.name
            is_hidden = any(name == entry or name.startswith((f"{entry}-", f"{entry}_nnunet")) for entry in hidden)
            if not is_hidden and source.suffix != ".pth" and name != "__pycache__" and not (target / name).exists():
                (target / name).symlink_to(source)

    def run(self, *arguments: str | Path, **variables: str) -> str:
        """Standard output of the environment's Python, started in an empty folder and without nnU-Net's variables."""
        return _run([self.python, *arguments], self.path, variables)

    def pip(self, *arguments: str | Path) -> None:
        self.run("-m", "pip", "--disable-pip-version-check", *arguments)

    def uv(self, command: str, *arguments: str | Path) -> None:
        cache = self.path / "uv-cache"
        uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        assert uv, "uv is missing; pip install -e '.[dev]'"
        _run([uv, "--cache-dir", cache, "pip", command, "--python", self.python, *arguments], self.path, {})

    def probe(self, *trainers: str, **variables: str) -> dict[str, Any]:
        probed: dict[str, Any] = json.loads(self.run("-c", PROBE, *trainers, **variables))
        return probed

    def files(self) -> set[Path]:
        """Everything in the environment except what is the installers' own: pip compiles itself, uv leaves a lock."""
        own = {self.site_packages / "pip", self.path / "venv" / ".lock"}
        return {path for path in (self.path / "venv").rglob("*") if own.isdisjoint((path, *path.parents))}


def _run(command: list[str | Path], folder: Path, variables: Mapping[str, str]) -> str:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("nnUNet", "IMA_", "PYTHON", "PIP_", "UV_", "VIRTUAL_ENV", "COV_"))
    }
    done = subprocess.run(
        command, cwd=folder, env={**clean, **variables}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, so that both are tested."""
    folder = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], folder, {})
    (built,) = folder.glob("*.whl")
    return built


def check(probed: dict[str, Any], home: Path) -> None:
    """The trainers were found, are those of the package under ``home``, and nothing was imported too early."""
    assert Path(probed["ima_seg"]) == home / "ima_seg" / "__init__.py"
    assert Path(probed["nnunet_trainers"]) == home / "nnunet_trainers" / "__init__.py"
    assert probed["modules"]["nnUNetTrainerIMA"].startswith("nnunet_trainers.")
    assert probed["modules"]["nnUNetTrainer"].startswith("nnunetv2.")
    assert probed["modules"]["nnUNetTrainer_5epochs"].startswith("nnunetv2.")
    assert probed["installed"]
    assert probed["pickles"]
    assert not {"torch", "numpy", "nnunetv2", "nnunet_trainers", "ima_seg"} & set(probed["early"])


@pytest.mark.slow
def test_wheel_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"{wheel.name.partition('-py3')[0]}.dist-info"
    assert {name.partition("/")[0] for name in names} == {
        "ima_seg",
        "nnunet_trainers",
        "_ima_seg_nnunet",
        "ima_seg_nnunet.pth",
        metadata,
    }
    assert {name for name in names if name.startswith("_ima_seg_nnunet/")} == {
        "_ima_seg_nnunet/__init__.py",
        "_ima_seg_nnunet/trainers/ima_seg_nnunet_trainers.py",
    }
    assert not [name for name in names if "discovery" in name or "__pycache__" in name]
    assert {"ima_seg/py.typed", "nnunet_trainers/py.typed", f"{metadata}/licenses/LICENSE"} <= names
    recipes = {f"ima_seg/data/recipes/{file.name}" for file in (ROOT / "datasets").glob("*.toml")}
    assert {name for name in names if name.startswith("ima_seg/data/recipes/")} == recipes
    for package in ("ima_seg", "nnunet_trainers"):
        sources = {str(file.relative_to(ROOT)) for file in (ROOT / package).rglob("*.py")}
        assert {name for name in sources if "discovery" not in name} <= names


@pytest.mark.slow
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_wheel_is_found_and_uninstalls_cleanly(installer: str, wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    before = environment.files()
    install = getattr(environment, installer)
    install("install", "--no-deps", wheel)
    probed = environment.probe()
    check(probed, environment.site_packages)
    assert probed["variable"] == str(environment.site_packages / "_ima_seg_nnunet" / "trainers")
    install("uninstall", *(["--yes"] if installer == "pip" else []), "ima-seg")
    assert environment.files() == before
    assert "nothing" in environment.run("-c", f"import os; print(os.environ.get('{VARIABLE}', 'nothing'))")


@pytest.mark.slow
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_editable_install(installer: str, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    before = environment.files()
    install = getattr(environment, installer)
    install("install", "--no-deps", "--no-build-isolation", "--editable", ROOT)
    check(environment.probe(), ROOT)
    assert not (environment.site_packages / "ima_seg").exists()
    code = "import importlib.util as u; print([n for n in ('datasets', 'benchmarks', 'tests') if u.find_spec(n)])"
    assert environment.run("-c", code).strip() == "[]", "what lies beside the packages stays out of reach"
    install("uninstall", *(["--yes"] if installer == "pip" else []), "ima-seg")
    left = environment.files() - before
    if installer == "uv":  # it forgets the bytecode of a module at the root, here of the finder of the two packages
        bytecode = environment.site_packages / "__pycache__"
        left -= {bytecode, *bytecode.glob("_editable_impl_ima_seg.*.pyc")}
    assert not left and before <= environment.files()


@pytest.mark.slow
def test_users_own_external_trainers_are_kept(wheel: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "my_trainer.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerMine(nnUNetTrainer):\n    pass\n"
    )
    environment = Environment(tmp_path)
    environment.pip("install", "--no-deps", wheel)
    probed = environment.probe("nnUNetTrainerMine", nnUNet_extTrainer=str(own))
    check(probed, environment.site_packages)
    assert probed["modules"]["nnUNetTrainerMine"] == "my_trainer"
    first, second = probed["variable"].split(os.pathsep)
    assert (first, second) == (str(own), str(environment.site_packages / "_ima_seg_nnunet" / "trainers"))


@pytest.mark.slow
def test_editable_clone_of_nnunet(wheel: Path, tmp_path: Path) -> None:
    """A clone that setuptools serves through a finder: no folder ``nnunetv2`` may appear in site-packages."""
    spec = importlib.util.find_spec("nnunetv2")
    assert spec is not None and spec.origin is not None
    clone = tmp_path / "clone"
    shutil.copytree(Path(spec.origin).parent, clone / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__", "tests"))
    (clone / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "nnunetv2"\nversion = "2.8.1"\n'
        '[tool.setuptools.packages.find]\ninclude = ["nnunetv2*"]\n'
    )
    environment = Environment(tmp_path, hidden=["nnunetv2"])
    environment.pip("install", "--no-deps", "--no-build-isolation", "--no-index", "--editable", clone)
    environment.pip("install", "--no-deps", wheel)
    probed = environment.probe()
    check(probed, environment.site_packages)
    assert Path(probed["nnunetv2"]) == clone / "nnunetv2"
    assert list(environment.site_packages.glob("__editable___nnunetv2_*finder.py"))


@pytest.mark.slow
def test_target_folder_needs_the_variable_and_doctor_says_so(wheel: Path, tmp_path: Path) -> None:
    """Python processes ``.pth`` files in its own site-packages only."""
    environment = Environment(tmp_path)
    target = tmp_path / "target"
    environment.pip("install", "--no-deps", "--target", target, wheel)
    asked = environment.run(
        "-c",
        "from ima_seg.nnunet import doctor\n"
        "print(doctor.ext_trainer_folder())\n"
        "print(*(f.remedy for f in doctor.examine() if f.name == 'nnUNet_extTrainer'))",
        PYTHONPATH=str(target),
    )
    folder, remedy = asked.splitlines()
    assert Path(folder) == target / "_ima_seg_nnunet" / "trainers"
    assert remedy == f"export {VARIABLE}={folder}"
    check(environment.probe(PYTHONPATH=str(target), nnUNet_extTrainer=folder), target)


def start(monkeypatch: pytest.MonkeyPatch, value: str | None) -> ModuleType:
    """Import the module that Python imports at its start, with ``nnUNet_extTrainer`` at ``value``."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    spec = importlib.util.spec_from_file_location("_started", DISCOVERY / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("value", "kept"),
    [(None, []), ("", []), ("/mine", ["/mine"]), ("/mine:/yours", ["/mine", "/yours"]), (":/mine:", ["/mine"])],
)
def test_start_appends_the_folder_once(value: str | None, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pathsep", ":")
    module = start(monkeypatch, value)
    expected = ":".join([*kept, str(DISCOVERY / "trainers")])
    assert os.environ[VARIABLE] == expected
    module.register()
    assert os.environ[VARIABLE] == expected


def test_start_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> str:
        raise OSError("no current folder")

    monkeypatch.setattr(os.path, "abspath", fail)
    start(monkeypatch, "/mine")
    assert os.environ[VARIABLE] == "/mine"


def test_pth_file_is_one_import() -> None:
    assert (DISCOVERY.parent / "ima_seg_nnunet.pth").read_text() == "import _ima_seg_nnunet\n"
