"""The page and the files beside it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ima_seg.errors import UserError
from ima_seg.evaluate.measure.collect import collect
from ima_seg.evaluate.measure.summary import Summary, summarise
from ima_seg.evaluate.records import Failure, append_line
from ima_seg.evaluate.report import write_report
from ima_seg.evaluate.report.flags import check
from ima_seg.evaluate.report.words import headline
from tests.report_data import (
    CLASSES,
    NASTY,
    class_metrics,
    make_failures,
    make_record,
    make_records,
    make_run,
    write_evaluation,
    write_example,
)
from tests.test_report import VOID, cleans, curve, small_run, summary_of


class _Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "aria-labelledby"):
                self.links.append(value or "")
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_offline_and_escaped(page: str) -> None:
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    for link in checker.links:
        assert link.startswith("data:image/png;base64,") or link.removeprefix("#") in checker.ids
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page
    assert NASTY not in page and "case &lt;b&gt;1&lt;/b&gt; &amp; &#34;x&#34;" in page
    assert '<script>alert("x")' not in page
    assert page.count("<script>") == 1 and "b" not in checker.tags
    titles = ["Threat model", "Clean performance", "Comparison of models", "Natural corruptions"]
    for title in [*titles, "Training margins of IMA"]:
        assert title in page
    assert page.count("data:image/png;base64,") == 2 * 3 * 5
    assert len(page) < 5_000_000


def test_csv_files_have_one_row_each(example: Path, page: str) -> None:
    records = list(csv.DictReader((example / "records.csv").open(encoding="utf-8")))
    assert len(records) == len(collect([example]).records)
    assert records[0]["case"] == NASTY and records[0]["attack"] == "clean"
    rows = list(csv.DictReader((example / "summary.csv").open(encoding="utf-8")))
    summary = Summary.model_validate(json.loads((example / "summary.json").read_text(encoding="utf-8")))
    assert len(rows) == len(summary.conditions) * (1 + len(CLASSES))
    row = next(r for r in rows if (r["model"], r["attack"], r["class"]) == ("ima", "clean", "mean"))
    clean = summary.find("ima", "clean")
    assert (
        clean is not None and clean.dice is not None and float(row["dice"]) == pytest.approx(clean.dice.estimate, 1e-5)
    )


def test_rebuilding_and_parts_change_nothing(example: Path, page: str, tmp_path: Path) -> None:
    assert write_report([example], tmp_path / "again").read_text(encoding="utf-8") == page
    parts = write_example(tmp_path / "parts", parts=3)
    assert len(list(parts.glob("records*.jsonl"))) == 3
    assert write_report([parts], parts).read_text(encoding="utf-8") == page
    for name in ("summary.json", "summary.csv", "records.csv"):
        assert (parts / name).read_bytes() == (example / name).read_bytes()


def test_folders_are_merged_and_duplicates_compared(tmp_path: Path) -> None:
    run = make_run(4)
    records = make_records(run)
    first = [r for r in records if r.model == "standard"]
    shared = first[0].model_copy(update={"seconds": 99.0})
    differing = make_record(first[1].case, "standard", first[1].kind, first[1].attack, [0.1, 0.1], first[1].eps)
    alone = run.model_copy(update={"models": run.models[:1]})
    a = write_evaluation(tmp_path / "a", alone, first, [], panels=False)
    second = [r for r in records if r.model == "ima"]
    b = write_evaluation(tmp_path / "b", run, [shared, differing, *second], [], panels=False)
    merged = collect([a, b])
    assert [model.name for model in merged.run.models] == ["standard", "ima"]
    assert (merged.duplicates, merged.differing) == (2, [first[1].key])
    assert sorted(r.key for r in merged.records if r.model == "standard") == sorted(r.key for r in first)
    assert next(r for r in merged.records if r.key == first[1].key).dice == first[1].dice
    flags = {f.name: f for f in check(merged, summarise(merged.run, merged.records, merged.failures))}
    assert flags["Repeated computations agree"].status == "WARN"
    write_report([a, b], tmp_path / "c")


def test_other_settings_and_models_are_refused(tmp_path: Path) -> None:
    run = make_run(4)
    records = make_records(run)[:3]
    a = write_evaluation(tmp_path / "a", run, records, [], panels=False)
    other = run.model_copy(update={"settings": run.settings.model_copy(update={"steps": 40})})
    b = write_evaluation(tmp_path / "b", other, records, [], panels=False)
    with pytest.raises(UserError, match="steps: 20 and 40") as error:
        write_report([a, b], tmp_path / "out")
    assert str(a) in str(error.value) and str(b) in str(error.value)
    changed = run.models[0].model_copy(update={"sha256": {"plans.json": "00"}})
    c = write_evaluation(tmp_path / "c", run.model_copy(update={"models": [changed]}), [], [], panels=False)
    with pytest.raises(UserError, match=r"'standard'.*different hashes") as error:
        write_report([a, c], tmp_path / "out")
    assert str(a) in str(error.value) and str(c) in str(error.value)
    with pytest.raises(UserError, match="no records"):
        write_report([c], tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failures_that_a_later_attempt_completed_are_gone(tmp_path: Path) -> None:
    run = make_run(4)
    failures = [Failure(case=run.cases[0], model="ima", message="memory"), Failure(case=run.cases[2], message="label")]
    records = [r for r in make_records(run) if r.case != run.cases[2] or (r.model, r.attack) == ("ima", "clean")]
    for parts in (1, 2):
        folder = write_evaluation(tmp_path / str(parts), run, records, failures[:1], parts=parts, panels=False)
        (folder / "failures.part-9-of-9.jsonl").write_text(failures[1].model_dump_json() + "\n")
        assert collect([folder]).failures == failures[1:]


def test_a_small_run_still_makes_a_report(tmp_path: Path) -> None:
    run = make_run(1)
    settings = run.settings.model_copy(update={"attacks": [], "eps": [], "targets": [], "corruptions": []})
    run = run.model_copy(update={"models": run.models[:1], "settings": settings})
    empty = make_record(run.cases[0], "standard", "clean", "clean", [None, None])
    folder = write_evaluation(tmp_path / "run", run, [empty], [], panels=False)
    text = write_report([folder], tmp_path / "out").read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(text)
    assert checker.open == [] and "not known" in text


def test_headline_speaks_of_both_models() -> None:
    run = small_run(8)
    records = cleans(run, 0.84) + curve(run, "pgd", "white", lambda eps, i: 0.8 if eps < 0.1 else 0.03 + 0.001 * i)
    first = headline(run, summary_of(run, records))[0]
    assert first.startswith(
        "At an RMS perturbation of 0.1 SD per voxel the mean Dice of standard falls from 0.840 to 0.03"
    )
    assert "that of ima falls" in first and "difference 0.000" in first and "p\u00a0=\u00a01.000" in first


def test_a_panel_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    folder = write_example(tmp_path / "run", 4)
    for path in (folder / "panels").iterdir():
        path.write_bytes(b"PK no archive")
    assert "data:image" not in write_report([folder], folder).read_text(encoding="utf-8")


def test_class_metrics_of_the_generator_are_consistent() -> None:
    metrics = class_metrics(0.9)
    assert 2 * metrics.tp / (2 * metrics.tp + metrics.fp + metrics.fn) == pytest.approx(0.9)
    assert len(make_failures(make_run())) == 1


def test_report_needs_no_torch() -> None:
    code = "import sys, ima_seg.evaluate.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_attack_that_failed_everywhere_is_missing_and_makes_no_model_look_robust(tmp_path: Path) -> None:
    """Model A has no PGD in any case: its failures stay, its worst case is partial, and nothing is compared by it."""
    run = small_run(4, 2)
    first, second = (model.name for model in run.models)
    run.conditions = {
        name: [("clean", None, None), ("fgsm", 0.1, None), ("pgd", 0.1, None)] for name in (first, second)
    }
    records = []
    for case in run.cases:
        for name in (first, second):
            records.append(make_record(case, name, "clean", "clean", [0.9] * 2))
            records.append(make_record(case, name, "white", "fgsm", [0.7] * 2, 0.1))
        records.append(make_record(case, second, "white", "pgd", [0.3] * 2, 0.1))
    (tmp_path / "run.json").write_text(run.model_dump_json())
    for record in records:
        append_line(tmp_path / "records.jsonl", record)
    for case in run.cases:
        append_line(tmp_path / "failures.jsonl", Failure(case=case, model=first, message="out of memory"))
    evaluation = collect([tmp_path])
    assert len(evaluation.failures) == len(run.cases)
    summary = summarise(evaluation.run, evaluation.records, evaluation.failures)
    worst = summary.find(first, "worst", 0.1)
    assert worst is not None and worst.partial == len(run.cases)
    assert not [c for c in summary.comparisons if c.attack == "worst"]
    assert {(i.case, i.model, tuple(i.lacking)) for i in summary.incomplete} == {
        (case, first, ("pgd at 0.1",)) for case in run.cases
    }
