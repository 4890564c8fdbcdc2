"""What MONAI's engine costs beyond the same IMA training in a plain loop of torch.

    python -m benchmarks.cost.monai_overhead [--device cpu|cuda]

An epoch of ``IMASupervisedTrainer`` over batches of MetaTensors, against ``IMA.step``, optimiser step and ``end_epoch``
over the same batches as plain tensors, with equal networks, seeds and settings; both make all passes of the search in
every iteration. ``decollate`` is on, as by default. The epochs alternate in one run, and the ratio is the median over
pairs; on the CPU it is of seconds of the CPU, on CUDA of the clock. A table goes to standard output and to
``benchmarks/results/monai_overhead_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import list_data_collate
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

from benchmarks.shared.measuring import alternate, provenance, ratio, store
from ima_seg.monai import IMASupervisedTrainer
from ima_seg.monai.trainer import make_method

CASES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    # name: batch, patch, feature maps
    "2D 56x40 x16, UNet 16-64": (16, (56, 40), (16, 32, 64)),
    "3D 32x48x32 x2, UNet 16-64": (2, (32, 48, 32), (16, 32, 64)),
}
ITERATIONS = 4
BAR = 1.05
#: Rates of 0: margins and networks are the same in every round, and so is the work.
SETTINGS = {
    "labels": 3,
    "criterion": "dice",
    "tau": 1e-4,
    "share": 1.0,
    "start": "random",
    "steps": 5,
    "precision": "fp32",
    "delta": 1e-4,
    "eps_max": 1e-4,
}


def batches(batch: int, patch: tuple[int, ...]) -> list[dict[str, Any]]:
    """Collated batches with the metadata of files."""
    torch.manual_seed(0)
    found = []
    for i in range(ITERATIONS):
        items = []
        for j in range(batch):
            meta = {"filename_or_obj": f"imagesTr/case_{i}_{j}.nii.gz", "affine": torch.eye(4)}
            label = torch.randint(0, 3, (1, *patch)).float()
            items.append(
                {"image": MetaTensor(torch.randn(1, *patch), meta=meta), "label": MetaTensor(label, meta=dict(meta))}
            )
        found.append(list_data_collate(items))
    return found


def measure(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of an epoch either way, and their ratio."""
    batch, patch, features = CASES[name]
    data = batches(batch, patch)
    network = UNet(len(patch), 1, 3, features, (2,) * (len(features) - 1), norm="instance").to(device)
    loss = DiceCELoss(softmax=True, to_onehot_y=True)

    twin = copy.deepcopy(network)
    trainer = IMASupervisedTrainer(
        device, max_epochs=10**6, train_data_loader=data, network=network, loss_function=loss, ima=SETTINGS,
        optimizer=torch.optim.SGD(network.parameters(), 0.0),
    )  # fmt: skip

    def engine() -> None:
        torch.manual_seed(0)
        trainer.state.max_epochs = trainer.state.epoch + 1
        trainer.run()

    ima = make_method(SETTINGS, epochs=10**6, name="ima")
    optimiser = torch.optim.SGD(twin.parameters(), 0.0)
    plain = [
        (b["image"].as_tensor(), b["label"].as_tensor(), [str(file) for file in b["image"].meta["filename_or_obj"]])
        for b in data
    ]

    def loop() -> None:
        torch.manual_seed(0)
        twin.train()
        for x, y, ids in plain:
            x, y = x.to(device), y.to(device)
            optimiser.zero_grad()
            report = ima.step(twin, x, y, ids, loss=lambda output, rows, y=y: loss(output, y[rows]))
            assert report.searched.all()
            optimiser.step()
        ima.end_epoch()

    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = alternate({"engine": engine, "loop": loop}, rounds, device, clock=clock)
    assert trainer.state.ima_report.searched.all()
    overhead = ratio(seconds["engine"], seconds["loop"])
    return {
        "case": name, **overhead, "bar": BAR, "pass": overhead["ratio"] <= BAR, "iterations": ITERATIONS,
        "loop_seconds": round(statistics.median(seconds["loop"]), 3), "pairs": rounds,
    }  # fmt: skip


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = []
    print("| case | engine / plain loop | min-max |  |\n|---|---|---|---|")
    for name in CASES:
        row = measure(name, device, options.pairs)
        rows.append(row)
        verdict = "pass" if row["pass"] else "**fail**"
        print(f"| {name} | {row['ratio']} | {row['ratio_min_max']} | {verdict} |", flush=True)
    store("monai_overhead", device, {"time": rows} | provenance(__file__, device))


if __name__ == "__main__":
    main()
