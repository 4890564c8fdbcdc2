"""ima-seg: segmentation networks that tolerate imperfect images, by increasing-margin adversarial training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ima_seg.errors import UserError

if TYPE_CHECKING:
    from ima_seg.methods.ima import IMA, StepReport
    from ima_seg.methods.ima_settings import IMASettings
    from ima_seg.methods.ledger import MarginLedger
    from ima_seg.methods.settings import load_settings
    from ima_seg.types import Classes, Labels, Target, ThreatModel

__version__ = "0.1.0"

__all__ = [
    "IMA",
    "Classes",
    "IMASettings",
    "Labels",
    "MarginLedger",
    "StepReport",
    "Target",
    "ThreatModel",
    "UserError",
    "__version__",
    "load_settings",
]

# Imported at first use, for a report must be made where there is no torch.
_HOMES = {
    "Classes": "types",
    "IMA": "methods.ima",
    "IMASettings": "methods.ima_settings",
    "Labels": "types",
    "MarginLedger": "methods.ledger",
    "StepReport": "methods.ima",
    "Target": "types",
    "ThreatModel": "types",
    "load_settings": "methods.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
