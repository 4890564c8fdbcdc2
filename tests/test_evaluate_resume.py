"""``ima-seg evaluate`` interrupted: killed, without room on the disk, with bad lines and numbers; nothing is lost."""

import errno
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from ima_seg.cli import main
from ima_seg.evaluate.attack import sweep
from ima_seg.evaluate.attack.sweep import Sweep
from tests.evaluation_runs import (
    RUNS,
    STEPS,
    command,
    comparable,
    failures,
    names,
    records,
    refused,
    some_cases,
    start,
    summary,
)


def test_a_killed_run_goes_on_where_it_stopped(phantoms, data, single, tmp_path, capsys):
    out, model = tmp_path / "out", phantoms.model("mr3d", steps=STEPS)
    file = out / "records.jsonl"
    with start(command(model, data, out)) as process:
        while not (file.is_file() and file.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    whole = file.read_bytes()[: file.read_bytes().rfind(b"\n") + 1]
    assert 2 <= whole.count(b"\n") < RUNS
    file.write_bytes(whole + whole.splitlines()[-1][:40])
    assert main(command(model, data, out)) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(command(model, data, out, "--resume", "--seed", "5")) == 2
    assert "seed is 5, there 0" in capsys.readouterr().err
    assert main(command(model, data, out, "--resume")) == 0
    assert file.read_bytes().startswith(whole), "what was there is kept"
    assert comparable(out) == comparable(single) and summary(out) == summary(single)


def left(out):
    """What an evaluation leaves: results without times, files of panels with their slices, and no temporaries."""
    slices = {path.name: [np.load(path)[name].tobytes() for name in ("clean", "delta", "after")]
              for path in sorted((out / "panels").iterdir())}  # fmt: skip
    hidden = [path for path in out.rglob(".*") if ".tmp" in path.name]
    page = (out / "report.html").read_text()
    return comparable(out), summary(out), slices, hidden, page.count("data:image/png")


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_nothing_is_lost_and_all_is_equal(phantoms, data, tmp_path, kills):
    """Killed again and again, over as many evaluations as that takes, each ends as the one that was left alone."""
    model, rng = phantoms.model("mr3d", steps=STEPS), np.random.default_rng(kills)
    more = ["--attack", "fgsm", "pgd", "ifgsm", "gaussian", "--eps", "0.1", "0.3", "0.5"]
    assert main(command(model, data, tmp_path / "whole", *more)) == 0
    expected, done = left(tmp_path / "whole"), 0
    assert expected[2] and not expected[3]
    while done < kills:
        out = tmp_path / f"out {done}"
        kept = b""
        for _ in range(3):  # then it may finish
            with start(command(model, data, out, *more, "--resume")) as process:
                # The work begins when the records are there; loading torch and the model is nothing to interrupt.
                while not (out / ".evaluation.txt").is_file() and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 1.5))
                done += process.poll() is None
                process.kill()
            there = (out / "records.jsonl").read_bytes() if (out / "records.jsonl").is_file() else b""
            assert there.startswith(kept), "what was written stays"
            kept = there[: there.rfind(b"\n") + 1]
        assert main(command(model, data, out, *more, "--resume")) == 0
        assert left(out) == expected


def test_a_finished_run_is_not_computed_again(phantoms, data, single, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(single, out)
    (out / "report.html").unlink()
    before = (out / "records.jsonl").read_bytes()
    monkeypatch.setattr(Sweep, "evaluate", lambda *arguments: pytest.fail("evaluates again"))
    assert main(command(phantoms.model("mr3d", steps=STEPS), data, out, "--resume")) == 0
    assert (out / "records.jsonl").read_bytes() == before and (out / "report.html").is_file()


def test_cases_that_leave_the_input_leave_the_report_and_come_back(phantoms, data, single, tmp_path, capsys):
    images, labels = (shutil.copytree(folder, tmp_path / folder.name) for folder in data)
    out, model = tmp_path / "out", phantoms.model("mr3d", steps=STEPS)
    assert main(command(model, (images, labels), out)) == 0
    gone = names(phantoms, "mr3d")[3]
    before = (out / "records.jsonl").read_bytes()
    moved = [path.rename(tmp_path / path.name) for path in (images / f"{gone}_0000.nii.gz", labels / f"{gone}.nii.gz")]
    capsys.readouterr()
    assert main(command(model, (images, labels), out, "--resume")) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"1 cases are gone, their records are kept but left out of the report: {gone}" in said
    assert json.loads((out / "summary.json").read_text())["cases"] == 1
    assert (out / "records.jsonl").read_bytes() == before
    for path, folder in zip(moved, (images, labels), strict=True):
        path.rename(folder / path.name)
    assert main(command(model, (images, labels), out, "--resume")) == 0
    assert f"1 cases are new: {gone}" in " ".join(capsys.readouterr().err.split())
    assert (out / "records.jsonl").read_bytes() == before and summary(out) == summary(single)


def test_records_of_another_model_are_left_out_and_named(single, tmp_path, capsys):
    out = shutil.copytree(single, tmp_path / "out")
    line = (out / "records.jsonl").read_bytes().splitlines()[0]
    with (out / "records.jsonl").open("ab") as file:
        file.write(line.replace(b'"model":"', b'"model":"other ') + b"\n")
    assert main(["report", str(out)]) == 0
    assert "model other " in (out / "report.html").read_text() and summary(out) == summary(single)
    (out / "records.jsonl").write_bytes(line.replace(b'"model":"', b'"model":"other ') + b"\n")
    assert main(["report", str(out)]) == 2
    assert "which run.json lacks" in capsys.readouterr().err


def test_a_case_whose_name_is_too_long_for_files_costs_no_other(phantoms, data, tmp_path):
    images, labels = (shutil.copytree(folder, tmp_path / folder.name) for folder in data)
    case, long = names(phantoms, "mr3d")[3], "b" * 238
    for path, new in (
        (images / f"{case}_0000.nii.gz", f"{long}_0000.nii.gz"),
        (labels / f"{case}.nii.gz", f"{long}.nii.gz"),
    ):
        path.rename(path.with_name(new))
    out = tmp_path / "out"
    assert main(command(phantoms.model("mr3d", steps=STEPS), (images, labels), out)) == 0
    panels = [record.panel for record in records(out).values() if record.case == long and record.panel]
    assert panels and all((out / panel).is_file() and len(panel) < 200 for panel in panels)


def test_a_bad_line_is_evaluated_again(phantoms, data, single, tmp_path, capsys):
    out, model = tmp_path / "out", phantoms.model("mr3d", steps=STEPS)
    shutil.copytree(single, out)
    lines = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"rms":', b'"rms":null,"x":', 1)
    (out / "records.jsonl").write_bytes(b"".join(lines))
    assert main(["report", str(out)]) == 1
    assert "line 4: no valid record: size.rms" in capsys.readouterr().err
    assert main(command(model, data, out, "--resume")) == 0
    assert "records.jsonl, line 4:" in " ".join(capsys.readouterr().err.split())
    assert (out / "records.jsonl").read_bytes().startswith(b"".join(lines)), "the line is left where it is"
    assert main(["report", str(out)]) == 0 and not capsys.readouterr().err
    assert summary(out) == summary(single)


def test_where_every_case_is_refused_the_report_says_why(phantoms, data, tmp_path, capsys):
    images, labels = data[0], shutil.copytree(data[1], tmp_path / "labels")
    for path in labels.iterdir():
        path.write_bytes(b"nothing")
    out = tmp_path / "out"
    for more in ([], ["--resume"]):
        assert main(command(phantoms.model("mr3d", steps=STEPS), (images, labels), out, *more)) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"ima-seg: error: 0 of 2 cases could be evaluated; the reasons are in {out / 'report.html'}"
    page = (out / "report.html").read_text()
    assert page.count("NOT EVALUATED") == 0 and all(str(path.name) in page for path in labels.iterdir())


def test_where_nothing_can_be_written_it_stops_at_once(phantoms, data, tmp_path, capsys, monkeypatch):
    out, written, asked = tmp_path / "out", [], []

    def write(self, record, write=Sweep._write):
        if len(written) == 2:
            asked.append(record)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "records.jsonl"))
        write(self, record)
        written.append(record)

    monkeypatch.setattr(Sweep, "_write", write)
    assert main(command(phantoms.model("mr3d", steps=STEPS), data, out)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last.startswith(f"ima-seg: error: {out / 'records.jsonl'}: {os.strerror(errno.ENOSPC)}: ") and len(asked) == 1
    )
    monkeypatch.undo()
    assert main(command(phantoms.model("mr3d", steps=STEPS), data, out, "--resume")) == 0
    assert len(records(out)) == RUNS


def test_a_record_that_is_not_finite_costs_its_condition(phantoms, data, tmp_path, capsys, monkeypatch):
    measure = sweep.measure_size

    def infinite(*arguments, **options):
        size = measure(*arguments, **options)
        return type(size)(**{**size.model_dump(), "rms": float("inf")}) if size.rms > 0.3 else size

    monkeypatch.setattr(sweep, "measure_size", infinite)
    out = tmp_path / "out"
    assert main(command(phantoms.model("mr3d", steps=STEPS), data, out)) == 1
    assert len(records(out)) == RUNS - 4 and len(failures(out)) == 4
    assert all("no valid record: rms is inf: input should be a finite number" in f.message for f in failures(out))
    assert "please report" not in capsys.readouterr().err and main(["report", str(out)]) == 0


def test_a_second_evaluation_of_a_folder_is_told_who_is_first(phantoms, data, tmp_path, capsys):
    out, model = tmp_path / "out", phantoms.model("mr3d", steps=STEPS)
    with start(command(model, data, out)) as process:
        while not (out / ".evaluation.txt").is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        assert f"being evaluated by process {process.pid} on " in refused(command(model, data, out, "--resume"), capsys)
        process.kill()
    assert main(command(model, data, out, "--resume")) == 0 and len(records(out)) == RUNS


def test_names_of_cases_do_not_act_on_the_terminal(phantoms, data, tmp_path, capsys):
    images, labels = some_cases(phantoms, "mr3d", tmp_path, 0)
    good = names(phantoms, "mr3d")[0]
    for case in ("=cmd|x", "a\x1b[2Jb", os.fsdecode(b"c\xff")):
        shutil.copy(images / f"{good}_0000.nii.gz", images / f"{case}_0000.nii.gz")
        shutil.copy(labels / f"{good}.nii.gz", labels / f"{case}.nii.gz")
    out = tmp_path / "out"
    assert main(command(phantoms.model("mr3d", steps=STEPS), (images, labels), out, "--attack", "gaussian")) == 1
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and r"a\x1b[2Jb" in said.err and "is not UTF-8" in said.err
    assert {key[0] for key in records(out)} == {good, "=cmd|x", "a\x1b[2Jb"}
    assert "\n'=cmd|x," in (out / "records.csv").read_text() and "\n=cmd" not in (out / "records.csv").read_text()
