"""The attacks of :mod:`ima_seg.attacks` on MONAI's batches: as settings, and as a dictionary transform."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from torch import nn

from ima_seg.attacks import GOALS, UNTARGETED, AttackResult, Goal, Problem
from ima_seg.attacks.network import Precision
from ima_seg.attacks.registry import ATTACKS
from ima_seg.errors import UserError
from ima_seg.monai.batch import plain, reference, with_meta
from ima_seg.types import Labels, Norm, Target, ThreatModel

#: A MONAI loss: (logits, reference) -> a value for each sample, as ``reduction="none"`` makes them.
SampleLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def per_sample(value: Any, samples: int) -> torch.Tensor:
    """The loss (B,) of each sample: means of what a loss with ``reduction="none"`` returned for B ``samples``.

    Raises:
        UserError: it is not a tensor with one row for each sample.
    """
    shape = f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        if value.numel() == samples == 1 or (value.ndim and len(value) == samples):
            return value.reshape(samples, -1).mean(1)
        shape = f"a tensor of shape {tuple(value.shape)}"
    raise UserError(
        f"the attack's loss returned {shape} for {samples} samples. An attack needs the loss of each sample, for with "
        "the mean over a batch one patient would be perturbed to harm another: give a loss made with reduction='none', "
        "such as DiceLoss(softmax=True, to_onehot_y=True, reduction='none'), or none, for Dice + CE"
    )


@dataclass(frozen=True)
class Attack:
    """An attack and its settings.

    Args:
        labels: how the network's outputs are read: an :class:`ima_seg.Labels` or another object that
            ``ima_seg.Target.from_raw`` takes, or the number of output channels, of which 0 is background.
        name: a key of ``ima_seg.attacks.registry.ATTACKS``: ``"pgd"``, ``"fgsm"``, ``"apgd-dice"``, ``"gaussian"``...
        steps: gradient steps.
        restarts: random restarts; the worst counts, per sample.
        norm: of the budget, ``"l2"`` (RMS per voxel) or ``"linf"``.
        image_channels: the first this many input channels may be perturbed; None means all.
        loss: to climb, a MONAI loss with ``reduction="none"``, (logits, reference) -> (B, ...); default: the attack's
            own.
        precision: of the network passes, see :func:`ima_seg.attacks.network.resolve_precision`.

    Raises:
        UserError: an attack that does not exist.
    """

    labels: Any
    name: str = "pgd"
    steps: int = 20
    restarts: int = 1
    norm: Norm = "l2"
    image_channels: int | None = None
    loss: SampleLoss | None = None
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise UserError(f"attack is {self.name!r}; the attacks there are: {', '.join(ATTACKS)}")
        ThreatModel(self.norm, self.image_channels)
        if isinstance(self.labels, int):
            object.__setattr__(self, "labels", Labels(self.labels))

    def __call__(
        self, network: Any, x: torch.Tensor, y: torch.Tensor, eps: float, generator: torch.Generator | None = None
    ) -> AttackResult:
        """Attack a batch; the network's flags and gradients are left as they are.

        Args:
            network: (B, C, *S) -> logits (B, K, *S), or a list with the full resolution first.
            x: images (B, C, *S) without metadata, on the device of the network, as are ``y`` and ``generator``.
            y: reference.
            eps: budget of each sample, per voxel in network units.
            generator: source of random starts.
        """
        target = Target.from_raw(reference(y, x, self.labels), self.labels)
        spec, goal = ATTACKS[self.name], GOALS[ATTACKS[self.name].goal]
        if self.loss is not None:
            loss, y = self.loss, plain(y)
            goal = Goal("loss", lambda z, *_: per_sample(loss(z.float(), y), len(z)), UNTARGETED.damage)
        threat = ThreatModel(self.norm, self.image_channels)
        problem = Problem(network, x, target, threat, goal, precision=self.precision, generator=generator)
        return spec(problem, eps, steps=self.steps, restarts=self.restarts)


class AttackBatchd(MapTransform, Randomizable):
    """Dictionary transform that replaces images by adversarial ones, for the network given.

    It takes a collated batch, images (B, C, *S), or a single item, (C, *S), and keeps the metadata of a MetaTensor. It
    calls the network, so it belongs behind the data loader, where the network's device is at hand, for instance

        evaluator.add_event_handler(Events.GET_BATCH_COMPLETED, lambda engine: setattr(
            engine.state, "batch", attack(engine.state.batch)))

    Args:
        keys: of the images; each is attacked by itself.
        label_key: of the reference, in the shape that ``labels`` describe.
        network: to be attacked; its flags are restored.
        labels: see :class:`Attack`.
        eps: budget per voxel in network units (the standard deviations of a z-scored image).
        attack: name of the attack.
        batched: whether images have a batch axis; None: as a MetaTensor says of itself.
        allow_missing_keys: whether to pass over images that are not there.
        options: further settings of :class:`Attack`: ``steps``, ``restarts``, ``norm``, ``loss``...

    Random starts follow from ``set_random_state``. The result has the device and dtype of the image.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: Hashable,
        network: nn.Module,
        labels: Any,
        eps: float,
        attack: str = "pgd",
        batched: bool | None = None,
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key, self.network, self.eps, self.batched = label_key, network, eps, batched
        self.attack = Attack(labels, attack, **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with adversarial images.

        Raises:
            UserError: no reference under ``label_key``, or a plain tensor of which it is not known if it is a batch.
        """
        result = dict(data)
        for key in self.key_iterator(result):
            if self.label_key not in result:
                raise UserError(
                    f"there is no reference under the key {self.label_key!r} (keys: {', '.join(map(str, result))}); "
                    "an attack needs one, name it as label_key"
                )
            result[key] = self._attacked(result[key], result[self.label_key])
        return result

    def _attacked(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        batched = image.is_batch if self.batched is None and isinstance(image, MetaTensor) else self.batched
        if batched is None:
            raise UserError("the image is a plain tensor; say whether it has a batch axis, batched=True or False")
        like = next(self.network.parameters(), image)
        x, y = (plain(t).to(like.device) if batched else plain(t)[None].to(like.device) for t in (image, label))
        generator = torch.Generator(x.device).manual_seed(int(self.R.randint(2**31)))
        found = self.attack(self.network, x, y, self.eps, generator).adversarial
        return with_meta((found if batched else found[0]).to(image.device, image.dtype), image)
