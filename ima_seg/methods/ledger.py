"""The margin ledger: what each training case is known to tolerate.

A *margin* is the size of the largest perturbation a case is believed to tolerate, per voxel in network units (see
:mod:`ima_seg.types`). It belongs to the case; a *visit* is one patch of it in one batch. Margins move only at the end
of an epoch, so the copies of a case in a batch, and all its visits in an epoch, are searched with the same margin and
weigh the same, in whatever order and on whatever rank they came.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist

from ima_seg.errors import UserError
from ima_seg.methods.ledger_state import COLUMNS, STATE_VERSION, LedgerState
from ima_seg.validation import validated

T = TypeVar("T")

Rule = Literal["paper", "majority", "mean", "grow"]
RULES: tuple[Rule, ...] = get_args(Rule)

#: Margins whose median grows by a smaller share from ``patience`` epochs to the next are in equilibrium.
EQUILIBRIUM_GROWTH = 0.05


@dataclass
class CaseRecord:
    """One case: its margin and its visits over the whole training.

    ``held`` visits found no adversarial sample within the margin; ``crossed`` ones did. ``expanding`` is whether the
    margin grew when it last moved (at the cap it no longer does); ``seen`` is the last epoch with a visit that counted.
    """

    margin: float
    visits: int = 0
    crossed: int = 0
    expanding: bool = True
    seen: int = -1


@dataclass(frozen=True)
class EpochSummary:
    """What an epoch did to the margins.

    Attributes:
        epoch: number of the epoch, from 0.
        cases: known cases; ``cases_visited`` had a visit that counted in this epoch.
        visits: visits that counted; ``crossed_share`` of them crossed (NaN without visits).
        expanding_share: share of the known cases whose margin last grew (cases at the cap do not expand).
        quantiles: margins at 5, 25, 50, 75 and 95 %.
        equilibrium: whether margins have stopped growing.
    """

    epoch: int
    cases: int
    cases_visited: int
    visits: int
    crossed_share: float
    expanding_share: float
    quantiles: tuple[float, ...]
    equilibrium: bool


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
        rule: how a case's visits of an epoch move its margin E (then clamped to [0, eps_max]):

            - ``"paper"``: E + delta if any visit held, else (E + mean distance) / 2;
            - ``"majority"``: E + delta if at least half of the visits held, else (E + mean distance) / 2, of those that
              crossed;
            - ``"mean"``: the mean over visits of E + delta (held) and (E + distance) / 2 (crossed);
            - ``"grow"``: E + delta if any visit held, else E.

            With one visit per epoch the first three agree. With n visits that cross with probability p each,
            ``"paper"`` contracts only with probability p^n.
        patience: equilibrium is reported when the median margin, averaged over this many epochs, is less than 5 % above
            its average over as many epochs before. Epochs count from the one in which half of the cases have had a
            visit that counted: before, margins stand still because the network is not good enough to be attacked.

    Raises:
        UserError: a step or cap that is not positive, an unknown rule.

    Cases without a visit that counted keep their margin.
    """

    def __init__(self, *, delta: float, eps_max: float, rule: Rule = "mean", patience: int = 5) -> None:
        for name, value in (("delta", delta), ("eps_max", eps_max)):
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value!r}; it must be a positive number (per voxel, network units)")
        if delta > eps_max:
            raise UserError(f"delta is {delta:g}, more than eps_max {eps_max:g}; use a smaller step or a larger cap")
        if rule not in RULES:
            raise UserError(f"margin rule is {rule!r}; the rules there are: {', '.join(map(repr, RULES))}")
        self.delta, self.eps_max, self.rule, self.patience = delta, eps_max, rule, patience
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
        self, case_ids: Sequence[str], *, crossed: torch.Tensor, distance: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Note a batch of visits; nothing moves before :meth:`step`.

        Args:
            case_ids: B case ids, repeats allowed: each is a visit of its own.
            crossed: (B,) bool.
            distance: (B,) size of the perturbation where it crossed; unused elsewhere.
            counts: (B,) bool, False for visits that say nothing about the margin (no foreground in the patch, clean
                patch already below the threshold, no finite gradient).

        The tensors are kept on their device and read at the end of the epoch, so that no iteration waits for them.
        """
        ids = [str(c) for c in case_ids]
        noted = {"crossed": crossed, "distance": distance.float(), "counts": counts}
        for name, value in noted.items():
            if value.shape != (len(ids),):
                raise UserError(
                    f"{name} has shape {tuple(value.shape)} for {len(ids)} case ids; expected one per visit"
                )
        self.register(ids)
        self._pending.append((ids, *(value.detach().clone() for value in noted.values())))

    # --- end of an epoch -------------------------------------------------------------------------------------------

    def _drain(self) -> list[tuple[str, float | None]]:
        """The visits that count, read from the device: case, and the distance where one crossed."""
        visits = []
        for ids, *noted in self._pending:
            rows = zip(ids, *(values.tolist() for values in noted), strict=True)
            visits += [(case, size if crossed else None) for case, crossed, size, counted in rows if counted]
        self._pending.clear()
        return visits

    def step(self) -> EpochSummary:
        """End the epoch: gather all ranks' visits, move the margins, say what happened.

        With ``torch.distributed`` initialised this is a collective call. Every rank computes from the same visits and
        sums them exactly (``math.fsum``), so all ranks hold the same margins, equal to those of a single process that
        made all the visits.
        """
        visits = []
        for cases, part in gather((list(self.cases), self._drain())):
            self.register(cases)
            visits += part
        by_case: defaultdict[str, list[float | None]] = defaultdict(list)
        for case, size in visits:
            by_case[case].append(size)
        for case, sizes in by_case.items():
            self._move(self.cases[case], sizes)
        return self._summarise(len(by_case), [size is not None for _, size in visits])

    def _move(self, record: CaseRecord, sizes: Sequence[float | None]) -> None:
        """Move a margin by its visits of an epoch, None where one held, else its distance."""
        distances = [size for size in sizes if size is not None]
        held = len(sizes) - len(distances)
        expanded = record.margin + self.delta
        contracted = (record.margin + math.fsum(distances) / len(distances)) / 2 if distances else expanded
        if self.rule == "mean":
            moved = (held * expanded + len(distances) * contracted) / len(sizes)
        elif held >= len(sizes) / 2 if self.rule == "majority" else held:
            moved = expanded
        else:
            moved = record.margin if self.rule == "grow" else contracted
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
