"""Other ways to train for robustness, for any torch module: what IMA is compared with.

All share this package's attacks, and the step of :class:`~ima_seg.methods.base.Method`.
"""

from ima_seg.methods.base import Method, MethodReport
from ima_seg.methods.ensembling import TemporalEnsembling
from ima_seg.methods.fixed import FGSMAT, PGDAT, NoiseAugmentation, SegPGDAT
from ima_seg.methods.fixed_settings import (
    FGSMATSettings,
    FixedBudgetSettings,
    FreeATSettings,
    NoiseSettings,
    PGDATSettings,
    SegPGDATSettings,
    TemporalEnsemblingSettings,
    TRADESSettings,
)
from ima_seg.methods.free import FreeAT
from ima_seg.methods.trades import TRADES

#: The settings of all methods.
SETTINGS: tuple[type[FixedBudgetSettings], ...] = (
    PGDATSettings, FGSMATSettings, SegPGDATSettings, FreeATSettings, TRADESSettings, TemporalEnsemblingSettings,
    NoiseSettings,
)  # fmt: skip

__all__ = [
    "FGSMAT",
    "PGDAT",
    "SETTINGS",
    "TRADES",
    "FGSMATSettings",
    "FreeAT",
    "FreeATSettings",
    "Method",
    "MethodReport",
    "NoiseAugmentation",
    "NoiseSettings",
    "PGDATSettings",
    "SegPGDAT",
    "SegPGDATSettings",
    "TRADESSettings",
    "TemporalEnsembling",
    "TemporalEnsemblingSettings",
]
