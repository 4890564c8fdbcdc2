"""What a margin ledger holds of a case, of a visit and of an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class CaseRecord:
    """One case: its margin and its visits over the whole training.

    ``held`` visits found no adversarial sample within the margin; ``crossed`` ones did. ``expanding`` is whether the
    margin grew when it last moved (at the cap it no longer does); ``seen`` is the last epoch with a visit that counted.
    Of those that did not, ``below`` had crossed without perturbation and ``background`` had no foreground.
    """

    margin: float
    visits: int = 0
    crossed: int = 0
    expanding: bool = True
    seen: int = -1
    below: int = 0
    background: int = 0

    @property
    def obstacle(self) -> str:
        """Why the case has never been searched, as a phrase; empty where it has."""
        if self.visits:
            return ""
        if self.below:
            return "all patches with foreground had crossed without perturbation"
        return "no patch had foreground" if self.background else "not drawn yet"


class Visit(NamedTuple):
    """One patch of a case in one batch, see :meth:`MarginLedger.record`."""

    case: str
    crossed: bool
    distance: float
    counts: bool
    below: bool
    background: bool


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
        shrinking: whether their median has lost a quarter in ``patience`` epochs.
        at_cap_share: share of the cases whose margin is at the cap.
        never_searched: cases that have not had a visit that counts, so far.
    """

    epoch: int
    cases: int
    cases_visited: int
    visits: int
    crossed_share: float
    expanding_share: float
    quantiles: tuple[float, ...]
    equilibrium: bool
    shrinking: bool
    at_cap_share: float
    never_searched: int
