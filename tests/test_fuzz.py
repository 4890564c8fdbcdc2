"""Mutated files and settings of every kind: the right result, or one clear line and a status that is not 0.

Never a traceback, a hang, or success with other data than the references here read from the same files: nnU-Net's own
predictor, its reader, and the unchanged evaluation. Seeded; ``FUZZ_INPUTS`` sets how many inputs of each kind there are
in the long form (``-m slow``).
"""

import gzip
import io
import json
import os
import shutil
import signal
import struct
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

from ima_seg.cli import main
from ima_seg.errors import UserError
from ima_seg.evaluate.records import Failure, Record, read_lines
from ima_seg.methods.settings import AMAT, FAST, IMASettings, load_settings
from tests.evaluation_runs import STEPS, names, some_cases

FEW, MANY = 16, int(os.environ.get("FUZZ_INPUTS", "200"))
#: Seconds that one input may take.
PATIENCE = 60
#: What replaces a value in JSON.
ODD = [
    None, True, 0, -1, 1, 3, 1e39, 2**70, "", "x", "0", "../../etc", "os.system", [], [0], [[1]], {}, {"x": 1}, "é\x1b[2J",
    [1e-9] * 3, [None] * 3, "SimpleITKIO", "nan", {"0": "CT"}, ["CTNormalization"],
]  # fmt: skip


class Hang(Exception):
    """An input took too long."""


@contextmanager
def limited(seconds=PATIENCE):
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def called(*arguments):
    """Exit status and everything printed by ``ima-seg``; an exception is a fault."""
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text), limited():
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse
            status = error.code
    printed = text.getvalue()
    assert "Traceback" not in printed and "please report" not in printed, printed
    assert "pydantic.dev" not in printed and len(max(printed.splitlines(), key=len, default="")) < 3000, printed
    if status:
        assert "error:" in printed, printed
    return status, printed


def evaluate(model, data, out, *more):
    images, labels = data
    return called("evaluate", "-m", model, "-i", images, "-gt", labels, "-o", out, "--attack", "--disable_tta",
                  "-device", "cpu", *more)  # fmt: skip


def found(out):
    return list(read_lines(sorted(out.glob("records*.jsonl")), Record))


def clear(status, printed, file):
    """An error names the file or what in it is wrong, in one line."""
    lines = [line for line in printed.splitlines() if "NOT EVALUATED" in line or "error:" in line]
    assert status in (1, 2) and lines, printed
    assert any(Path(file).name in line for line in lines), printed


@pytest.fixture(scope="module")
def base(phantoms, tmp_path_factory):
    """A model folder, two cases, and their evaluation, all as they should be."""
    root = tmp_path_factory.mktemp("fuzz")
    data = some_cases(phantoms, "mr3d", root, 0, 1)
    model = phantoms.model("mr3d", steps=STEPS)
    status, printed = evaluate(model, data, root / "out")
    assert status == 0, printed
    return root, model, data, {record.case: record for record in found(root / "out")}


def flipped(rng, content, low=0, high=None):
    """``content`` with one to three bits of it flipped."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(low, high or len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


# --- images and labels -------------------------------------------------------------------------------------------------


#: Offset and format of fields of a NIfTI header.
FIELDS = {
    "sizeof_hdr": (0, "i"), "dim0": (40, "h"), "dim1": (42, "h"), "dim4": (48, "h"), "datatype": (70, "h"),
    "bitpix": (72, "h"), "pixdim0": (76, "f"), "pixdim1": (80, "f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"),
    "scl_inter": (116, "f"), "xyzt_units": (123, "b"), "qform_code": (252, "h"), "sform_code": (254, "h"),
    "quatern_b": (256, "f"), "srow_x": (280, "f"), "magic": (344, "i"), "extension": (348, "i"),
}  # fmt: skip


def mutated_nifti(rng, content):
    """A changed ``.nii.gz``, and whether its stream is damaged."""
    how = rng.integers(6)
    plain = gzip.decompress(content)
    if how == 0:
        return content[: rng.integers(0, len(content))]
    if how == 1:
        return flipped(rng, content)
    if how == 2:
        return gzip.compress(flipped(rng, plain, 0, 352))
    if how == 3:
        return gzip.compress(plain[: rng.integers(0, len(plain))])
    if how == 4:
        return plain if rng.integers(2) else content + bytes(rng.integers(0, 256, 20, dtype=np.uint8))
    offset, kind = FIELDS[str(rng.choice(list(FIELDS)))]
    values = [0, 1, -1, 2, 7, 100, 127] + ([float("nan"), float("inf"), 1e39, 1e-38, -0.5] if kind == "f" else [])
    value = values[rng.integers(len(values))]
    changed = bytearray(plain)
    changed[offset : offset + struct.calcsize(kind)] = struct.pack(f"<{kind}", np.float32(value) if kind == "f" else value)
    return gzip.compress(bytes(changed))


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


# --- plans.json and dataset.json -----------------------------------------------------------------------------------------


def places(value, path=()):
    """The paths to everything in a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def mutated_json(rng, text, paths):
    """Changed JSON text: a value replaced, removed or renamed, or the text itself damaged."""
    how = rng.integers(8)
    if how == 0:
        return text[: rng.integers(0, len(text))]
    if how == 1:
        return flipped(rng, text)
    if how == 2:
        return b"[" * 30_000 + text
    content = json.loads(text)
    *parents, last = paths[rng.integers(1, len(paths))]
    inside = content
    for key in parents:
        inside = inside[key]
    if how in (3, 4):
        del inside[last]
    elif how == 5 and isinstance(inside, dict):
        inside[f"{last}x"] = inside.pop(last)
    else:
        inside[last] = ODD[rng.integers(len(ODD))]
    return json.dumps(content).encode()


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
        return clear(status, printed, file if not records else "")
    if {name: c.tp for name, c in records[0].classes.items()} != {n: c.tp for n, c in right[records[0].case].classes.items()}:
        same_as_nnunet(records[0], changed, data)
    return None


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def mutated_checkpoint(rng, file):
    how = rng.integers(5)
    content = file.read_bytes()
    if how == 0:
        file.write_bytes(content[: rng.integers(0, len(content))])
    elif how == 1:
        file.write_bytes(flipped(rng, content))
    elif how == 2:  # a member is missing, or is another's
        with zipfile.ZipFile(file) as old:
            members = {name: old.read(name) for name in old.namelist()}
        name = str(rng.choice(list(members)))
        members[name] = members[str(rng.choice(list(members)))][: rng.integers(0, 2000)]
        with zipfile.ZipFile(file, "w") as new:
            for key, value in members.items():
                new.writestr(key, value)
    else:
        state = torch.load(file, weights_only=False)
        weights = state["network_weights"]
        key = str(rng.choice(list(weights)))
        changes = [
            lambda: state.pop(str(rng.choice(list(state)))),
            lambda: state.update({str(rng.choice(list(state))): ODD[rng.integers(len(ODD))]}),
            lambda: weights.pop(key),
            lambda: weights.update({key: ODD[rng.integers(len(ODD))]}),
            lambda: weights.update({key: weights[key] * float("nan")}),
            lambda: weights.update({key: weights[key] * 1e38 * 1e38}),
            lambda: weights.update({key: weights[key].to(torch.complex64)}),
            lambda: weights.update({key: weights[key][..., None]}),
            lambda: weights.update({f"{key}.x": weights.pop(key)}),
            lambda: state.update(network_weights={f"module.{k}": v for k, v in weights.items()}),
            lambda: state.update(network_weights={f"_orig_mod.{k}": v for k, v in weights.items()}),
            lambda: state.update(network_weights={k: v.half() for k, v in weights.items()}),
            lambda: state["init_args"].pop(str(rng.choice(list(state["init_args"])))),
            lambda: state["init_args"].update(configuration=ODD[rng.integers(len(ODD))]),
            lambda: state.update(ima=ODD[rng.integers(len(ODD))]),
            lambda: state.update(ima={"settings": {}, "ledger": ODD[rng.integers(len(ODD))], "history": [{}]}),
        ]
        changes[rng.integers(len(changes))]()
        torch.save(state, file)


def fuzz_checkpoint(base, folder, rng):
    """The checkpoint of a model is changed; it is evaluated, exported, and its margins are asked for."""
    _, model, data, right = base
    changed = shutil.copytree(model, folder / "model")
    file = changed / "fold_0" / "checkpoint_final.pth"
    mutated_checkpoint(rng, file)
    status, printed = evaluate(changed, data, folder / "out", "--limit", "1")
    if status:
        clear(status, printed, file)
    else:
        record = found(folder / "out")[0]
        if {name: c.tp for name, c in record.classes.items()} != {n: c.tp for n, c in right[record.case].classes.items()}:
            same_as_nnunet(record, changed, data)
    exported, printed = called("export", changed, "-o", folder / "exported")
    assert (exported == 0) == (folder / "exported").exists()
    if exported:
        clear(exported, printed, "checkpoint")
    else:
        assert status == 0, "exported what cannot be evaluated"
    assert called("margins", changed)[0] in (0, 2)


# --- settings ------------------------------------------------------------------------------------------------------------


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


# --- records -------------------------------------------------------------------------------------------------------------


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
            import traceback

            faults.append(f"--- input {number}: {type(error).__name__}: {str(error)[-1500:]}\n{traceback.format_exc()[-800:]}")
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
    assert names and Failure  # the helpers of these tests
    for record in right.values():
        same_as_nnunet(record, model, data)
