"""The work of an evaluation: every condition on every case and model, one record each, as soon as it is known."""

from __future__ import annotations

import contextlib
import errno
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ima_seg.cases.raw import CaseFiles, FloatArray, LabelArray
from ima_seg.cases.write import save_adversarial, slug
from ima_seg.errors import UserError
from ima_seg.evaluate.attack.conditions import Condition, conditions
from ima_seg.evaluate.attack.corruptions import corrupt
from ima_seg.evaluate.attack.execution import Attacker, Found, within_memory
from ima_seg.evaluate.attack.panel import is_worst, panel_name, with_panels, write_panel
from ima_seg.evaluate.measure.metrics import CaseMetrics, case_metrics, measure_size
from ima_seg.evaluate.records import Disk, Failure, Record, append_line, explained
from ima_seg.evaluate.run import EvaluationSettings
from ima_seg.evaluate.subject import Case, Model, Window
from ima_seg.ops import perturbation_size

#: How much larger a breaking perturbation may be made until the exported segmentation is broken, too.
_LARGER = (1.01, 1.03, 1.1)


@dataclass
class Contestant:
    """A model under evaluation, its name in the records, and its window."""

    name: str
    model: Model
    window: Window


@dataclass
class _Subject:
    """A case as one model sees it, and the prediction of its clean image."""

    contestant: Contestant
    files: CaseFiles
    case: Case
    before: LabelArray
    clean_dice: float | None


@dataclass
class Sweep:
    """Evaluates cases; everything that it finds is in the files of ``folder`` when a method returns."""

    settings: EvaluationSettings
    contestants: Sequence[Contestant]
    attacker: Attacker
    folder: Path
    records: Path  # file to append to
    failures: Path  # the same
    done: dict[tuple[Any, ...], Record]  # records that are there already, by key
    log: Callable[[str], None] = print
    step: Callable[[str], None] = lambda what: None  # called after each condition, done or skipped
    failed: set[str] = field(default_factory=set)  # cases of which something could not be evaluated

    def conditions(self, contestant: Contestant) -> list[Condition]:
        """All conditions of one model."""
        return conditions(self.settings, model=contestant.name, models=[other.name for other in self.contestants])

    def fail(self, case: str, message: str, model: str | None = None) -> None:
        """Note that a case could not be evaluated."""
        self.failed.add(case)
        # JSON has no place for the bytes of a file name that is not UTF-8.
        case, message = (text.encode(errors="backslashreplace").decode() for text in (case, message))
        append_line(self.failures, Failure(case=case, model=model, message=message))
        self.log(f"{case}: NOT EVALUATED{f' by {model}' if model else ''}: {message}")

    def evaluate(self, files: CaseFiles) -> None:
        """Evaluate what is missing of one case. A case that cannot be evaluated is noted; the others go on."""
        sound = False
        with self._noting(files.case, None, "check"):
            self.contestants[0].model.check_case(files)
            sound = True
        if not sound:
            return
        subjects: list[_Subject] = []
        for contestant in self.contestants:
            with self._noting(files.case, contestant.name, "clean"):
                subjects.append(self._clean(contestant, files))
        for subject in subjects:
            name = subject.contestant.name
            for condition in self.conditions(subject.contestant):
                if condition.kind == "clean":
                    continue
                if (files.case, name, *condition.key) not in self.done:
                    with self._noting(files.case, name, condition.attack):
                        work: Callable[[], Record | None] = partial(self._attack, condition, subject, subjects)
                        if condition.kind == "corruption":
                            work = partial(self._corruption, condition, subject)
                        record = within_memory(subject.contestant.window, work, self.log)
                        if record is not None:
                            self._write(record)
                self.step(f"{files.case}  {name}  {condition.attack}")

    @contextlib.contextmanager
    def _noting(self, case: str, model: str | None, attack: str) -> Iterator[None]:
        """Note an exception as a failure and go on: one case or attack must not cost the days that others took.

        What the user can mend has a message of its own; of anything else the traceback goes to the log.
        """
        try:
            with explained(f"{attack} gives no valid record: ", "look for extreme intensities in the image"):
                yield
        except Exception as error:
            if self._ends_everything(error):
                raise
            message = str(error)
            if not isinstance(error, UserError | OSError):
                for line in traceback.format_exc().splitlines():
                    self.log(line)
                message = f"{attack}: {type(error).__name__}: {error}; please report this"
            self.fail(case, message, model)

    def _ends_everything(self, error: Exception) -> bool:
        """Whether every further case would fail, too: after a fault of the device, or where nothing can be written."""
        if not isinstance(error, OSError):
            return "CUDA error" in str(error)
        ours = isinstance(error.filename, str) and Path(error.filename).is_relative_to(self.folder)
        return (ours and error.errno != errno.ENAMETOOLONG) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

    def _write(self, record: Record) -> None:
        append_line(self.records, record)
        self.done[record.key] = record

    def _clean(self, contestant: Contestant, files: CaseFiles) -> _Subject:
        """Prepare a case and predict its clean image; the record is written unless it is there."""
        began = time.perf_counter()

        def predicted() -> tuple[Case, LabelArray]:
            case = contestant.model.prepare(files, device=self.attacker.device)
            return case, case.predict(contestant.window, case.base)

        case, before = within_memory(contestant.window, predicted, self.log)
        condition, seconds = Condition("clean", "clean"), time.perf_counter() - began
        metrics, metric_seconds = self._metrics(case, before)
        if (files.case, contestant.name, *condition.key) not in self.done:
            repeat = None
            if all(name != contestant.name for _, name, *_ in self.done):
                # Without the memory for a gradient the clean image and the corruptions are evaluated all the same.
                with contextlib.suppress(UserError):
                    repeat = within_memory(
                        contestant.window, lambda: self.attacker.repeat_difference(case, contestant.window), self.log
                    )
            values = {"sd": case.sd, "repeat_difference": repeat, "forwards": 1}
            seconds_each = {"seconds": seconds, "metric_seconds": metric_seconds}
            self._write(self._record(condition, files.case, contestant, metrics, **values, **seconds_each))
        self.step(f"{files.case}  {contestant.name}  clean")
        return _Subject(contestant, files, case, before, metrics.dice)

    def _attack(self, condition: Condition, subject: _Subject, subjects: Sequence[_Subject]) -> Record | None:
        case, contestant = subject.case, subject.contestant
        began = time.perf_counter()
        if condition.kind == "transfer":
            other = condition.attack.partition(":")[2]
            source = next((s for s in subjects if s.contestant.name == other), None)
            if source is None:  # it failed on this case, which is noted already
                return None
            found = self.attacker.transfer(
                condition, source.case, source.contestant.window, case, contestant.window, self.log
            )
        else:
            found = self.attacker.run(condition, case, contestant.window)
        after = case.predict(contestant.window, found.perturbed)
        metrics, metric_seconds = self._metrics(case, after)
        if found.breaking_rms is not None:
            found, after, metrics = self._verified(subject, found, after, metrics)
        seconds = time.perf_counter() - began - metric_seconds
        started = time.perf_counter()
        count = case.image_channels
        size = measure_size(
            *(image[0, :count].cpu().numpy() for image in (case.base, found.perturbed)),
            scale=None if case.scale is None else case.scale.tolist(),
            native_range=case.native_range.tolist(),
            budget="volume" if condition.kind == "minimal" else self.settings.budget,
        )
        metric_seconds += time.perf_counter() - started
        panel = disk = None
        middle = condition.kind == "white" and condition.eps == self.settings.eps[len(self.settings.eps) // 2]
        if middle and metrics.dice is not None and case.scale is not None:
            panel = panel_name(case.raw.case, contestant.name, condition.attack)
        others = with_panels(self.done.values(), case.raw.case, contestant.name)
        order = [c.key for c in self.conditions(contestant)]
        worst = panel is not None and is_worst(metrics.dice, condition.key, others, order)
        if worst or self.settings.save_adversarial:
            native = case.native_delta(case.delta(found.perturbed))
            if panel is not None and worst:
                write_panel(self.folder / panel, case, delta=native, before=subject.before, after=after)
                for name in {record.panel for record in others} - {None, panel}:
                    (self.folder / str(name)).unlink(missing_ok=True)
            if self.settings.save_adversarial:
                disk = self._disk(condition, subject, native)
        return self._record(
            condition, case.raw.case, contestant, metrics, size=size, eps_network=found.eps_network,
            breaking_rms=found.breaking_rms, trace=found.trace, zero_gradient=found.zero_gradient,
            forwards=found.passes.forwards + 1, gradients=found.passes.gradients, seconds=seconds,
            metric_seconds=metric_seconds, panel=panel, disk=disk,
        )  # fmt: skip

    def _verified(
        self, subject: _Subject, found: Found, after: LabelArray, metrics: CaseMetrics
    ) -> tuple[Found, LabelArray, CaseMetrics]:
        """The smallest breaking perturbation, a little larger if the exported segmentation is not broken by it.

        The search ends within its tolerance of the boundary, on the network's grid and in its own precision.
        """
        case, threshold = subject.case, self.settings.broken_below * (subject.clean_dice or 0)
        delta = found.perturbed - case.base
        image = delta[:, : case.image_channels]
        length = float(perturbation_size(image, self.settings.norm))

        def broken() -> bool:
            return metrics.dice is not None and metrics.dice < threshold

        for factor in _LARGER:
            if broken() or factor * length > found.eps_network:
                break
            larger = case.within(case.base + factor * delta)
            rms = case.delta(larger).square().mean().sqrt()
            found = replace(found, perturbed=larger, breaking_rms=float(rms))
            after = case.predict(subject.contestant.window, larger)
            metrics, _ = self._metrics(case, after)
        return found if broken() else replace(found, breaking_rms=None), after, metrics

    def _corruption(self, condition: Condition, subject: _Subject) -> Record:
        raw, contestant = subject.case.raw, subject.contestant
        began = time.perf_counter()
        assert condition.severity is not None
        name = condition.attack.removeprefix("corruption:")
        case = subject.case.altered(
            corrupt(raw.image, raw.spacing_mm, name, condition.severity, self.settings.seed, raw.case)
        )
        after = case.predict(contestant.window, case.base)
        seconds = time.perf_counter() - began
        metrics, metric_seconds = self._metrics(case, after)
        return self._record(
            condition, raw.case, contestant, metrics, forwards=1, seconds=seconds, metric_seconds=metric_seconds
        )

    def _metrics(self, case: Case, prediction: LabelArray) -> tuple[CaseMetrics, float]:
        began = time.perf_counter()
        metrics = case_metrics(
            prediction,
            case.raw.reference,
            classes=case.model.classes,
            spacing_mm=case.raw.spacing_mm,
            nsd_tolerance_mm=self.settings.nsd_tolerance_mm,
            ignore_label=case.model.labels.ignore_label,
            slice_axis=case.slice_axis,
        )
        return metrics, time.perf_counter() - began

    def _record(
        self, condition: Condition, case: str, contestant: Contestant, metrics: CaseMetrics, **values: Any
    ) -> Record:
        return Record(
            case=case,
            model=contestant.name,
            kind=condition.kind,
            attack=condition.attack,
            **vars(metrics),
            **condition.fields(self.settings),
            **values,
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _disk(self, condition: Condition, subject: _Subject, native: FloatArray) -> Disk:
        """Write the adversarial files, read them again and predict them from the start."""
        case, contestant, files = subject.case, subject.contestant, subject.files
        budget = "" if condition.eps is None else f"_{condition.eps:g}{self.settings.unit}"
        folder = self.folder / "adversarial" / slug(contestant.name) / slug(f"{condition.attack}{budget}")
        images, differences = save_adversarial(files.images, native, folder, files.case)
        again = contestant.model.prepare(replace(files, images=tuple(images)), device=self.attacker.device)
        metrics, _ = self._metrics(again, again.predict(contestant.window, again.base))
        assert case.scale is not None
        change = (again.raw.image.astype(np.float64) - case.raw.image) / case.scale.reshape(-1, 1, 1, 1)
        return Disk(
            image=[self._relative(path) for path in images],
            difference=[self._relative(path) for path in differences],
            dice=metrics.dice,
            rms=float(np.sqrt(np.square(change).sum() / (len(change) * case.image_voxels))),
            linf=float(np.abs(change).max()),
            resampled=case.resampled,
            rounded=case.raw.limits is not None and bool(np.isfinite(case.raw.limits).all()),
        )
