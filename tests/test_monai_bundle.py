"""The example bundle: two lines from a standard training, trains, goes on, predicts."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from monai.bundle import ConfigParser, run
from monai.engines import SupervisedTrainer

from tests.monai_data import items

CONFIGS = Path(__file__).parents[1] / "examples" / "monai_bundle" / "configs"
SMALL = {"network_def#channels": [4, 8], "network_def#strides": [2]}


@pytest.fixture
def data(tmp_path):
    """A folder with imagesTr and labelsTr; smaller than the patch in one axis, so that padding is undone."""
    for i, item in enumerate(items(5, shape=(30, 48, 32))):
        for folder, key in (("imagesTr", "image"), ("labelsTr", "label")):
            (tmp_path / folder).mkdir(exist_ok=True)
            values = item[key][0].numpy().astype(np.float32 if key == "image" else np.uint8)
            nib.save(nib.Nifti1Image(values, np.diag([1.0, 2, 3, 1])), tmp_path / folder / f"case_{i}.nii.gz")
    return tmp_path


def train(data, root, **overrides):
    options = {"bundle_root": str(root), "dataset_dir": str(data), "train#trainer#ima#tau": 0.001, **SMALL, **overrides}
    run(config_file=str(CONFIGS / "train.yaml"), **options)
    with (root / "models" / "ima_margins.csv").open() as file:
        return {row["case"]: row["training_margin_rms"] for row in csv.DictReader(file)}


def test_two_lines_make_the_difference_to_a_standard_training(data):
    lines = (CONFIGS / "train.yaml").read_text().splitlines()
    marked = [line for line in lines if line.endswith((" # IMA", "in place of SupervisedTrainer"))]
    assert len(marked) == 2
    plain = [line.replace("ima_seg.monai.IMASupervisedTrainer", "SupervisedTrainer") for line in lines
             if not line.endswith(" # IMA")]  # fmt: skip
    config = yaml.safe_load("\n".join(plain))
    # What only reports margins has nothing to report.
    config["train"]["handlers"] = [h for h in config["train"]["handlers"] if "MarginLedger" not in h["_target_"]]
    config.update(dataset_dir=str(data), bundle_root=str(data))
    parser = ConfigParser(config)
    trainer = parser.get_parsed_content("train#trainer")
    assert type(trainer) is SupervisedTrainer


def test_a_bundle_may_name_any_method(data):
    config = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    config.update(dataset_dir=str(data), bundle_root=str(data))
    trainer = config["train"]["trainer"]
    del trainer["ima"]
    trainer |= {"_target_": "ima_seg.monai.AdversarialSupervisedTrainer",
                "method": {"name": "trades", "labels": 3, "eps": 0.05}}  # fmt: skip
    method = ConfigParser(config).get_parsed_content("train#trainer").method
    assert (method.name, method.eps, method.epochs) == ("TRADES", 0.05, 60)


@pytest.mark.slow
def test_it_trains_goes_on_and_predicts(data, tmp_path):
    whole = train(data, tmp_path / "whole", max_epochs=2, robustness_interval=2)
    train(data, tmp_path / "parts", max_epochs=1)
    resumed = train(data, tmp_path / "parts", max_epochs=2, resume=True, robustness_interval=2)
    assert whole == resumed and set(whole) == {f"imagesTr/case_{i}" for i in (1, 2, 3, 4)}
    out = tmp_path / "out"
    run(config_file=str(CONFIGS / "inference.yaml"), bundle_root=str(tmp_path / "whole"),
        dataset_dir=str(data / "imagesTr"), output_dir=str(out), **SMALL)  # fmt: skip
    for file in sorted((data / "imagesTr").iterdir()):
        image, prediction = nib.load(file), nib.load(out / file.name)
        assert prediction.shape == image.shape and set(np.unique(prediction.get_fdata())) <= {0, 1, 2}
        assert np.allclose(prediction.affine, image.affine)
