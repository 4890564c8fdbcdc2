"""ima-seg: segmentation networks that tolerate imperfect images, by increasing-margin adversarial training."""

from ima_seg.errors import UserError
from ima_seg.ima import IMA, StepReport
from ima_seg.ledger import MarginLedger
from ima_seg.settings import IMASettings, load_settings
from ima_seg.types import Labels, Target, ThreatModel

__version__ = "0.1.0"

__all__ = [
    "IMA",
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
