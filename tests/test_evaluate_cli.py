"""``ima-seg evaluate`` as a command: interrupted, in parts, on several ranks, with bad files and models.

One file: the command line is tried on one trained model, which takes long to make.
"""

import html
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from ima_seg.cli import main
from tests.evaluation_runs import (
    PROGRAM,
    STEPS,
    command,
    comparable,
    failures,
    names,
    records,
    refused,
    some_cases,
    summary,
)


def test_two_parts_and_a_report_are_one_run(phantoms, data, single, tmp_path, capsys):
    out, model = tmp_path / "out", phantoms.model("mr3d", steps=STEPS)
    assert main(command(model, data, out, "-num_parts", "2", "-part_id", "0")) == 0
    assert "ima-seg report" in capsys.readouterr().out and not (out / "report.html").exists()
    assert main(command(model, data, out, "-num_parts", "2", "-part_id", "1")) == 0
    assert sorted(p.name for p in out.glob("records*")) == ["records.csv", "records.part-1-of-2.jsonl",
                                                           "records.part-2-of-2.jsonl"]  # fmt: skip
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").is_file()
    assert comparable(out) == comparable(single) and summary(out) == summary(single)
    # parts may lie in folders of their own as well
    apart = [tmp_path / "apart 0", tmp_path / "apart 1"]
    for index, folder in enumerate(apart):
        folder.mkdir()
        shutil.copy(out / "run.json", folder)
        shutil.copy(out / f"records.part-{index + 1}-of-2.jsonl", folder)
    assert main(["report", *map(str, apart), "-o", str(tmp_path / "merged")]) == 0
    assert summary(tmp_path / "merged") == summary(single)


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", [False, True])
def test_ranks_share_the_cases_and_write_one_report(phantoms, data, single, tmp_path, spoilt):
    """Also when a rank has a case that cannot be evaluated: torchrun stops all ranks when one ends with an error."""
    images, labels = (shutil.copytree(folder, tmp_path / folder.name) for folder in data)
    if spoilt:
        last = names(phantoms, "mr3d")[3]
        shutil.copy(images / f"{last}_0000.nii.gz", images / "zz_0000.nii.gz")
        (images / f"{last}_0000.nii.gz").write_bytes(b"nothing")
        shutil.copy(labels / f"{last}.nii.gz", labels / "zz.nii.gz")
    out = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "ima_seg.cli"]
    done = subprocess.run(
        [sys.executable, *launcher, *command(phantoms.model("mr3d", steps=STEPS), (images, labels), out)],
        env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert (done.returncode == 0) == (not spoilt), done.stderr
    assert len(list(out.glob("records.part-*-of-2.jsonl"))) == 2
    assert (out / "report.html").is_file() and done.stdout.count("wrote") == 1
    if spoilt:
        assert [failure.case for failure in failures(out)] == [last] and last in (out / "report.html").read_text()
    else:
        assert comparable(out) == comparable(single) and summary(out) == summary(single)


def spoil(images, labels, case, how):
    """Make a case bad; what its failure must name is returned."""
    first, label = images / f"{case}_0000.nii.gz", labels / f"{case}.nii.gz"
    stored, truth = nibabel.load(first), nibabel.load(label)
    values, classes = np.asarray(stored.dataobj).copy(), np.asarray(truth.dataobj).copy()
    affine = stored.affine.copy()

    def write(path, array, like, geometry=None):
        geometry = like.affine if geometry is None else geometry
        nibabel.save(nibabel.Nifti1Image(array, geometry), path)

    if how == "missing channel":
        (images / f"{case}_0001.nii.gz").unlink()
    elif how == "truncated":
        first.write_bytes(first.read_bytes()[:3000])
    elif how == "4D":
        write(first, np.stack([values, values], 3), stored)
    elif how == "NaN":
        values = values.astype(np.float32)
        values[1, 2, 3] = np.nan
        write(first, values, stored)
    elif how == "constant":
        write(first, np.full_like(values, 7), stored)
    elif how == "no foreground":
        write(label, np.zeros_like(classes), truth)
    elif how == "other shape":
        write(label, classes[:-1], truth)
    elif how == "mm apart":
        affine[0, 3] += 3
        write(label, classes, truth, affine)
    elif how == "has the value":
        classes[0, 0, 0] = 9
        write(label, classes, truth)
    elif how == "orthonormal":  # nibabel reads it, nnU-Net's reader does not
        sheared = affine @ np.array([[1, 0.4, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        for path in [*images.glob(f"{case}_0*"), label]:
            file = nibabel.load(path)
            write(path, np.asarray(file.dataobj), file, sheared)
    return {
        "missing channel": "_0001.nii.gz does not exist",
        "constant": "all voxels have the value",
        "NaN": "NaN or infinite",
        "4D": "4 dimensions",
        "other shape": "has shape",
    }.get(how, how)


def test_bad_cases_are_noted_and_the_good_ones_evaluated(phantoms, tmp_path, capsys):
    images, labels = some_cases(phantoms, "regions", tmp_path, 1)
    good = names(phantoms, "regions")[1]
    kinds = ["missing channel", "truncated", "4D", "NaN", "constant", "no foreground", "other shape", "mm apart",
             "has the value", "orthonormal"]  # fmt: skip
    cases = {f"bad {index}": kind for index, kind in enumerate(kinds)} | {"bad <b>x & y": "truncated"}
    for case in [*cases, "good <b>x & y"]:
        for channel in (0, 1):
            shutil.copy(images / f"{good}_{channel:04d}.nii.gz", images / f"{case}_{channel:04d}.nii.gz")
        shutil.copy(labels / f"{good}.nii.gz", labels / f"{case}.nii.gz")
    expected = {case: spoil(images, labels, case, how) for case, how in cases.items()}
    out = tmp_path / "out"
    arguments = command(phantoms.model("regions", steps=STEPS), (images, labels), out, "--save-adversarial")
    for _ in range(2):  # the second time, a resumed run reports the same
        assert main(arguments) == 1
        assert {key[0] for key in records(out)} == {good, "good <b>x & y"}
        noted = {failure.case: failure.message for failure in failures(out)}
        assert noted.keys() == expected.keys() and len(failures(out)) == len(expected)
        for case, text in expected.items():
            assert text in noted[case], (case, noted[case])
        page = (out / "report.html").read_text()
        assert all(html.escape(case) in html.unescape(page) or html.escape(case) in page for case in cases)
        assert "<b>x" not in page and "good &lt;b&gt;x &amp; y" in page
        assert f"{len(expected)} of {len(expected) + 2} cases" in capsys.readouterr().err
        arguments.append("--resume")
    first, other = (
        {
            key[1:]: value["dice"]
            for key, value in comparable(out).items()
            if key[0] == case and value["kind"] == "clean"
        }
        for case in (good, "good <b>x & y")
    )
    assert first == other
    saved = [path for record in records(out).values() if record.disk for path in record.disk.image]
    assert saved and all((out / path).is_file() for path in saved)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["-f", "3"], "fold 3"),
        (["-chk", "checkpoint_best.pth"], "checkpoint_best.pth"),
        (["--attack", "pdg"], "'pdg'"),
        (["--corruption", "fog"], "'fog'"),
        (["--eps", "0"], "--eps is 0.0: input should be greater than"),
        (["--eps", "-0.1"], "--eps is -0.1"),
        (["--eps", "0.1", "1e308"], "--eps is 1e+308: input should be less than"),
        (["--eps", "nan"], "--eps is nan"),
        (["--nsd-tolerance", "nan"], "--nsd-tolerance is nan: input should be a finite number"),
        (["--nsd-tolerance", "inf"], "--nsd-tolerance is inf"),
        (["--nsd-tolerance", "-1"], "--nsd-tolerance is -1.0"),
        (["--broken-below", "nan"], "--broken-below is nan"),
        (["-step_size", "nan"], "-step_size is nan"),
        (["--unit", "linf"], "'linf'"),
        (["--norm", "linf", "--unit", "rms"], "'rms'"),
        (["--unit", "hu"], "'hu'"),
        (["--budget", "slice"], "'slice'"),
        (["--attack", "transfer"], "'transfer'"),
        (["--attack", "disappear", "--target", "spine"], "'spine'"),
        (["--steps", "0"], "steps is 0"),
        (["--limit", "0"], "limit of cases 0"),
        (["--tile-batch", "-1"], "tile_batch is -1"),
        (["-step_size", "0"], "step size"),
        (["-device", "tpu"], "'tpu'"),
        (["-d", "981"], "either"),
        (["-num_parts", "2", "-part_id", "2"], "part_id is 2"),
        (["--name", "a", "--name", "b"], "--name"),
    ],
)
def test_wrong_options_are_refused_in_one_line(phantoms, data, tmp_path, capsys, more, text):
    assert text in refused(command(phantoms.model("mr3d", steps=STEPS), data, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_refused_in_one_line(phantoms, data, single, tmp_path, capsys):
    model, out = phantoms.model("mr3d", steps=STEPS), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "plans.json" in refused(command(tmp_path / "empty", data, out), capsys)
    assert "does not exist" in refused(command(tmp_path / "nowhere", data, out), capsys)
    assert "no case" in refused(command(model, (tmp_path / "empty", data[1]), out), capsys)
    assert "does not exist" in refused(command(model, (data[0], tmp_path / "nowhere"), out), capsys)
    assert "there [0.1, 0.5]" in refused(command(model, data, single, "--resume", "--eps", "0.2"), capsys)
    assert "the models are others" in refused(command(phantoms.model("mr3d", seed=1), data, single, "--resume",
                                                      "--name", "x"), capsys)  # fmt: skip
    assert "one task" in refused([*command(model, data, out), "-m", phantoms.model("ct")], capsys)
    if not torch.cuda.is_available():
        assert "-device cpu" in refused(command(model, data, out, "-device", "cuda"), capsys)
    (tmp_path / "file").touch()
    assert "is a file" in refused(command(model, data, tmp_path / "file"), capsys)
    (tmp_path / "empty" / "records.jsonl").touch()
    assert "no run.json" in refused(command(model, data, tmp_path / "empty"), capsys)
    assert not out.exists()


class Touch:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_runs_code_needs_trust(phantoms, data, tmp_path, capsys):
    folder, mark = shutil.copytree(phantoms.model("mr3d", steps=STEPS), tmp_path / "model"), tmp_path / "mark"
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=False), "logging": Touch(mark)}, file)
    arguments = command(folder, data, tmp_path / "out", "--limit", "1", "--attack", "gaussian")
    assert "--trust-checkpoint" in refused(arguments, capsys) and not mark.exists()
    assert main([*arguments, "--trust-checkpoint"]) == 0
    assert mark.is_dir() and len(records(tmp_path / "out")) == 3


@pytest.mark.parametrize("name", ["os.system", "nnunetv2.paths.os.system", "torch.nn.functional.relu"])
@pytest.mark.parametrize("part", ["network_class_name", "nonlin"])
def test_plans_that_name_code_that_is_no_network_are_refused(phantoms, data, tmp_path, capsys, name, part):
    folder = shutil.copytree(phantoms.model("mr3d", steps=STEPS), tmp_path / "model")
    plans = json.loads((folder / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    if part == "nonlin":
        architecture["arch_kwargs"] |= {"nonlin": name, "nonlin_kwargs": {"command": f"touch {tmp_path / 'mark'}"}}
    else:
        architecture["network_class_name"] = name
    (folder / "plans.json").write_text(json.dumps(plans))
    assert f"'{name}'" in refused(command(folder, data, tmp_path / "out"), capsys)
    assert not (tmp_path / "mark").exists()


def test_a_model_is_found_by_dataset_configuration_trainer_and_plans(phantoms, data, single, tmp_path):
    results = tmp_path / "results" / "Dataset981_Mr"
    for trainer, seed in (("nnUNetTrainer", 0), ("nnUNetTrainerIMA", 1)):
        shutil.copytree(
            phantoms.model("mr3d", seed=seed, steps=(STEPS, 60)[seed]), results / f"{trainer}__tiny__3d_fullres"
        )
    arguments = command("", data, tmp_path / "out", "-d", "981", "-c", "3d_fullres", "-p", "tiny")
    arguments[1:3] = ["-tr", "nnUNetTrainer", "nnUNetTrainerIMA"]
    environment = {**os.environ, "nnUNet_results": str(tmp_path / "results")}
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "nnUNet_raw" not in done.stdout + done.stderr, "what only training needs is not asked for"
    models = json.loads((tmp_path / "out" / "run.json").read_text())["models"]
    assert [model["name"] for model in models] == ["nnUNetTrainer", "nnUNetTrainerIMA"]
    assert [Path(model["folder"]).name for model in models] == [
        "nnUNetTrainer__tiny__3d_fullres", "nnUNetTrainerIMA__tiny__3d_fullres",
    ]  # fmt: skip
    mine = {key[0:1] + key[2:]: record["dice"] for key, record in comparable(single).items()}
    found = comparable(tmp_path / "out")
    assert {k[0:1] + k[2:]: r["dice"] for k, r in found.items() if k[1] == "nnUNetTrainer"} == mine
