"""plans.json and dataset.json of a model folder, held to what nnU-Net and this package read in them.

Both come back as the dicts that nnU-Net's managers take, with numbers that are numbers. Fields that nobody reads here
may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from ima_seg.errors import UserError
from ima_seg.files import read_json
from ima_seg.nnunet.normalisation import FIXED
from ima_seg.validation import validated

_MISSING = "does not exist; copy it from where nnUNetv2_train wrote it"
_REMEDY = "copy it again from where the model was trained, or correct it"
#: Voxels of a patch, and stages, blocks or convolutions of a network, that nobody trains with.
_LARGEST_PATCH, _MOST_LAYERS = 1 << 28, 256


def _is_file_name(name: str) -> str:
    if not name or name in (".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{name!r} is no name of a file, or a part of one")
    return name


FileName = Annotated[str, AfterValidator(_is_file_name)]
#: nnU-Net takes "1" for 1; our label maps have 16 bits.
LabelValue = Annotated[int, Field(strict=False, ge=0, le=32767)]
Intensity = Annotated[float, Field(gt=-1e9, lt=1e9)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _DatasetEntry(_Part):
    images: list[str] = Field(min_length=1)
    label: str


class _Dataset(_Part):
    channel_names: dict[str, Any] = Field(min_length=1)
    labels: dict[str, LabelValue | Annotated[list[LabelValue], Field(min_length=1)]]
    regions_class_order: list[LabelValue] | None = None
    file_ending: FileName
    dataset: dict[FileName, _DatasetEntry] | None = None

    @model_validator(mode="before")
    @classmethod
    def _old_name_of_channels(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "modality" in values:
            names, old = values.get("channel_names"), values["modality"]
            if not isinstance(old, Mapping):
                raise ValueError(f"modality is {repr(old)[:100]}, no table of channels; leave it out")
            if isinstance(names, Mapping) and len(names) != len(old):
                raise ValueError(f"channel_names has {len(names)} channels, modality {len(old)}; leave modality out")
            return {**values, "channel_names": old if names is None else names}
        return values

    @model_validator(mode="after")
    def _channels_are_counted(self) -> _Dataset:
        numbers = [int(key) if key.strip().isdecimal() else -1 for key in self.channel_names]
        if sorted(numbers) != list(range(len(numbers))):
            raise ValueError(
                f"channel_names has the keys {', '.join(map(repr, self.channel_names))[:200]}; they must be the "
                'numbers of the channels from "0" on, and the names their values: {"0": "CT"}'
            )
        return self

    @model_validator(mode="after")
    def _labels_are_nnunets(self) -> _Dataset:
        """As nnU-Net's LabelManager and its check of data sets demand."""
        if self.labels.get("background") != 0:
            raise ValueError('labels must map names to values, with "background": 0 among them')
        values = {name: v if isinstance(v, list) else [v] for name, v in self.labels.items() if name != "ignore"}
        known = sorted({v for members in values.values() for v in members})
        if known != list(range(len(known))):
            raise ValueError(f"labels has the values {str(known)[:200]}; they must be 0, 1, 2, ... without a gap")
        if "ignore" in self.labels and self.labels["ignore"] != len(known):
            raise ValueError(f"labels.ignore is {self.labels['ignore']}; it must follow the others, as {len(known)}")
        foreground = [members for members in values.values() if set(members) != {0}]
        order = self.regions_class_order
        if any(len(members) > 1 for members in values.values()):
            if order is None or len(order) != len(foreground) or not set(order) <= set(known):
                raise ValueError(
                    f"regions_class_order is {str(order)[:100]}; with regions it must have one of the label values for "
                    f"each of the {len(foreground)} classes"
                )
        elif len(foreground) != len(known) - 1:
            raise ValueError("labels gives two classes the same value")
        if not foreground:
            raise ValueError("labels has no class but the background")
        return self


class _Architecture(_Part):
    network_class_name: str
    arch_kwargs: dict[str, Any]
    requires_import: list[str] = Field(alias="_kw_requires_import")

    @model_validator(mode="after")
    def _can_be_built(self) -> _Architecture:
        for key in self.requires_import:
            if not isinstance(self.arch_kwargs.get(key, 0), str | None):
                raise ValueError(f"arch_kwargs.{key} must be the name of a class or null, as _kw_requires_import says")
        for key, value in self.arch_kwargs.items():
            numbers = value if isinstance(value, list) else [value]
            if key.startswith("n_") and any(isinstance(n, int) and n > _MOST_LAYERS for n in numbers):
                raise ValueError(f"arch_kwargs.{key} is {str(value)[:100]}, more than {_MOST_LAYERS}")
        return self


class _Shared(_Part):
    """What all configurations have, with what they inherit."""

    patch_size: list[PositiveInt] = Field(min_length=2, max_length=3)
    spacing: list[Annotated[float, Field(ge=1e-6, le=1e6)]]
    batch_size: PositiveInt
    normalization_schemes: list[str]
    use_mask_for_norm: list[bool]
    preprocessor_name: str
    resampling_fn_data: str
    resampling_fn_data_kwargs: dict[str, Any]
    resampling_fn_seg: str
    resampling_fn_seg_kwargs: dict[str, Any]
    resampling_fn_probabilities: str
    resampling_fn_probabilities_kwargs: dict[str, Any]
    previous_stage: str | None = None

    @model_validator(mode="after")
    def _lengths(self) -> _Shared:
        if len(self.spacing) != len(self.patch_size):
            raise ValueError(f"spacing {self.spacing} and patch_size {self.patch_size} have not as many axes")
        if math.prod(self.patch_size) > _LARGEST_PATCH:
            raise ValueError(f"patch_size {self.patch_size} has more than {_LARGEST_PATCH} voxels")
        return self


class _Configuration(_Shared):
    architecture: _Architecture


Layers = Annotated[list[Annotated[int, Field(ge=0, le=_MOST_LAYERS)]], Field(min_length=1, max_length=_MOST_LAYERS)]
Kernels = list[int | list[int]]


class _OldConfiguration(_Shared):
    """Of plans before nnU-Net 2.3, whose architecture nnU-Net reconstructs."""

    UNet_class_name: Literal["PlainConvUNet", "ResidualEncoderUNet"]
    UNet_base_num_features: PositiveInt
    unet_max_num_features: PositiveInt
    n_conv_per_stage_encoder: Layers
    n_conv_per_stage_decoder: Layers
    num_pool_per_axis: list[NonNegativeInt]
    pool_op_kernel_sizes: Kernels
    conv_kernel_sizes: Kernels


class _Plans(_Part):
    plans_name: str = ""
    dataset_name: str = ""
    image_reader_writer: str
    label_manager: str = "LabelManager"
    transpose_forward: list[int]
    transpose_backward: list[int]
    configurations: dict[str, dict[str, Any]] = Field(min_length=1)
    intensities: dict[str, dict[str, Any]] = Field(alias="foreground_intensity_properties_per_channel")
    ima: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _old_name_of_intensities(cls, values: Any) -> Any:
        new, old = "foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality"
        return (
            {**values, new: values[old]}
            if isinstance(values, Mapping) and new not in values and old in values
            else values
        )

    @model_validator(mode="after")
    def _axes_go_there_and_back(self) -> _Plans:
        there, back = self.transpose_forward, self.transpose_backward
        if sorted(there) != [0, 1, 2] or sorted(back) != [0, 1, 2] or [there[axis] for axis in back] != [0, 1, 2]:
            raise ValueError(f"transpose_backward {back} does not undo transpose_forward {there} of the axes 0, 1, 2")
        return self


class _Intensities(_Part):
    std: NonNegativeFloat


class _CTIntensities(_Part):
    mean: Intensity
    std: Annotated[float, Field(gt=1e-6, lt=1e9)]
    percentile_00_5: Intensity
    percentile_99_5: Intensity

    @model_validator(mode="after")
    def _has_a_range(self) -> _CTIntensities:
        if self.percentile_00_5 >= self.percentile_99_5:
            raise ValueError(f"percentile_00_5 {self.percentile_00_5} is not below percentile_99_5")
        return self


def read_dataset(path: Path) -> dict[str, Any]:
    """Contents of dataset.json, with ``channel_names`` also where it has nnU-Net's old name for them.

    Raises:
        UserError: there is no such file, it is not JSON, or something in it is not as nnU-Net needs it.
    """
    contents = read_json(path, missing=_MISSING, remedy=_REMEDY)
    return validated(_Dataset, contents, source=path, remedy=_REMEDY).model_dump(exclude_unset=True)


def read_plans(path: Path, *, missing: str = _MISSING) -> dict[str, Any]:
    """Contents of a plans file; of its configurations only that there are some.

    Raises:
        UserError: there is no such file (the message goes on with ``missing``), it is not JSON, or something in it is
            not as nnU-Net needs it.
    """
    contents = read_json(path, missing=missing, remedy=_REMEDY)
    return validated(_Plans, contents, source=path, remedy=_REMEDY).model_dump(exclude_unset=True, by_alias=True)


def read_configuration(path: Path, name: str, *, channels: int) -> dict[str, Any]:
    """:func:`read_plans`, and the configuration ``name`` is whole, together with what it inherits.

    Args:
        path: the plans file.
        name: of the configuration that will be used.
        channels: how many dataset.json has.

    Raises:
        UserError: as for :func:`read_plans`; the configuration is not there, or does not fit the channels.
    """
    plans = read_plans(path)
    resolved = _resolved(plans["configurations"], name, path)
    is_old = "UNet_class_name" in resolved and "architecture" not in resolved
    kind: type[_Shared] = _OldConfiguration if is_old else _Configuration
    where = f"{path}: configuration {name}"
    checked = validated(kind, resolved, source=where, remedy=_REMEDY)
    for key in ("normalization_schemes", "use_mask_for_norm"):
        if len(found := getattr(checked, key)) != channels:
            raise UserError(
                f"{where}: {key} is {str(found)[:200]} for the {channels} channels of dataset.json; {_REMEDY}"
            )
    # Inference takes its segmentations, not its configuration, which an export may lack.
    if checked.previous_stage == name:
        raise UserError(f"{where}: previous_stage is {name!r} itself; it is another configuration, or null; {_REMEDY}")
    intensities = plans["foreground_intensity_properties_per_channel"]
    for index, scheme in enumerate(checked.normalization_schemes):
        key = f"foreground_intensity_properties_per_channel.{index}"
        if str(index) not in intensities:
            raise UserError(f"{path} is without {key!r}, though dataset.json has that channel; {_REMEDY}")
        if scheme == "CTNormalization":
            validated(_CTIntensities, intensities[str(index)], source=f"{path}: {key}", remedy=_REMEDY)
        elif scheme in FIXED:
            validated(_Intensities, intensities[str(index)], source=f"{path}: {key}", remedy=_REMEDY)
    plans["configurations"][name] = checked.model_dump(exclude_unset=True, by_alias=True)
    return plans


def _resolved(configurations: Mapping[str, Mapping[str, Any]], name: str, path: Path) -> dict[str, Any]:
    """A configuration on top of those it inherits from, as nnU-Net's PlansManager has it."""
    resolved: dict[str, Any] = {}
    heirs: list[str] = []
    current: Any = name
    while True:
        if not isinstance(current, str) or current not in configurations or current in heirs:
            why = f"which {heirs[-1]!r} inherits from" if heirs else "which the checkpoint was trained for"
            what = (
                "inherits from itself" if current in heirs else f"is not there; there are: {', '.join(configurations)}"
            )
            raise UserError(f"{path}: the configuration {current!r}, {why}, {what[:300]}; {_REMEDY}")
        heirs.append(current)
        resolved = {**configurations[current], **resolved}
        if "inherits_from" not in configurations[current]:
            return {key: value for key, value in resolved.items() if key != "inherits_from"}
        current = configurations[current]["inherits_from"]
