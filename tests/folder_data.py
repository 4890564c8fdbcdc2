"""A model folder written by hand: plans, data set and a checkpoint with margins, without nnU-Net's planning."""

import copy
import json
import random

import nibabel
import numpy as np
import pytest
import torch

from ima_seg.errors import UserError
from ima_seg.methods.ledger import MarginLedger
from ima_seg.nnunet.folder import load_model

ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2, "features_per_stage": [2, 4], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [2, 2, 2]], "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1], "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}  # fmt: skip
_RESAMPLING = {"order": 1, "order_z": 0, "force_separate_z": None}
PLANS = {
    "dataset_name": "Dataset999_Hand",
    "plans_name": "hand",
    "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "configurations": {
        "base": {
            "batch_size": 2, "patch_size": [8, 8, 8], "spacing": [1.0, 1.0, 1.0],
            "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
            "preprocessor_name": "DefaultPreprocessor",
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {**_RESAMPLING, "is_seg": False},
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {**_RESAMPLING, "is_seg": True},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": {**_RESAMPLING, "is_seg": False},
        },
        "3d": {"inherits_from": "base", "architecture": ARCHITECTURE},
    },
    "foreground_intensity_properties_per_channel": {
        "0": {"mean": 10.0, "std": 20.0, "percentile_00_5": -50.0, "percentile_99_5": 90.0}
    },
}  # fmt: skip
DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "organ": 1, "lesion": 2},
    "file_ending": ".nii.gz",
    "numTraining": 2,
}


def state():
    """That of an IMA training of two cases."""
    ledger = MarginLedger(delta=0.01, eps_max=0.3)
    ledger.register(["a", "b"])
    ledger.step()
    row = dict.fromkeys(
        ("expanding_share", "crossed_share", "below_tau_share", "background_share", "clean_loss", "adversarial_loss"),
        0.5,
    )
    row |= {f"margin_q{q:02}": 0.01 for q in (5, 25, 50, 75, 95)}
    row |= {"epoch": 0, "equilibrium": False, "passes_per_sample": 9.0}
    settings = {"norm": "l2", "delta": 0.01, "eps_max": 0.3, "rule": "mean", "tau": 0.45}
    return {"settings": settings, "history": [row], "ledger": ledger.state_dict(), "voxels": 512}


def write_model(folder):
    """Plans, data set, and ``fold_0`` with untrained weights."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    torch.manual_seed(0)
    named = ARCHITECTURE["network_class_name"], ARCHITECTURE["arch_kwargs"], ARCHITECTURE["_kw_requires_import"]
    network = get_network_from_plans(*named, 1, 3, deep_supervision=False)
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(PLANS))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    checkpoint = {
        "network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer", "ima": state(),
        "init_args": {"configuration": "3d", "fold": 0}, "inference_allowed_mirroring_axes": (0, 1, 2),
    }  # fmt: skip
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def write_cases(folder, *names):
    """CT cases of 10 voxels an edge, for that model; the folders of images and labels."""
    images, labels = folder / "images", folder / "labels"
    for path in (images, labels):
        path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in names:
        reference = np.zeros((10, 10, 10), np.uint8)
        reference[2:6, 2:7, 2:5], reference[6:8, 3:6, 3:6] = 1, 2
        image = rng.normal(30 * reference, 10).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), images / f"{name}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(reference, np.eye(4)), labels / f"{name}.nii.gz")
    return images, labels


CHECKPOINT = "fold_0/checkpoint_final.pth"


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A model folder and what is loaded of it."""
    folder = write_model(tmp_path_factory.mktemp("sound") / "model")
    return folder, load_model(folder)


def changed(content, path, value):
    """A copy of nested dicts and lists with another ``value`` at ``path``, or without it."""
    result = copy.deepcopy(content)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    if value is LEFT_OUT:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return result


LEFT_OUT = object()
VALUES = (
    LEFT_OUT, None, True, -1, 0, 3, 1.5, 10**12, 1e999, -1e999, float("nan"), "", "x", "../../x", "os.system",
    "builtins.eval", "torch.nn.Module.load_state_dict", [], [[]], [1, 2], ["x"], {}, {"0": "x"}, {"x": 0},
)  # fmt: skip


def paths(content, above=()):
    """The paths of everything in nested dicts and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from paths(value, (*above, key))


def mutations(content, count, seed):
    """``count`` copies with a change each, and how each is called."""
    every = [(path, value) for path in paths(content) for value in VALUES]
    for path, value in random.Random(seed).sample(every, count):
        yield f"{path} = {value!r}", changed(content, path, value)


def outcome(action, file):
    """``None`` or the message: one line, not long, naming the file; any other exception fails the test."""
    try:
        action()
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1500, message
        assert file in message, message
        return message
    return None
