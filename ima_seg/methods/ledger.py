"""The margin ledger: how far each training case is perturbed.

A *training margin* is the size within which a case's boundary is searched, per voxel in network units (see
:mod:`ima_seg.types`). It is no measurement of what the case tolerates: a training search is short, and a margin is one
number for patches that differ. What a case tolerates is measured by :func:`ima_seg.attacks.minimal_norm`.

A margin belongs to the case; a *visit* is one patch of it in one batch. Margins move only at the end of an epoch, so
the copies of a case in a batch, and all its visits in an epoch, are searched with the same margin and weigh the same,
in whatever order and on whatever rank they came.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist

from ima_seg.errors import UserError
from ima_seg.methods.ledger_records import CaseRecord, EpochSummary, Visit
from ima_seg.methods.ledger_state import COLUMNS, STATE_VERSION, LedgerState
from ima_seg.validation import validated

T = TypeVar("T")

Rule = Literal["quantile", "paper", "grow", "ame"]
RULES: tuple[Rule, ...] = get_args(Rule)

#: Share of a case's patches that cross when its margin is at rest.
DEFAULT_CROSSING_SHARE = 0.8
#: By so much AME shrinks its step for each step that a margin has grown.
AME_DECAY = 0.9
#: Margins whose median grows by a smaller share from ``patience`` epochs to the next are in equilibrium.
EQUILIBRIUM_GROWTH = 0.05
#: A median that loses this share in as many epochs is shrinking.
SHRINKING = 0.25


def gather(mine: T) -> list[T]:
    """Every rank's ``mine``, in the order of ranks, on all of them; ``[mine]`` in a training of one process.

    A collective call when ``torch.distributed`` is initialised. ``mine`` must be picklable.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [mine]
    parts: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


class MarginLedger:
    """Margins per case, updated once per epoch.

    Args:
        delta: expansion step and first margin of every case, per voxel in network units.
        eps_max: cap on margins, same unit.
        rule: how a case's visits of an epoch move its margin E, which is then clamped to [0, eps_max]. h is the share
            of them that held, d the mean distance of those that crossed:

            - ``"quantile"``: E + delta (q h - (1 - q) (1 - h)) / max(q, 1 - q), q = ``crossing_share``. At rest a share
              q of the visits crosses: E is the q-quantile of the boundary distances of the case's patches, whatever
              delta, the number of epochs and that of visits (Robbins & Monro 1951);
            - ``"paper"``: E + delta if h > 0, else (E + d) / 2. With n visits that cross with probability p each, it
              contracts only with probability p^n;
            - ``"grow"``: E + delta if h > 0, else E;
            - ``"ame"``: h (E + 0.9^floor(E / delta) delta) + (1 - h) d, after Adaptive Margin Evolution (Ma et al.,
              Neurocomputing 551:126524, 2023), whose samples have one visit an epoch. (Their code shrinks the step by
              the gradient's size as well.)
        crossing_share: q, above 0 and below 1.
        patience: equilibrium is reported when the median margin, averaged over this many epochs, is less than 5 % above
            its average over as many epochs before. Epochs count from the one in which half of the cases have had a
            visit that counted: before, margins stand still because the network is not good enough to be attacked.

    Raises:
        UserError: a step or cap that is not positive, an unknown rule.

    Cases without a visit that counted keep their margin.
    """

    def __init__(
        self, *, delta: float, eps_max: float, rule: Rule = "quantile",
        crossing_share: float = DEFAULT_CROSSING_SHARE, patience: int = 5,
    ) -> None:  # fmt: skip
        for name, value in (("delta", delta), ("eps_max", eps_max)):
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value!r}; it must be a positive number (per voxel, network units)")
        if delta > eps_max:
            raise UserError(f"delta is {delta:g}, more than eps_max {eps_max:g}; use a smaller step or a larger cap")
        if rule not in RULES:
            raise UserError(f"margin rule is {rule!r}; the rules there are: {', '.join(map(repr, RULES))}")
        if not 0 < crossing_share < 1:
            raise UserError(f"crossing_share is {crossing_share!r}; it must be above 0 and below 1")
        self.delta, self.eps_max, self.rule, self.patience = delta, eps_max, rule, patience
        self.crossing_share = crossing_share
        self.cases: dict[str, CaseRecord] = {}
        self.epoch = 0
        self._medians: list[float] = []
        self._pending: list[Any] = []

    # --- during an epoch -------------------------------------------------------------------------------------------

    def register(self, case_ids: Iterable[str]) -> None:
        """Enter cases that are not known yet, at the first margin."""
        for case_id in case_ids:
            if str(case_id) not in self.cases:
                self.cases[str(case_id)] = CaseRecord(min(self.delta, self.eps_max))

    def get(self, case_ids: Sequence[str], device: torch.device | str | None = None) -> torch.Tensor:
        """Margins of ``case_ids`` as (B,) float32; unknown cases are entered."""
        self.register(case_ids)
        return torch.tensor([self.cases[str(c)].margin for c in case_ids], dtype=torch.float32, device=device)

    def record(
        self,
        case_ids: Sequence[str],
        *,
        crossed: torch.Tensor,
        distance: torch.Tensor,
        counts: torch.Tensor,
        below: torch.Tensor | None = None,
        background: torch.Tensor | None = None,
    ) -> None:
        """Note a batch of visits; nothing moves before :meth:`step`.

        Args:
            case_ids: B case ids, repeats allowed: each is a visit of its own.
            crossed: (B,) bool.
            distance: (B,) size of the perturbation where it crossed; unused elsewhere.
            counts: (B,) bool, False for visits that say nothing about the margin (no foreground in the patch, clean
                patch already below the threshold, no finite gradient).
            below: (B,) bool, visits that do not count because the clean patch had crossed already; default: not known.
            background: (B,) bool, those that do not for lack of foreground; default: not known.

        The tensors are kept on their device and read at the end of the epoch, so that no iteration waits for them.
        """
        ids = [str(c) for c in case_ids]
        never = torch.zeros_like(counts)
        noted = {
            "crossed": crossed, "distance": distance.float(), "counts": counts,
            "below": never if below is None else below, "background": never if background is None else background,
        }  # fmt: skip
        for name, value in noted.items():
            if value.shape != (len(ids),):
                raise UserError(
                    f"{name} has shape {tuple(value.shape)} for {len(ids)} case ids; expected one per visit"
                )
        self.register(ids)
        self._pending.append((ids, *(value.detach().clone() for value in noted.values())))

    # --- end of an epoch -------------------------------------------------------------------------------------------

    def _drain(self) -> list[Visit]:
        """The visits, read from the device."""
        visits = [
            Visit(*row)
            for ids, *noted in self._pending
            for row in zip(ids, *(values.tolist() for values in noted), strict=True)
        ]
        self._pending.clear()
        return visits

    def step(self) -> EpochSummary:
        """End the epoch: gather all ranks' visits, move the margins, say what happened.

        With ``torch.distributed`` initialised this is a collective call. Every rank computes from the same visits and
        sums them exactly (``math.fsum``), so all ranks hold the same margins, equal to those of a single process that
        made all the visits.
        """
        by_case: defaultdict[str, list[float | None]] = defaultdict(list)
        for cases, visits in gather((list(self.cases), self._drain())):
            self.register(cases)
            for visit in visits:
                record = self.cases[visit.case]
                record.below += visit.below
                record.background += visit.background
                if visit.counts:
                    by_case[visit.case].append(visit.distance if visit.crossed else None)
        for case, sizes in by_case.items():
            self._move(self.cases[case], sizes)
        return self._summarise(len(by_case), [size is not None for sizes in by_case.values() for size in sizes])

    def _move(self, record: CaseRecord, sizes: Sequence[float | None]) -> None:
        """Move a margin by its visits of an epoch, None where one held, else its distance."""
        distances = [size for size in sizes if size is not None]
        held = 1 - len(distances) / len(sizes)
        mean = math.fsum(distances) / len(distances) if distances else record.margin
        margin, delta, q = record.margin, self.delta, self.crossing_share
        if self.rule == "quantile":
            moved = margin + delta * (q * held - (1 - q) * (1 - held)) / max(q, 1 - q)
        elif self.rule == "ame":
            # Steps of a tenth less each; the floor must not fall by the rounding of a margin that is a multiple.
            grown = margin + delta * AME_DECAY ** math.floor(margin / delta + 1e-9)
            moved = held * grown + (1 - held) * mean
        elif held > 0:
            moved = margin + delta
        else:
            moved = margin if self.rule == "grow" else (margin + mean) / 2
        moved = min(max(moved, 0.0), self.eps_max)
        record.expanding = moved > record.margin
        record.margin = moved
        record.visits += len(sizes)
        record.crossed += len(distances)
        record.seen = self.epoch

    def _summarise(self, cases_visited: int, crossed: list[bool]) -> EpochSummary:
        margins = torch.tensor([r.margin for r in self.cases.values()] or [float("nan")], dtype=torch.float64)
        quantiles = torch.quantile(margins, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)).tolist()
        if 2 * sum(record.visits > 0 for record in self.cases.values()) >= len(self.cases) > 0:
            self._medians.append(quantiles[2])
        n = self.patience
        recent = self._medians[-2 * n :]
        summary = EpochSummary(
            epoch=self.epoch,
            cases=len(self.cases),
            cases_visited=cases_visited,
            visits=len(crossed),
            crossed_share=sum(crossed) / len(crossed) if crossed else float("nan"),
            expanding_share=sum(r.expanding for r in self.cases.values()) / max(len(self.cases), 1),
            quantiles=tuple(quantiles),
            equilibrium=len(recent) == 2 * n and sum(recent[n:]) < (1 + EQUILIBRIUM_GROWTH) * sum(recent[:n]),
            shrinking=len(self._medians) > n and self._medians[-1] < (1 - SHRINKING) * self._medians[-1 - n],
            at_cap_share=sum(r.margin >= self.eps_max for r in self.cases.values()) / max(len(self.cases), 1),
            never_searched=sum(r.visits == 0 for r in self.cases.values()),
        )
        self.epoch += 1
        return summary

    # --- checkpoint ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as JSON types and plain float64 / int64 tensors (safe under ``weights_only``)."""
        return {
            "version": STATE_VERSION,
            "delta": self.delta,
            "eps_max": self.eps_max,
            "rule": self.rule,
            "crossing_share": self.crossing_share,
            "epoch": self.epoch,
            "medians": list(self._medians),
            "cases": list(self.cases),
            **{
                name: torch.tensor([getattr(record, name) for record in self.cases.values()], dtype=dtype)
                for name, dtype in COLUMNS.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. Step, cap and rule stay those of this ledger; margins are clamped to the cap.

        Raises:
            UserError: a state of another layout, or a damaged one.
        """
        found = validated(LedgerState, state, source="margin ledger", remedy="use an earlier checkpoint")
        columns = (getattr(found, name) for name in COLUMNS)
        self.cases = {
            case: CaseRecord(min(margin, self.eps_max), *counts)
            for case, margin, *counts in zip(found.cases, *columns, strict=True)
        }
        self.epoch, self._medians = found.epoch, found.medians
        self._pending.clear()

    def table(self) -> list[dict[str, Any]]:
        """One row per case, sorted by id: ``case`` and the fields of :class:`CaseRecord`."""
        return [{"case": case, **asdict(self.cases[case])} for case in sorted(self.cases)]
