"""The methods by name, which is the section of their settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ima_seg.errors import UserError
from ima_seg.methods.base import Method
from ima_seg.methods.ensembling import TemporalEnsembling
from ima_seg.methods.fixed import FGSMAT, PGDAT, FreeAT, NoiseAugmentation, SegPGDAT
from ima_seg.methods.ima import IMA
from ima_seg.methods.ima_settings import AMAT, AME
from ima_seg.methods.settings import TrainingSettings
from ima_seg.methods.trades import TRADES

#: A method of one's own is added under the section of its settings.
METHODS: dict[str, type[Method[Any, Any]]] = {
    kind.settings_class.section: kind
    for kind in (IMA, PGDAT, FGSMAT, SegPGDAT, FreeAT, TRADES, TemporalEnsembling, NoiseAugmentation)
}
#: Further names: settings of one of these methods that make another.
PRESETS: Mapping[str, TrainingSettings] = {"amat": AMAT, "ame": AME}


def preset(name: str) -> TrainingSettings:
    """The default settings of the method ``name``, in ``METHODS`` or ``PRESETS``.

    Raises:
        UserError: no such method.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; the methods there are: {', '.join((*METHODS, *PRESETS))}")
    return METHODS[name].settings_class()


def make_method(settings: str | TrainingSettings, **given: Any) -> Method[Any, Any]:
    """The method that ``settings`` are of, or of that name and with its default settings.

    Args:
        settings: of the method, or its name.
        given: labels, patch_voxels, epochs, image_channels and channel_sd, as for :meth:`Method.from_settings`.

    Raises:
        UserError: no such method, or one that is not for such labels.
    """
    settings = preset(settings) if isinstance(settings, str) else settings
    return METHODS[settings.section].from_settings(settings, **given)
