"""Paths and processes as other systems have them: separators, names outside of ASCII, processes that are spawned."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from ima_seg.evaluate.measure.collect import collect
from ima_seg.evaluate.report import write_report
from ima_seg.nnunet import doctor
from tests.evaluation_runs import evaluated, failures, settings
from tests.folder_data import write_cases, write_model
from tests.test_install import DISCOVERY, ROOT, VARIABLE, start


@pytest.mark.parametrize("own", ["C:\\Ürologie & Söhne\\trainers", "D:\\a;E:\\b", "", ";;D:\\a;"])
def test_windows_separates_folders_by_semicolons(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive's colon separates nothing there."""
    monkeypatch.setattr(os, "pathsep", ";")
    module = start(monkeypatch, own)
    kept = [entry for entry in own.split(";") if entry]
    assert os.environ[VARIABLE].split(";") == [*kept, str(DISCOVERY / "trainers")]
    module.register()
    assert os.environ[VARIABLE].split(";") == [*kept, str(DISCOVERY / "trainers")]
    monkeypatch.setattr(doctor, "ext_trainer_folder", lambda: DISCOVERY / "trainers")
    findings = list(doctor._search_path())
    assert all(finding.state != "wrong" for finding in findings)
    missing = [finding.value.partition(" does not exist")[0] for finding in findings[1:]]
    assert missing == kept


def _found(name: str) -> tuple[str, str]:
    """In another process: where nnU-Net finds a trainer, and which process it is."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    return recursive_find_trainer_class_by_name(name).__module__, str(os.getpid())


def test_spawned_processes_find_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows spawn the workers of nnU-Net, which inherit nothing but the environment."""
    monkeypatch.setenv(VARIABLE, str(DISCOVERY / "trainers"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        module, process = pool.submit(_found, "nnUNetTrainerIMA").result()
    assert module.startswith("nnunet_trainers.") and process != str(os.getpid())


def test_paths_with_spaces_and_letters_outside_of_ascii(tmp_path: Path) -> None:
    root = tmp_path / "Ürologie & Söhne" / "daten 1"
    images, labels = write_cases(root, "Fräulein № 1")
    model = write_model(root / "modèle 1")
    out = root / "ergebnis %1"
    chosen = settings(attacks=["gaussian"], save_adversarial=True)
    report, failed = evaluated({"Modell Ü": model}, (images, labels), out, chosen)
    assert failed == 0 and failures(out) == [] and report == out / "report.html"
    found = collect([out])
    (case,) = found.run.cases
    assert case == "Fräulein № 1" and case in report.read_text(encoding="utf-8")
    (saved,) = [record.disk for record in found.records if record.disk is not None]
    assert all((out / name).is_file() for name in saved.image)
    assert write_report([out], root / "noch einmal").is_file()
