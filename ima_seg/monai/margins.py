"""Margins in MONAI's engine: they move at the end of an epoch, are saved in checkpoints and written as tables."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from ignite.engine import Events

from ima_seg.errors import UserError
from ima_seg.methods.history import EpochTally, epoch_line, epoch_warnings, history_row, write_course
from ima_seg.methods.ima import IMA
from ima_seg.methods.settings import differences

#: Columns of the history that also go to ``engine.state.metrics``, where MONAI's statistics handlers find them.
METRICS = ("margin_q05", "margin_q50", "margin_q95", "expanding_share", "crossed_share", "passes_per_sample")


class MarginLedgerHandler:
    """Ends the epochs of the margins, at ``EPOCH_COMPLETED``; a collective call when ``torch.distributed`` is in use.

    :class:`IMASupervisedTrainer` makes one by itself; give it one among ``train_handlers`` to set these arguments. It
    is attached before all other handlers, so that a ``CheckpointSaver`` in the same epoch saves margins that moved.
    Its state is part of the trainer's, ``save_dict={"trainer": trainer}``; it can be saved by itself as well,
    ``save_dict={"net": network, "opt": optimizer, "ima": handler}``. A checkpoint from within an epoch lacks the visits
    of that epoch.

    Args:
        output_dir: folder for ``ima_margins.csv``, ``ima_history.csv`` and ``ima_progress.png``, written every epoch by
            rank 0; None for none.
        cases: ids of the training cases, so that those that have not been drawn yet are in the tables. Without a
            ``case_key`` the ids are ``ima_seg.monai.case_name`` of the image files.
        native: native intensity units per network unit, by the name of a column to add, for images that all share one
            scale: ``{"hu": 250.0}`` after ``ScaleIntensityRanged(a_min=-500, a_max=500, b_min=-2, b_max=2)``.
        ima: the training, where the engine is not an :class:`IMASupervisedTrainer`. That engine's step must put its
            ``StepReport`` into ``engine.state.ima_report``, and the number of values of a patch into
            ``engine.state.ima_voxels``.

    The quantiles of the margins and more are in ``engine.state.metrics``, with names that start with ``ima_``.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        *,
        cases: Iterable[str] = (),
        native: Mapping[str, float] | None = None,
        ima: IMA | None = None,
    ) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.cases, self.native = [str(case) for case in cases], dict(native or {})
        self.history: list[dict[str, Any]] = []
        self.logger = logging.getLogger(__name__)
        self._ima, self._tally, self._voxels, self._began = ima, EpochTally(), 0, perf_counter()

    @property
    def ima(self) -> IMA:
        """The training."""
        if self._ima is None:
            raise UserError("the MarginLedgerHandler has no IMA: attach it to an IMASupervisedTrainer, or give it ima=")
        return self._ima

    def attach(self, engine: Any) -> None:
        """Attach to a trainer."""
        if self._ima is None:
            self._ima = getattr(engine, "ima", None)
        self.ima.ledger.register(self.cases)
        self.logger = engine.logger
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    def _start_epoch(self, engine: Any) -> None:
        self._began = perf_counter()

    def _count(self, engine: Any) -> None:
        self._tally.add(engine.state.ima_report)
        self._voxels = engine.state.ima_voxels

    def _end_epoch(self, engine: Any) -> None:
        totals = self._tally.totals()
        self._tally = EpochTally()
        summary = self.ima.end_epoch()
        row = history_row(summary, totals, perf_counter() - self._began)
        self.history.append(row)
        engine.state.metrics.update({f"ima_{name}": row[name] for name in METRICS})
        self.logger.info("IMA margins: %s", epoch_line(summary, row))
        for warning in epoch_warnings(row, self.ima.settings, engine.state.max_epochs):
            self.logger.warning("IMA: %s", warning)
        if self.output_dir is not None and engine.state.rank == 0:
            write_course(
                self.output_dir, self.history, self.ima.ledger,
                norm=self.ima.settings.norm, voxels=self._voxels, native=self.native,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and JSON types, which ``torch.load(weights_only=True)`` reads."""
        return {
            "settings": self._settings(),
            "history": [dict(row) for row in self.history],
            "ledger": self.ima.ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a warning names the settings that have changed since."""
        changed = differences(state["settings"], self._settings())
        if changed:
            self.logger.warning("IMA goes on with other settings than those of the checkpoint (%s)", changed)
        self.ima.ledger.load_state_dict(dict(state["ledger"]))
        self.ima.ledger.register(self.cases)
        self.history = [dict(row) for row in state["history"]]
        self._tally = EpochTally()

    def _settings(self) -> dict[str, Any]:
        ledger = self.ima.ledger
        return {**self.ima.settings.model_dump(mode="json"), "delta": ledger.delta, "eps_max": ledger.eps_max}
