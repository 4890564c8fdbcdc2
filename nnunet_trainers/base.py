"""What all adversarial trainers share: nnU-Net's hooks, each handing over to :mod:`ima_seg`."""

import contextlib
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ima_seg.attacks.network import allow_recompiles, full_resolution, resolve_precision
from ima_seg.errors import UserError, show_plainly
from ima_seg.files import replacing
from ima_seg.methods.average import AveragedWeights, bare
from ima_seg.methods.calls import Rows, map_heads
from ima_seg.methods.settings import TrainingSettings, load_settings
from ima_seg.nnunet import compat
from ima_seg.nnunet.checkpoint import TRAINED_KEY, read_checkpoint
from ima_seg.nnunet.teacher import load_teacher

if TYPE_CHECKING:
    # What the mixin is mixed into, and whose attributes it uses.
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as _Trainer
else:
    _Trainer = object

#: So many batches in a row without a single usable patch end the training.
PATIENCE_NONFINITE = 10


class AdversarialMixin(_Trainer):
    """What makes a trainer of nnU-Net's one of the method that the settings are of.

    It comes before the trainer among the bases, whose loss, augmentation, schedule, optimiser and network stay.

    Settings: ``preset`` (subclasses), overridden by a section of the plans, by the file that ``IMA_CONFIG`` names, in
    this order.
    """

    preset: TrainingSettings
    num_iterations_per_epoch: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        order = list(cls.__mro__)
        behind = order[order.index(AdversarialMixin) + 1 :]
        if nnUNetTrainer in order and nnUNetTrainer not in behind:
            mixin, others = (
                next((b.__name__ for b in cls.__bases__ if issubclass(b, AdversarialMixin) is ours), "")
                for ours in (True, False)
            )
            raise UserError(
                f"{cls.__name__} would train as {others} does, without adversarial samples; name the mixin first: "
                f"class {cls.__name__}({mixin}, {others})"
            )
        for kind in behind:
            if kind is not nnUNetTrainer and "train_step" in vars(kind):
                raise UserError(
                    f"{cls.__name__}: {kind.__name__} has a train_step of its own, and so has adversarial training; "
                    "one of the two would not happen, so they cannot be combined"
                )

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),
    ) -> None:
        show_plainly()
        compat.check_nnunet_version()
        # Before nnU-Net makes a folder or a log: a mistake in the settings costs nothing.
        self.adversarial_settings = load_settings(self.preset, plans=plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        for attribute, value in self.adversarial_settings.replaced().items():
            setattr(self, attribute, value)
        name = self.adversarial_settings.teacher
        teacher = name and load_teacher(
            name, fold=fold, labels=compat.trainer_labels(self), configuration=self.configuration_manager,
            device=self.device,
        )  # fmt: skip
        self.training = compat.make_training(self, self.adversarial_settings, teacher or None)
        if self.adversarial_settings.iterations_per_epoch is None:
            updates = self.training.method.updates_per_batch
            self.num_iterations_per_epoch = max(self.num_iterations_per_epoch // updates, 1)
        if self._do_i_compile():
            allow_recompiles()
        self._unusable_batches = 0
        #: Of the weights, once there is a network.
        self.average: AveragedWeights | None = None
        self._averaged = contextlib.ExitStack()

    def initialize(self) -> None:
        super().initialize()
        if self.adversarial_settings.ema:
            self.average = AveragedWeights(self.network, self.adversarial_settings.ema)

    def on_train_start(self) -> None:
        planned = self.training.method.epochs
        if self.num_epochs != planned:
            raise UserError(
                f"{type(self).__name__} trains for {self.num_epochs} epochs but is planned for {planned}; give the "
                f"length in its preset, {type(self.preset).__name__}(epochs={self.num_epochs})"
            )
        cases = self.do_split()[0]
        compat.require_foreground(self, cases)
        if self.adversarial_settings.training_precision == "bf16":
            resolve_precision("bf16", self.device)
        compat.set_unit(self, cases)
        self.training.enter_cases(cases)
        if self.local_rank == 0:
            self.training.guard(Path(self.output_folder))
            if self.training.history:
                # A killed training may have written an epoch that its checkpoint does not have.
                self.training.write_files(Path(self.output_folder))
        self.training.log_settings(self.device)
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.training.start_epoch(self.current_epoch)
        self._epoch_began = time()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        data = batch["data"].to(self.device, non_blocking=True)
        target = map_heads(batch["target"], lambda head: head.to(self.device, non_blocking=True))
        keys = [str(key) for key in batch["keys"]]
        usable = torch.isfinite(data.flatten(1).sum(1))
        if not bool(usable.all()):
            rows = usable.nonzero()[:, 0]
            self._note_unusable(keys, usable.tolist())
            if len(rows) == 0:
                return {"loss": np.float32(np.nan)}
            if self.is_ddp:
                # nnU-Net's batch Dice gathers tensors of equal shape from all ranks: usable patches are repeated.
                rows = rows[torch.arange(len(keys), device=rows.device) % len(rows)]
            data, keys = data[rows], [keys[row] for row in rows.tolist()]
            target = map_heads(target, lambda head: head[rows])

        self.optimizer.zero_grad(set_to_none=True)
        scaler = self.grad_scaler

        bf16 = self.adversarial_settings.training_precision == "bf16"

        def amp() -> contextlib.AbstractContextManager[Any]:
            cuda = self.device.type == "cuda"
            return torch.autocast("cuda") if cuda and not bf16 else contextlib.nullcontext()

        def forward(network: torch.nn.Module, x: torch.Tensor) -> Any:
            if bf16:
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    output = network(x)
                return map_heads(output, lambda head: head.float())
            with amp():
                return network(x)

        def loss(output: Any, rows: Rows) -> torch.Tensor:
            with amp():
                value: torch.Tensor = self.loss(output, map_heads(target, lambda head: head[rows]))
            return value

        report = self.training.method.step(
            self.network,
            data,
            full_resolution(target),
            keys,
            loss=loss,
            forward=forward,
            backward=lambda value: (value if scaler is None else scaler.scale(value)).backward(),
            update=self._update,
        )
        self.training.tally.add(report)
        norm = self._update()
        result = report.loss.cpu().numpy()
        # A gradient scaler meets infinite gradients in sound trainings, by design.
        self._watch(result if scaler is not None else norm.cpu().numpy())
        return {"loss": result}

    def _update(self) -> torch.Tensor:
        """nnU-Net's step of the optimiser, and cleared gradients; returns their norm."""
        scaler = self.grad_scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if scaler is not None:
            scaler.step(self.optimizer)
            scaler.update()
        elif bool(torch.isfinite(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        return norm

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        finite = [output for output in train_outputs if np.isfinite(output["loss"])]
        super().on_train_epoch_end(finite or train_outputs)
        self.training.end_epoch(time() - self._epoch_began)
        if self.local_rank == 0:
            self.training.write_files(Path(self.output_folder))

    def _with_average(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network has its averaged weights, where there are some."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def on_validation_epoch_start(self) -> None:
        self._averaged.enter_context(self._with_average())
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        self._averaged.close()
        super().on_validation_epoch_end(val_outputs)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with self._with_average():
            super().perform_actual_validation(save_probabilities)

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with replacing(filename) as temporary:
            super().save_checkpoint(str(temporary))
            # Our own file of a moment ago: reading it back is the only way to add to what nnU-Net saves.
            checkpoint = torch.load(temporary, map_location="cpu", weights_only=False)
            checkpoint[self.training.key] = self.training.state_dict()
            if self.average is not None:
                # Whoever predicts with the file finds the average.
                checkpoint[TRAINED_KEY] = checkpoint["network_weights"]
                checkpoint["network_weights"] = self.average.module.state_dict()
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        # nnU-Net's own loading trusts the file, too.
        checkpoint = read_checkpoint(filename_or_checkpoint, trust=True)
        state = checkpoint.get(self.training.key)
        super().load_checkpoint(filename_or_checkpoint)
        if self.average is not None:
            self.average.load(checkpoint["network_weights"])
            bare(self.network).load_state_dict(checkpoint.get(TRAINED_KEY, checkpoint["network_weights"]))
        if state is None:
            self.training.warn(f"{filename_or_checkpoint} holds {self.training.method.absent()}")
        else:
            self.training.load_state_dict(state)

    def _note_unusable(self, keys: list[str], usable: list[bool]) -> None:
        bad = sorted({key for key, good in zip(keys, usable, strict=True) if not good})
        self.training.tally.drop(usable.count(False))
        self.training.warn(f"NaN or infinite voxels in {', '.join(bad)}; left out of this batch")
        if not any(usable):
            self._watch(np.nan)
            if self.is_ddp:
                # The other ranks wait for this one's gradients: skipping the step would hang them.
                raise UserError(f"rank {self.local_rank}: no usable patch in a batch; repair {', '.join(bad)}")

    def _watch(self, loss: Any) -> None:
        self._unusable_batches = 0 if np.isfinite(loss) else self._unusable_batches + 1
        if self._unusable_batches >= PATIENCE_NONFINITE:
            raise UserError(
                f"{PATIENCE_NONFINITE} batches in a row had no finite loss or gradient; check the images for NaN or "
                "infinite voxels (the log names the cases), or lower the learning rate"
            )


class AdversarialTrainer(AdversarialMixin, nnUNetTrainer):
    """nnU-Net's own trainer with the step of a method."""
