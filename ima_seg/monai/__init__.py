"""IMA training and robustness evaluation of any MONAI network, through MONAI's engines, handlers and bundles."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ima_seg.monai.attack import Attack, AttackBatchd, per_sample
    from ima_seg.monai.batch import case_name
    from ima_seg.monai.margins import MarginLedgerHandler
    from ima_seg.monai.robustness import RobustnessHandler
    from ima_seg.monai.trainer import IMASupervisedTrainer

__all__ = [
    "Attack",
    "AttackBatchd",
    "IMASupervisedTrainer",
    "MarginLedgerHandler",
    "RobustnessHandler",
    "case_name",
    "per_sample",
]

# Imported at first use, for MONAI and Ignite take seconds to load.
_HOMES = {
    "Attack": "attack",
    "AttackBatchd": "attack",
    "IMASupervisedTrainer": "trainer",
    "MarginLedgerHandler": "margins",
    "RobustnessHandler": "robustness",
    "case_name": "batch",
    "per_sample": "attack",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ima_seg.monai.compat import check_versions

    check_versions()
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
