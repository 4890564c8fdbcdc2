from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ima_seg.errors import UserError
from ima_seg.evaluate.measure.collect import Evaluation, collect
from ima_seg.evaluate.measure.summary import Summary, summarise
from ima_seg.evaluate.records import Failure, Record, append_line
from ima_seg.evaluate.report import write_report
from ima_seg.evaluate.report.flags import Flag, check
from ima_seg.evaluate.report.words import headline
from ima_seg.evaluate.run import Run
from tests.report_data import (
    CLASSES,
    EPS,
    NASTY,
    class_metrics,
    make_failures,
    make_record,
    make_records,
    make_run,
    write_evaluation,
    write_example,
)

VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(example: Path) -> str:
    return write_report([example], example).read_text(encoding="utf-8")


def small_run(cases: int = 4, models: int = 2) -> Run:
    run = make_run(cases)
    return run.model_copy(update={"models": run.models[:models], "cases": [f"c{i}" for i in range(cases)]})


def summary_of(run: Run, records: list[Record], failures: list[Failure] | None = None) -> Summary:
    return summarise(run, records, failures or [])


def flag_of(name: str, records: list[Record], run: Run | None = None, **more: object) -> Flag:
    run = run or small_run()
    evaluation = Evaluation(run, records, [], **more)  # type: ignore[arg-type]
    return next(flag for flag in check(evaluation, summary_of(run, records)) if flag.name == name)


def curve(run: Run, attack: str, kind: str, dice: Callable[[float, int], float], **more: object) -> list[Record]:
    return [
        make_record(case, model.name, kind, attack, [dice(eps, i)] * 2, eps, **more)  # type: ignore[arg-type]
        for model in run.models
        for eps in EPS
        for i, case in enumerate(run.cases)
    ]


def cleans(run: Run, dice: float = 0.8) -> list[Record]:
    return [make_record(case, m.name, "clean", "clean", [dice] * 2) for m in run.models for case in run.cases]


def test_means_against_hand_calculation() -> None:
    run = small_run(3, 1)
    values = [[0.9, 0.7], [0.6, None], [None, None]]
    records = [make_record(c, "standard", "clean", "clean", v) for c, v in zip(run.cases, values, strict=True)]
    clean = summary_of(run, records).find("standard", "clean")
    assert clean is not None and clean.dice is not None
    assert clean.dice.estimate == pytest.approx((0.8 + 0.6) / 2)
    assert (clean.n, clean.undefined, clean.missing, clean.dice.n) == (3, 1, 0, 2)
    anterior = clean.classes["anterior"]
    assert anterior.dice is not None and anterior.dice.estimate == pytest.approx(0.75)
    assert anterior.pooled_dice == pytest.approx(2 * (2700 + 1800) / (2 * 6000))
    assert anterior.states == {"both_empty": 1, "ok": 2}
    assert clean.pooled_dice == pytest.approx((0.75 + 0.7) / 2)


def test_success_rate_leaves_out_cases_without_clean_dice() -> None:
    run = small_run(4, 1)
    before = [0.8, 0.8, 0.0, 0.8]
    after = [0.39, 0.41, 0.0, 0.1]
    records = []
    for case, a, b in zip(run.cases, before, after, strict=True):
        records += [
            make_record(case, "standard", "clean", "clean", [a] * 2),
            make_record(case, "standard", "white", "pgd", [b] * 2, 0.1),
        ]
    condition = summary_of(run, records).find("standard", "pgd", 0.1)
    assert condition is not None and condition.success is not None
    assert condition.success.estimate == pytest.approx(2 / 3)
    assert (condition.success.n, condition.success_left_out) == (3, 1)


def test_worst_takes_the_lowest_attack_of_each_case_but_no_noise() -> None:
    run = small_run(2, 1)
    dice = {"pgd": [0.5, 0.2], "square": [0.3, 0.4], "gaussian": [0.1, 0.1], "disappear:anterior": [0.0, 0.0]}
    kinds = {"pgd": "white", "square": "black", "gaussian": "noise", "disappear:anterior": "targeted"}
    records = cleans(run) + [
        make_record(case, "standard", kinds[attack], attack, [values[i]] * 2, 0.1)  # type: ignore[arg-type]
        for attack, values in dice.items()
        for i, case in enumerate(run.cases)
    ]
    worst = summary_of(run, records).find("standard", "worst", 0.1)
    assert worst is not None and worst.dice is not None
    assert worst.dice.estimate == pytest.approx((0.3 + 0.2) / 2)
    assert worst.partial == 0
    partial = summary_of(run, [r for r in records if (r.case, r.attack) != ("c1", "pgd")]).find(
        "standard", "worst", 0.1
    )
    assert partial is not None and partial.partial == 1


def test_area_breaking_and_targeted_by_hand() -> None:
    run = small_run(1, 1)
    records = cleans(run, 0.8) + curve(
        run, "pgd", "white", lambda eps, i: {0.01: 0.8, 0.03: 0.6, 0.1: 0.2, 0.3: 0.0}[eps]
    )
    # c3 has nothing to lose: that it was not broken says nothing
    for size, case, clean in ((0.02, "c0", 0.8), (0.04, "c1", 0.8), (None, "c2", 0.8), (None, "c3", 0.0)):
        if case not in run.cases:
            run.cases.append(case)
            records.append(make_record(case, "standard", "clean", "clean", [clean] * 2))
        records.append(make_record(case, "standard", "minimal", "minimal", [0.4] * 2, breaking_rms=size))
    gone = make_record("c0", "standard", "targeted", "disappear:anterior", [0.1, 0.8], 0.1)
    gone.classes["anterior"] = gone.classes["anterior"].model_copy(update={"prediction_ml": 0.3})
    more = make_record("c0", "standard", "targeted", "appear:posterior", [0.8, 0.3], 0.1)
    more.classes["posterior"] = more.classes["posterior"].model_copy(update={"prediction_ml": 6.0})
    summary = summary_of(run, [*records, gone, more])
    area = next(a for a in summary.areas if a.attack == "pgd")
    assert area.area is not None
    assert area.area.estimate == pytest.approx((0.8 * 0.01 + 0.7 * 0.02 + 0.4 * 0.07 + 0.1 * 0.2) / 0.3)
    assert [(b.median_rms, b.broken, b.n) for b in summary.breaking] == [(0.04, 2, 3)]
    shares = {t.attack: t.share.estimate for t in summary.targeted if t.share is not None}
    assert shares == pytest.approx({"disappear:anterior": 0.1, "appear:posterior": 2.0})


def test_comparison_is_paired_over_common_cases() -> None:
    run = small_run(8)
    records = cleans(run)
    records += curve(run, "pgd", "white", lambda eps, i: 0.3 + 0.01 * i)
    lacking = ("c7", "ima", 0.1)
    records = [
        make_record(r.case, r.model, "white", "pgd", [(r.dice or 0) + 0.1] * 2, r.eps)
        if r.model == "ima" and r.eps
        else r
        for r in records
        if (r.case, r.model, r.eps) != lacking
    ]
    summary = summary_of(run, records)
    found = {(c.attack, c.eps): c for c in summary.comparisons}
    assert len(found) == 1 + 2 * len(EPS)
    test = found["pgd", 0.1]
    assert (test.n, test.reference, test.model) == (7, "standard", "ima")
    assert test.difference.estimate == pytest.approx(0.1)
    assert test.reference_mean == pytest.approx(0.33) and test.effect == 1
    assert found["clean", None].p == 1 and test.p < test.p_holm
    assert [cost.holds for cost in summary.clean_costs] == [True]
    assert [(i.case, i.model, i.lacking) for i in summary.incomplete] == [("c7", "ima", ["pgd at 0.1"])]


def test_flags_of_the_example_are_as_made(example: Path) -> None:
    evaluation = collect([example])
    flags = {
        f.name: f.status for f in check(evaluation, summarise(evaluation.run, evaluation.records, evaluation.failures))
    }
    expected = {"Enough cases", "All cases are complete", "No case failed", "A large eps breaks every model"}
    assert {name for name, status in flags.items() if status == "WARN"} <= expected
    assert expected - {"A large eps breaks every model"} <= {name for name, status in flags.items() if status == "WARN"}


@pytest.mark.parametrize(
    ("name", "attacks"),
    [
        ("Iterative attacks beat single-step attacks", {"pgd": ("white", 0.5), "fgsm": ("white", 0.3)}),
        ("White box beats attacks without gradients", {"pgd": ("white", 0.5), "square": ("black", 0.3)}),
        ("White box beats transfer", {"pgd": ("white", 0.5), "transfer:x": ("transfer", 0.3)}),
        ("White box beats random noise", {"pgd": ("white", 0.5), "gaussian": ("noise", 0.3)}),
        ("Transfer beats random noise", {"transfer:x": ("transfer", 0.5), "gaussian": ("noise", 0.3)}),
        ("A large eps breaks every model", {"pgd": ("white", 0.5)}),
        ("Enough cases", {"pgd": ("white", 0.5)}),
    ],
)
def test_flags_warn_of_wrong_orders(name: str, attacks: dict[str, tuple[str, float]]) -> None:
    run = small_run()
    records = cleans(run)
    for attack, (kind, dice) in attacks.items():
        records += curve(run, attack, kind, lambda eps, i, dice=dice: dice)  # type: ignore[misc]
    flag = flag_of(name, records, run)
    assert flag.status == "WARN" and re.search(r"\d", flag.sentence)
    if len(attacks) == 2:
        swapped = cleans(run)
        for (attack, (kind, _)), (_, dice) in zip(attacks.items(), reversed(attacks.values()), strict=True):
            swapped += curve(run, attack, kind, lambda eps, i, dice=dice: dice)  # type: ignore[misc]
        assert flag_of(name, swapped, run).status == "PASS"


def test_flags_warn_of_bad_records() -> None:
    run = small_run()
    rising = cleans(run) + curve(run, "pgd", "white", lambda eps, i: 0.3 + eps)
    assert flag_of("A larger eps never helps the model", rising, run).status == "WARN"
    course = curve(run, "pgd", "white", lambda eps, i: 0.3, trace=list(np.linspace(0.8, 0.3, 21)), zero_gradient=0.2)
    assert flag_of("More steps would not help the attack", course, run).status == "WARN"
    assert flag_of("Gradients are not zero", course, run).status == "WARN"
    large = [r.model_copy(update={"eps_network": (r.eps or 0) / 1.01}) for r in course]
    assert flag_of("The budget is kept", large, run).status == "WARN"
    disk = {"image": ["a"], "difference": ["b"], "dice": 0.4, "rms": 0.02, "linf": 0.04, "resampled": False}
    saved = curve(run, "pgd", "white", lambda eps, i: 0.3, disk=disk)
    assert flag_of("Saved files give the same Dice", saved, run).status == "WARN"
    assert flag_of("Saved files hold the same perturbation", saved, run).status == "WARN"
    resampled = curve(run, "pgd", "white", lambda eps, i: 0.3, disk=disk | {"resampled": True})
    assert flag_of("Saved files give the same Dice", resampled, run).status == "SKIP"
    other = run.model_copy(update={"versions": {"torch": "2.8.0"}})
    assert flag_of("All parts ran on the same software and device", course, run, others=[other]).status == "WARN"


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
    for title in ("Threat model", "Clean performance", "Comparison of models", "Natural corruptions", "Margins of IMA"):
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
