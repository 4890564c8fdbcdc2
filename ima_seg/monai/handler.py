"""The course of a training in MONAI's engine: its epochs end, it is saved in checkpoints and written as tables."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from ignite.engine import Events

from ima_seg.errors import UserError
from ima_seg.files import remove_stale
from ima_seg.methods.base import Method
from ima_seg.methods.course import Course
from ima_seg.methods.ima import IMA
from ima_seg.methods.settings import differences


class TrainingHandler:
    """Ends the epochs of a training at ``EPOCH_COMPLETED``; a collective call when ``torch.distributed`` is in use.

    :class:`AdversarialSupervisedTrainer` makes one by itself; give it one among ``train_handlers`` to set these
    arguments. It is attached before all other handlers, so that a ``CheckpointSaver`` in the same epoch saves margins
    that moved. Its state is part of the trainer's, ``save_dict={"trainer": trainer}``; it can be saved by itself as
    well, ``save_dict={"net": network, "opt": optimizer, "ima": handler}``. A checkpoint from within an epoch lacks the
    visits of that epoch.

    Args:
        output_dir: folder for ``NAME_history.csv``, of IMA also ``ima_margins.csv`` and ``ima_progress.png``, written
            every epoch by rank 0; None for none.
        cases: ids of the training cases, so that those that have not been drawn yet are in the tables. Without a
            ``case_key`` the ids are ``ima_seg.monai.case_name`` of the image files.
        native: native intensity units per unit of sizes, by the name of a column to add, for images that all share one
            scale: ``{"hu": 250.0}`` after ``ScaleIntensityRanged(a_min=-500, a_max=500, b_min=-2, b_max=2)``.
        method: the method, where the engine is another. That engine's step must put its report into
            ``engine.state.SECTION_report``, and the number of values of a patch into ``engine.state.SECTION_voxels``,
            with the section of the settings: ``ima_report``.

    Losses, passes, and of IMA quantiles of the margins, are in ``engine.state.metrics``, with names that start with the
    section: ``ima_margin_q50``.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        *,
        cases: Iterable[str] = (),
        native: Mapping[str, float] | None = None,
        method: Method[Any, Any] | None = None,
    ) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.cases, self.native = [str(case) for case in cases], dict(native or {})
        self.logger = logging.getLogger(__name__)
        self._course, self._began = None if method is None else self._begun(method), perf_counter()

    def _begun(self, method: Method[Any, Any]) -> Course:
        return Course(
            method, native=self.native, log=lambda text: self.logger.info(text),
            warn=lambda text: self.logger.warning("%s: %s", method.name, text),
        )  # fmt: skip

    @property
    def course(self) -> Course:
        """The course of the training."""
        if self._course is None:
            raise UserError(
                f"the {type(self).__name__} has no method: attach it to an IMASupervisedTrainer or "
                "AdversarialSupervisedTrainer, or give it the method"
            )
        return self._course

    def attach(self, engine: Any) -> None:
        """Attach to a trainer."""
        if self._course is None and getattr(engine, "method", None) is not None:
            self._course = self._begun(engine.method)
        self.course.method.enter_cases(self.cases)
        if self.output_dir is not None:
            remove_stale(self.output_dir)
        self.logger = engine.logger
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    def _start_epoch(self, engine: Any) -> None:
        self._began = perf_counter()
        self.course.method.epochs = engine.state.max_epochs
        self.course.start_epoch(engine.state.epoch - 1)

    def _count(self, engine: Any) -> None:
        section = self.course.method.settings.section
        self.course.tally.add(getattr(engine.state, f"{section}_report"))
        self.course.voxels = getattr(engine.state, f"{section}_voxels")

    def _end_epoch(self, engine: Any) -> None:
        row, method = self.course.end_epoch(perf_counter() - self._began), self.course.method
        engine.state.metrics.update({f"{method.settings.section}_{name}": row[name] for name in method.metrics})
        if self.output_dir is not None and engine.state.rank == 0:
            self.course.write_files(self.output_dir)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and JSON types, which ``torch.load(weights_only=True)`` reads."""
        return self.course.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a warning names the settings that have changed since."""
        changed = differences(state["settings"], self.course.described())
        if changed:
            name = self.course.method.name
            self.logger.warning("%s goes on with other settings than those of the checkpoint (%s)", name, changed)
        self.course.load_state_dict(state)
        self.course.method.enter_cases(self.cases)


class MarginLedgerHandler(TrainingHandler):
    """A :class:`TrainingHandler`, which may be given an IMA as ``ima``; other arguments as there."""

    def __init__(self, *args: Any, ima: IMA | None = None, **kwargs: Any) -> None:
        super().__init__(*args, method=ima, **kwargs)
