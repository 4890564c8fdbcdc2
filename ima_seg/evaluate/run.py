"""``run.json``: the settings and circumstances of an evaluation, which with the records make the report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

#: As in :mod:`ima_seg.types`, which needs torch.
Norm = Literal["l2", "linf"]
Unit = Literal["rms", "l2", "linf", "hu", "percent"]
Budget = Literal["volume", "slice"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Strict(BaseModel):
    """A model that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid")


class EvaluationSettings(Strict):
    """What is evaluated and how; two runs with equal settings may be merged, others never.

    Attributes:
        attacks: names as on the command line.
        norm: of all attacks.
        eps: budgets in ``unit``, ascending.
        unit: ``rms``: root mean square per voxel, in standard deviations (SD) of each channel of the network's input;
            ``l2``: L2 norm of the whole volume (or slice), ``linf``: largest absolute value, both in the same;
            ``hu``: original intensities (RMS or largest value, by norm); ``percent``: the same, % of the image's
            0.5-99.5 percentile range.
        budget: per ``volume`` or per ``slice`` (2D models).
        steps: gradient steps of iterative attacks (queries of Square: ten times as many).
        restarts: restarts of randomly started attacks; the worst counts, per case.
        seed: of all randomness.
        targets: class names for "disappear" and "appear"; empty without targeted attacks.
        corruptions: names of natural corruptions.
        broken_below: a case counts as broken when its Dice falls below this share of its clean Dice.
        nsd_tolerance_mm: tolerance of the normalised surface Dice.
        save_adversarial: whether adversarial files are written.
        step_size: of the sliding window, in patches.
        mirroring: whether test-time mirroring is on.
        precision: of the attack's passes; scores always come from float32 passes.
        limit: at most so many cases.
        bundle_labels: of MONAI bundles: class -> values in the label files; empty: as the metadata say.
        bundle_output: of MONAI bundles: how outputs are read; ``None``: as the post-processing says.
    """

    attacks: list[str]
    norm: Norm = "l2"
    eps: list[float]
    unit: Unit = "rms"
    budget: Budget = "volume"
    steps: int = 20
    restarts: int = 1
    seed: int = 0
    targets: list[str] = []
    corruptions: list[str] = []
    broken_below: float = 0.5
    nsd_tolerance_mm: float = 2.0
    save_adversarial: bool = False
    step_size: float = 0.5
    mirroring: bool = True
    precision: Precision = "auto"
    limit: int | None = None
    bundle_labels: dict[str, list[int]] = {}
    bundle_output: Literal["softmax", "sigmoid"] | None = None


class ModelInfo(Strict):
    """One evaluated model: of nnU-Net, or a MONAI bundle."""

    name: str
    folder: str
    bundle: str | None = None  # name and version of a bundle
    trainer: str = ""
    plans: str = ""
    configuration: str  # of a bundle: class of its inferer
    folds: list[str] = []
    checkpoint: str
    sha256: dict[str, str]  # file -> hash
    patch_size: list[int]  # empty: the whole image
    spacing: list[float] = []  # of the network's grid, mm, in its axis order
    mirror_axes: list[int] | None = None
    parameters: int
    #: Network units per SD of each channel's network input, the unit of sizes; None: measured in each case. Empty: the
    #: normalisation makes it 1.
    sd: list[float | None] = []
    #: Of nnUNetTrainerIMA's models: "norm", "delta", "eps_max", "margins" (case -> margin), "history" (rows of
    #: ima_history.csv); None for others.
    ima: dict[str, Any] | None = None
    #: Cases of the run that the training knew, by their ids -> how that is known; None where nothing tells.
    training_cases: dict[str, str] | None = None


class Run(Strict):
    """Everything in ``run.json``."""

    version: int = 1
    settings: EvaluationSettings
    models: list[ModelInfo]
    dataset: str  # name in dataset.json, or of the folder
    classes: list[str]  # foreground classes or regions, in the order of the records
    images: str
    labels: str
    cases: list[str]  # all cases of the run, over all parts
    #: Model -> (attack, eps, severity) of each record that a complete case has.
    conditions: dict[str, list[tuple[str, float | None, int | None]]] = {}
    channels: list[str]
    modality_native_unit: str  # "HU" for a single CT, else "original intensity units"
    command: str
    created: str  # ISO date and time, UTC
    device: str
    versions: dict[str, str]  # package -> version
    machine: str
