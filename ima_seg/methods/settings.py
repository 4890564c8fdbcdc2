"""Settings of trainings: validated, serialisable, read from a TOML or YAML file or a plans section."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ima_seg.attacks.network import Precision
from ima_seg.errors import UserError
from ima_seg.types import Norm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Names the settings file.
ENVIRONMENT_VARIABLE = "IMA_CONFIG"

#: What trainings did before a setting existed.
BEFORE: Mapping[str, Any] = {
    "start": "random", "criterion": "dice", "share": 1.0, "crossing_share": 0.8, "ema": 0.0, "teacher": None,
    "teacher_weight": 1.0, "training_precision": "nnunet",
}  # fmt: skip
#: Settings that there were, and the value of each that did nothing.
REMOVED: Mapping[str, Any] = {"steady_interval": 1}

S = TypeVar("S", bound="TrainingSettings")


class TrainingSettings(BaseModel):
    """What the settings of all adversarial trainings share. Every size is in the unit named by ``unit``.

    Attributes:
        norm: ``"l2"`` or ``"linf"``.
        unit: of sizes. ``"voxel"``: per voxel in SDs of the network's input, RMS for l2 and largest absolute value for
            linf. ``"l2"``: L2 norm of the perturbation of a whole training patch.
        precision: arithmetic of the attack; ``"auto"`` is bfloat16 where the device computes in it natively.
        training_precision: of nnU-Net's trainers, arithmetic of the training passes: ``"nnunet"`` is nnU-Net's own
            (float32 on CPUs, automatic mixed precision on CUDA); ``"bf16"`` is bfloat16 wherever autocast sees fit,
            with the loss in float32. On CPUs that compute in it natively it halves their time.
        ema: decay per iteration of an exponential moving average of the weights, with which nnU-Net's trainers
            validate, predict and export; 0 for none.
        teacher: of nnU-Net's trainers, the folder of a trained model (``TRAINER__PLANS__CONFIGURATION``) with the same
            fold: a frozen network to whose predictions of clean patches training is held.
        teacher_weight: of that, the mean over voxels of KL(teacher, network), in nats, beside the training loss.
        epochs, iterations_per_epoch, val_iterations_per_epoch, save_every: replace nnU-Net's own where given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    #: The section of the plans and of settings files.
    section: ClassVar[str]
    #: The settings that are sizes.
    sizes: ClassVar[tuple[str, ...]]

    norm: Norm = "l2"
    unit: Literal["voxel", "l2"] = "voxel"
    precision: Precision = "auto"
    training_precision: Literal["nnunet", "bf16"] = "nnunet"
    ema: float = Field(0.0, ge=0, lt=1)
    teacher: str | None = Field(None, min_length=1)
    teacher_weight: float = Field(1.0, gt=0)
    epochs: int | None = Field(None, ge=1)
    iterations_per_epoch: int | None = Field(None, ge=1)
    val_iterations_per_epoch: int | None = Field(None, ge=1)
    save_every: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, values: Any) -> Any:
        # pydantic reads true as 1, which is no number of epochs that anybody meant.
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool):
                raise ValueError(f"{key} is {str(value).lower()}; no setting is a boolean, give a number or a name")
        return values

    @model_validator(mode="after")
    def _sizes_make_sense(self: S) -> S:
        for name in self.sizes:
            value = getattr(self, name)
            if value != "auto" and value <= 0:
                remedy = " (or 'auto')" if type(self).model_fields[name].default == "auto" else ""
                raise ValueError(f"{name} is {value:g}; it must be positive{remedy}")
            if self.unit == "l2" and value != "auto" and name not in self.model_fields_set:
                raise ValueError(f"unit is 'l2', so give {name} in that unit; its default of {value:g} is per voxel")
        if self.unit == "l2" and self.norm != "l2":
            raise ValueError("unit 'l2' goes with norm 'l2'; give linf sizes per voxel (unit = 'voxel')")
        return self

    @classmethod
    def parse(cls: type[S], values: Mapping[str, Any], *, source: str, base: S | None = None) -> S:
        """Validate ``values`` on top of ``base`` (default: the defaults).

        Raises:
            UserError: an unknown key or a value out of range, naming ``source``, key, value and what is allowed.
        """
        inherited = base.model_dump(exclude_unset=True) if base else {}
        if base is not None and values.get("unit", base.unit) != base.unit:
            # Sizes given in the other unit would be misread; they are chosen anew unless restated.
            inherited = {key: value for key, value in inherited.items() if key not in cls.sizes}
        merged = {**inherited, **values}
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise UserError("\n".join(_explain(item, source, cls) for item in error.errors())) from None

    def per_voxel(self, patch_voxels: int) -> float:
        """The factor that turns a size in ``unit`` into one per voxel, for patches of so many values."""
        return 1 / math.sqrt(patch_voxels) if self.unit == "l2" else 1.0

    def replaced(self) -> dict[str, int]:
        """The attributes of nnU-Net's trainer that these settings replace."""
        attributes = {
            "num_epochs": self.epochs,
            "num_iterations_per_epoch": self.iterations_per_epoch,
            "num_val_iterations_per_epoch": self.val_iterations_per_epoch,
            "save_every": self.save_every,
        }
        return {name: value for name, value in attributes.items() if value is not None}


def _explain(item: Any, source: str, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in item["loc"] if part not in ("literal['auto']", "float"))
    if item["type"] == "extra_forbidden" and key in REMOVED:
        return f"{source}: the setting {key!r} was removed; leave it out"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, model.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; the settings there are: {', '.join(model.model_fields)}"
        return f"{source}: unknown setting {key!r}{hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{source}: {key} = {item['input']!r}: {message}" if key else f"{source}: {message}"


def read_settings_file(path: str | os.PathLike[str], section: str = "ima") -> dict[str, Any]:
    """The raw settings of a ``.toml``, ``.yaml`` or ``.yml`` file, at its top level or in a section ``section``.

    Raises:
        UserError: no such file, another suffix, or not parseable.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"settings file {file} does not exist; correct {ENVIRONMENT_VARIABLE} or unset it")
    if file.suffix not in (".toml", ".yaml", ".yml"):
        raise UserError(f"settings file {file} ends in {file.suffix!r}; use .toml, .yaml or .yml")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".toml" and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise yaml.YAMLError("it has an alias, *NAME, and a few may stand for billions; write the value out")
        values: Any = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text) or {}
    except (ValueError, yaml.YAMLError, OSError, RecursionError) as error:
        raise UserError(f"settings file {file} cannot be read: {error}") from None
    if isinstance(values, dict) and values and all(isinstance(value, dict) for value in values.values()):
        if section not in values:
            raise UserError(f"settings file {file} has no section {section!r}; there are: {', '.join(values)}")
        values = values[section]
    if not isinstance(values, dict):
        raise UserError(f"settings file {file} holds a {type(values).__name__}; expected key = value pairs")
    return values


def load_settings(base: S, *, plans: Mapping[str, Any] | None = None, file: str | None = None) -> S:
    """Settings in order of precedence: ``file`` (default: ``$IMA_CONFIG``), the section of the plans, ``base``.

    Raises:
        UserError: see :meth:`TrainingSettings.parse` and :func:`read_settings_file`.
    """
    settings, name = base, base.section
    section = (plans or {}).get(name)
    if section is not None:
        if not isinstance(section, Mapping):
            raise UserError(f"plans: the section {name!r} is a {type(section).__name__}; expected key: value pairs")
        settings = type(base).parse(section, source=f"plans, section {name!r}", base=settings)
    file = file or os.environ.get(ENVIRONMENT_VARIABLE)
    if file:
        settings = type(base).parse(read_settings_file(file, name), source=file, base=settings)
    return settings


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two trainings' settings, as a phrase; empty where they train the same.

    ``old`` may be of a version with other settings: see ``BEFORE`` and ``REMOVED``.
    """
    old = {name: value for name, value in old.items() if name not in REMOVED or value != REMOVED[name]}
    old = {**{name: value for name, value in BEFORE.items() if name in new}, **old}
    # How often to save and validate changes nothing about what is trained.
    ignored = {"save_every", "val_iterations_per_epoch", "precision", "cuda_graphs"}
    names = [n for n in {**old, **new} if n not in ignored and old.get(n) != new.get(n)]
    return ", ".join(f"{n}: {old.get(n)} there, {new.get(n)} now" for n in names)
