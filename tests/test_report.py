from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ima_seg.evaluate.measure.collect import Evaluation, collect
from ima_seg.evaluate.measure.summary import Summary, summarise
from ima_seg.evaluate.records import Failure, Record
from ima_seg.evaluate.report.flags import Flag, check
from ima_seg.evaluate.run import Run
from tests.report_data import (
    EPS,
    make_record,
    make_run,
)

VOID = {"meta", "img", "br"}


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
