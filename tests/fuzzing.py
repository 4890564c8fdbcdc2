"""Files changed at random, and the command line called under a limit of time, for the tests that mutate inputs."""

import gzip
import io
import json
import signal
import struct
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import torch

from ima_seg.cli import main

#: Seconds that one input may take.
PATIENCE = 60


#: What replaces a value in JSON.
ODD = [
    None, True, 0, -1, 1, 3, 1e39, 2**70, "", "x", "0",
    "../../etc", "os.system", [], [0], [[1]], {}, {"x": 1}, "é\x1b[2J",
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


def flipped(rng, content, low=0, high=None):
    """``content`` with one to three bits of it flipped."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(low, high or len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


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
    changed[offset : offset + struct.calcsize(kind)] = struct.pack(
        f"<{kind}", np.float32(value) if kind == "f" else value
    )
    return gzip.compress(bytes(changed))


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
