"""What an evaluation writes can be read back, and what cannot is named; files left over, locks, texts that act."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ima_seg.cli import main
from ima_seg.errors import UserError, plain
from ima_seg.evaluate.attack.share import Share, locked
from ima_seg.evaluate.measure.collect import collect
from ima_seg.evaluate.measure.summary import summarise
from ima_seg.evaluate.measure.tables import records_csv
from ima_seg.evaluate.records import Failure, append_line
from ima_seg.evaluate.report import write_report
from ima_seg.evaluate.report.flags import check
from ima_seg.evaluate.run import EvaluationSettings, Run
from ima_seg.files import building_folder, remove_stale, replacing, write_csv
from tests.report_data import make_record, make_records, make_run, write_evaluation, write_example
from tests.test_report_page import _Checker

DAMAGES = {
    "NaN": lambda line: line.replace(b'"nsd":', b'"nsd":NaN,"x":', 1),
    "null": lambda line: re.sub(rb'"seconds":[\d.e-]+', b'"seconds":null', line),
    "eps 0": lambda line: re.sub(rb'"eps":[^,]+', b'"eps":0.0', line),
    "1e308": lambda line: re.sub(rb'"hd95_mm":[^,]+', b'"hd95_mm":1e308', line),
    "not UTF-8": lambda line: line.replace(b'"case":"', b'"case":"\xff\xfe'),
    "deep": lambda line: b"[" * 30_000 + b"]" * 30_000,
    "huge": lambda line: b'{"' + b"k" * 2_000_000 + b'":1}',
    "cut": lambda line: line[:40],
    "empty": lambda line: b"",
}


def test_a_bad_line_costs_its_record_and_is_named(tmp_path, capsys):
    folder = write_example(tmp_path / "run", 3)
    file = folder / "records.jsonl"
    lines = file.read_bytes().splitlines()
    usable = [index for index, line in enumerate(lines) if b'"eps":0.1' in line and b'"size":{' in line]
    bad = dict(zip(usable, DAMAGES, strict=False))
    assert len(bad) == len(DAMAGES)
    for index, damage in bad.items():
        lines[index] = DAMAGES[damage](lines[index])
    file.write_bytes(b"\n".join(lines) + b"\n")
    assert main(["report", str(folder)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(bad)
    for index, line in zip(bad, said, strict=True):
        assert f"records.jsonl, line {index + 1}: no valid record" in line and len(line) < 900
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"records.jsonl, line {usable[0] + 1}" in page and "9 of" in page
    assert len(collect([folder]).records) == len(lines) - len(bad)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda run: run["settings"].update(nsd_tolerance_mm=float("nan")), "settings.nsd_tolerance_mm is nan"),
        (lambda run: run["settings"].update(eps=[0.0]), "settings.eps.0 is 0.0"),
        (lambda run: run.update(version=7), "version is 7"),
        (lambda run: run.update(models=[]), "models is []"),
        (lambda run: run.pop("cases"), "cases: field required"),
        (lambda run: run["models"][1]["ima"].update(history=5), "models.1.ima.history is 5"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(change, text, tmp_path, capsys):
    folder = write_example(tmp_path / "run", 3)
    run = json.loads((folder / "run.json").read_text())
    change(run)
    (folder / "run.json").write_text(json.dumps(run))
    assert main(["report", str(folder)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "run.json" in said and text in said and "https:" not in said


def test_no_line_is_written_that_cannot_be_read(tmp_path):
    record = make_record("a", "standard", "white", "pgd", [0.5, 0.5], 0.1)
    assert record.size is not None
    broken = record.model_copy(update={"size": record.size.model_copy(update={"rms": float("inf")})})
    with pytest.raises(UserError, match=r"size\.rms"):
        append_line(tmp_path / "records.jsonl", broken)
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_error_of_the_system_names_its_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_line(Path("/dev/full"), Failure(case="a", message="b"))


def test_the_command_line_says_errors_of_the_system_once(tmp_path, capsys):
    folder = write_example(tmp_path / "run", 3)
    (tmp_path / "file").touch()
    assert main(["report", str(folder), "-o", str(tmp_path / "file" / "there")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"ima-seg: error: {tmp_path / 'file'}") and "irectory" in said


def test_where_no_case_could_be_evaluated_the_report_lists_the_reasons(tmp_path):
    run = make_run(2)
    reasons = [Failure(case=case, message=f"label {index} is <b>odd</b>") for index, case in enumerate(run.cases)]
    folder = write_evaluation(tmp_path / "run", run, [], reasons)
    page = write_report([folder], folder).read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(f"label {index} is &lt;b&gt;odd" in page for index in range(2))
    assert json.loads((folder / "summary.json").read_text())["cases"] == 2
    summary = summarise(run, [], reasons)
    assert not summary.conditions and {flag.name for flag in check(collect([folder]), summary) if flag.status == "WARN"}


def test_records_of_a_case_that_left_the_input_are_left_out(tmp_path):
    run = make_run(4)
    records = make_records(run)
    folder = write_evaluation(tmp_path / "run", run, records, [], panels=False)
    fewer = run.model_copy(update={"cases": run.cases[:-1]})
    (folder / "run.json").write_text(fewer.model_dump_json())
    found = collect([folder])
    assert {record.case for record in found.records} == set(fewer.cases)
    assert found.left_out == {f"case {run.cases[-1]}": sum(r.case == run.cases[-1] for r in records)}
    assert run.cases[-1] in write_report([folder], folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "wrong", [{"eps": [float("nan")]}, {"eps": [1e308]}, {"eps": [-1.0]}, {"nsd_tolerance_mm": float("inf")},
              {"steps": 0}, {"broken_below": 1.0}],
)  # fmt: skip
def test_settings_that_are_no_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvaluationSettings(**{"attacks": ["pgd"], "eps": [0.1], **wrong})


FORMULA = "=cmd|' /C calc'!A0"


@pytest.mark.parametrize(
    ("text", "written"),
    [(text, f"'{text}") for text in (FORMULA, "+1", "-1+1", "@SUM(A1)")] + [("\t=1", r"\t=1"), ("a\x1b", r"a\x1b")],
)
def test_texts_are_no_formulas_in_tables(text, written, tmp_path):
    write_csv(tmp_path / "a.csv", [{"case": text, "margin": -0.25, text: 1}])
    (row,) = csv.DictReader((tmp_path / "a.csv").open(newline=""))
    assert row == {"case": written, "margin": "-0.25", written: "1"}
    run: Run = make_run(1).model_copy(update={"cases": [text]})
    (row,) = csv.DictReader(
        records_csv(run, [make_record(text, "standard", "clean", "clean", [0.5, 0.5])]).splitlines()
    )
    assert row["case"] == written


def test_names_of_models_classes_and_channels_are_texts_to_the_page(tmp_path):
    """Those of models also in the charts."""
    evil = '"/></title><script>x</script>$\\frac{'
    run = make_run(3)
    text = "".join(record.model_dump_json() + "\n" for record in make_records(run))
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in (("run.json", run.model_dump_json()), ("records.jsonl", text)):
        for word in ("standard", "posterior", "MRI"):
            content = content.replace(f'"{word}"', json.dumps(f"{word}{evil}"))
        (folder / name).write_text(content)
    found = write_report([folder], folder).read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(found)
    assert checker.open == [] and found.count("<script>") == 1 and "<script>x" not in found
    assert found.count("standard&#34;/&gt;&lt;/title&gt;") > 5 and "posterior&#34;" in found and "MRI&#34;" in found


def test_nothing_acts_on_the_terminal():
    assert plain("a\x1b[2Jb\rc\x9b\u202ed\udcff e\u00fc\n f") == r"a\x1b[2Jb c\x9b\u202ed\udcff e" + "\u00fc  f"


def test_temporaries_of_dead_processes_are_removed_and_no_others(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from ima_seg.files import building_folder, replacing\n"
        "with building_folder(Path(sys.argv[1]) / 'model') as folder, replacing(sys.argv[1] + '/a.nii.gz') as file:\n"
        "    (folder / 'x').touch(); file.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    old, day = tmp_path / ".records.csv.abcd_123.tmp.csv", time.time() - 100_000
    foreign = tmp_path / ".b.json.0a1b2c3d-17.abcd_123.tmp.json"
    kept = [tmp_path / name for name in (".mine.tmp", "b.tmp", ".c.json.abcdefgh.tmp.json", ".nfs.tmp.x")]
    for path in (old, foreign, *kept):
        path.touch()
    for path in (old, foreign, tmp_path / ".mine.tmp"):
        os.utime(path, (day, day))
    assert len(list(tmp_path.glob(".a.nii.gz.*"))) == len(list(tmp_path.glob(".model.*"))) == 1
    with replacing(tmp_path / "own.txt") as own:
        remove_stale(tmp_path)
        assert own.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"own.txt", *(path.name for path in kept)}
    with building_folder(tmp_path / "model") as folder:
        assert folder.is_dir()


HOLDER = """
import sys, time
from pathlib import Path
from ima_seg.evaluate.attack.share import Share, locked
with locked(Path(sys.argv[1]), Share(int(sys.argv[2]), int(sys.argv[3]), 0, 1)):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_evaluates_a_share(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path), "0", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        for index, count in ((0, 2), (0, 1), (2, 3)):
            words = rf"being evaluated by process {process.pid} on \S+ since \d{{4}}-.*--resume"
            with pytest.raises(UserError, match=words), locked(tmp_path, Share(index, count, 0, 1)):
                pass
        with locked(tmp_path, Share(1, 2, 0, 1)):
            pass
        process.kill()
    for index, count in ((0, 2), (0, 1)):  # a lock ends with its process
        with locked(tmp_path, Share(index, count, 0, 1)):
            pass
    assert not list(tmp_path.glob("*.txt")) and not list(tmp_path.glob(".*.txt"))
