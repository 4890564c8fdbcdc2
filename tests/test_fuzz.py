"""Mutated files and settings of every kind: the right result, or one clear line and a status that is not 0.

Never a traceback, a hang, or success with other data than the references here read from the same files: nnU-Net's own
predictor, its reader, and the unchanged evaluation. Seeded; ``FUZZ_INPUTS`` sets how many inputs of each kind there are
in the long form (``-m slow``).
"""

import json
import os
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from ima_seg.errors import UserError
from ima_seg.evaluate.records import Record, read_lines
from ima_seg.methods.ima_settings import AMAT, FAST, IMASettings
from ima_seg.methods.settings import load_settings
from tests.evaluation_runs import STEPS, some_cases
from tests.fuzzing import called, flipped, limited, mutated_checkpoint, mutated_json, mutated_nifti, places

FEW, MANY = 8, int(os.environ.get("FUZZ_INPUTS", "200"))


def evaluate(model, data, out, *more):
    images, labels = data
    return called("evaluate", "-m", model, "-i", images, "-gt", labels, "-o", out, "--attack", "--disable_tta",
                  "-device", "cpu", *more)  # fmt: skip


def found(out):
    return list(read_lines(sorted(out.glob("records*.jsonl")), Record))


def clear(status, printed, *files):
    """An error names the file, or one that says otherwise, in one line."""
    lines = [line for line in printed.splitlines() if "NOT EVALUATED" in line or "error:" in line]
    assert status in (1, 2), printed
    assert any(Path(file).name in line for line in lines for file in files), printed


@pytest.fixture(scope="module")
def base(phantoms, tmp_path_factory):
    """A model folder, two cases, and their evaluation, all as they should be."""
    root = tmp_path_factory.mktemp("fuzz")
    data = some_cases(phantoms, "mr3d", root, 0, 1)
    model = phantoms.model("mr3d", steps=STEPS)
    status, printed = evaluate(model, data, root / "out")
    assert status == 0, printed
    return root, model, data, {record.case: record for record in found(root / "out")}


def fuzz_nifti(base, folder, rng):
    """One file of one of two cases is changed; the other case is evaluated as ever."""
    _, model, (images, labels), right = base
    case, other = sorted(right)
    data = (shutil.copytree(images, folder / "images"), shutil.copytree(labels, folder / "labels"))
    file = data[0] / f"{case}_0000.nii.gz" if rng.integers(2) else data[1] / f"{case}.nii.gz"
    file.write_bytes(mutated_nifti(rng, file.read_bytes()))
    status, printed = evaluate(model, data, folder / "out")
    records = {record.case: record for record in found(folder / "out")}
    assert records[other].classes == right[other].classes
    assert (folder / "out" / "report.html").is_file()
    if case not in records:
        return clear(status, printed, file)
    assert status == 0
    same_as_nnunet(records[case], model, data)
    return None


def same_as_nnunet(record, model, data):
    """Volumes, and voxels of prediction and reference in common, are those of nnU-Net's reader and predictor."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    image, properties = SimpleITKIO().read_images([str(data[0] / f"{record.case}_0000.nii.gz")])
    label = SimpleITKIO().read_seg(str(data[1] / f"{record.case}.nii.gz"))[0][0]
    predicted = nnunet_prediction(model, image, properties)
    voxel_ml = float(np.prod(properties["spacing"])) / 1000
    for index, metrics in enumerate(record.classes.values(), 1):
        truth, mask = np.rint(label) == index, predicted == index
        assert metrics.reference_ml == pytest.approx(truth.sum() * voxel_ml, rel=1e-3)
        # Sums of overlapping tiles are rounded differently; a voxel or two may be at a tie.
        assert abs(metrics.tp - int((truth & mask).sum())) <= 2
        assert abs(metrics.fp - int((~truth & mask).sum())) <= 2


def nnunet_prediction(model, image, properties):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"),
                                allow_tqdm=False)  # fmt: skip
    predictor.initialize_from_trained_model_folder(str(model), None, "checkpoint_final.pth")
    return predictor.predict_single_npy_array(image, properties)


def used(path):
    """Whether a path into the plans leads to what inference may read; most of the rest is about planning."""
    return not (len(path) > 1 and path[0] == "configurations" and path[1] not in ("3d_fullres",))


def fuzz_description(base, folder, rng):
    """plans.json or dataset.json of a model is changed."""
    _, model, data, right = base
    changed = shutil.copytree(model, folder / "model")
    file = changed / ("plans.json" if rng.integers(2) else "dataset.json")
    text = file.read_bytes()
    paths = [path for path in places(json.loads(text)) if used(path)]
    file.write_bytes(mutated_json(rng, text, paths))
    status, printed = evaluate(changed, data, folder / "out", "--limit", "1")
    records = found(folder / "out")
    if status:
        return clear(status, printed, file, "checkpoint_final.pth", "NOT EVALUATED")
    if {name: c.tp for name, c in records[0].classes.items()} != {
        n: c.tp for n, c in right[records[0].case].classes.items()
    }:
        same_as_nnunet(records[0], changed, data)
    return None


def fuzz_checkpoint(base, folder, rng):
    """The checkpoint of a model is changed; it is evaluated, exported, and its margins are asked for."""
    _, model, data, right = base
    changed = shutil.copytree(model, folder / "model")
    file = changed / "fold_0" / "checkpoint_final.pth"
    mutated_checkpoint(rng, file)
    status, printed = evaluate(changed, data, folder / "out", "--limit", "1")
    if status:
        clear(status, printed, file, "plans.json")
    else:
        record = found(folder / "out")[0]
        if {name: c.tp for name, c in record.classes.items()} != {
            n: c.tp for n, c in right[record.case].classes.items()
        }:
            same_as_nnunet(record, changed, data)
    exported, printed = called("export", changed, "-o", folder / "exported")
    assert (exported == 0) == (folder / "exported").exists()
    if exported:
        clear(exported, printed, file, "plans.json")
    else:
        assert status == 0, "exported what cannot be evaluated"
    assert called("margins", changed)[0] in (0, 2)


def fuzz_settings(base, folder, rng):
    """A settings file of a training, and options of the command line."""
    _, model, data, _ = base
    keys = [*IMASettings.model_fields, "stepss", "x"]
    odd = ["nan", "inf", "-inf", "-1", "0", "1", "1e308", "1e-320", "true", '"auto"', '"x"', '"l2"', "[1]", "{a = 1}",
           "9" * 400, '""', "2026-01-01", '"\\u0000"']  # fmt: skip
    lines = [f"{rng.choice(keys)} = {rng.choice(odd)}" for _ in range(rng.integers(1, 4))]
    text = "\n".join(lines).encode()
    if rng.integers(4) == 0:
        text = [flipped(rng, text), b"\xff\xfe" + text, b"x = " + b"[" * 30_000, b"a: &a [x, x]\n" * 3][rng.integers(4)]
    file = folder / str(rng.choice(["ima.toml", "ima.yaml", "ima.yml", "ima.ini", "none.toml"]))
    if file.name != "none.toml":
        file.write_bytes(text)
    try:
        with limited():
            settings = load_settings([IMASettings(), FAST, AMAT][rng.integers(3)], file=str(file))
            delta, cap = settings.resolve_sizes(patch_voxels=1000, epochs=10)
            assert 0 < delta <= cap < float("inf")
    except UserError as error:
        assert str(error)
    option = str(rng.choice(["--eps", "--nsd-tolerance", "--broken-below", "--seed", "--restarts", "--tile-batch",
                             "-step_size", "-num_parts", "-part_id", "--unit", "--target", "--norm", "--limit",
                             "--corruption", "-f", "-chk", "--name", "--precision", "-device"]))  # fmt: skip
    value = str(rng.choice(["nan", "inf", "-1", "0", "1e308", "1e-320", "", "x", "../x", "é\x1b", "0x1", "1e3"]))
    more = ["--attack", "fgsm", "--eps", "0.1"] if option in ("--restarts", "--target") else []
    status, printed = evaluate(model, data, folder / "out", *more, f"{option}={value}")
    assert "\x1b" not in printed
    if status == 0:
        assert all(record.dice is not None for record in found(folder / "out")), (option, value)


def fuzz_records(base, folder, rng):
    """run.json or the records of a finished evaluation are changed; a report of it is made, and it is gone on with."""
    root, model, data, right = base
    out = shutil.copytree(root / "out", folder / "out")
    file = out / str(rng.choice(["run.json", "records.jsonl"]))
    text = file.read_bytes()
    if file.name == "run.json":
        file.write_bytes(mutated_json(rng, text, list(places(json.loads(text)))))
    else:
        lines = text.splitlines()
        number = rng.integers(len(lines))
        lines[number] = mutated_json(rng, lines[number], list(places(json.loads(lines[number]))))
        file.write_bytes(b"\n".join(lines) + b"\n")
    status, printed = called("report", out)
    if status:
        clear(status, printed, file)
    before = {(r.case, r.model) for r in good_records(file)} if file.name != "run.json" else set()
    status, printed = evaluate(model, data, out, "--resume")
    if status == 0:
        again = {record.case: record for record in good_records(out / "records.jsonl")}
        assert again.keys() >= right.keys()
        assert {(r.case, r.model) for r in again.values()} >= before
    else:
        clear(status, printed, out if file.name == "run.json" else file)


def good_records(file):
    """The lines that are records."""
    for line in file.read_bytes().splitlines():
        try:
            yield Record.model_validate_json(line)
        except ValueError:
            continue


KINDS = [fuzz_nifti, fuzz_description, fuzz_checkpoint, fuzz_settings, fuzz_records]


def run(kind, base, folder, count):
    faults = []
    for number in range(count):
        work = folder / str(number)
        work.mkdir()
        try:
            kind(base, work, np.random.default_rng([number, KINDS.index(kind)]))
        except Exception as error:
            faults.append(
                f"--- input {number}: {type(error).__name__}: {str(error)[-1500:]}\n{traceback.format_exc()[-800:]}"
            )
        shutil.rmtree(work)
    assert not faults, f"{len(faults)} of {count}\n" + "\n".join(faults)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_mutations_are_right_or_refused(kind, base, tmp_path):
    run(kind, base, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutations_are_right_or_refused(kind, base, tmp_path):
    run(kind, base, tmp_path, MANY)


def test_the_references_agree_with_an_unchanged_evaluation(base):
    _, model, data, right = base
    for record in right.values():
        same_as_nnunet(record, model, data)
