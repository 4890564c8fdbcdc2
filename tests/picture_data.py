"""Tiny pictures with a bright disc, and nnU-Net model folders for them, made without nnU-Net's planning."""

import json

import numpy as np
import tifffile
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io

SIZE = (28, 36)


def disc(rng, size=SIZE):
    """A label (Y, X), or in three dimensions a cylinder."""
    y, x = np.mgrid[: size[-2], : size[-1]]
    centre = rng.uniform(0.4, 0.6, 2) * size[-2:]
    flat = np.hypot(y - centre[0], x - centre[1]) < 7
    return np.broadcast_to(flat, size).astype(np.uint8)


def picture(label, rng, *, top=255, dtype=np.uint8, channels=3):
    """(Y, X[, C]) or (Z, Y, X): black at the left and right, the disc bright."""
    gain = np.array([0.9, 0.6, 0.3])[:channels]
    light = (0.35 + 0.45 * label)[..., None] * gain + rng.normal(0, 0.03, (*label.shape, channels))
    light[..., :3, :] = light[..., -3:, :] = 0
    whole = np.clip(light, 0, 1) * top
    return np.squeeze(whole if np.dtype(dtype).kind == "f" else whole.round(), -1 if channels == 1 else ()).astype(
        dtype
    )


def store(path, pixels):
    if path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.shape[-1] == 3 else "minisblack")
    else:
        io.imsave(path, pixels, check_contrast=False)


def make_pictures(root, *, ending=".png", channels=3, cases=2, size=SIZE, **options):
    """``imagesTr`` and ``labelsTr`` below ``root``; returns them."""
    rng, folders = np.random.default_rng(0), (root / "imagesTr", root / "labelsTr")
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(cases):
        label = disc(rng, size)
        store(folders[0] / f"eye{number}_0000{ending}", picture(label, rng, channels=channels, **options))
        store(folders[1] / f"eye{number}{ending}", label)
    return folders


def make_model(root, images, labels, *, ending=".png", reader="NaturalImage2DIO", names=("R", "G", "B"),
               scheme="ZScoreNormalization", steps=30, ima=None):  # fmt: skip
    """A model folder with a little network, trained for some steps on the pictures."""
    volume = reader == "Tiff3DIO"
    axes = 3 if volume else 2
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    functions = {f"resampling_fn_{name}": "resample_data_or_seg_to_shape" for name in ("data", "seg", "probabilities")}
    functions |= {f"{name}_kwargs": resampling | {"is_seg": name.endswith("seg"), "order": 1} for name in functions}
    plans = {
        "dataset_name": "Dataset970_Eyes", "plans_name": "tiny", "image_reader_writer": reader,
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner", "original_median_spacing_after_transp": [999.0, 1.0, 1.0],
        "foreground_intensity_properties_per_channel": {str(i): {"mean": 0.0, "std": 1.0} for i in range(len(names))},
        "configurations": {"3d_fullres" if volume else "2d": {
            "data_identifier": "tiny", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
            "patch_size": [4, 16, 16] if volume else [16, 16], "spacing": [1.0] * axes, "batch_dice": True,
            "normalization_schemes": [scheme] * len(names), "use_mask_for_norm": [False] * len(names), **functions,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 2, "features_per_stage": [4, 8], "conv_op": f"torch.nn.Conv{axes}d",
                    "kernel_sizes": [[3] * axes] * 2, "strides": [[1] * axes, [2] * axes], "n_conv_per_stage": [1, 1],
                    "n_conv_per_stage_decoder": [1], "conv_bias": True, "norm_op": f"torch.nn.InstanceNorm{axes}d",
                    "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
            },
        }},
    }  # fmt: skip
    dataset = {"channel_names": {str(i): name for i, name in enumerate(names)}, "file_ending": ending,
               "labels": {"background": 0, "disc": 1}, "numTraining": 2}  # fmt: skip
    fold = root / "fold_0"
    fold.mkdir(parents=True)
    (root / "plans.json").write_text(json.dumps(plans))
    (root / "dataset.json").write_text(json.dumps(dataset))
    manager = PlansManager(plans)
    (configuration,) = plans["configurations"]
    torch.manual_seed(0)
    network = nnUNetTrainer.build_network_architecture(
        manager, manager.get_configuration(configuration), len(names), 2, False
    )
    _train(network, manager.image_reader_writer_class(), images, labels, ending, steps, scheme)
    checkpoint = {
        "network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": configuration, "fold": 0}, "inference_allowed_mirroring_axes": (0, 1),
    }  # fmt: skip
    torch.save(checkpoint | ({} if ima is None else {"ima": ima}), fold / "checkpoint_final.pth")
    return root


def _train(network, reader, images, labels, ending, steps, scheme):
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    x, y = [], []
    for file in sorted(labels.glob(f"*{ending}")):
        case = file.name.removesuffix(ending)
        values = reader.read_images(sorted(map(str, images.glob(f"{case}_*{ending}"))))[0]
        axes = tuple(range(1, values.ndim))
        if scheme == "ZScoreNormalization":
            values = (values - values.mean(axes, keepdims=True)) / values.std(axes, keepdims=True)
        else:
            values = values / 255
        x.append(torch.from_numpy(values.astype(np.float32)))
        y.append(torch.from_numpy(reader.read_seg(str(file))[0][0]).long())
    x, y = torch.stack(x), torch.stack(y)
    if x.shape[2] == 1:
        x, y = x[:, :, 0], y[:, 0]
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimiser.step()
