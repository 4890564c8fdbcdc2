"""Settings of IMA training, and of what is IMA with other settings."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ima_seg.attacks.boundary import Refine, SearchSettings
from ima_seg.errors import UserError
from ima_seg.methods.ledger import DEFAULT_CROSSING_SHARE, Rule
from ima_seg.methods.settings import TrainingSettings

#: Cap on margins unless set: the paper's largest, L2 15 on a 56x40 slice, is 0.317 SD per voxel.
DEFAULT_EPS_MAX = 0.3

Auto = Literal["auto"]


class IMASettings(TrainingSettings):
    """Settings of IMA training.

    Attributes:
        eps_max: cap on margins; ``"auto"``: 0.3 standard deviations per voxel. Only a cap: a case stops expanding at
            its own boundary.
        delta: expansion step and first margin; ``"auto"``: the cap in as many steps as a third of the epochs, but 10
            to 50. Boundaries in 3D are nearer per voxel than in 2D, and a first margin beyond them trains on noise
            that is too large.
        criterion: what tells whether a patch has crossed: ``"relative"``, its hard foreground Dice is below ``tau``
            times that of the clean patch; ``"dice"``, it is below ``tau``; ``"loss"``, its Dice + CE is above
            ``tau``, counted from its least, which is 0 where all is right. Patches that have crossed without
            perturbation are not searched; with ``"relative"`` those are the patches whose clean Dice is 0. Of a
            classifier none of these: an image has crossed when its predicted class changes, or any of its labels.
        tau: the threshold; above 0, and below 1 for a Dice. The lower, the larger the margins: more robust, less Dice
            on clean images. The paper takes a ``"dice"`` of 0.6. Given only together with ``criterion``.
        beta: weight of the adversarial loss; 0 is standard training.
        steps: gradient steps K of the search, at most.
        step_factor: alpha; a step is ``step_factor * margin / steps`` long.
        start: where the search begins. ``"random"``: at a random point. ``"mixed"``: one step from there along the
            input gradient of the clean training loss, which the clean backward pass yields at the cost of the first
            layer's. It is the gradient of another loss (whole batch, all heads), so only the start: the search climbs
            each patch's own. Patches without a usable gradient, and all where ``beta`` is 1, start at random.
        refine, refine_steps, refine_tolerance: how a crossing is placed on the boundary (see ``SearchSettings``). The
            one forward of the default leaves it a little beyond, which costs no robustness.
        background_steps: gradient steps on patches without foreground, which have no boundary to find; 0 leaves them
            clean. They climb their own loss from a random point.
        share: of each batch, rounded up and drawn at random: the patches that are searched and perturbed.
        rule: how visits move margins (see ``MarginLedger``).
        crossing_share: with the rule ``"quantile"``, how many of a case's patches are to sit on their boundary, which
            its margin bounds the search for; the others are perturbed by less than they could bear.
        cuda_graphs: ``"on"`` captures the network passes of the search as CUDA graphs, one for each size of the batch
            (:class:`ima_seg.attacks.GraphedPasses`): faster where launches take longer than kernels.
    """

    section: ClassVar[str] = "ima"
    sizes: ClassVar[tuple[str, ...]] = ("eps_max", "delta")

    eps_max: Auto | float = "auto"
    delta: Auto | float = "auto"
    criterion: Literal["dice", "relative", "loss"] = "relative"
    tau: float = 0.5
    beta: float = Field(0.5, ge=0, le=1)
    steps: int = Field(3, ge=1, le=1000)
    step_factor: float = Field(4.0, gt=0)
    start: Literal["random", "mixed"] = "mixed"
    refine: Refine = "root"
    refine_steps: int = Field(1, ge=0, le=100)
    refine_tolerance: float = Field(0.1, ge=0, lt=1)
    background_steps: int = Field(1, ge=0, le=1000)
    share: float = Field(0.5, gt=0, le=1)
    rule: Rule = "quantile"
    crossing_share: float = Field(DEFAULT_CROSSING_SHARE, gt=0, lt=1)
    cuda_graphs: Literal["off", "on"] = "off"

    @field_validator("start", mode="before")
    @classmethod
    def _start_exists(cls, start: Any) -> Any:
        if start == "gradient":
            raise ValueError("it was removed, for it gained nothing; use 'random' or 'mixed'")
        return start

    @field_validator("rule", mode="before")
    @classmethod
    def _rule_exists(cls, rule: Any) -> Any:
        if rule in ("mean", "majority"):
            raise ValueError(
                "it was removed, for its margins depended on the step; use 'quantile', whose do not, or 'paper'"
            )
        return rule

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
        if "tau" in self.model_fields_set and "criterion" not in self.model_fields_set:
            raise ValueError(
                f"tau is {self.tau:g}, but not of what: it used to be a Dice, and is by default a share of the clean "
                "patch's; say criterion = 'relative', 'dice' or 'loss' as well"
            )
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


#: Two thirds of the default's search.
FAST = IMASettings(steps=2)
#: AMAT: the margin is defined by a loss, and never moved back.
AMAT = IMASettings(criterion="loss", tau=0.5, rule="grow")
#: Adaptive Margin Evolution: no upper bound (nothing is left of an image at so many SDs), a step that shrinks.
AME = IMASettings(rule="ame", eps_max=100.0, delta=0.03)
