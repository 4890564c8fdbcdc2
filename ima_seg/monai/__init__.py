"""IMA training and robustness evaluation of any MONAI network, through MONAI's engines, handlers and bundles."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ima_seg.monai.attack import Attack as Attack
    from ima_seg.monai.attack import AttackBatchd as AttackBatchd
    from ima_seg.monai.attack import per_sample as per_sample
    from ima_seg.monai.batch import case_name as case_name
    from ima_seg.monai.handler import MarginLedgerHandler as MarginLedgerHandler
    from ima_seg.monai.handler import TrainingHandler as TrainingHandler
    from ima_seg.monai.robustness import RobustnessHandler as RobustnessHandler
    from ima_seg.monai.trainer import AdversarialSupervisedTrainer as AdversarialSupervisedTrainer
    from ima_seg.monai.trainer import IMASupervisedTrainer as IMASupervisedTrainer

# Imported at first use, for MONAI and Ignite take seconds to load.
_HOMES = {
    "AdversarialSupervisedTrainer": "trainer",
    "Attack": "attack",
    "AttackBatchd": "attack",
    "IMASupervisedTrainer": "trainer",
    "MarginLedgerHandler": "handler",
    "RobustnessHandler": "robustness",
    "TrainingHandler": "handler",
    "case_name": "batch",
    "per_sample": "attack",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ima_seg.monai.compat import check_versions

    check_versions()
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
