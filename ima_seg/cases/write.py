"""Files in the place of others: adversarial images and differences in the original geometry."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ima_seg.cases.check import is_nifti
from ima_seg.cases.find import without_ending
from ima_seg.cases.pictures import difference_name, is_picture, spacing_file, write_picture
from ima_seg.cases.raw import FloatArray
from ima_seg.files import replacing

#: Integers are exact in float32 up to here.
_FLOAT32_EXACT = 2**24


def slug(name: str) -> str:
    """``name`` as part of a file name: plain and short, where a hash keeps different names apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:50]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def save_adversarial(
    sources: Sequence[Path], delta: FloatArray, folder: Path, case: str
) -> tuple[list[Path], list[Path]]:
    """Write the adversarial image and the difference of each channel, each in one rename.

    Geometry and header are those of the source; the data are float32, or float64 where float32 could not hold the
    source's values. Pictures keep their format and dtype: what they cannot hold is rounded and clipped.

    Args:
        sources: original image of each channel, or a single one with the channels along its last axis.
        delta: (C, Z, Y, X) perturbation in original intensities.
        folder: gets ``images/NAME`` (a folder for ``nnUNetv2_predict -i``) and ``difference/NAME``, under the names of
            the sources, where these are nnU-Net's names of the case.
        case: its id.

    Returns:
        The images and the differences, per source.
    """
    names = [_name(source, case, index) for index, source in enumerate(sources)]
    images, differences = ([folder / kind / name for name in names] for kind in ("images", "difference"))
    differences = [path.with_name(difference_name(path)) if is_picture(path) else path for path in differences]
    changes = delta if len(sources) > 1 else [delta]
    for source, change, *paths in zip(sources, changes, images, differences, strict=True):
        for path, add in zip(paths, (True, False), strict=True):
            with replacing(path) as temporary:
                _write(source, change, temporary, add=add)
    aside = spacing_file(sources[0])
    if is_picture(sources[0]) and aside.is_file():
        with replacing(spacing_file(images[0])) as temporary:
            shutil.copyfile(aside, temporary)
    return images, differences


def _name(source: Path, case: str, index: int) -> str:
    """``source``'s own name, or one by the case where a dataset.json names any file, of which many may be alike."""
    ending = source.name[len(without_ending(source.name)) :]
    numbered = f"_{index:04d}{ending}"
    return source.name if source.name in (f"{case}{ending}", f"{case}{numbered}") else f"{slug(case)}{numbered}"


def _write(source: Path, change: FloatArray, path: Path, *, add: bool) -> None:
    if is_picture(source):
        write_picture(source, change.reshape(-1, *change.shape[-3:]), path, add=add)
        return
    if is_nifti(source):
        import nibabel

        stored = nibabel.load(source)
        values, kind = np.asanyarray(stored.dataobj), stored.get_data_dtype()
        data = _changed(values, change.transpose(), kind, add=add)
        header = stored.header.copy()
        header.set_data_dtype(data.dtype)
        nibabel.save(stored.__class__(data, stored.affine, header), path)
        return
    import SimpleITK

    stored = SimpleITK.ReadImage(str(source))
    values = SimpleITK.GetArrayFromImage(stored)
    image = SimpleITK.GetImageFromArray(_changed(values, change, values.dtype, add=add))
    image.CopyInformation(stored)
    SimpleITK.WriteImage(image, str(path), True)


def _changed(values: npt.NDArray[Any], change: FloatArray, stored: npt.DTypeLike, *, add: bool) -> FloatArray:
    turned = change.reshape(values.shape)
    wide = np.dtype(stored) == np.float64 or np.abs(values).max(initial=0) >= _FLOAT32_EXACT
    data = values.astype(np.float64) + turned if add else turned
    return data.astype(np.float64 if wide else np.float32)
