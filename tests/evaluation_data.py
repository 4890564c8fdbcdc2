"""Small models that segment phantoms passably, in nnU-Net's model folders, for tests of the evaluation."""

import json
from pathlib import Path

import pytest
import torch

from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.data.phantom import write_phantom_dataset
from ima_seg.evaluate.attack.problem import make_stage
from ima_seg.nnunet.case import prepare_case, read_case
from ima_seg.nnunet.folder import load_model
from ima_seg.types import ThreatModel
from tests.nnunet_data import run

CT, COARSE = 983, 984
#: name -> data set, configuration, spacing factor of the network's grid, normalisation over the nonzero region only
FLAVOURS = {
    "mr3d": ("Dataset981_Mr", "3d_fullres", 1.0, False),
    "mr2d": ("Dataset981_Mr", "2d", 1.0, False),
    "regions": ("Dataset982_Regions", "3d_fullres", 1.0, False),
    "ct": ("Dataset983_Ct", "3d_fullres", 1.0, False),
    "coarse": ("Dataset984_Coarse", "3d_fullres", 1.4, True),
}


class Phantoms:
    """Raw folders of the phantoms and a model folder for each of :data:`FLAVOURS`, made when asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self._made = root, {}

    def raw(self, flavour: str) -> Path:
        return self.root / "raw" / FLAVOURS[flavour][0]

    def images(self, flavour: str) -> Path:
        return self.raw(flavour) / "imagesTr"

    def labels(self, flavour: str) -> Path:
        return self.raw(flavour) / "labelsTr"

    def model(self, flavour: str, *, seed: int = 0, steps: int = 60) -> Path:
        key = (flavour, seed, steps)
        if key not in self._made:
            folder = self.root / "models" / f"{flavour}_{seed}_{steps}__tiny__{FLAVOURS[flavour][1]}"
            self._made[key] = self._make(flavour, folder, seed, steps)
        return self._made[key]

    def case(self, flavour: str, index: int = 0, **options):
        """(loaded model, prepared case) on the CPU."""
        model = load_model(self.model(flavour, **options))
        name = sorted(file.name.removesuffix(".nii.gz") for file in self.labels(flavour).iterdir())[index]
        images = sorted(self.images(flavour).glob(f"{name}_0*.nii.gz"))
        return model, prepare_case(read_case(model, name, images, self.labels(flavour) / f"{name}.nii.gz"), model)

    def _make(self, flavour, folder, seed, steps):
        dataset, configuration, coarser, masked = FLAVOURS[flavour]
        plans = json.loads((self.root / "preprocessed" / dataset / "tiny.json").read_text())
        values = plans["configurations"][configuration]
        values["spacing"] = [value * coarser for value in values["spacing"]]
        values["patch_size"] = [16] * len(values["patch_size"])
        values["use_mask_for_norm"] = [masked] * len(values["use_mask_for_norm"])
        fold = folder / "fold_0"
        fold.mkdir(parents=True)
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text((self.raw(flavour) / "dataset.json").read_text())
        network = self._network(folder, plans, configuration, seed)
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": configuration, "fold": 0},
            "inference_allowed_mirroring_axes": tuple(range(len(values["patch_size"]))),
        }
        torch.save(checkpoint, fold / "checkpoint_final.pth")
        if steps:
            checkpoint["network_weights"] = self._train(flavour, folder, steps)
            torch.save(checkpoint, fold / "checkpoint_final.pth")
        return folder

    def _network(self, folder, plans, configuration, seed):
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        torch.manual_seed(seed)
        manager = PlansManager(plans)
        chosen, dataset_json = (
            manager.get_configuration(configuration),
            json.loads((folder / "dataset.json").read_text()),
        )
        inputs = determine_num_input_channels(manager, chosen, dataset_json)
        heads = manager.get_label_manager(dataset_json).num_segmentation_heads
        return nnUNetTrainer.build_network_architecture(manager, chosen, inputs, heads, False)

    def _train(self, flavour, folder, steps):
        """A few steps on whole volumes; returns the weights."""
        model = load_model(folder)
        network = model.networks[0].train().requires_grad_(True)
        window = model.window(step_size=1.0, mirroring=False)
        names = sorted(file.name.removesuffix(".nii.gz") for file in self.labels(flavour).iterdir())[:3]
        batches = []
        for name in names:
            images = sorted(self.images(flavour).glob(f"{name}_0*.nii.gz"))
            case = prepare_case(read_case(model, name, images, self.labels(flavour) / f"{name}.nii.gz"), model)
            stage = make_stage(case, window, ThreatModel(), "slice" if model.is_2d else "volume")
            shape = [2**3 * (size // 8) for size in stage.problem.x.shape[2:]]
            crop = (slice(None), slice(None), *(slice(0, size) for size in shape))
            reference = case.reference[0].movedim(1, 0) if model.is_2d else case.reference
            clean = case.clean[0].movedim(1, 0) if model.is_2d else case.clean
            # the target of the crop, through the case's own code for regions
            cropped = type(case)(**{**case.__dict__, "reference": reference[crop]})
            batches.append((clean[crop], cropped.target()))
        network.requires_grad_(True).train()
        optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
        for step in range(steps):
            x, target = batches[step % len(batches)]
            optimiser.zero_grad()
            dice_ce_loss(network(x), target).mean().backward()
            optimiser.step()
        return network.state_dict()


@pytest.fixture(scope="session")
def phantoms(nnunet):
    """Phantom data sets 981 to 984 with models on demand."""
    shape = (24, 24, 24)
    write_phantom_dataset(nnunet / "raw", dataset_id=CT, name="Ct", cases=5, shape=shape, modality="ct")
    write_phantom_dataset(
        nnunet / "raw", dataset_id=COARSE, name="Coarse", cases=5, shape=(28, 28, 16), modality="mr2",
        spacing=(1.0, 1.0, 2.0),
    )  # fmt: skip
    done = run("nnUNetv2_plan_and_preprocess", "-d", CT, COARSE, "--no_pp", "-npfp", "1", nnUNet_n_proc_DA="1")
    assert done.returncode == 0, done.stderr[-3000:]
    from ima_seg.nnunet.plans import write_plans

    for dataset in (CT, COARSE):
        write_plans(str(dataset), "nnUNetPlans", "tiny", features=4, max_features=8, batch_size=2)
    return Phantoms(nnunet)
