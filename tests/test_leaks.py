"""Cases that are evaluated although a model was trained on them are named."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from ima_seg.evaluate.api import evaluate
from ima_seg.evaluate.measure.collect import collect
from ima_seg.evaluate.measure.summary import summarise
from ima_seg.evaluate.report.flags import check
from ima_seg.methods.ledger import MarginLedger
from ima_seg.nnunet.leaks import training_cases
from tests.evaluation_runs import settings
from tests.folder_data import write_cases, write_model

CASES = ["a", "b", "c", "d"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty nnU-Net folders."""
    for name in ("raw", "preprocessed"):
        (tmp_path / name / "Dataset001_X").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


def state(*cases):
    ledger = MarginLedger(delta=0.1, eps_max=0.3)
    ledger.get(cases)
    chosen = {"norm": "l2", "delta": 0.1, "eps_max": 0.3, "rule": "mean"}
    return {"settings": chosen, "ledger": ledger.state_dict(), "voxels": 8, "history": []}


def known(root, folds=("0",), ledgers=None, images="imagesTs", dataset=None):
    (root / "model").mkdir(exist_ok=True)
    description = {"file_ending": ".nii.gz"} | ({} if dataset is None else {"dataset": dataset})
    model = SimpleNamespace(
        folder=root / "model", folds=list(folds), ledgers=ledgers or {}, dataset="Dataset001_X",
        dataset_json=description,
    )  # fmt: skip
    return training_cases(model, root / images)


def splits(path, *folds):
    path.write_text(json.dumps([{"train": list(train), "val": list(val)} for train, val in folds]))


def validation(root, fold, *cases, summary=False):
    folder = root / "model" / f"fold_{fold}" / "validation"
    folder.mkdir(parents=True)
    if summary:
        rows = [
            {"reference_file": f"/elsewhere/{case}.nii.gz", "prediction_file": f"/x/{case}.nii.gz"} for case in cases
        ]
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": rows}))
    else:
        for case in cases:
            (folder / f"{case}.nii.gz").touch()


def labels(root):
    folder = root / "raw" / "Dataset001_X" / "labelsTr"
    folder.mkdir()
    for case in CASES:
        (folder / f"{case}.nii.gz").touch()
    return folder.parent / "imagesTr"


def test_where_nothing_tells_nothing_is_said(folders):
    assert known(folders) is None


def test_the_ledger_names_what_it_was_trained_on(folders):
    assert known(folders, ledgers={"0": state("a", "b")}) == dict.fromkeys("ab", "trained on by fold 0 (margin ledger)")


@pytest.mark.parametrize("place", ["model", ".", "preprocessed/Dataset001_X"])
def test_splits_name_the_training_cases_of_the_folds(folders, place):
    (folders / "model").mkdir()
    splits(folders / place / "splits_final.json", ("abc", "d"), ("bcd", "a"))
    assert set(known(folders)) == set("abc")
    both = known(folders, folds=("0", "1"), ledgers={"1": state("b")})
    assert both["a"] == "trained on by fold 0 (splits_final.json)"
    assert both["b"] == "trained on by fold 0, 1 (splits_final.json, margin ledger)" and set(both) == set(CASES)
    assert known(folders, folds=("all",))["d"] == "trained on by fold all (splits_final.json)"


@pytest.mark.parametrize("summary", [False, True])
def test_what_one_fold_validates_the_others_train_on(folders, summary):
    validation(folders, 0, "a", "b", summary=summary)
    validation(folders, 1, "c", summary=summary)
    assert known(folders, folds=("0",)) == {"c": "trained on by fold 0 (validation folders of other folds)"}
    together = known(folders, folds=("0", "1"))
    assert set(together) == set("abc")
    assert together["a"] == "trained on by fold 1 (validation folders of other folds)"


def test_held_out_cases_are_no_leak(folders):
    validation(folders, 0, "a")
    assert known(folders) == {}
    images = labels(folders)
    assert set(known(folders)) == set("bcd")
    splits(folders / "model" / "splits_final.json", ("bc", "a"))
    found = known(folders, images=images)
    where = (folders / "raw" / "Dataset001_X" / "labelsTr").resolve()
    assert found == dict.fromkeys("bc", "trained on by fold 0 (splits_final.json)") | {
        "d": f"in the training set ({where})"
    }


def test_the_training_set_is_known_by_its_folder_or_its_description(folders, monkeypatch):
    assert set(known(folders, dataset={"a": {}, "b": {}})) == set("ab")
    images = labels(folders)
    monkeypatch.delenv("nnUNet_raw")
    assert known(folders) is None
    assert set(known(folders, images=images)) == set(CASES)


@pytest.mark.parametrize(
    ("text", "why"),
    [("[", ""), ("3", ""), ("[3]", ""), ('{"train": []}', ""), ('[{"train": ["a"]}]', " is without '0.val'"),
     ('[{"train": "a", "val": []}]', ": 0.train is 'a'")],
)  # fmt: skip
def test_splits_that_cannot_be_read_are_named_and_left_out(folders, caplog, text, why):
    (folders / "splits_final.json").write_text(text)
    assert known(folders, ledgers={"0": state("a")}) == {"a": "trained on by fold 0 (margin ledger)"}
    (line,) = caplog.messages
    assert f"splits_final.json{why}" in line and "copy it again from nnUNet_preprocessed, or remove it" in line


@pytest.mark.parametrize("text", ["[", "3", '{"metric_per_case": 3}', '{"metric_per_case": [{"reference_file": 1}]}'])
def test_validations_that_cannot_be_read_are_named_and_left_out(folders, caplog, text):
    validation(folders, 1, "c")
    (folders / "model" / "fold_1" / "validation" / "summary.json").write_text(text)
    (folders / "model" / "fold_2").mkdir()
    (folders / "model" / "fold_2" / "validation").write_text("no folder")
    assert set(known(folders)) == {"c"}
    assert any("summary.json" in line for line in caplog.messages) and len(caplog.messages) == 2


def test_report_and_terminal_name_the_cases(tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    model = write_model(tmp_path / "model")
    splits(model / "splits_final.json", ("ab", "c"))
    said, out = io.StringIO(), tmp_path / "out"
    console = Console(file=said, width=1000)
    data = write_cases(tmp_path, "a", "c")
    evaluate({"M": model}, *data, out, settings(attacks=["gaussian"]), device="cpu", console=console)
    reason = "trained on by fold 0 (margin ledger, splits_final.json)"
    assert f"1 of 2 cases are known to the training of M: a ({reason})" in said.getvalue()
    found = collect([out])
    assert found.run.models[0].training_cases == {"a": reason}
    flags = {flag.name: flag for flag in check(found, summarise(found.run, found.records, found.failures))}
    flag = flags["No case is of the training set"]
    assert flag.status == "WARN" and flag.sentence.startswith("1 of 2 cases have the ids of cases that a model was ")
    assert f"a (M: {reason})." in flag.sentence and f"a (M: {reason})" in (out / "report.html").read_text()
    old = found.run.model_dump()
    del old["models"][0]["training_cases"]
    assert type(found.run).model_validate(old).models[0].training_cases is None
