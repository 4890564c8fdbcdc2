"""``ima-seg doctor``: is this environment fit for training and evaluation, and if not, what to do about it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ima_seg.data.naming import FOLDER_VARIABLES
from ima_seg.errors import UserError
from ima_seg.nnunet.compat import SUPPORTED_NNUNET, check_nnunet_version, find_trainer

_REINSTALL = "pip install --force-reinstall --no-deps ima-seg"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table: what was looked at and what was found."""

    name: str
    value: str
    #: A note works, but is worth knowing; with what is wrong, training or evaluation will fail.
    state: Literal["ok", "note", "wrong"] = "ok"
    remedy: str = ""  # given whenever something is wrong


def ext_trainer_folder() -> Path:
    """The folder through which nnU-Net finds the trainers.

    An installed ima-seg adds it to ``nnUNet_extTrainer`` at each start of Python. Where Python does not process
    ``.pth`` files (``pip install --target`` with ``PYTHONPATH``), export it yourself.

    Raises:
        UserError: the folder is missing from the installation.
    """
    spec = importlib.util.find_spec("_ima_seg_nnunet")
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
    else:  # a checkout that was put on the path without an installation
        package = Path(__file__).parents[2] / "nnunet_trainers" / "discovery" / "_ima_seg_nnunet"
    folder = package / "trainers"
    if not folder.is_dir():
        raise UserError(f"folder {folder}, where nnU-Net finds the trainers, is missing; {_REINSTALL}")
    return folder


def run_doctor(console: Console | None = None) -> int:
    """Examine the environment and print the findings as a table, with one remedy for each thing that is wrong.

    Returns:
        0 when everything is fine, 1 when something is wrong.
    """
    console = console or Console()
    findings = examine()
    folded = [Column(heading, overflow="fold") for heading in ("what", "found")]
    table = Table(Column("", no_wrap=True), *folded, title="ima-seg doctor", title_justify="left")
    style = {"ok": "green", "note": "yellow", "wrong": "bold red"}
    for finding in findings:
        table.add_row(f"[{style[finding.state]}]{finding.state}[/]", escape(finding.name), escape(finding.value))
    console.print(table)
    for finding in findings:
        if finding.remedy:
            console.print(f"{finding.name}: remedy: {finding.remedy}", soft_wrap=True, markup=False, highlight=False)
    wrong = sum(finding.state == "wrong" for finding in findings)
    console.print(f"{wrong} of {len(findings)} checks found something wrong." if wrong else "Everything is fine.")
    return 1 if wrong else 0


def examine() -> list[Finding]:
    """All findings, in the order of the table. Prints nothing."""
    checks = (_versions, _torch, _compile, _search_path, _trainers, _folders, _settings)
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    yield _version_of("ima-seg", "pip install ima-seg")
    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")
    try:
        yield _nnunet_location(f"{check_nnunet_version()} (supported: {SUPPORTED_NNUNET})")
    except UserError as error:
        found, _, remedy = str(error).partition("; ")
        yield Finding("nnU-Net", found, "wrong", remedy)
    yield _version_of("monai", 'pip install "monai>=1.4"')
    yield from _wrapper()


def _wrapper() -> Iterator[Finding]:
    """MONAI's bundles of nnU-Net models build the network as nnU-Net before 2.8 did, which took other arguments."""
    monai, nnunet = importlib.util.find_spec("monai"), importlib.util.find_spec("nnunetv2")
    if monai is None or monai.origin is None or nnunet is None or nnunet.origin is None:
        return
    wrapper = Path(monai.origin).parent / "apps" / "nnunet" / "nnunet_bundle.py"
    trainer = Path(nnunet.origin).parent / "training" / "nnUNetTrainer" / "nnUNetTrainer.py"
    sources = [file.read_text(encoding="utf-8") if file.is_file() else "" for file in (wrapper, trainer)]
    texts = ["".join(source.split()) for source in sources]
    calls = ("build_network_architecture(configuration_manager.", "build_network_architecture(plans_manager")
    if all(call in text for call, text in zip(calls, texts, strict=True)):
        value = (
            "MONAI's wrapper of nnU-Net models (monai.apps.nnunet) does not work with this nnU-Net; use nnU-Net itself"
        )
        yield Finding("nnunet_bundle", value, "note")


def _version_of(distribution: str, remedy: str) -> Finding:
    try:
        return Finding(distribution, importlib.metadata.version(distribution) + _editable(distribution))
    except importlib.metadata.PackageNotFoundError:
        return Finding(distribution, "not installed", "wrong", remedy)


def _editable(distribution: str) -> str:
    """`` (editable)`` if the distribution was installed so, else an empty string."""
    text = importlib.metadata.distribution(distribution).read_text("direct_url.json")
    return " (editable)" if text and json.loads(text).get("dir_info", {}).get("editable") else ""


def _nnunet_location(version: str) -> Finding:
    spec = importlib.util.find_spec("nnunetv2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        return Finding("nnU-Net", f"{version}, but cannot be imported", "wrong", "reinstall nnunetv2")
    if not Path(folders[0], "training", "nnUNetTrainer", "nnUNetTrainer.py").is_file():
        value = f"{version}, hidden by the folder {folders[0]}, which is not nnU-Net"
        remedy = f"remove {folders[0]} (a leftover of another package or a copied trainer), then reinstall nnunetv2"
        return Finding("nnU-Net", value, "wrong", remedy)
    return Finding("nnU-Net", f"{version}{_editable('nnunetv2')} in {folders[0]}")


def _torch() -> Iterator[Finding]:
    import torch

    from ima_seg.attacks.network import resolve_precision
    from ima_seg.ops.backend import ENVIRONMENT_VARIABLE, describe_backend

    version = torch.__version__
    if version.startswith("2.9."):
        value = f"{version}: the 2.9 series slows 3D convolutions down in mixed precision"
        yield Finding("PyTorch", value, "wrong", 'pip install "torch>=2.5,!=2.9.*"')
    else:
        yield Finding("PyTorch", version)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        device = torch.device("cuda")
        yield Finding("device", f"cuda ({names})")
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
        yield Finding("device", "mps")
    else:
        blind = f": PyTorch is built for CUDA {torch.version.cuda} but sees no GPU" if torch.version.cuda else ""
        yield Finding("device", f"cpu{blind}; train with -device cpu", "note")
    dtype = resolve_precision("auto", device)
    bf16 = "native" if dtype is torch.bfloat16 else "not native"
    yield Finding("bfloat16", f"{bf16}; the search computes in {str(dtype or torch.float32).removeprefix('torch.')}")
    try:
        yield Finding("attack ops", describe_backend(device))
    except UserError as error:
        yield Finding("attack ops", str(error), "wrong", f"unset {ENVIRONMENT_VARIABLE}")


def _compile() -> Iterator[Finding]:
    import torch

    value = os.environ.get("nnUNet_compile")
    shown = "not set" if value is None else f"nnUNet_compile={value}"
    triton = importlib.util.find_spec("triton") is not None
    # nnU-Net never compiles on the CPU, on mps and on Windows, whatever the variable says.
    wanted = value is None or value.lower() in ("true", "1", "t")
    compiles = wanted and torch.cuda.is_available() and os.name != "nt"
    if compiles and not triton:
        remedy = "pip install triton, or export nnUNet_compile=f"
        yield Finding("torch.compile", f"on ({shown}), but Triton is missing", "wrong", remedy)
    else:
        yield Finding("torch.compile", f"{'on' if compiles else 'off'} in training ({shown})")
    if triton:
        found = next(iter(importlib.metadata.distributions(name="triton")), None)
        yield Finding("Triton", found.version if found else "installed")
    else:
        yield Finding("Triton", "not installed; the plain PyTorch operations are used", "note")


def _search_path() -> Iterator[Finding]:
    value = os.environ.get("nnUNet_extTrainer", "")
    entries = [entry for entry in value.split(os.pathsep) if entry.strip()]
    try:
        ours = str(ext_trainer_folder())
    except UserError as error:
        yield Finding("nnUNet_extTrainer", str(error), "wrong", _REINSTALL)
        return
    if os.path.realpath(ours) not in map(os.path.realpath, entries):
        remedy = f"export nnUNet_extTrainer={os.pathsep.join([*entries, ours])}"
        yield Finding("nnUNet_extTrainer", f"{value or 'not set'}: names no folder of ima-seg", "wrong", remedy)
        return
    yield Finding("nnUNet_extTrainer", value)
    for entry in entries:
        if not os.path.isdir(entry):
            yield Finding("nnUNet_extTrainer", f"{entry} does not exist; nnU-Net skips it", "note")


def _trainers() -> Iterator[Finding]:
    try:
        with _quiet():
            package: Any = importlib.import_module("nnunet_trainers")
        named = {name: getattr(package, name) for name in package.__all__}
    except (ImportError, AttributeError) as error:
        yield Finding("trainers", f"cannot be imported: {error}", "wrong", _REINSTALL)
        return
    yield from (_find_trainer(name, own) for name, own in named.items() if isinstance(own, type))


def _find_trainer(name: str, own: type) -> Finding:
    try:
        with _quiet():
            found = find_trainer(name)
    except Exception as error:  # the lookup runs every module of every folder in nnUNet_extTrainer, whoever wrote it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = "see nnUNet_extTrainer above; take out folders whose modules cannot be imported"
        return Finding(name, f"nnU-Net does not find it: {reason}", "wrong", remedy)
    where = getattr(sys.modules.get(found.__module__), "__file__", None) or f"module {found.__module__}"
    if found is own:
        return Finding(name, f"found by nnU-Net, defined in {where}")
    remedy = "remove or rename that copy: nnU-Net looks in its own package first, then in nnUNet_extTrainer in order"
    return Finding(name, f"nnU-Net finds another class of this name, in {where}", "wrong", remedy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow what nnU-Net and its dependencies print while they are imported and searched."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _folders() -> Iterator[Finding]:
    for name in FOLDER_VARIABLES:
        value = os.environ.get(name)
        if not value:
            yield Finding(name, "not set", "wrong", f"mkdir -p ~/{name} && export {name}=~/{name}")
        elif not os.path.exists(value):
            yield Finding(name, f"{value} does not exist", "wrong", f"mkdir -p {value}, or correct {name}")
        elif not os.path.isdir(value):
            yield Finding(name, f"{value} is not a folder", "wrong", f"let {name} name a folder")
        elif os.access(value, os.W_OK | os.X_OK):
            yield Finding(name, value)
        elif name == "nnUNet_raw":
            yield Finding(name, f"{value} (read-only: enough for training, not for adding datasets)", "note")
        else:
            yield Finding(name, f"{value} is not writable", "wrong", f"chmod u+rwx {value}, or let {name} name another")


def _settings() -> Iterator[Finding]:
    from ima_seg.methods.registry import METHODS, preset
    from ima_seg.methods.settings import ENVIRONMENT_VARIABLE, load_settings

    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if not value:
        yield Finding(ENVIRONMENT_VARIABLE, "not set; the trainers' own settings are used")
        return
    errors = []
    for base in map(preset, METHODS):
        try:
            load_settings(base)
        except UserError as error:
            errors.append(str(error))
        else:
            yield Finding(ENVIRONMENT_VARIABLE, f"{value} (valid for {base.section})")
            return
    yield Finding(ENVIRONMENT_VARIABLE, errors[0], "wrong", f"correct the file, or unset {ENVIRONMENT_VARIABLE}")
