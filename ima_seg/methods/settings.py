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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ima_seg.attacks.boundary import Refine, SearchSettings
from ima_seg.attacks.network import Precision
from ima_seg.errors import UserError
from ima_seg.methods.ledger import Rule
from ima_seg.types import Norm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Names the settings file.
ENVIRONMENT_VARIABLE = "IMA_CONFIG"
#: Cap on margins unless set: the paper's largest, L2 15 on a 56x40 slice, is 0.317 SD per voxel.
DEFAULT_EPS_MAX = 0.3

#: What trainings did before a setting existed.
BEFORE: Mapping[str, Any] = {"start": "random", "criterion": "dice"}
#: Settings that there were, and the value of each that did nothing.
REMOVED: Mapping[str, Any] = {"steady_interval": 1}

Auto = Literal["auto"]

S = TypeVar("S", bound="TrainingSettings")


class TrainingSettings(BaseModel):
    """What the settings of all adversarial trainings share. Every size is in the unit named by ``unit``.

    Attributes:
        norm: ``"l2"`` or ``"linf"``.
        unit: of sizes. ``"voxel"``: per voxel in SDs of the network's input, RMS for l2 and largest absolute value for
            linf. ``"l2"``: L2 norm of the perturbation of a whole training patch.
        precision: arithmetic of the attack; ``"auto"`` is bfloat16 where the device computes in it natively.
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


class IMASettings(TrainingSettings):
    """Settings of IMA training.

    Attributes:
        eps_max: cap on margins; ``"auto"``: 0.3 standard deviations per voxel. Only a cap: a case stops expanding at
            its own boundary.
        delta: expansion step and first margin; ``"auto"``: the cap in as many steps as a third of the epochs, but 10
            to 50. Boundaries in 3D are nearer per voxel than in 2D, and a first margin beyond them trains on noise
            that is too large.
        criterion: what tells whether a patch has crossed: ``"dice"``, its hard foreground Dice is below ``tau``;
            ``"relative"``, it is below ``tau`` times that of the clean patch; ``"loss"``, its Dice + CE is above
            ``tau``, counted from its least, which is 0 where all is right. Patches that have crossed without
            perturbation are not searched; with ``"relative"`` those are the patches whose clean Dice is 0. Of a
            classifier none of these: an image has crossed when its predicted class changes, or any of its labels.
        tau: the threshold; above 0, and below 1 for a Dice. The lower, the larger the margins: more robust, less Dice
            on clean images. The paper takes 0.6.
        beta: weight of the adversarial loss; 0 is standard training.
        steps: gradient steps K of the search, at most.
        step_factor: alpha; a step is ``step_factor * margin / steps`` long.
        start: where the search begins. ``"random"``: at a random point. ``"mixed"``: one step from there along the
            input gradient of the clean training loss, which the clean backward pass yields at the cost of the first
            layer's. It is the gradient of another loss (whole batch, all heads), so only the start: the search climbs
            each patch's own. Patches without a usable gradient, and all where ``beta`` is 1, start at random.
        refine, refine_steps, refine_tolerance: how a crossing is placed on the boundary (see ``SearchSettings``). The
            two forwards of the default leave it a little beyond, which cost no robustness.
        background_steps: gradient steps on patches without foreground, which have no boundary to find; 0 leaves them
            clean. They climb their own loss from a random point.
        rule: how visits move margins (see ``MarginLedger``).
        cuda_graphs: ``"on"`` captures the network passes of the search as CUDA graphs, one for each size of the batch
            (:class:`ima_seg.attacks.GraphedPasses`): faster where launches take longer than kernels.
    """

    section: ClassVar[str] = "ima"
    sizes: ClassVar[tuple[str, ...]] = ("eps_max", "delta")

    eps_max: Auto | float = "auto"
    delta: Auto | float = "auto"
    criterion: Literal["dice", "relative", "loss"] = "dice"
    tau: float = 0.45
    beta: float = Field(0.5, ge=0, le=1)
    steps: int = Field(5, ge=1, le=1000)
    step_factor: float = Field(4.0, gt=0)
    start: Literal["random", "mixed"] = "random"
    refine: Refine = "root"
    refine_steps: int = Field(2, ge=0, le=100)
    refine_tolerance: float = Field(0.1, ge=0, lt=1)
    background_steps: int = Field(1, ge=0, le=1000)
    rule: Rule = "mean"
    cuda_graphs: Literal["off", "on"] = "off"

    @field_validator("start", mode="before")
    @classmethod
    def _start_exists(cls, start: Any) -> Any:
        if start == "gradient":
            raise ValueError("it was removed, for it gained nothing; use 'random' or 'mixed'")
        return start

    @field_validator("tau")
    @classmethod
    def _threshold(cls, tau: float, info: ValidationInfo) -> float:
        if info.data.get("criterion") != "loss" and not 0 < tau < 1:
            raise ValueError("as the threshold of a Dice it must be above 0 and below 1")
        if tau <= 0:
            raise ValueError("as the threshold of a loss it must be above 0")
        return tau

    @model_validator(mode="after")
    def _consistent(self) -> IMASettings:
        cap = DEFAULT_EPS_MAX if self.eps_max == "auto" and self.unit == "voxel" else self.eps_max
        if cap != "auto" and self.delta != "auto" and self.delta > cap:
            raise ValueError(f"delta {self.delta:g} is more than eps_max {cap:g}; use a smaller step or a larger cap")
        return self

    def check_classes(self) -> None:
        """Refuse settings that are not for classifiers.

        Raises:
            UserError: ``criterion`` or ``tau``, which say when a segmentation has crossed, differ from their defaults;
                ``beta`` is 1.
        """
        if self.beta == 1:
            raise UserError("beta is 1, which leaves images that are classified wrongly without a loss; use less")
        for name in ("criterion", "tau"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise UserError(
                    f"{name} is {value!r}, which is for segmentations; an image has crossed when its predicted class "
                    f"changes, so leave {name} out"
                )

    def resolve_sizes(self, *, patch_voxels: int, epochs: int) -> tuple[float, float]:
        """``(delta, eps_max)`` per voxel in SDs, for patches of so many values and this many epochs."""
        per_voxel = self.per_voxel(patch_voxels)
        eps_max = DEFAULT_EPS_MAX if self.eps_max == "auto" else self.eps_max * per_voxel
        delta = eps_max / min(max(epochs / 3, 10), 50) if self.delta == "auto" else self.delta * per_voxel
        if delta > eps_max:
            raise UserError(f"delta {delta:g} is more than eps_max {eps_max:g} (per voxel); use a smaller step")
        return delta, eps_max

    def search(self, *, delta: float, multiple_of: int) -> SearchSettings:
        """The settings of the boundary search; ``delta`` per voxel."""
        shared = self.model_dump(include={"steps", "step_factor", "refine", "refine_steps", "refine_tolerance"})
        return SearchSettings(**shared, start_slack=delta, multiple_of=multiple_of)


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


def read_settings_file(path: str | os.PathLike[str], section: str = IMASettings.section) -> dict[str, Any]:
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


#: About half of the default's search (``benchmarks/robustness/search_settings.py``).
FAST = IMASettings(steps=2, start="mixed", refine_steps=1)
#: AMAT: the margin is defined by a loss, and never moved back.
AMAT = IMASettings(criterion="loss", tau=0.5, rule="grow")
