"""What a bundle that is not trusted may be made of: classes that only compute, with arguments that stay within it.

Lists, not rules, say which transforms and inferers these are, so that what a later MONAI adds is refused until somebody
has read it. Of networks, it is all but those that fetch, read, compile or import something on their own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

import monai.inferers
import monai.transforms
from monai.bundle import ComponentLocator
from monai.transforms import Compose, LoadImage, LoadImaged, Transform
from monai.transforms.io.array import SUPPORTED_READERS
from torch import nn

from ima_seg.monai.configfile import MOST_ITEMS, Refused, shown

#: Transforms of monai.transforms that compute, and no more; also as NAMEd, on dictionaries, and as RandNAME.
_TRANSFORMS = """
    Compose OneOf RandomOrder SomeOf ApplyPending
    BorderPad BoundingRect CenterScaleCrop CenterSpatialCrop Crop CropByLabelClasses CropByPosNegLabel CropForeground
    DivisiblePad Pad ResizeWithPadOrCrop ScaleCrop SpatialCrop SpatialCropSamples SpatialPad WeightedCrop
    AdjustContrast BiasField ClipIntensityPercentiles CoarseDropout CoarseShuffle DetectEnvelope ForegroundMask
    GaussianNoise GaussianSharpen GaussianSmooth GibbsNoise HistogramNormalize HistogramShift IntensityRemap
    KSpaceSpikeNoise MaskIntensity MedianSmooth NormalizeIntensity RicianNoise SavitzkyGolaySmooth ScaleIntensity
    ScaleIntensityFixedMean ScaleIntensityRange ScaleIntensityRangePercentiles ShiftIntensity StdShiftIntensity
    ThresholdIntensity
    LoadImage FromMetaTensor ToMetaTensor
    Activations AsDiscrete DistanceTransformEDT Ensemble FillHoles GenerateHeatmap Invert KeepLargestConnectedComponent
    LabelFilter LabelToContour MeanEnsemble ProbNMS RemoveSmallObjects SobelGradients VoteEnsemble
    SmoothDeform SmoothFieldAdjustContrast SmoothFieldAdjustIntensity
    2DElastic 3DElastic Affine AffineGrid AxisFlip ConvertBoxToPoints ConvertPointsToBoxes DeformGrid Flip
    GridDistortion GridPatch GridSplit Orientation Resample ResampleToMatch Resize Rotate Rotate90
    SimulateLowResolution Spacing SpatialResample Zoom
    AddCoordinateChannels AddExtremePointsChannel ApplyTransformToPoints AsChannelLast CastToType ClassesToIndices
    ConcatItems ConvertToMultiChannelBasedOnBratsClasses CopyItems DeleteItems EnsureChannelFirst EnsureType
    FgBgToIndices FlattenSequence FlattenSubKeys Identity ImageFilter IntensityStats LabelToMask MapLabelValue
    RemoveRepeatedChannel RepeatChannel SelectItems SplitDim SqueezeDim ToDevice ToNumpy ToTensor
    TransformPointsImageToWorld TransformPointsWorldToImage Transpose
"""
#: Transforms that write what they are given to files, or remove files.
SAVERS = ("SaveImage", "SaveImaged", "SaveClassificationd", "WriteFileMapping", "WriteFileMappingd")
_INFERERS = ("SimpleInferer", "SliceInferer", "SlidingWindowInferer", "SlidingWindowInfererAdapt")
#: Of monai.networks: models of torchvision, transformers or segment_anything, and code compiled at run time.
_NO_NETWORKS = frozenset({
    "monai.networks.blocks.hyena", "monai.networks.layers.gmm", "monai.networks.nets.cell_sam_wrapper",
    "monai.networks.nets.milmodel", "monai.networks.nets.torchvision_fc", "monai.networks.nets.transchex",
})  # fmt: skip
_NETWORKS = ("monai.networks.blocks.", "monai.networks.layers.", "monai.networks.nets.", "torch.nn.modules.")
_PLACES = ("monai.networks.", "monai.transforms.", "monai.inferers.", "torch.nn.")

#: Arguments of LoadImage: its own, and those of readers that say how an image lies in its file.
_READING = """
    keys reader dtype meta_keys meta_key_postfix overwriting image_only ensure_channel_first simple_keys
    prune_meta_pattern prune_meta_sep allow_missing_keys expanduser affine_lps_to_ras as_closest_canonical channel_dim
    reverse_indexing series_meta squeeze_non_spatial_dims swap_ij
"""
#: Arguments of transforms that are sizes in voxels or counts, and what none of them comes near to.
_SIZES = ("spatial_size", "roi_size", "spatial_border", "k", "to_pad", "repeats", "new_size")
_LARGEST_SIZE = 2**16
#: Arguments that name weights to be fetched or read, whatever their value.
_WEIGHTS = re.compile("pretrain|url|weights_path|ckpt|checkpoint_path", re.IGNORECASE)

_LOCATOR = ComponentLocator()


class Unsaved(Transform):
    """Stands where a config that is not trusted has a transform that saves, and passes on what it gets."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, data: Any) -> Any:
        """``data``."""
        return data


def find_class(target: Any) -> type:
    """The class that a ``_target_`` names, by whatever of its names.

    Raises:
        Refused: it is not one of those above, nor one of :data:`SAVERS`.
    """
    found: Any = None
    if isinstance(target, str):
        module = _LOCATOR.get_component_module_name(target)
        module = module[0] if isinstance(module, list) else module
        name = f"{module}.{target}" if module else target
        found = locate(name) if name.startswith(_PLACES) else None
    if not isinstance(found, type) or not (is_saver(found) or only_computes(found)):
        raise Refused(
            f"would run code beyond the networks, transforms and inferers of monai and torch: {shown(target)}"
        )
    return found


def is_saver(kind: type) -> bool:
    """Whether it is a transform that writes files."""
    return any(kind is getattr(monai.transforms, name, None) for name in SAVERS)


def only_computes(kind: type) -> bool:
    """Whether a class is one of those above. Where a class is defined counts, not where it is found."""
    name, module = kind.__name__, kind.__module__
    if issubclass(kind, nn.Module):
        return module.startswith(_NETWORKS) and module not in _NO_NETWORKS
    if kind is getattr(monai.inferers, name, None):
        return name in _INFERERS
    plain = name.removeprefix("Rand")
    return kind is getattr(monai.transforms, name, None) and not {name, plain, plain.removesuffix("d")}.isdisjoint(
        _TRANSFORMS.split()
    )


def check_arguments(kind: type, arguments: Mapping[str, Any], root: Path) -> None:
    """Refuse arguments that lead out of the bundle in the folder ``root``, or to code.

    Raises:
        Refused: with the key and the value.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    for name, value in {**defaults, **arguments}.items():
        if _WEIGHTS.search(name) and value not in (None, False, inspect.Parameter.empty):
            remedy = "" if name in arguments else f"; write {name}: false"
            raise Refused(f"{kind.__name__} would fetch or read other weights, by {name}={shown(value)}{remedy}")
    for name, value in arguments.items():
        if _size(value, {}) > MOST_ITEMS:
            raise Refused(f"{kind.__name__} would get more than {MOST_ITEMS} values as {name}, {shown(value)}")
        is_size = name in _SIZES and issubclass(kind, Transform)
        for inner in _contents(value):
            if is_size and isinstance(inner, int | float) and not abs(inner) <= _LARGEST_SIZE:
                raise Refused(f"{kind.__name__} would get a size above {_LARGEST_SIZE}, {name}={shown(value)}")
            if isinstance(inner, Unsaved) and not issubclass(kind, Compose):
                raise Refused(f"{inner.name} writes files, and {kind.__name__} would get it as {name}")
            if isinstance(inner, str) and leads_out(inner, root):
                raise Refused(f"{kind.__name__} would get a path or address outside the bundle, {name}={shown(inner)}")
        # In torch and its models, `weights` as a text or True are pretrained ones.
        if name == "weights" and isinstance(value, str | bool):
            raise Refused(f"{kind.__name__} would fetch other weights, by {name}={shown(value)}")
    if issubclass(kind, LoadImage | LoadImaged):
        reader = arguments.get("reader") or ()
        for found in reader if isinstance(reader, list | tuple) else [reader]:
            # It would call whatever else has that name, with any arguments.
            if not isinstance(found, str) or found.lower() not in SUPPORTED_READERS:
                raise Refused(f"would run code of another reader than those of monai: {shown(found)}")
        if others := sorted(set(arguments) - set(_READING.split())):
            raise Refused(
                f"{kind.__name__} would pass {others[0]}={shown(arguments[others[0]])} to whatever reads an image"
            )


def leads_out(text: str, root: Path) -> bool:
    """Whether a text is an address, or a path that leaves ``root``, by a link too."""
    if "://" in text or text.startswith("~"):
        return True
    return not (root / text.replace("\\", "/")).resolve().is_relative_to(root)


def _items_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return [*value] if isinstance(value, list | tuple) else []


def _size(value: Any, sizes: dict[int, int]) -> int:
    """How many values it is, counting those that lists share as often as they are met."""
    if id(value) not in sizes:
        sizes[id(value)] = 1 + sum(_size(item, sizes) for item in _items_of(value))
    return sizes[id(value)]


def _contents(value: Any) -> Iterator[Any]:
    """A value and what it holds."""
    yield value
    for item in _items_of(value):
        yield from _contents(item)
