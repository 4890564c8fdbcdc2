"""``evaluate``: models, images and labels in, records and report out; what ``ima-seg evaluate`` calls."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ima_seg.errors import UserError
from ima_seg.evaluate.collect import read_run
from ima_seg.evaluate.conditions import attack_names, check_settings, conditions
from ima_seg.evaluate.execution import Attacker
from ima_seg.evaluate.files import check_writable
from ima_seg.evaluate.ranks import Share, pick_device, share_out
from ima_seg.evaluate.records import Failure, Record, drop_half_line, read_lines
from ima_seg.evaluate.report import write_report
from ima_seg.evaluate.run import EvaluationSettings, ModelInfo, Run
from ima_seg.evaluate.sweep import Contestant, Sweep
from ima_seg.files import write_text
from ima_seg.model import resolve_precision
from ima_seg.nnunet.folder import SegmentationModel, load_model
from ima_seg.nnunet.inputs import CaseFiles, find_cases
from ima_seg.nnunet.margins import restore_ledger
from ima_seg.ops import describe_backend

_PACKAGES = ("ima-seg", "nnunetv2", "torch", "monai", "torchio", "numpy", "scipy", "nibabel", "SimpleITK")


def evaluate(
    models: Mapping[str, str | Path],
    images: str | Path,
    labels: str | Path,
    output: str | Path,
    settings: EvaluationSettings,
    *,
    folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    previous_stage: str | Path | None = None,
    device: str = "cuda",
    tile_batch: int | None = None,
    resume: bool = False,
    num_parts: int = 1,
    part_id: int = 0,
    trust: bool = False,
    command: str = "ima_seg.evaluate.evaluate(...)",
    console: Console | None = None,
) -> tuple[Path | None, int]:
    """Attack models on cases and write the report.

    Args:
        models: name in the report -> model folder; the first is what the others are compared with.
        images: folder of images in nnU-Net's naming.
        labels: folder of labels.
        output: folder of the evaluation; made if missing.
        settings: what to evaluate.
        folds: to average, of every model; default: all there are.
        checkpoint: file name in each fold.
        previous_stage: folder of the previous stage's segmentations, for cascades.
        device: ``cpu``, ``cuda`` or ``mps``.
        tile_batch: tiles that the network sees at once; default: the batch size of its training.
        resume: go on with an evaluation that was interrupted.
        num_parts: the cases are shared out over so many calls.
        part_id: which of them this is, from 0.
        trust: load checkpoints and plans that run code.
        command: for the report.
        console: where messages go.

    Returns:
        The report (``None`` as long as other parts are missing), and how many cases could not be evaluated.

    Raises:
        UserError: see the message. Mistakes in single cases do not raise; they are noted, and in the report.
    """
    if tile_batch is not None and tile_batch < 1:
        raise UserError(f"tile_batch is {tile_batch}; the network sees at least 1 tile at once")
    console = console or Console(stderr=True)
    out = Path(output)
    settings = settings.model_copy(update={"attacks": attack_names(settings.attacks), "eps": sorted(set(settings.eps))})
    with share_out(num_parts, part_id) as share:
        place = pick_device(device)
        loaded = {
            name: load_model(folder, folds=folds, checkpoint=checkpoint, device=place, trust=trust)
            for name, folder in models.items()
        }
        first = _compatible(loaded, settings, previous_stage)
        if {"disappear", "appear"} & set(settings.attacks) and not settings.targets:
            settings = settings.model_copy(update={"targets": list(first.classes)})
        check_settings(settings, models=list(loaded), classes=list(first.classes))
        dtype = resolve_precision(settings.precision, place)
        contestants = [
            Contestant(
                name,
                model,
                model.window(step_size=settings.step_size, mirroring=settings.mirroring, tile_batch=tile_batch),
                Path(previous_stage) if previous_stage and model.configuration.previous_stage_name else None,
            )
            for name, model in loaded.items()
        ]
        cases, problems = find_cases(Path(images), Path(labels), first.dataset_json, limit=settings.limit)
        run = _describe(
            loaded, settings, cases, images=images, labels=labels, device=place, dtype=dtype, command=command
        )
        _claim(out, run, share, resume=resume)
        records, failures = (out / f"{name}{share.suffix}.jsonl" for name in ("records", "failures"))
        drop_half_line(records)
        records.touch()
        if share.count > 1:
            # Parts may run on other machines, which the report then says.
            write_text(out / f"run{share.suffix}.json", run.model_dump_json(indent=1) + "\n")
        failures.unlink(missing_ok=True)
        share.wait()
        done = {record.key for record in read_lines(_record_files(out), Record)}
        sweep = Sweep(settings, contestants, Attacker(settings, place), out, records, failures, done)
        if share.index == 0:
            for problem in problems:
                sweep.fail(problem.case, problem.message)
        mine = share.of(cases)
        _work(sweep, mine, console)
        share.wait()
        report = write_report([out], out) if share.rank == 0 and _complete(out, run, share) else None
        share.wait()  # a rank that ends with an error before ends the others, too
    return report, len(sweep.failed)


def _compatible(
    loaded: Mapping[str, SegmentationModel], settings: EvaluationSettings, previous_stage: str | Path | None
) -> SegmentationModel:
    """The first model; all others segment the same classes in the same channels."""
    first = next(iter(loaded.values()))
    for name, model in loaded.items():
        if model.classes != first.classes or model.channels != first.channels:
            raise UserError(
                f"model {name!r} segments {model.classes} in {model.channels}, the first one {first.classes} in "
                f"{first.channels}; only models of one task can be compared"
            )
        if settings.budget == "slice" and not model.is_2d:
            raise UserError(f"budget 'slice' is for 2D models, {name!r} is {model.configuration_name}: --budget volume")
        if settings.unit == "hu" and not model.is_single_ct:
            raise UserError(f"unit 'hu' is for models of a single CT channel, {name!r} is not: --unit percent or rms")
        stage = model.configuration.previous_stage_name
        if stage is not None and previous_stage is None:
            raise UserError(
                f"model {name!r} is the second stage of a cascade; name the folder with the segmentations of {stage!r} "
                "with -prev_stage_predictions"
            )
        if settings.save_adversarial:
            check_writable(model)
    return first


def _describe(
    loaded: Mapping[str, SegmentationModel],
    settings: EvaluationSettings,
    cases: Sequence[CaseFiles],
    *,
    images: str | Path,
    labels: str | Path,
    device: torch.device,
    dtype: torch.dtype | None,
    command: str,
) -> Run:
    first = next(iter(loaded.values()))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Run(
        settings=settings,
        models=[_model_info(name, model) for name, model in loaded.items()],
        dataset=str(
            first.plans.plans.get("dataset_name") or first.dataset_json.get("name") or Path(images).parent.name
        ),
        classes=list(first.classes),
        images=str(Path(images).resolve()),
        labels=str(Path(labels).resolve()),
        cases=[case.case for case in cases],
        conditions={
            name: [(c.attack, c.eps, c.severity) for c in conditions(settings, model=name, models=list(loaded))]
            for name in loaded
        },
        channels=first.channels,
        modality_native_unit="HU" if first.is_single_ct else "original intensity units",
        command=command,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=name,
        versions={
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
            "passes of the attacks": str(dtype or torch.float32).removeprefix("torch."),
            "ops of the attacks": describe_backend(device),
        },
        machine=f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _model_info(name: str, model: SegmentationModel) -> ModelInfo:
    network = [float(value) for value in model.configuration.spacing]
    return ModelInfo(
        name=name,
        folder=str(model.folder),
        trainer=model.trainer,
        plans=str(model.plans.plans_name),
        configuration=model.configuration_name,
        folds=model.folds,
        checkpoint=model.files[-1].name,
        sha256=model.sha256(),
        patch_size=[int(size) for size in model.configuration.patch_size],
        spacing=network,
        mirror_axes=model.mirror_axes,
        parameters=sum(parameter.numel() for parameter in model.networks[0].parameters()),
        ima=None if model.ima is None else _margins(model.ima),
    )


def _margins(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of the training of nnUNetTrainerIMA, from its state in the checkpoint."""
    ledger = restore_ledger(state)
    return {
        "norm": state["settings"]["norm"],
        "delta": ledger.delta,
        "eps_max": ledger.eps_max,
        "margins": {case: record.margin for case, record in ledger.cases.items()},
        "history": [dict(row) for row in state["history"]],
    }


def _claim(out: Path, run: Run, share: Share, *, resume: bool) -> None:
    """Make ``out`` the folder of ``run``, or make sure that it is.

    Raises:
        UserError: it holds another evaluation, or one that was begun while ``resume`` is not set.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder with -o")
    if not (out / "run.json").is_file():
        if out.exists() and any(out.glob("records*.jsonl")):
            raise UserError(f"{out} holds records but no run.json; name another folder with -o")
        if share.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "run.json", run.model_dump_json(indent=1) + "\n")
        share.wait()
        return
    share.wait()
    there = read_run(out)
    differing = [
        f"{name} is {new!r}, there {old!r}"
        for name, new in run.settings.model_dump().items()
        if (old := there.settings.model_dump()[name]) != new
    ]
    differing += [
        f"{what} are others"
        for what, new, old in (
            ("the models", [(m.name, m.sha256) for m in run.models], [(m.name, m.sha256) for m in there.models]),
            ("the cases", run.cases, there.cases),
            ("the folders of images and labels", (run.images, run.labels), (there.images, there.labels)),
            ("the versions", *({k: r.versions[k] for k in ("ima-seg", "nnunetv2")} for r in (run, there))),
        )
        if new != old
    ]
    if differing:
        raise UserError(
            f"{out} holds an evaluation with other settings ({'; '.join(differing)}); results are never mixed, name "
            "another folder with -o"
        )
    # Files of the other parts of the same array are no reason to stop.
    own = f"records{share.suffix}.jsonl"
    begun = [
        path.name
        for path in _record_files(out)
        if path.name == own or not path.name.endswith(f"-of-{share.count}.jsonl")
    ]
    if begun and not resume:
        raise UserError(f"{out} holds this evaluation already, in part or whole; go on with --resume, or name another")


def _complete(out: Path, run: Run, share: Share) -> bool:
    """Whether every case of all parts is evaluated or noted as failed, so that this process is the last."""
    if share.count == share.world:
        return True
    failed = {failure.case for failure in read_lines(sorted(out.glob("failures*.jsonl")), Failure)}
    there = {(r.case, r.model, r.attack, r.eps, r.severity) for r in read_lines(_record_files(out), Record)}
    return all(
        case in failed or (case, model, *condition) in there
        for case in run.cases
        for model, wanted in run.conditions.items()
        for condition in wanted
    )


def _record_files(out: Path) -> list[Path]:
    return sorted(out.glob("records*.jsonl"))


@contextmanager
def _shown(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal; nothing elsewhere, where a line per case is written instead."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda what: progress.update(task, advance=1, description=escape(what))


def _work(sweep: Sweep, cases: Sequence[CaseFiles], console: Console) -> None:
    """Evaluate ``cases``, with the remaining time."""
    todo = [case for case in cases if not sweep.is_done(case.case)]
    if len(todo) < len(cases):
        console.print(f"{len(cases) - len(todo)} of {len(cases)} cases are done already")
    conditions = sum(len(sweep.conditions(contestant)) for contestant in sweep.contestants)
    began = time.monotonic()
    with _shown(len(todo) * conditions, console) as step:
        sweep.log = lambda text: console.print(escape(text), soft_wrap=True)
        sweep.step = step
        for number, case in enumerate(todo, 1):
            started = time.monotonic()
            sweep.evaluate(case)
            now = time.monotonic()
            left = (now - began) / number * (len(todo) - number)
            sweep.log(f"[{number}/{len(todo)}] {case.case}: {now - started:.0f} s, about {_duration(left)} left")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
