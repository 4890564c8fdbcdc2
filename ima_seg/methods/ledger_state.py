"""The state of a margin ledger in a checkpoint: its layout, and what it must hold to be gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, NonNegativeFloat, NonNegativeInt, model_validator

#: Layout version of :meth:`MarginLedger.state_dict`, and the fields of a record there.
STATE_VERSION = 2
#: Of which version 1 lacked the last two.
COLUMNS: Mapping[str, torch.dtype] = {
    "margin": torch.float64,
    "visits": torch.int64,
    "crossed": torch.int64,
    "expanding": torch.bool,
    "seen": torch.int64,
    "below": torch.int64,
    "background": torch.int64,
}
_NEW = ("below", "background")


def _listed(column: Any) -> Any:
    return column.tolist() if isinstance(column, torch.Tensor) else column


C = TypeVar("C")
Column = Annotated[list[C], BeforeValidator(_listed)]


class LedgerState(BaseModel):
    """What :meth:`MarginLedger.state_dict` gives."""

    model_config = ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True)

    epoch: NonNegativeInt
    medians: list[float]
    cases: list[str]
    margin: Column[NonNegativeFloat]
    visits: Column[NonNegativeInt]
    crossed: Column[NonNegativeInt]
    expanding: Column[bool]
    seen: Column[int]
    below: Column[NonNegativeInt]
    background: Column[NonNegativeInt]

    @model_validator(mode="before")
    @classmethod
    def _is_of_this_version(cls, state: Any) -> Any:
        version = state.get("version") if isinstance(state, Mapping) else None
        if version == 1 and isinstance(state.get("cases"), list):
            return {**state, **{name: [0] * len(state["cases"]) for name in _NEW}}
        if version != STATE_VERSION:
            raise ValueError(f"it is of version {version!r}, this ima-seg reads versions 1 and {STATE_VERSION}")
        return state

    @model_validator(mode="after")
    def _has_a_row_for_each_case(self) -> LedgerState:
        lengths = {name: len(getattr(self, name)) for name in ("cases", *COLUMNS)}
        if len(set(lengths.values())) > 1 or len(set(self.cases)) < len(self.cases):
            raise ValueError(f"it has a case twice, or columns of different lengths: {lengths}")
        return self
