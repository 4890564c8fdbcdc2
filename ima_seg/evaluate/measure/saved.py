"""Adversarial files in the summary: the Dice in network space beside the Dice of the file, read again from disk."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from ima_seg.evaluate.measure.estimates import mean
from ima_seg.evaluate.records import Record


class Saved(BaseModel):
    """Files of one model, attack and budget.

    Attributes:
        resampled: of how many files the plans resample the image; there the two Dice may differ.
        dice: mean in network space, as everywhere else in the report.
        disk_dice: mean of the files, predicted from the start.
        rms: mean size in network space, SD per voxel.
        disk_rms: mean size measured on the files.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    attack: str
    eps: float | None
    n: int
    resampled: int
    dice: float | None
    disk_dice: float | None
    rms: float | None
    disk_rms: float | None


def saved_files(records: Iterable[Record]) -> list[Saved]:
    """One row per model, attack and budget with saved files, in the order of the records."""
    groups: dict[tuple[str, str, float | None], list[Record]] = {}
    for record in records:
        if record.disk is not None:
            groups.setdefault((record.model, record.attack, record.eps), []).append(record)
    rows = []
    for (model, attack, eps), members in groups.items():
        disks = [record.disk for record in members if record.disk is not None]
        both = [(r.dice, r.disk.dice) for r in members if r.disk and r.dice is not None and r.disk.dice is not None]
        rows.append(
            Saved(
                model=model,
                attack=attack,
                eps=eps,
                n=len(members),
                resampled=sum(disk.resampled for disk in disks),
                dice=mean([dice for dice, _ in both]),
                disk_dice=mean([dice for _, dice in both]),
                rms=mean([record.size.rms for record in members if record.size is not None]),
                disk_rms=mean([disk.rms for disk in disks]),
            )
        )
    return rows
