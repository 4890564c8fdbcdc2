"""The robustness table from stored results: numbers, and what is never mixed."""

import json

import pytest

import nnunet_trainers
from benchmarks.robustness import report
from benchmarks.robustness.methods import METHODS, PROFILES, matched_iterations, method_of, protocols_of, settings_of


def record(case, attack, eps, dice, slices=(0.5, 2), voxels=(10, 0, 0)):
    return {"case": case, "attack": attack, "norm": "l2", "unit": "l2", "eps": eps, "dice": dice, "nsd": dice,
            "hd95_mm": 1.0, "slice_dice": list(slices), "voxels": {"a": list(voxels)}}  # fmt: skip


def result(method, dice, fold="0", **identity):
    same = {"versions": {"torch": "2"}, "sources": "s", "plans": "p", "pretrained": None, "profile": "q", "split": "t"}
    cases = [record("x", "clean", None, 0.9), record("y", "clean", None, 0.8)]
    cases += [
        record("x", "pgd", 5.0, dice, (dice, 3), (1, 1, 0)),
        record("y", "pgd", 5.0, dice, (dice / 2, 1), (3, 0, 2)),
    ]
    worst = [*cases, record("x", "square", 5.0, dice - 0.1), record("y", "square", 5.0, dice + 0.1)]
    return {
        "method": method, "fold": fold, "identity": {**same, **identity},
        "protocols": {"paper": cases, "worst-l2": worst},
        "cost": {"forwards_per_sample": 1, "gradients_per_sample": 3, "training_passes_per_sample": 2,
                 "standard_passes_per_sample": 4.3, "seconds": 10 if method == "standard" else 40},
        "command": "c", "date": "d", "device": "e", "torch": "2", "ima_seg": "0",
    }  # fmt: skip


def write(folder, *results):
    for each in results:
        (folder / f"{each['method']}_fold{each['fold']}.json").write_text(json.dumps(each))


def test_statistics():
    cases = report.pick([result("ima", 0.6)], "paper", worst=False)
    assert report.per_slice(list(cases[5.0].values())) == pytest.approx((0.6 * 3 + 0.3) / 4)
    assert report.pooled(list(cases[5.0].values())) == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    worst = report.pick([result("ima", 0.6)], "worst-l2", worst=True)
    assert [r["attack"] for r in worst[5.0].values()] == ["square", "pgd"]
    assert report.per_case("dice")(list(worst[5.0].values())) == pytest.approx((0.5 + 0.6) / 2)
    nothing = {**result("ima", 0.6)}
    nothing["protocols"]["worst-l2"].append(record("x", "apgd-ce", 5.0, None))
    assert report.pick([nothing], "worst-l2", worst=True)[5.0]["x"]["attack"] == "square"


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESAMPLES", 50)
    write(tmp_path, result("standard", 0.2), result("pgdat-5", 0.5), result("pgdat-1", 0.4), result("ima", 0.6))
    report.report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| ima | 2.00 | 3.00 | 1.00 | 4.3 | 40 | 4.0 |" in text
    assert "| 5 | pgdat-5 | +0.0" in text, "the best fixed noise is named, and how far ours is from it"
    assert text.index("| standard |") < text.index("| pgdat-1 |") < text.index("| ima |"), "in the order of the methods"
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_overview_has_one_line_for_each_method():
    results = {"standard": [result("standard", 0.2)], "ima": [result("ima", 0.6)]}
    chosen = {method: report.pick(each, "paper", worst=False) for method, each in results.items()}
    lines = report.overview(results, {"paper": (chosen, report.per_slice)}).splitlines()
    assert lines[0] == "|  | cost | paper clean | paper 5 |"
    assert lines[2:] == ["| standard | 4.3 | 0.500 | 0.175 |", "| ima | 4.3 | 0.500 | 0.525 |"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"versions": {"torch": "3"}}, "other versions"),
        ({"sources": "z"}, "other sources"),
        ({"pretrained": "w"}, "other pretrained"),
        ({"profile": "r"}, "other profile"),
        ({"split": "u"}, "another split of fold 0"),
        ({"fold": "1"}, "different folds"),
    ],
)
def test_results_that_do_not_belong_together_are_named(tmp_path, other, message):
    fold = other.pop("fold", "0")
    write(tmp_path, result("ima", 0.6), result("standard", 0.2, fold, **other))
    with pytest.raises(SystemExit, match=message):
        report.load(tmp_path)


def test_a_case_that_one_method_lacks_is_named(tmp_path):
    less = result("standard", 0.2)
    less["protocols"]["paper"].pop()
    write(tmp_path, result("ima", 0.6), less)
    with pytest.raises(SystemExit, match=r"standard lacks budget and case \(5.0, 'y'\)"):
        report.report(tmp_path)


def test_trainings_of_the_same_computation_stand_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESAMPLES", 20)
    write(tmp_path, result("pgdat-5-matched", 0.5), result("pgdat-1", 0.4), result("ima", 0.6))
    report.report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| budget | best PGD training there | ima minus it |" in text and "| 5 | pgdat-1 |" in text
    assert "of the same computation" in text and "| 5 | pgdat-5-matched |" in text
    assert matched_iterations({"iterations_per_epoch": 30}, wanted=4.0, cost=1.0) == 120
    assert matched_iterations({}, wanted=4.0, cost=8.0) == 125
    assert settings_of("standard-matched", PROFILES["quick"], 77)["iterations_per_epoch"] == 77
    assert method_of("standard-matched") is METHODS["standard"]


def test_tables_replace_what_stands_between_their_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- a: generated -->\nold\n<!-- a: end -->\nafter\n")
    report.put_into(file, "b", "other")
    assert "old" in file.read_text()
    for _ in range(2):
        report.put_into(file, "a", "new")
        assert file.read_text() == "before\n<!-- a: generated -->\n\nnew\n\n<!-- a: end -->\nafter\n"


def test_nothing_stored(tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        report.report(tmp_path)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_trainer_that_takes_its_settings(name, profile):
    base = getattr(nnunet_trainers, METHODS[name].trainer).preset
    type(base).parse(settings_of(name, PROFILES[profile]), source=name, base=base)


@pytest.mark.parametrize("profile", PROFILES)
def test_protocols_are_arguments_of_evaluate(profile):
    from ima_seg.cli import make_parser

    for configuration, names in (
        ("2d", {"paper", "worst-l2", "worst-linf"}),
        ("3d_fullres", {"worst-l2", "worst-linf"}),
    ):
        protocols = protocols_of(configuration, PROFILES[profile])
        assert set(protocols) == names
        for arguments in protocols.values():
            make_parser().parse_args(["evaluate", "-i", "i", "-gt", "g", "-o", "o", "-m", "m", *arguments])


def test_a_stored_table_needs_no_data(tmp_path, monkeypatch):
    from benchmarks.robustness import table as script

    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    monkeypatch.setattr(script, "STORE", tmp_path)
    for name in ("Dataset004_Left_Hippocampus_3d_fullres_quick", "Dataset014_Other_3d_fullres_quick"):
        (tmp_path / name).mkdir()
    for given in ("4", "004", "Dataset004_Left_Hippocampus"):
        assert script.stored_name(given, "3d_fullres", "quick") == "Dataset004_Left_Hippocampus"
    with pytest.raises(SystemExit, match=r"no results of data set '5', 3d_fullres, quick.*Dataset004_Left_Hippocampus"):
        script.stored_name("5", "3d_fullres", "quick")
