"""What a bundle's transforms tell before there is a case, and what is wrong with them."""

from __future__ import annotations

from typing import Any, Literal

from ima_seg.errors import UserError
from ima_seg.monai.config import Parts

Output = Literal["softmax", "sigmoid"]


def image_key(parts: Parts) -> str:
    """The key of the one image that the first transform reads.

    Raises:
        UserError: there is none, or a transform is random.
    """
    from monai.transforms import LoadImaged, RandomizableTrait

    steps = parts.preprocessing.transforms
    keys = list(getattr(steps[0], "keys", ())) if steps and isinstance(steps[0], LoadImaged) else []
    if len(keys) != 1:
        raise UserError(
            f"{parts.config}: the first transform of 'preprocessing' must be LoadImaged with the key of one image; it "
            f"is {type(steps[0]).__name__ if steps else 'missing'} with the keys {keys}"
        )
    steps = parts.preprocessing.flatten().transforms
    if random := [type(step).__name__ for step in steps if isinstance(step, RandomizableTrait)]:
        raise UserError(f"{parts.config}: {', '.join(random)} in 'preprocessing' is random; inference must not be")
    return str(keys[0])


def output_of(parts: Parts) -> Output:
    """How outputs are read: the activation, or else the discretisation, of the post-processing.

    Raises:
        UserError: there is neither.
    """
    steps = parts.postprocessing.flatten().transforms

    def has(attribute: str) -> bool:
        return any(_is_set(step, attribute) for step in steps)

    for softmax, sigmoid in (("softmax", "sigmoid"), ("argmax", "threshold")):
        if has(softmax) != has(sigmoid):
            return "softmax" if has(softmax) else "sigmoid"
        if has(softmax):
            break
    raise UserError(
        f"{parts.config}: 'postprocessing' does not tell whether outputs are read by softmax or by sigmoid; say it "
        "with --bundle-output"
    )


def _is_set(step: Any, attribute: str) -> bool:
    """Whether an option of a dictionary transform is on for one of its keys."""
    values = getattr(step, attribute, None)
    return isinstance(values, tuple | list) and any(value not in (None, False) for value in values)


def check_steps(parts: Parts, *, channels: int) -> None:
    """Refuse transforms that cannot leave an image with ``channels``, or a segmentation.

    Raises:
        UserError: with the line to change.
    """
    from monai.transforms import AsDiscreted, EnsureChannelFirstd, Invertd, Transposed

    before, after = (part.flatten().transforms for part in (parts.preprocessing, parts.postprocessing))
    # Of several channels, each may lie in a file of its own; LoadImaged then stacks them in front.
    known = channels == 1 and all(type(step).__module__.startswith("monai.transforms.") for step in before)
    in_front = getattr(getattr(before[0], "_loader", None), "ensure_channel_first", True) if before else True
    if known and not in_front and not any(isinstance(step, EnsureChannelFirstd | Transposed) for step in before):
        raise UserError(
            f"{parts.config}: nothing in 'preprocessing' gives the image its channel axis; write ensure_channel_first: "
            "true into LoadImaged, or add EnsureChannelFirstd behind it"
        )
    discrete = [index for index, step in enumerate(after) if isinstance(step, AsDiscreted)]
    for index, step in enumerate(after):
        blurs = isinstance(step, Invertd) and not all(step.nearest_interp)
        if blurs and discrete and max(discrete) < index and (over := [s for s in before if _interpolates(s)]):
            raise UserError(
                f"{parts.config}: Invertd in 'postprocessing' interpolates the labels that AsDiscreted made, to undo "
                f"{type(over[0]).__name__}, and leaves fractions of labels; set its nearest_interp to true, or put it "
                "before AsDiscreted"
            )


def _interpolates(step: Any) -> bool:
    """Whether a transform resamples the image, by other than nearest neighbours."""
    from monai.transforms import Affined, ResampleToMatchd, Resized, Rotated, Spacingd, SpatialResampled, Zoomd

    kinds = (Affined, Resized, ResampleToMatchd, Rotated, Spacingd, SpatialResampled, Zoomd)
    modes = getattr(step, "mode", "bilinear")
    modes = modes if isinstance(modes, tuple | list) else [modes]
    return isinstance(step, kinds) and not all(str(getattr(m, "value", m)).startswith(("nearest", "0")) for m in modes)
