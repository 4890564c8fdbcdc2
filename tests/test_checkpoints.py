"""Mutated, damaged and hostile checkpoints and archives: the right weights or one line, and no effect."""

import io
import os
import pickle
import random
import re
import shutil
import tarfile
import zipfile

import pytest
import torch

from ima_seg.data.archives import unpack_single_folder
from ima_seg.nnunet.export import export_model
from ima_seg.nnunet.folder import load_model
from ima_seg.nnunet.margins import read_margins
from tests.folder_data import (
    CHECKPOINT,
    LEFT_OUT,
    VALUES,
    changed,
    outcome,
    paths,
)


@pytest.fixture
def model(sound, tmp_path):
    """A copy of it."""
    return shutil.copytree(sound[0], tmp_path / "model")


def use(model, output):
    """All that reads checkpoints: loading, margins, export."""
    model_loaded = load_model(model)
    model_loaded.card()
    (fold,), _ = read_margins(model)
    export_model(model, output)
    return fold


def test_mutated_checkpoints_are_read_rightly_or_refused_in_a_line(sound, model, tmp_path):
    content = torch.load(model / CHECKPOINT, weights_only=False)
    weight = next(iter(content["network_weights"]))
    wrong = [torch.tensor([1.0]), torch.tensor(float("nan")), torch.tensor([1j]), torch.ones(2).to_sparse(), b"x"]
    every = [
        (path, value)
        for path in [*paths(content), *((*p, "new") for p in (("ima",), ("network_weights",)))]
        if path[:2] in {("network_weights", weight), ("network_weights", "new")} or path[0] != "network_weights"
        or len(path) == 1
        for value in [*VALUES, *wrong]
    ]  # fmt: skip
    refused, count = 0, 200
    for index, (path, value) in enumerate(random.Random(3).sample(every, count)):
        if value is LEFT_OUT and path[-1] == "new":
            continue
        torch.save(changed(content, path, value), model / CHECKPOINT)
        message = outcome(lambda index=index: use(model, tmp_path / f"out{index}"), "model")
        if message is None:
            found = load_model(tmp_path / f"out{index}").networks[0].state_dict()
            assert all(torch.equal(v, found[k]) for k, v in sound[1].networks[0].state_dict().items()), (path, value)
        refused += message is not None
    assert count // 3 < refused < count


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.pop("network_weights"), "is without 'network_weights'"),
        (lambda c: c.update(network_weights=None), "network_weights is None: input should be a valid dict"),
        (lambda c: c.update(network_weights={}), "network_weights is {}"),
        (lambda c: c["network_weights"].popitem(), "does not fit the network of .*1 weights missing"),
        (lambda c: c.update(network_weights={f"x.{k}": v for k, v in c["network_weights"].items()}), "not of this net"),
        (lambda c: c.pop("init_args"), "is without 'init_args'"),
        (lambda c: c["init_args"].update(configuration="4d"), "'4d', which the checkpoint was trained for"),
        (lambda c: c.update(trainer_name="nnUNetTrainerXYZ"), "was trained by nnUNetTrainerXYZ, which this install"),
        (lambda c: c.update(trainer_name="torch"), "was trained by torch, which this"),
        (lambda c: c.update(trainer_name=["a"]), r"trainer_name is \['a'\]"),
        (lambda c: c.update(inference_allowed_mirroring_axes=(0, 7)), "allowed_mirroring_axes is"),
        (lambda c: c["ima"]["ledger"].pop("seen"), "margin ledger is without 'seen'"),
        (lambda c: c["ima"]["ledger"].update(margin=[0.1]), "columns of different lengths"),
        (lambda c: c["ima"]["settings"].update(delta=-1.0), "delta is -1.0"),
        (lambda c: c["ima"].update(history=None), "ima.history is None"),
    ],
)
def test_what_is_wrong_in_a_checkpoint_is_named(model, change, expected):
    content = torch.load(model / CHECKPOINT, weights_only=False)
    change(content)
    torch.save(content, model / CHECKPOINT)
    message = outcome(lambda: load_model(model), "model")
    assert message is not None and re.search(expected, message), message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j])
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_are_not_finite_and_real_are_neither_evaluated_nor_exported(model, tmp_path, value, legacy):
    content = torch.load(model / CHECKPOINT, weights_only=False)
    name = next(iter(content["network_weights"]))
    content["network_weights"][name] = content["network_weights"][name] * value
    torch.save(content, model / CHECKPOINT, _use_new_zipfile_serialization=not legacy)
    for action in (lambda: load_model(model), lambda: export_model(model, tmp_path / "out")):
        assert re.search(rf"{name} holds .*(NaN|complex)", outcome(action, "checkpoint_final.pth"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.double() * 1e300, "NaN or infinite"),
        (lambda w: (w * 9).to(torch.uint8), "uint8 instead of .*float32"),
    ],
)
def test_weights_that_the_network_cannot_compute_with_are_refused(model, change, message):
    content = torch.load(model / CHECKPOINT, weights_only=False)
    content["network_weights"] = {name: change(value) for name, value in content["network_weights"].items()}
    torch.save(content, model / CHECKPOINT)
    assert re.search(message, outcome(lambda: load_model(model), "checkpoint_final.pth"))


def test_what_cannot_be_loaded_is_not_exported(model, tmp_path):
    content = torch.load(model / CHECKPOINT, weights_only=False)
    content["network_weights"].pop(next(iter(content["network_weights"])))
    torch.save(content, model / CHECKPOINT)
    assert "does not fit the network" in outcome(lambda: export_model(model, tmp_path / "out"), "checkpoint_final.pth")
    assert not (tmp_path / "out").exists()


def test_prefixes_of_wrappers_are_left_out(model, sound, tmp_path):
    content = torch.load(model / CHECKPOINT, weights_only=False)
    content["network_weights"] = {f"module._orig_mod.{k}": v for k, v in content["network_weights"].items()}
    torch.save(content, model / CHECKPOINT, _use_new_zipfile_serialization=False)
    for folder in (model, export_model(model, tmp_path / "out")):
        found = load_model(folder).networks[0].state_dict()
        assert all(torch.equal(v, found[k]) for k, v in sound[1].networks[0].state_dict().items())


def test_bit_flips_change_nothing_or_are_found(sound, model):
    """In any byte of a checkpoint: members have sums, which torch itself does not compare."""
    whole, generator = (model / CHECKPOINT).read_bytes(), random.Random(4)
    expected, found = sound[1].networks[0].state_dict(), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (model / CHECKPOINT).write_bytes(damaged)
        loaded = []
        if outcome(lambda loaded=loaded: loaded.append(load_model(model)), "checkpoint_final.pth") is None:
            weights = loaded[0].networks[0].state_dict()
            assert all(torch.equal(value, weights[key]) for key, value in expected.items())
        else:
            found += 1
    assert found > 20


def test_checkpoints_without_sums_are_read(model):
    content = torch.load(model / CHECKPOINT, weights_only=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, model / CHECKPOINT)
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_model(model).trainer == "nnUNetTrainer"


class Acts:
    """Runs a shell command when it is unpickled."""

    def __init__(self, mark, how=os.system):
        self.mark, self.how = mark, how

    def __reduce__(self):
        return self.how, (f"touch {self.mark}",)


def hostile_archives(model, mark):
    """Checkpoints that try to act, or to unpack to more than they are."""
    content = torch.load(model / CHECKPOINT, weights_only=False)
    for where in ("x", "network_weights", "ima", "trainer_name"):
        for legacy in (False, True):
            file = io.BytesIO()
            torch.save({**content, where: Acts(mark)}, file, _use_new_zipfile_serialization=not legacy)
            yield file.getvalue()
    yield pickle.dumps(Acts(mark))
    yield pickle.dumps({**content, "x": Acts(mark)}, protocol=4)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("archive/data.pkl", "../../out", "archive/data/0"):
            archive.writestr(name, b"\0" * (50 << 20))
    yield bomb.getvalue()


def test_hostile_checkpoints_have_no_effect(model, tmp_path):
    mark = tmp_path / "acted"
    for data in list(hostile_archives(model, mark)):
        (model / CHECKPOINT).write_bytes(data)
        before = sorted(tmp_path.rglob("*"))
        assert outcome(lambda: use(model, tmp_path / "out"), "checkpoint_final.pth"), data[:100]
        assert sorted(tmp_path.rglob("*")) == before and not mark.exists()


def tar(path, members):
    with tarfile.open(path, "w:gz", compresslevel=9) as archive:
        for name, size, kind in members:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = size, kind, "/etc/passwd"
            archive.addfile(member, io.BytesIO(b"\0" * size))
    return path


@pytest.mark.parametrize(
    "members",
    [
        [("a/x", 1, tarfile.REGTYPE), ("../out", 1, tarfile.REGTYPE)],
        [("a/../../out", 1, tarfile.REGTYPE)],
        [("/tmp/out", 1, tarfile.REGTYPE)],
        [("a/x", 0, tarfile.SYMTYPE), ("a/x/y", 1, tarfile.REGTYPE)],
        [("a/x", 0, tarfile.LNKTYPE)],
        [("a/x", 0, tarfile.FIFOTYPE)],
        [("a/x", 0, tarfile.CHRTYPE)],
        [("a/x", 60 << 20, tarfile.REGTYPE)],
    ],
)
def test_hostile_archives_are_not_unpacked(tmp_path, members):
    archive, into = tar(tmp_path / "task.tar.gz", members), tmp_path / "in" / "to"
    into.mkdir(parents=True)
    assert outcome(lambda: unpack_single_folder(archive, into), "task.tar.gz")
    assert not any(into.iterdir()) and sorted(p.name for p in tmp_path.iterdir()) == ["in", "task.tar.gz"]
