"""What all adversarial trainers share: nnU-Net's hooks, each handing over to :mod:`ima_seg`."""

import contextlib
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ima_seg.attacks.network import allow_recompiles, full_resolution
from ima_seg.errors import UserError, show_plainly
from ima_seg.files import replacing
from ima_seg.methods.base import map_heads
from ima_seg.methods.settings import TrainingSettings, load_settings
from ima_seg.nnunet import compat
from ima_seg.nnunet.checkpoint import read_checkpoint

#: So many batches in a row without a single usable patch end the training.
PATIENCE_NONFINITE = 10


class AdversarialTrainer(nnUNetTrainer):
    """nnU-Net's trainer with the step of the method that the settings are of.

    Settings: ``preset`` (subclasses), overridden by a section of the plans, by the file that ``IMA_CONFIG`` names, in
    this order.
    """

    preset: TrainingSettings
    num_iterations_per_epoch: int

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
        self.training = compat.make_training(self, self.adversarial_settings)
        if self.adversarial_settings.iterations_per_epoch is None:
            updates = self.training.method.updates_per_batch
            self.num_iterations_per_epoch = max(self.num_iterations_per_epoch // updates, 1)
        if self._do_i_compile():
            allow_recompiles()
        self._unusable_batches = 0

    def on_train_start(self) -> None:
        planned = self.training.method.epochs
        if self.num_epochs != planned:
            raise UserError(
                f"{type(self).__name__} trains for {self.num_epochs} epochs but is planned for {planned}; give the "
                f"length in its preset, {type(self.preset).__name__}(epochs={self.num_epochs})"
            )
        cases = self.do_split()[0]
        compat.require_foreground(self, cases)
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

        def amp() -> contextlib.AbstractContextManager[Any]:
            cuda = self.device.type == "cuda"
            return torch.autocast("cuda") if cuda else contextlib.nullcontext()

        def forward(network: torch.nn.Module, x: torch.Tensor) -> Any:
            with amp():
                return network(x)

        def loss(output: Any) -> torch.Tensor:
            with amp():
                value: torch.Tensor = self.loss(output, target)
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
        return norm

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        finite = [output for output in train_outputs if np.isfinite(output["loss"])]
        super().on_train_epoch_end(finite or train_outputs)
        self.training.end_epoch(time() - self._epoch_began)
        if self.local_rank == 0:
            self.training.write_files(Path(self.output_folder))

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with replacing(filename) as temporary:
            super().save_checkpoint(str(temporary))
            # Our own file of a moment ago: reading it back is the only way to add to what nnU-Net saves.
            checkpoint = torch.load(temporary, map_location="cpu", weights_only=False)
            checkpoint[self.training.key] = self.training.state_dict()
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        # nnU-Net's own loading trusts the file, too.
        state = read_checkpoint(filename_or_checkpoint, trust=True).get(self.training.key)
        super().load_checkpoint(filename_or_checkpoint)
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
