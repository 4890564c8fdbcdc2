"""What is evaluated on each case and model: the list of conditions, from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ima_seg.attacks.registry import ATTACKS, GROUPS, SPECIAL
from ima_seg.errors import UserError
from ima_seg.evaluate.attack.corruptions import CORRUPTIONS, SEVERITIES
from ima_seg.evaluate.records import Kind
from ima_seg.evaluate.run import EvaluationSettings


@dataclass(frozen=True)
class Condition:
    """One record to be: an attack at a budget, a corruption at a severity, or the clean image."""

    kind: Kind
    attack: str
    eps: float | None = None
    severity: int | None = None

    @property
    def key(self) -> tuple[str, float | None, int | None]:
        """What identifies it within a run; the end of :attr:`Record.key`."""
        return (self.attack, self.eps, self.severity)

    def fields(self, settings: EvaluationSettings) -> dict[str, Any]:
        """Fields of its record that follow from the settings."""
        if self.kind in ("clean", "corruption"):
            return {"severity": self.severity}
        if self.kind == "minimal":
            return {"norm": settings.norm, "budget": "volume"}
        return {"norm": settings.norm, "unit": settings.unit, "eps": self.eps, "budget": settings.budget}


def attack_names(names: Sequence[str]) -> list[str]:
    """``names`` with groups replaced by their members, each once.

    Raises:
        UserError: an unknown name.
    """
    found = [member for name in names for member in GROUPS.get(name, [name])]
    for name in found:
        if name not in ATTACKS and name not in SPECIAL:
            known = ", ".join([*ATTACKS, *SPECIAL, *GROUPS])
            raise UserError(f"attack {name!r} does not exist; there are: {known}")
    return list(dict.fromkeys(found))


def check_settings(settings: EvaluationSettings, *, models: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse settings that cannot be evaluated.

    Raises:
        UserError: names the setting, its value and the remedy.
    """
    norm, unit = settings.norm, settings.unit
    if (norm, unit) in (("l2", "linf"), ("linf", "rms"), ("linf", "l2")):
        fitting = "rms, l2, hu or percent" if norm == "l2" else "linf, hu or percent"
        raise UserError(f"unit {unit!r} does not go with norm {norm!r}; use --unit {fitting}")
    if settings.attacks and not settings.eps:
        raise UserError("attacks need at least one budget; name them with --eps, for example --eps 0.02 0.05 0.1")
    if "transfer" in settings.attacks and len(models) < 2:
        raise UserError("attack 'transfer' needs two models or more; name another with -m")
    for name in settings.targets:
        if name not in classes:
            raise UserError(f"target class {name!r} does not exist; the model has: {', '.join(classes)}")
    for name in settings.corruptions:
        if name not in CORRUPTIONS:
            raise UserError(f"corruption {name!r} does not exist; there are: {', '.join(CORRUPTIONS)}")


def conditions(settings: EvaluationSettings, *, model: str, models: Sequence[str]) -> list[Condition]:
    """All conditions of one case and model, the clean image first, in the order of the settings."""
    found = [Condition("clean", "clean")]
    for name in settings.attacks:
        kind: Kind = ATTACKS[name].kind if name in ATTACKS else "white"
        names, budgets = [name], list[float | None](settings.eps)
        if name == "minimal":
            kind, budgets = "minimal", [None]
        elif name == "transfer":
            kind, names = "transfer", [f"transfer:{other}" for other in models if other != model]
        elif name in ("disappear", "appear"):
            kind, names = "targeted", [f"{name}:{target}" for target in settings.targets]
        found += [Condition(kind, full, eps) for full in names for eps in budgets]
    for name in settings.corruptions:
        found += [Condition("corruption", f"corruption:{name}", severity=severity) for severity in SEVERITIES]
    return found
