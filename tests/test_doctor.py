from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ima_seg.errors import UserError
from ima_seg.nnunet import doctor
from ima_seg.nnunet.compat import check_nnunet_version
from ima_seg.nnunet.doctor import Finding

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> type:
    """A stand-in for the trainers' package with one class."""
    package = types.ModuleType("nnunet_trainers")
    trainer = type("nnUNetTrainerIMA", (), {"__module__": __name__})
    package.__all__ = ["nnUNetTrainerIMA"]  # type: ignore[attr-defined]
    package.nnUNetTrainerIMA = trainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nnunet_trainers", package)
    monkeypatch.setattr(doctor, "find_trainer", lambda name: getattr(package, name))
    return trainer


def only(findings: object) -> Finding:
    (finding,) = findings  # type: ignore[misc]
    assert isinstance(finding, Finding)
    return finding


def report() -> tuple[int, str]:
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    code = doctor.run_doctor(console)
    return code, console.export_text()


@pytest.mark.parametrize("version", ["2.8.0", "2.8.1", "2.8", "2.8.3.post1"])
def test_supported_nnunet(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert check_nnunet_version() == version


@pytest.mark.parametrize("version", ["2.7.9", "2.9", "2.10.1", "3.0", "1.8.2", "unknown"])
def test_unsupported_nnunet(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(UserError, match=f'nnU-Net {version} .*pip install "nnunetv2>=2.8,<2.9"'):
        check_nnunet_version()


def test_missing_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r'not installed.*pip install "nnunetv2>=2.8,<2.9"'):
        check_nnunet_version()


def test_monais_wrapper_is_noted_where_it_calls_nnunet_in_the_old_way() -> None:
    from monai.apps.nnunet import nnunet_bundle
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    old = "configuration_manager.network_arch_class_name" in inspect.getsource(nnunet_bundle.ModelnnUNetWrapper)
    new = next(iter(inspect.signature(nnUNetTrainer.build_network_architecture).parameters)) == "plans_manager"
    noted = [finding for finding in doctor.examine() if finding.name == "nnunet_bundle"]
    assert len(noted) == (old and new) and all(finding.state == "note" for finding in noted)


def test_fine_environment_gives_zero(folders: Path, trainers: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(doctor.ext_trainer_folder()))
    monkeypatch.delenv("IMA_CONFIG", raising=False)
    monkeypatch.setenv("nnUNet_compile", "f")
    code, text = report()
    assert code == 0, text
    assert "Everything is fine." in text
    assert "remedy" not in text


def test_each_wrong_thing_has_one_remedy_and_the_result_is_one(
    folders: Path, trainers: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    monkeypatch.delenv("nnUNet_results")
    monkeypatch.setenv("IMA_CONFIG", str(folders / "missing.toml"))
    monkeypatch.setenv("nnUNet_compile", "f")
    code, text = report()
    assert code == 1
    assert "3 of " in text
    lines = [line for line in text.splitlines() if "remedy: " in line]
    assert [line.partition(":")[0] for line in lines] == ["nnUNet_extTrainer", "nnUNet_results", "IMA_CONFIG"]


def test_every_wrong_finding_names_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in FOLDERS:
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv("nnUNet_extTrainer", "")
    monkeypatch.setenv("IMA_CONFIG", "nowhere.toml")
    monkeypatch.setitem(sys.modules, "nnunet_trainers", None)
    wrong = [finding for finding in doctor.examine() if finding.state == "wrong"]
    assert {finding.name for finding in wrong} >= {"trainers", "nnUNet_extTrainer", "IMA_CONFIG", *FOLDERS}
    assert all(finding.remedy for finding in wrong)


def test_markup_in_a_path_is_printed_as_it_is(folders: Path, trainers: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", "/data/[red]raw[/]")
    _, text = report()
    assert text.count("/data/[red]raw[/]") >= 2  # in the table and in the remedy


def test_unsupported_nnunet_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.7.0" if name == "nnunetv2" else real(name))
    finding = next(finding for finding in doctor._versions() if finding.name == "nnU-Net")
    assert finding.state == "wrong"
    assert "2.7.0" in finding.value
    assert finding.remedy == 'pip install "nnunetv2>=2.8,<2.9"'


def test_folder_that_hides_nnunet_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_loader("nnunetv2", None, is_package=True)
    assert spec is not None and spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    finding = doctor._nnunet_location("2.8.1")
    assert finding.state == "wrong"
    assert str(tmp_path) in finding.value and str(tmp_path) in finding.remedy


@pytest.mark.parametrize(("version", "state"), [("2.8.0", "ok"), ("2.9.1+cu130", "wrong"), ("2.10.0", "ok")])
def test_torch_version(version: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert next(iter(doctor._torch())).state == state


def test_cuda_build_without_gpu_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    finding = next(finding for finding in doctor._torch() if finding.name == "device")
    assert finding.state == "note"
    assert "12.8" in finding.value


@pytest.mark.parametrize(
    ("value", "cuda", "triton", "expected"),
    [
        (None, True, True, "on"),
        (None, True, False, "wrong"),
        ("f", True, False, "off"),
        ("TRUE", True, True, "on"),
        ("1", False, True, "off"),
    ],
)
def test_compile(value: str | None, cuda: bool, triton: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_compile", raising=False)
    if value is not None:
        monkeypatch.setenv("nnUNet_compile", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(os, "name", "posix")
    finding = next(iter(doctor._compile()))
    if expected == "wrong":
        assert finding.state == "wrong"
        assert "nnUNet_compile=f" in finding.remedy
    else:
        assert finding.state == "ok"
        assert finding.value.startswith(expected)


def test_search_path_keeps_the_users_folders_in_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    finding = only(doctor._search_path())
    assert finding.state == "wrong"
    assert finding.remedy == f"export nnUNet_extTrainer={tmp_path}{os.pathsep}{doctor.ext_trainer_folder()}"


def test_search_path_accepts_another_spelling_of_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", f"{doctor.ext_trainer_folder()}{os.sep}")
    assert only(doctor._search_path()).state == "ok"


def test_search_path_notes_a_folder_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path / "gone"), str(doctor.ext_trainer_folder())]))
    first, second = doctor._search_path()
    assert (first.state, second.state) == ("ok", "note")
    assert "gone" in second.value


def test_ext_trainer_folder_holds_the_stub_alone() -> None:
    assert [file.name for file in doctor.ext_trainer_folder().glob("*.py")] == ["ima_seg_nnunet_trainers.py"]


def test_ext_trainer_folder_of_a_bare_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folder = doctor.ext_trainer_folder()
    assert folder.parts[-4:] == ("nnunet_trainers", "discovery", "_ima_seg_nnunet", "trainers")


def test_copied_trainer_is_wrong(trainers: type, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = type("nnUNetTrainerIMA", (), {"__module__": __name__})
    monkeypatch.setattr(doctor, "find_trainer", lambda name: copy)
    finding = only(doctor._trainers())
    assert finding.state == "wrong"
    assert __file__ in finding.value


def test_broken_external_folder_is_reported(trainers: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> type:
        raise SyntaxError("their_trainer.py, line 3\nand more")

    monkeypatch.setattr(doctor, "find_trainer", broken)
    finding = only(doctor._trainers())
    assert finding.state == "wrong"
    assert "their_trainer.py, line 3" in finding.value and "and more" not in finding.value


def test_lookup_is_quiet(trainers: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def noisy(name: str) -> type:
        print("Inspecting module")
        return trainers

    monkeypatch.setattr(doctor, "find_trainer", noisy)
    assert only(doctor._trainers()).state == "ok"
    assert capsys.readouterr().out == ""


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "file"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    raw, preprocessed, results = doctor._folders()
    assert (raw.state, preprocessed.state, results.state) == ("wrong", "wrong", "ok")
    assert raw.value == "not set"
    assert "not a folder" in preprocessed.value


def test_read_only_folders(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert [finding.state for finding in doctor._folders()] == ["note", "wrong", "wrong"]


@pytest.mark.parametrize(("text", "state"), [("steps = 5\n", "ok"), ("taau = 0.5\n", "wrong"), ("tau = = \n", "wrong")])
def test_settings_file(text: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ima.toml"
    file.write_text(text)
    monkeypatch.setenv("IMA_CONFIG", str(file))
    finding = only(doctor._settings())
    assert finding.state == state
    assert str(file) in finding.value
