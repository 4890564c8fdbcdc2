"""Ways to train for robustness, for any torch module: IMA, and what it is compared with.

All share this package's attacks, and the step of :class:`~ima_seg.methods.base.Method`.
"""

from ima_seg.methods.base import Calls, Method, MethodReport
from ima_seg.methods.ensembling import TemporalEnsembling, TemporalEnsemblingSettings
from ima_seg.methods.fixed import (
    FGSMAT,
    PGDAT,
    FGSMATSettings,
    FixedBudget,
    FixedBudgetSettings,
    FreeAT,
    FreeATSettings,
    NoiseAugmentation,
    NoiseSettings,
    PGDATSettings,
    SegPGDAT,
    SegPGDATSettings,
    mixed,
)  # fmt: skip
from ima_seg.methods.ima import IMA, StepReport
from ima_seg.methods.registry import METHODS, PRESETS, make_method
from ima_seg.methods.settings import IMASettings
from ima_seg.methods.trades import TRADES, TRADESSettings

__all__ = [
    "FGSMAT", "IMA", "METHODS", "PGDAT", "PRESETS", "TRADES", "Calls", "FGSMATSettings", "FixedBudget",
    "FixedBudgetSettings", "FreeAT", "FreeATSettings", "IMASettings", "Method", "MethodReport", "NoiseAugmentation",
    "NoiseSettings", "PGDATSettings", "SegPGDAT", "SegPGDATSettings", "StepReport", "TRADESSettings",
    "TemporalEnsembling", "TemporalEnsemblingSettings", "make_method", "mixed",
]  # fmt: skip
