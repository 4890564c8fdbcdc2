"""What a MONAI batch says: whose samples these are; and its tensors without metadata, and with it again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from monai.data import MetaTensor, get_track_meta

from ima_seg.errors import UserError
from ima_seg.types import Labels

#: Where MONAI's readers note the file that an image came from.
FILE_KEY = "filename_or_obj"


def case_name(path: str | os.PathLike[str]) -> str:
    """The case id of an image file: its folder and its name without extension.

    The folder is part of it because many data sets keep a folder per patient with the same file names in each; what is
    above is not, so that a training can go on where the data have moved.
    """
    file = PurePath(path)
    stem = file.name.removesuffix(".nii.gz") if file.name.endswith(".nii.gz") else file.stem
    return "/".join(part for part in (file.parent.name, stem) if part)


def case_ids(batchdata: Any, images: torch.Tensor, key: str | None) -> list[str]:
    """The case of each sample (B) of a batch with ``images`` (B, C, *S).

    ``key`` of the batch, or of the images' metadata, holds the ids; None: the file that the metadata name, see
    :func:`case_name`.

    Raises:
        UserError: there are none, or not one for each sample; with the line of code that adds them.
    """
    found: Any = batchdata.get(key) if key is not None and isinstance(batchdata, Mapping) else None
    if found is None and isinstance(images, MetaTensor):
        found = images.meta.get(key or FILE_KEY)
    ids = found.flatten().tolist() if isinstance(found, torch.Tensor) else found
    ids = list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
    if len(ids) != len(images) or not all(isinstance(i, (str, int, os.PathLike)) for i in ids):
        where = (
            f"key {key!r} of the batch or of its images' metadata" if key else f"metadata ({FILE_KEY!r}) of the images"
        )
        what = "has no case ids" if found is None else f"holds {found!r} for {len(images)} samples, not one id for each"
        raise UserError(
            f"IMA keeps a margin for every case, but the {where} {what}. Add ids to the data list before you make the "
            "data set of it,\n"
            "    data = [{**item, 'case_id': f'case_{number:04}'} for number, item in enumerate(data)]\n"
            "and give the trainer case_key='case_id'"
        )
    return [case_name(i) if key is None else str(i) for i in ids]


def plain(tensor: Any) -> torch.Tensor:
    """``tensor`` without metadata, which every operation on a MetaTensor would copy, and an index into one collate."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor  # type: ignore[no-any-return]


def with_meta(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``tensor``, with the metadata of ``source`` where it has any, as what a network makes of a MetaTensor."""
    if not isinstance(source, MetaTensor) or not get_track_meta():
        return tensor
    result = tensor.as_subclass(MetaTensor)
    result.copy_meta_from(source, copy_attr=not source.is_batch)
    result.is_batch = source.is_batch
    return result  # type: ignore[no-any-return]


def reference(targets: Any, images: torch.Tensor, labels: Any) -> torch.Tensor:
    """The reference as ``labels`` read it: one-hot channels of classes, which many MONAI pipelines make, become a map.

    It has the shape that the training loss takes, the images are (B, C, *S).

    Raises:
        UserError: there is no reference, or it has neither one channel nor one for each class.
    """
    if not isinstance(targets, torch.Tensor):
        raise UserError(
            f"the reference of a batch is a {type(targets).__name__}; expected a tensor. Where the key is not 'label', "
            "give the trainer a prepare_batch that returns (image, label)"
        )
    y = plain(targets)
    if not isinstance(labels, Labels) or labels.regions or y.ndim != images.ndim or y.shape[1] == 1:
        return y
    if y.shape[1] != labels.outputs:
        raise UserError(
            f"the reference has the shape {tuple(y.shape)}; expected one channel of classes or {labels.outputs} "
            "one-hot channels (B, K, *S). For regions, which may overlap: labels = {outputs: ..., regions: true}"
        )
    return y.argmax(1, keepdim=True)
