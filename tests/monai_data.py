"""Small batches, networks and trainers for the tests of ``ima_seg.monai``."""

import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.losses import DiceCELoss

from ima_seg.monai import IMASupervisedTrainer
from tests.models import TinyUNet

#: Searches from the first iteration on, for no network is below this Dice.
IMA = {
    "labels": 2,
    "criterion": "dice",
    "tau": 0.001,
    "share": 1.0,
    "steps": 2,
    "delta": 0.05,
    "eps_max": 0.3,
    "precision": "fp32",
}


def items(count=4, dims=2, shape=None, files=True, one_hot=False):
    """Disks in noise with metadata as LoadImaged leaves them."""
    generator = torch.Generator().manual_seed(1)
    shape = shape or (16,) * dims
    axes = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    found = []
    for i in range(count):
        distance = sum((a - s / 2 - i % 2) ** 2 for a, s in zip(axes, shape, strict=True))
        label = (distance < (shape[-1] / 3) ** 2)[None].float()
        image = label + 0.3 * torch.randn(1, *shape, generator=generator)
        if one_hot:
            label = torch.cat([1 - label, label])
        meta = {"filename_or_obj": f"/data/imagesTr/case_{i}.nii.gz"} if files else {}
        found.append({"image": MetaTensor(image, meta=meta), "label": MetaTensor(label), "name": f"n{i}"})
    return found


def loader(data, batch_size=2, **options):
    return DataLoader(Dataset(data), batch_size=batch_size, num_workers=0, **options)


def make_trainer(network=None, data=None, *, kind=IMASupervisedTrainer, epochs=1, lr=0.1, **options):
    network = network or TinyUNet(2, outputs=2)
    if kind is IMASupervisedTrainer:
        options.setdefault("ima", IMA)
    options.setdefault("train_data_loader", loader(items() if data is None else data))
    options.setdefault("loss_function", DiceCELoss(softmax=True, to_onehot_y=True))
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr)
    options.setdefault("optimizer", optimizer)
    return kind(device="cpu", max_epochs=epochs, network=network, **options)
