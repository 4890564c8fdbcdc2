"""Small MONAI bundles that segment phantoms passably, written as their authors write them."""

import json
import shutil
from pathlib import Path

import monai
import nibabel
import numpy as np
import torch

from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.cases.raw import CaseFiles
from ima_seg.data.phantom import write_phantom_dataset
from ima_seg.monai.bundle import load_bundle
from tests.folder_data import LEFT_OUT, changed

CLASSES = ["organ", "lesion"]
METADATA = {
    "name": "Phantom organs",
    "version": "0.3.1",
    "network_data_format": {
        "inputs": {"image": {"type": "image", "modality": "MR", "num_channels": 1, "channel_def": {"0": "T1"}}},
        "outputs": {
            "pred": {
                "num_channels": 3,
                "channel_def": {"0": "background", **{str(i + 1): c for i, c in enumerate(CLASSES)}},
            }
        },
    },
}

#: Where the metadata describe the output.
PRED = ("network_data_format", "outputs", "pred")


def transform(name, *, keys="@image_key", **options):
    return {"_target_": name, "keys": keys, **options}


#: Spatial transforms and normalisation: name -> between Orientationd and EnsureTyped
PREPROCESSING = {
    "plain": [transform("NormalizeIntensityd"), transform("SpatialPadd", spatial_size=[28, 24, 26])],
    "coarse": [
        transform("Spacingd", pixdim=[1.3, 1.3, 1.4], mode="bilinear"),
        transform("ScaleIntensityRanged", a_min=0.0, a_max=900.0, b_min=-1.0, b_max=2.0, clip=True),
    ],
    "gamma": [transform("NormalizeIntensityd"), transform("AdjustContrastd", gamma=2.5)],
}


def config(flavour="plain", *, sigmoid=False, channels=1, outputs=3, **changes):
    """inference.json in the manner of the model zoo."""
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "image_key": "image",
        "dataset_dir": "/nowhere",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "UNet", "spatial_dims": 3, "in_channels": channels, "out_channels": outputs,
            "channels": [8, 16], "strides": [2], "num_res_units": 1,
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                transform("LoadImaged"),
                transform("EnsureChannelFirstd"),
                transform("Orientationd", axcodes="RAS"),
                *PREPROCESSING[flavour],
                transform("EnsureTyped"),
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 16], "sw_batch_size": 4, "overlap": 0.4},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                transform("Activationsd", keys="pred", **({"sigmoid": True} if sigmoid else {"softmax": True})),
                transform("Invertd", keys="pred", transform="@preprocessing", orig_keys="@image_key",
                          nearest_interp=False),
                transform("AsDiscreted", keys="pred", **({"threshold": 0.5} if sigmoid else {"argmax": True})),
                transform("SaveImaged", keys="pred", output_dir="@output_dir", separate_folder=False, print_log=False),
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader",
            "network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
        **changes,
    }  # fmt: skip


def write_bundle(folder, contents=None, *, metadata=METADATA, weights=None):
    """A bundle with random weights, or the given ones."""
    contents = config() if contents is None else contents
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "configs" / "inference.json").write_text(json.dumps(contents, indent=1))
    if weights is None:
        torch.manual_seed(0)
        arguments = {key: value for key, value in contents["network_def"].items() if key != "_target_"}
        weights = monai.networks.nets.UNet(**arguments).state_dict()
    torch.save(weights, folder / "models" / "model.pt")
    return folder


def altered(metadata, *path, value):
    """A copy of nested dictionaries with another value somewhere; ``None`` removes it."""
    return changed(metadata, path, LEFT_OUT if value is None else value)


class Organs:
    """Phantom cases, and bundles for them that are trained when asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self._made = root, {}
        source = write_phantom_dataset(
            root, dataset_id=1, name="Organs", cases=3, shape=(24, 22, 20), spacing=(1.0, 1.0, 1.2)
        )
        source = Path(source)
        for kind in ("images", "labels"):
            (root / kind).mkdir()
        for label in sorted((source / "labelsTr").iterdir()):
            shutil.copy(label, root / "labels")
            shutil.copy(source / "imagesTr" / label.name.replace(".nii", "_0000.nii"), root / "images" / label.name)
        self.names = sorted(path.name.removesuffix(".nii.gz") for path in (root / "labels").iterdir())

    @property
    def data(self):
        """Folders of images and labels of the same names, as in the Decathlon."""
        return self.root / "images", self.root / "labels"

    def files(self, index=0):
        images, labels = self.data
        name = f"{self.names[index]}.nii.gz"
        return CaseFiles(self.names[index], (images / name,), labels / name)

    def bundle(self, preprocessing="plain", *, steps=80, **options):
        key = (preprocessing, steps, *options)
        if key not in self._made:
            contents = config(preprocessing, **options)
            folder = self.root / "bundles" / "-".join(map(str, key))
            self._made[key] = write_bundle(folder, contents)
            model = load_bundle(folder, output="softmax")
            cases = [model.prepare(self.files(index)) for index in range(2)]
            network = model.network.train().requires_grad_(True)
            optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
            for step in range(steps):
                case = cases[step % len(cases)]
                size = [2 * (length // 2) for length in case.base.shape[2:]]
                crop = (slice(None), slice(None), *(slice(0, length) for length in size))
                cut = type(case)(**{**case.__dict__, "reference": case.reference[crop]})
                optimiser.zero_grad()
                x = case.network(torch.nn.Identity(), whole=False)(case.base)  # network units
                dice_ce_loss(network(x[crop]), cut.target()).mean().backward()
                optimiser.step()
            torch.save({"model": network.state_dict()}, folder / "models" / "model.pt")
        return self._made[key]


def read(path):
    return np.asarray(nibabel.load(path).dataobj)
