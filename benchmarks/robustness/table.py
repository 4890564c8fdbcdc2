"""IMA beside every other way to train, from a data set to the table and the figure.

    python -m benchmarks.robustness.table 4 -c 2d --profile quick -w WORK [--methods ima pgdat-5 ...] [--folds 0]

Trains every method on the same folds, for the same number of updates, from the same weights (``--pretrained``) or from
scratch, and evaluates each on the validation cases of its fold with ``ima-seg evaluate``, by the paper's protocol (2D:
budget per slice, PGD, mean Dice per slice with foreground and pooled Dice) and by ours (whole volumes, the worst case
of PGD, APGD, SegPGD and Square, L2 and L-infinity). ``methods.py`` says what is trained and how long.

Every stage goes on where it stopped: trainings and evaluations live in WORK, and what they gave is stored in
``benchmarks/results/robustness/DATASET_CONFIGURATION_PROFILE/METHOD_foldN.json``, of which table and figure are made
(``--table`` makes only them). A stored result is taken as it is if settings, plans, versions and sources are as they
are now; otherwise the script says what differs and stops; ``--rerun METHOD`` makes it anew. Calls with different
``--methods`` may run side by side; their seconds are then those of a shared machine.

One file: the stages of one command, in the order in which it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch

import ima_seg
from benchmarks.robustness.methods import (
    MATCHED,
    METHODS,
    OURS,
    PROFILES,
    matched_iterations,
    method_of,
    plans_of,
    protocols_of,
    settings_of,
)
from benchmarks.robustness.report import report
from benchmarks.shared.measuring import RESULTS, ROOT, again, command_line, provenance
from ima_seg.evaluate.records import Record, read_lines
from ima_seg.files import file_hash, write_text
from ima_seg.nnunet.checkpoint import KEY, METHOD_KEY, read_checkpoint
from ima_seg.nnunet.plans import preprocessed_folder, write_plans

STORE = RESULTS / "robustness"
#: What does not decide how a training or an evaluation turns out, of our own sources.
ASIDE = ("ima_seg/cli/*", "ima_seg/data/*", "ima_seg/evaluate/report/*", "ima_seg/evaluate/measure/tables.py",
         "ima_seg/methods/plots.py", "ima_seg/nnunet/doctor.py")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One method on one fold."""

    dataset: str
    configuration: str
    profile: str
    method: str
    fold: str
    work: Path
    device: str
    pretrained: Path | None
    iterations: int | None = None

    @property
    def folder(self) -> Path:
        """Of everything that the training and its evaluations leave."""
        return self.work / f"{self.dataset}_{self.configuration}_{self.profile}" / f"{self.method}_fold{self.fold}"

    @property
    def stored(self) -> Path:
        """The result."""
        return store_folder(self.dataset, self.configuration, self.profile) / f"{self.method}_fold{self.fold}.json"

    @property
    def plans(self) -> str:
        """Name of the plans."""
        return plans_of(PROFILES[self.profile], self.configuration)[0]

    @property
    def model(self) -> Path:
        """The model folder of the training."""
        trainer = method_of(self.method).trainer
        return self.folder / "results" / self.dataset / f"{trainer}__{self.plans}__{self.configuration}"

    def identity(self) -> dict[str, Any]:
        """Everything that must be the same for two results to stand in one table."""
        profile = PROFILES[self.profile]
        plans = preprocessed_folder(self.dataset) / f"{self.plans}.json"
        return {
            "trainer": method_of(self.method).trainer,
            "settings": settings_of(self.method, profile, self.iterations),
            "protocols": protocols_of(self.configuration, profile),
            "profile": digest([profile.training, profile.steps, protocols_of(self.configuration, profile)]),
            "plans": digest(json.loads(plans.read_text())["configurations"][self.configuration]),
            "split": digest(split(self.dataset, self.fold)),
            "pretrained": None if self.pretrained is None else file_hash(self.pretrained)[:12],
            "versions": {name: importlib.metadata.version(name) for name in ("ima-seg", "nnunetv2", "torch")},
            "sources": sources(),
        }


def split(dataset: str, fold: str) -> dict[str, list[str]]:
    """Training and validation cases of a fold.

    Raises:
        SystemExit: there is no such fold.
    """
    file = preprocessed_folder(dataset) / "splits_final.json"
    folds = json.loads(file.read_text())
    if not fold.isdigit() or int(fold) >= len(folds):
        sys.exit(f"there is no fold {fold!r} in {file}, only 0 to {len(folds) - 1}")
    chosen: dict[str, list[str]] = folds[int(fold)]
    return chosen


def digest(value: Any) -> str:
    """Short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@cache
def sources() -> str:
    """Short hash of our sources, but those that decide nothing."""
    files = sorted(file for folder in ("ima_seg", "nnunet_trainers") for file in (ROOT / folder).rglob("*.py"))
    names = [str(file.relative_to(ROOT)) for file in files]
    kept = [name for name in names if not any(fnmatch(name, pattern) for pattern in ASIDE)]
    return digest([(name, (ROOT / name).read_text()) for name in kept])


def store_folder(dataset: str, configuration: str, profile: str) -> Path:
    """Where the results of a table lie."""
    return STORE / f"{dataset}_{configuration}_{profile}"


def stored_name(dataset: str, configuration: str, profile: str) -> str:
    """The name of a data set, given by id or name, of which results are stored; the data themselves are not needed.

    Raises:
        SystemExit: there are no results of it.
    """
    ending = f"_{configuration}_{profile}"
    names = sorted(folder.name.removesuffix(ending) for folder in STORE.glob(f"Dataset*{ending}"))
    found = [name for name in names if dataset == name or dataset.zfill(3) == name[7:10]]
    if len(found) != 1:
        there = ", ".join(names) or "none"
        sys.exit(
            f"no results of data set {dataset!r}, {configuration}, {profile} in {STORE}; there are those of: {there}"
        )
    return found[0]


def differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same, named."""
    return [f"{key} was {stored.get(key)!r}, is {now[key]!r}" for key in now if stored.get(key) != now[key]]


def train(job: Job, identity: dict[str, Any]) -> None:
    """Train, or go on; a finished training is left alone.

    Raises:
        SystemExit: the folder holds a training of other settings.
    """
    fold = job.model / f"fold_{job.fold}"
    note = job.folder / "identity.json"
    if note.is_file() and (changed := differences(json.loads(note.read_text()), identity)):
        sys.exit(
            f"{job.folder} holds a training of another kind ({'; '.join(changed)}); run with --rerun {job.method}, "
            "or give another folder with -w"
        )
    if (fold / "checkpoint_final.pth").is_file():
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(identity, indent=2) + "\n")
    settings = job.folder / "settings.toml"
    write_text(settings, "".join(f"{key} = {json.dumps(value)}\n" for key, value in identity["settings"].items()))
    environment = {**os.environ, "nnUNet_results": str(job.folder / "results"), "IMA_CONFIG": str(settings)}
    began = time.monotonic()
    command = again(__file__, *sys.argv[1:], "--train", job.configuration, job.method, job.fold)
    call(command, job.folder / "train.log", environment)
    print(f"  {job.method}: trained in {time.monotonic() - began:.0f} s", flush=True)


def trainer_of(job: Job, go_on: bool = False) -> Any:
    """nnU-Net's trainer object."""
    from nnunetv2.run.run_training import get_trainer_from_args

    return get_trainer_from_args(
        job.dataset, job.configuration, int(job.fold), method_of(job.method).trainer, job.plans,
        continue_training=go_on, device=torch.device(job.device),
    )  # fmt: skip


def train_here(job: Job) -> None:
    """Train in this process, whose environment names settings and folders."""
    from nnunetv2.run.run_training import maybe_load_checkpoint

    go_on = (job.model / f"fold_{job.fold}" / "checkpoint_latest.pth").is_file()
    trainer = trainer_of(job, go_on)
    maybe_load_checkpoint(trainer, go_on, False, None)
    if job.pretrained is not None and not go_on:
        if not trainer.was_initialized:
            trainer.initialize()
        weights = torch.load(job.pretrained, map_location=trainer.device, weights_only=False)["network_weights"]
        getattr(trainer.network, "_orig_mod", trainer.network).load_state_dict(weights)
    trainer.run_training()


def validation_folder(job: Job) -> Path:
    """Links to images and labels of the fold's validation cases."""
    raw, folder = Path(os.environ["nnUNet_raw"]) / job.dataset, job.folder / "validation"
    for kind, ending in (("imagesTr", "_[0-9][0-9][0-9][0-9].*"), ("labelsTr", ".*")):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for case in split(job.dataset, job.fold)["val"]:
            for file in (raw / kind).glob(glob.escape(case) + ending):
                link = folder / kind / file.name
                if not link.exists():
                    link.symlink_to(file.resolve())
    return folder


def evaluate(job: Job) -> dict[str, list[dict[str, Any]]]:
    """The records of each protocol, evaluated as far as they are missing."""
    cases = validation_folder(job)
    program = shutil.which("ima-seg", path=str(Path(sys.executable).parent)) or "ima-seg"
    result = {}
    for protocol, arguments in protocols_of(job.configuration, PROFILES[job.profile]).items():
        out, began = job.folder / protocol, time.monotonic()
        command = [program, "evaluate", "-m", str(job.model), "-f", job.fold, "-i", str(cases / "imagesTr"),
                   "-gt", str(cases / "labelsTr"), "-o", str(out), "-device", job.device, "--resume"]  # fmt: skip
        call([*command, *arguments], job.folder / f"{protocol}.log")
        print(f"  {job.method}: {protocol} in {time.monotonic() - began:.0f} s", flush=True)
        result[protocol] = [slim(record) for record in read_lines(sorted(out.glob("records*.jsonl")), Record)]
    return result


def call(command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
    """Run a command whose output goes to the end of ``log``.

    Raises:
        SystemExit: it failed.
    """
    with log.open("a") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"this failed, see the end of {log}; the same call goes on from here: {' '.join(command)}")


def slim(record: Record) -> dict[str, Any]:
    """What the table needs of a record."""
    return {
        "case": record.case, "attack": record.attack, "norm": record.norm, "unit": record.unit, "eps": record.eps,
        "dice": record.dice, "nsd": record.nsd, "hd95_mm": record.hd95_mm,
        "slice_dice": None if record.slice_dice is None else [record.slice_dice.mean, record.slice_dice.slices],
        "voxels": {name: [each.tp, each.fp, each.fn] for name, each in record.classes.items()},
    }  # fmt: skip


def cost(job: Job) -> dict[str, Any]:
    """Network passes and seconds of the whole training, from the history that its checkpoint holds."""
    checkpoint = read_checkpoint(job.model / f"fold_{job.fold}" / "checkpoint_final.pth")
    state = checkpoint.get(KEY) or checkpoint[METHOD_KEY]
    history = state["history"]
    mean = {key: sum(row[key] for row in history) / len(history) for key in
            ("forwards_per_sample", "gradients_per_sample", "training_passes_per_sample")}  # fmt: skip
    # Of a training pass, whose backward pass has the gradients of input and parameters, the forward is a third.
    gradients, forwards = mean["gradients_per_sample"] * 2 / 3, mean["forwards_per_sample"] / 3
    equivalent = mean["training_passes_per_sample"] + gradients + forwards
    return {**mean, "standard_passes_per_sample": equivalent, "epochs": len(history),
            "seconds": sum(row["seconds"] for row in history), "last_epoch": history[-1]}  # fmt: skip


def run(job: Job, rerun: bool) -> None:
    """Train, evaluate and store, as far as that is not done.

    Raises:
        SystemExit: the stored result is of another kind.
    """
    identity = job.identity()
    if rerun:
        job.stored.unlink(missing_ok=True)
        if job.folder.is_dir():
            shutil.rmtree(job.folder)
    if job.stored.is_file():
        changed = differences(json.loads(job.stored.read_text())["identity"], identity)
        if changed:
            sys.exit(f"{job.stored} is a result of another kind ({'; '.join(changed)}); run with --rerun {job.method}")
        return
    print(f"{job.configuration} {job.method} fold {job.fold}", flush=True)
    train(job, identity)
    protocols = evaluate(job)
    result = {
        "method": job.method, "fold": job.fold, "identity": identity, "cost": cost(job), "protocols": protocols,
        **provenance(__file__, torch.device(job.device)), "ima_seg": ima_seg.__version__,
        "command": command_line(__file__),
    }  # fmt: skip
    job.stored.parent.mkdir(parents=True, exist_ok=True)
    write_text(job.stored, json.dumps(result) + "\n")


def jobs(options: argparse.Namespace, dataset: str) -> Iterator[Job]:
    """All of them."""
    for configuration in options.configurations:
        for fold in options.folds:
            for method in options.methods:
                yield Job(dataset, configuration, options.profile, method, fold, options.work.resolve(),
                          options.device, options.pretrained)  # fmt: skip


def matched(job: Job) -> Job:
    """The job once more, for as much computation as ours took.

    Raises:
        SystemExit: ours is not stored yet.
    """
    ours = replace(job, method=OURS).stored
    if not ours.is_file():
        sys.exit(f"{ours} does not exist, so there is no computation to match; run with --methods {OURS} first")
    wanted, own = (json.loads(file.read_text()) for file in (ours, job.stored))
    iterations = matched_iterations(
        wanted["identity"]["settings"],
        wanted["cost"]["standard_passes_per_sample"],
        own["cost"]["standard_passes_per_sample"],
    )
    return replace(job, method=job.method + MATCHED, iterations=iterations)


def prepare(job: Job) -> None:
    """Write the profile's plans, and let nnU-Net split the data set if it has not yet."""
    name, changes = plans_of(PROFILES[job.profile], job.configuration)
    if changes:
        write_plans(job.dataset, "nnUNetPlans", name, **changes)
    if not (preprocessed_folder(job.dataset) / "splits_final.json").is_file():
        trainer_of(job).do_split()


def main() -> None:
    """Train, evaluate, store, and make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("-c", "--configurations", nargs="+", default=["2d"])
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument("-f", "--folds", nargs="+", default=["0"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("-w", "--work", type=Path, default=Path("robustness_work"))
    parser.add_argument("--pretrained", type=Path, help="checkpoint of a standard model that all trainings start from")
    parser.add_argument("--matched", action="store_true", help="train each once more for as much computation as IMA")
    parser.add_argument("--rerun", nargs="+", choices=list(METHODS), default=[], help="make these anew")
    parser.add_argument("--table", action="store_true", help="only make table and figure from what is stored")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pretrained is not None and not options.pretrained.is_file():
        sys.exit(f"checkpoint {options.pretrained} does not exist")
    dataset = (
        stored_name(options.dataset, options.configurations[0], options.profile)
        if options.table
        else preprocessed_folder(options.dataset).name
    )
    if options.train:
        configuration, method, fold = options.train
        train_here(Job(dataset, configuration, options.profile, method, fold, options.work.resolve(),
                       options.device, options.pretrained))  # fmt: skip
        return
    if not options.table:
        for job in jobs(options, dataset):
            prepare(job)
            run(job, job.method in options.rerun)
        for job in jobs(options, dataset) if options.matched else ():
            if job.method != OURS:
                run(matched(job), job.method in options.rerun)
    for configuration in options.configurations:
        report(store_folder(dataset, configuration, options.profile))


if __name__ == "__main__":
    main()
