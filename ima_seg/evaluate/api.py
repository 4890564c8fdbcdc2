"""``evaluate``: models, images and labels in, records and report out; what ``ima-seg evaluate`` calls."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ima_seg.attacks.network import resolve_precision
from ima_seg.cases.raw import CaseFiles, CaseProblem
from ima_seg.errors import UserError, plain
from ima_seg.evaluate.attack.conditions import attack_names, check_settings
from ima_seg.evaluate.attack.describe import describe_run
from ima_seg.evaluate.attack.execution import Attacker
from ima_seg.evaluate.attack.problem import native_scale
from ima_seg.evaluate.attack.share import Share, locked, pick_device, share_out
from ima_seg.evaluate.attack.sweep import Contestant, Sweep
from ima_seg.evaluate.claim import check_folder, claim, record_files
from ima_seg.evaluate.measure.collect import complete
from ima_seg.evaluate.records import Failure, Record, drop_half_line, explained, read_lines
from ima_seg.evaluate.report import write_report
from ima_seg.evaluate.run import EvaluationSettings, Run
from ima_seg.evaluate.subject import Model
from ima_seg.files import write_text
from ima_seg.monai.bundle import load_bundle
from ima_seg.nnunet.folder import load_model


def evaluate(
    models: Mapping[str, str | Path],
    images: str | Path | None,
    labels: str | Path | None,
    output: str | Path,
    settings: EvaluationSettings,
    *,
    folds: Sequence[str] | None = None,
    checkpoint: str | None = None,
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
        models: name in the report -> nnU-Net model folder, or MONAI bundle (a folder with ``configs``); the first is
            what the others are compared with.
        images: folder of images in nnU-Net's naming; with bundles alone, also named like the labels. Without
            ``labels``: a dataset.json that names files, by default that of the first nnU-Net model.
        labels: folder of labels.
        output: folder of the evaluation; made if missing.
        settings: what to evaluate.
        folds: to average, of every model; default: all there are.
        checkpoint: file name in each fold (default: checkpoint_final.pth), or in a bundle's ``models`` (default: what
            its config loads, else model.pt).
        previous_stage: folder of the previous stage's segmentations, for cascades.
        device: ``cpu``, ``cuda`` or ``mps``.
        tile_batch: tiles that the network sees at once; default: the batch size of its training.
        resume: go on with an evaluation that was interrupted.
        num_parts: the cases are shared out over so many calls.
        part_id: which of them this is, from 0.
        trust: load checkpoints, plans and bundles that run code.
        command: for the report.
        console: where messages go.

    Returns:
        The report (``None`` as long as other parts are missing), and how many cases could not be evaluated.

    Raises:
        UserError: see the message. Mistakes in single cases do not raise; they are noted, and in the report.
    """
    if tile_batch is not None and tile_batch < 1:
        raise UserError(f"tile_batch is {tile_batch}; the network sees at least 1 tile at once")
    out = Path(output)
    chosen = {"attacks": attack_names(settings.attacks), "eps": sorted(set(settings.eps))}
    with explained("setting ", "correct it"):  # a copy of settings has not been checked
        settings = EvaluationSettings.model_validate(settings.model_dump() | chosen)
    with share_out(num_parts, part_id) as share:
        place = pick_device(device)
        loading: dict[str, Any] = {"device": place, "trust": trust}
        loaded: dict[str, Model] = {}
        for name, folder in models.items():
            if _is_bundle(folder):
                names, reading = settings.bundle_labels, settings.bundle_output
                loaded[name] = load_bundle(folder, checkpoint=checkpoint, labels=names, output=reading, **loading)
            else:
                model = load_model(folder, folds=folds, checkpoint=checkpoint or "checkpoint_final.pth", **loading)
                loaded[name] = replace(model, previous_stage=None if previous_stage is None else Path(previous_stage))
        first = _compatible(loaded, settings)
        if {"disappear", "appear"} & set(settings.attacks) and not settings.targets:
            settings = settings.model_copy(update={"targets": list(first.classes)})
        check_settings(settings, models=list(loaded), classes=list(first.classes))
        dtype = resolve_precision(settings.precision, place)
        window: dict[str, Any] = settings.model_dump(include={"step_size", "mirroring"}) | {"tile_batch": tile_batch}
        contestants = [Contestant(name, model, model.window(**window)) for name, model in loaded.items()]
        # Bundles read nnU-Net's naming too.
        finder = next((model for model in loaded.values() if not _is_bundle(model.folder)), first)
        given = [None if folder is None else Path(folder) for folder in (images, labels)]
        cases, problems = _named_in_json(*finder.find_cases(*given, limit=settings.limit))
        images = given[0] or finder.folder / "dataset.json"
        labels = given[1] or images
        _require_native(loaded, settings, cases)
        run = describe_run(
            loaded, settings, cases, problems, images=images, labels=labels, device=place, dtype=dtype, command=command
        )
        console = console or Console(stderr=True)
        check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, share):
            share.wait()  # until all ranks hold their locks
            claim(out, run, share, resume=resume, log=partial(_say, console))
            if share.rank == 0:
                _name_leaks(run, console)
            records, failures = (out / f"{name}{share.suffix}.jsonl" for name in ("records", "failures"))
            drop_half_line(records)
            records.touch()
            if share.count > 1:
                # Parts may run on other machines, which the report then says.
                write_text(out / f"run{share.suffix}.json", run.model_dump_json(indent=1) + "\n")
            failures.unlink(missing_ok=True)
            share.wait()
            damaged: list[str] = []
            there = list(read_lines(record_files(out), Record, damaged))
            for fault in damaged if share.rank == 0 else ():
                _say(console, f"{fault}; the line is passed over, what it said is evaluated again")
            done = {record.key: record for record in there}
            sweep = Sweep(settings, contestants, Attacker(settings, place), out, records, failures, done)
            sweep.log = partial(_say, console)
            if share.index == 0:
                for problem in problems:
                    sweep.fail(problem.case, problem.message)
            mine, whole = cases[share.index :: share.count], complete(run, there)
            todo = [case for case in mine if not whole.issuperset((case.case, name) for name in loaded)]
            if len(todo) < len(mine):
                console.print(f"{len(mine) - len(todo)} of {len(mine)} cases are done already")
            _work(sweep, todo, console)
            share.wait()
            report = write_report([out], out) if share.rank == 0 and _is_whole(out, run, share) else None
            share.wait()  # a rank that ends with an error before ends the others, too
    return report, len(sweep.failed)


def _is_bundle(folder: str | Path) -> bool:
    return (Path(folder) / "configs").is_dir()


def _compatible(loaded: Mapping[str, Model], settings: EvaluationSettings) -> Model:
    """The first model; all others segment the same classes in the same channels."""
    first = next(iter(loaded.values()))
    bundles = [name for name, model in loaded.items() if _is_bundle(model.folder)]
    mixed = 0 < len(bundles) < len(loaded)
    for name, model in loaded.items():
        # nnU-Net knows its channels by name, bundles often do not.
        channels = len(model.channels) == len(first.channels) if mixed else model.channels == first.channels
        if model.classes != first.classes or not channels or model.labels.ignore_label != first.labels.ignore_label:
            raise UserError(
                f"model {name!r} segments {model.classes} in {model.channels}, the first one {first.classes} in "
                f"{first.channels}; only models of one task can be compared"
            )
        if settings.budget == "slice" and not model.is_2d:
            raise UserError(f"budget 'slice' is for 2D models, {name!r} sees volumes: --budget volume")
        if settings.unit == "hu" and not model.is_single_ct:
            raise UserError(f"unit 'hu' is for models of a single CT channel, {name!r} is not: --unit percent or rms")
        model.check_use(writing=settings.save_adversarial)
    if bundles and settings.step_size != 0.5:
        raise UserError(
            f"step_size is {settings.step_size}, but {bundles[0]!r} is a bundle: its inferer has the overlap"
        )
    if not bundles and (settings.bundle_labels or settings.bundle_output):
        raise UserError("bundle_labels and bundle_output are for MONAI bundles, and there is none; leave them out")
    if mixed and settings.attacks and settings.unit not in ("hu", "percent"):
        raise UserError(
            f"unit {settings.unit!r} is that of each model's own pre-processing, so an nnU-Net model and a bundle are "
            "not attacked alike; compare them with --unit percent (or hu)"
        )
    return first


def _require_native(loaded: Mapping[str, Model], settings: EvaluationSettings, cases: Sequence[CaseFiles]) -> None:
    """Refuse original intensities before anything is written, where a bundle's pre-processing has no way to them.

    The first usable case tells; cases that cannot be used are noted later.
    """
    if not (settings.save_adversarial or settings.unit in ("hu", "percent") or "transfer" in settings.attacks):
        return
    for model in (model for model in loaded.values() if _is_bundle(model.folder)):
        for files in cases:
            try:
                model.check_case(files)
                case = model.prepare(files)
            except UserError:
                continue
            native_scale(case)
            break


def _name_leaks(run: Run, console: Console) -> None:
    """Say which cases are known to the training of a model."""
    for info in run.models:
        if info.training_cases:
            names, reason = list(info.training_cases), next(iter(info.training_cases.values()))
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            known = f"{len(names)} of {len(run.cases)} cases are known to the training of {info.name}"
            _say(console, f"{known}: {', '.join(names[:4])}{more} ({reason})")


def _named_in_json(
    cases: Sequence[CaseFiles], problems: Sequence[CaseProblem]
) -> tuple[list[CaseFiles], list[CaseProblem]]:
    """Both without names that are not UTF-8, which no record could hold."""
    bad = [case for case in cases if _spelled(case.case) != case.case]
    reason = "the name is not UTF-8; rename the files"
    others = [CaseProblem(_spelled(case.case), reason) for case in bad]
    others += [replace(problem, case=_spelled(problem.case)) for problem in problems]
    return [case for case in cases if case not in bad], others


def _spelled(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _say(console: Console, text: str) -> None:
    console.print(escape(plain(text)), soft_wrap=True)


def _is_whole(out: Path, run: Run, share: Share) -> bool:
    """Whether every case of all parts is evaluated or noted as failed, so that this process is the last."""
    if share.count == share.world:
        return True
    failed = {failure.case for failure in read_lines(sorted(out.glob("failures*.jsonl")), Failure, [])}
    there = complete(run, read_lines(record_files(out), Record, []))
    return all(case in failed or (case, model.name) in there for case in run.cases for model in run.models)


def _work(sweep: Sweep, cases: Sequence[CaseFiles], console: Console) -> None:
    """Evaluate ``cases``, with the remaining time."""
    conditions = sum(len(sweep.conditions(contestant)) for contestant in sweep.contestants)
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True)]
    text = TextColumn("{task.description}")
    # A progress bar on a terminal; nothing elsewhere, where a line per case is written instead.
    with Progress(*columns, text, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases) * conditions)
        sweep.step = lambda what: progress.update(task, advance=1, description=escape(plain(what)))
        began = time.monotonic()
        for number, case in enumerate(cases, 1):
            sweep.evaluate(case)
            mean = (time.monotonic() - began) / number
            each, left = (timedelta(seconds=round(mean * count)) for count in (1, len(cases) - number))
            sweep.log(f"[{number}/{len(cases)}] {case.case}: {each} per case, about {left} left")
