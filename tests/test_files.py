"""Files that are read at all: regular, of a size and depth that somebody meant."""

import os
import time

import pytest

from ima_seg import files
from ima_seg.errors import UserError
from ima_seg.files import read_json, require_regular
from ima_seg.weights import load_tensors


def read(path):
    return read_json(path, missing="does not exist", remedy="write it again")


def test_only_regular_files_are_read(tmp_path):
    """A pipe without a writer would be waited for, for ever."""
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_text("{}")
    (tmp_path / "link").symlink_to(file)
    started = time.monotonic()
    for path, kind in ((pipe, "a pipe"), (tmp_path, "a folder"), (files.Path("/dev/zero"), "device")):
        for reader in (require_regular, read, load_tensors):
            with pytest.raises(UserError, match=f"^{path} is .*{kind}.*not a regular file"):
                reader(path)
    assert time.monotonic() - started < 5
    require_regular(tmp_path / "link")
    require_regular(tmp_path / "none")
    with pytest.raises(UserError, match=r"none does not exist$"):
        read(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":' * 30_000 + "1" + "}" * 30_000, "nested too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "more than 100 levels"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[1]", "no JSON object"),
        ('{"a": "' + "x" * 2000 + '"}', "has 2009 bytes"),
    ],
)
def test_json_that_nobody_meant_is_refused_in_a_line(tmp_path, monkeypatch, text, reason):
    if reason.startswith("has"):
        monkeypatch.setattr(files, "LARGEST_JSON", 1000)
    path = tmp_path / "plans.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"plans\.json .*{reason}.*; write it again") as refused:
        read(path)
    assert len(str(refused.value)) < 400


def test_nested_json_is_read(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text('{"a":' * 90 + "1" + "}" * 90)
    assert read(path)["a"]["a"]
