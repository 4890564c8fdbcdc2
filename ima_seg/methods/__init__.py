"""Ways to train for robustness, for any torch module: IMA, and what it is compared with.

All share this package's attacks, and the step of :class:`~ima_seg.methods.base.Method`.
"""

from ima_seg.methods.base import Method, MethodReport
from ima_seg.methods.calls import Calls
from ima_seg.methods.ensembling import TemporalEnsembling, TemporalEnsemblingSettings
from ima_seg.methods.fixed import (
    FGSMAT,
    PGDAT,
    FGSMATSettings,
    FixedBudget,
    FixedBudgetSettings,
    FreeAT,
    FreeATSettings,
    Mixed,
    MixedSettings,
    NoiseAugmentation,
    NoiseSettings,
    PGDATSettings,
    SegPGDAT,
    SegPGDATSettings,
)  # fmt: skip
from ima_seg.methods.ima import IMA, StepReport
from ima_seg.methods.ima_settings import IMASettings
from ima_seg.methods.registry import METHODS, PRESETS, make_method
from ima_seg.methods.trades import TRADES, TRADESSettings

__all__ = [
    "FGSMAT",
    "IMA",
    "METHODS",
    "PGDAT",
    "PRESETS",
    "TRADES",
    "Calls",
    "FGSMATSettings",
    "FixedBudget",
    "FixedBudgetSettings",
    "FreeAT",
    "FreeATSettings",
    "IMASettings",
    "Method",
    "MethodReport",
    "Mixed",
    "MixedSettings",
    "NoiseAugmentation",
    "NoiseSettings",
    "PGDATSettings",
    "SegPGDAT",
    "SegPGDATSettings",
    "StepReport",
    "TRADESSettings",
    "TemporalEnsembling",
    "TemporalEnsemblingSettings",
    "make_method",
]  # fmt: skip
