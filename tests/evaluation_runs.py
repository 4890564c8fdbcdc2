"""Evaluations of phantoms that tests look into: running them, and reading what they wrote."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ima_seg.cli import main
from ima_seg.evaluate.api import evaluate
from ima_seg.evaluate.records import Failure, Record, read_lines
from ima_seg.evaluate.run import EvaluationSettings

#: Training of a model that finds the organ of the first case.
STEPS = 200
RUNS = 10  # records of two cases with PGD and noise at two budgets
#: ``ima-seg`` with the threads of the tests' own process, so that sums are rounded alike.
PROGRAM = "import sys, torch; torch.set_num_threads(2); from ima_seg.cli import main; sys.exit(main())"


def settings(**values):
    """Two steps, no mirroring."""
    return EvaluationSettings(**{"attacks": ["pgd"], "eps": [0.3], "steps": 2, "mirroring": False, **values})


def names(phantoms, flavour):
    return sorted(file.name.removesuffix(".nii.gz") for file in phantoms.labels(flavour).iterdir())


def some_cases(phantoms, flavour, folder, *indices):
    """Copies of the cases at ``indices``; returns the folders of images and labels."""
    for index in indices:
        name = names(phantoms, flavour)[index]
        for source, kind, pattern in (
            (phantoms.images(flavour), "images", f"{name}_0*.nii.gz"),
            (phantoms.labels(flavour), "labels", f"{name}.nii.gz"),
        ):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for file in source.glob(pattern):
                shutil.copy(file, folder / kind)
    return folder / "images", folder / "labels"


def evaluated(models, data, out, chosen, **options):
    """``evaluate`` on the CPU; returns what it does, without its messages."""
    return evaluate(models, *data, out, chosen, device="cpu", console=Console(file=io.StringIO()), **options)


def records(out):
    """All records of a folder, by key; none is there twice."""
    found = list(read_lines(sorted(Path(out).glob("records*.jsonl")), Record))
    by_key = {record.key: record for record in found}
    assert len(by_key) == len(found)
    return by_key


def failures(out):
    return list(read_lines(sorted(Path(out).glob("failures*.jsonl")), Failure))


def comparable(out):
    """All that equal evaluations have in common."""
    circumstances = {"seconds", "metric_seconds", "panel", "repeat_difference"}
    return {key: record.model_dump(exclude=circumstances) for key, record in records(out).items()}


def command(model, data, out, *more):
    """A small evaluation on the command line, without ``ima-seg`` in front."""
    images, labels = data
    short = ["--attack", "pgd", "gaussian", "--eps", "0.1", "0.5", "--steps", "2", "--disable_tta", "-device", "cpu",
             "--precision", "fp32"]  # fmt: skip
    return [str(a) for a in ("evaluate", "-m", model, "-i", images, "-gt", labels, "-o", out, *short, *more)]


def start(arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="session")
def data(phantoms, tmp_path_factory):
    """Folders of two cases."""
    return some_cases(phantoms, "mr3d", tmp_path_factory.mktemp("data"), 0, 3)


@pytest.fixture(scope="session")
def single(phantoms, data, tmp_path_factory):
    """One uninterrupted run."""
    out = tmp_path_factory.mktemp("single") / "out"
    assert main(command(phantoms.model("mr3d", steps=STEPS), data, out)) == 0
    assert len(records(out)) == RUNS and (out / "report.html").is_file()
    return out


def summary(out):
    """summary.json without run times."""

    def without(value):
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if "seconds" not in key}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return without(json.loads((out / "summary.json").read_text()))


def refused(arguments, capsys):
    """The only line that a refused command writes."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert not said.out and line.startswith("ima-seg: error: ")
    return line
