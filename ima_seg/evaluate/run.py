"""``run.json``: the settings and circumstances of an evaluation, which with the records make the report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

#: As in :mod:`ima_seg.types`, which needs torch.
Norm = Literal["l2", "linf"]
Unit = Literal["rms", "l2", "linf", "hu", "percent"]
Budget = Literal["volume", "slice"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Strict(BaseModel):
    """A model that refuses fields it does not know, and numbers that JSON does not have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


#: As far as sums of squares and cubes of them stay finite.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
NonNegative = Annotated[float, Field(ge=0, le=1e30)]
Portion = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10**15)]
#: A budget, in any unit; the ends are SMALLEST and LARGEST of :mod:`ima_seg.attacks.problem`, which needs torch.
Eps = Annotated[float, Field(ge=1e-12, le=1e12)]


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
    eps: list[Eps]
    unit: Unit = "rms"
    budget: Budget = "volume"
    steps: int = Field(20, ge=1)
    restarts: int = Field(1, ge=1)
    seed: int = 0
    targets: list[str] = []
    corruptions: list[str] = []
    broken_below: float = Field(0.5, gt=0, lt=1)
    nsd_tolerance_mm: float = Field(2.0, ge=0, le=1e6)
    save_adversarial: bool = False
    step_size: float = 0.5
    mirroring: bool = True
    precision: Precision = "auto"
    limit: int | None = None
    bundle_labels: dict[str, list[int]] = {}
    bundle_output: Literal["softmax", "sigmoid"] | None = None


class Margins(TypedDict, total=False):
    """What IMA's training has left in a checkpoint."""

    norm: Norm
    delta: float | None
    eps_max: float | None
    margins: dict[str, Any]  # case -> margin
    history: list[dict[str, Any]]  # rows of ima_history.csv


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
    sd: list[NonNegative | None] = []
    ima: Margins | None = None  # of nnUNetTrainerIMA's models
    #: Cases of the run that the training knew, by their ids -> how that is known; None where nothing tells.
    training_cases: dict[str, str] | None = None


class Run(Strict):
    """Everything in ``run.json``."""

    version: Literal[1] = 1
    settings: EvaluationSettings
    models: list[ModelInfo] = Field(min_length=1)
    dataset: str  # name in dataset.json, or of the folder
    classes: list[str]  # foreground classes or regions, in the order of the records
    images: str
    labels: str
    cases: list[str]  # all cases of the run, over all parts
    #: Model -> (attack, eps, severity) of each record that a complete case has.
    conditions: dict[str, list[tuple[str, Eps | None, int | None]]] = {}
    channels: list[str]
    modality_native_unit: str  # "HU" for a single CT, else "original intensity units"
    command: str
    created: str  # ISO date and time, UTC
    device: str
    versions: dict[str, str]  # package -> version
    machine: str
