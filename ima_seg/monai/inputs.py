"""Cases for the evaluation of a bundle: in nnU-Net's naming, or image and label of one name as in the Decathlon."""

from __future__ import annotations

from pathlib import Path

from ima_seg.cases.files import CaseFiles, CaseProblem, check_limit, list_files, some
from ima_seg.errors import UserError

_ENDINGS = (".nii.gz", ".nii")


def find_cases(
    images: Path, labels: Path, *, channels: int, limit: int | None = None
) -> tuple[list[CaseFiles], list[CaseProblem]]:
    """Find the cases of two folders: labels ``CASE.nii.gz``, images of the same name or ``CASE_0000.nii.gz`` and on.

    Args:
        images: folder of images; a single file per case may hold its channels along a fourth axis.
        labels: folder of labels.
        channels: of the bundle.
        limit: stop, in the order of the names, after so many complete cases.

    Returns:
        The complete cases and the incomplete ones, both sorted by name.

    Raises:
        UserError: a folder is missing or unreadable, or there is not a single complete case.
    """
    check_limit(limit)
    there, labelled = _by_case(images, "images"), _by_case(labels, "labels")
    found: list[CaseFiles] = []
    problems: list[CaseProblem] = []
    used: set[str] = set()
    for case, label in labelled.items():
        if limit is not None and len(found) == limit:
            return found, problems
        split = [f"{case}_{index:04d}" for index in range(channels)]
        names = [case] if case in there else [name for name in split if name in there]
        used.update(names)
        if names == [case] or names == split:
            found.append(CaseFiles(case, tuple(there[name] for name in names), label))
        else:
            wanted = ", ".join(name for name in split if name not in names)
            problems.append(
                CaseProblem(
                    case, f"{label} has no image: {images} has neither {case} nor {wanted}; add it or remove the label"
                )
            )
    if not found:
        raise UserError(
            f"no case with image and label: expected CASE.nii.gz, or CASE_0000.nii.gz for each channel, in {images} "
            f"(found: {some(list_files(images, 'images'))}) and CASE.nii.gz in {labels} (found: "
            f"{some(list_files(labels, 'labels'))}); check the folders and the names of the files"
        )
    problems += [
        CaseProblem(name, f"{path} has no label in {labels}; add it or remove the image")
        for name, path in there.items()
        if name not in used
    ]
    return found, sorted(problems, key=lambda problem: problem.case)


def _by_case(folder: Path, content: str) -> dict[str, Path]:
    """Name without its ending -> file."""
    return {
        name.removesuffix(ending): folder / name
        for name in list_files(folder, content)
        for ending in _ENDINGS
        if name.endswith(ending)
    }
