"""Bundles as MONAI's model zoo has them: what they are made of is read without trust, and small slips are named.

One file: the configs of the zoo, and the lists that say which parts of MONAI they may name.
"""

import importlib
import inspect
import json
import re
from pathlib import Path

import monai.inferers
import monai.transforms
import nibabel
import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR, UNet
from torch import nn

from ima_seg.errors import UserError
from ima_seg.monai.allowed import is_saver, only_computes
from ima_seg.monai.bundle import load_bundle
from tests.bundle_data import METADATA, PRED, altered, config, read, transform, write_bundle

BEFORE = [transform("LoadImaged"), transform("EnsureChannelFirstd"), transform("Orientationd", axcodes="RAS")]
SPACING = transform("Spacingd", pixdim=[1.5, 1.5, 2.0], mode="bilinear")
CT = transform("ScaleIntensityRanged", a_min=-57, a_max=164, b_min=0, b_max=1, clip=True)
SOFTMAX = transform("Activationsd", keys="pred", softmax=True)
ARGMAX = transform("AsDiscreted", keys="pred", argmax=True)
INVERT = transform("Invertd", keys="pred", transform="@preprocessing", orig_keys="@image_key",
                   meta_key_postfix="meta_dict", nearest_interp=False, to_tensor=True)  # fmt: skip
NEAREST = {**INVERT, "nearest_interp": True}
SAVE = transform("SaveImaged", keys="pred", meta_keys="pred_meta_dict", output_dir="@output_dir", dtype="$None",
                 output_dtype="$numpy.float32", output_ext=".nii.gz", separate_folder=True)  # fmt: skip


def compose(*steps):
    return {"_target_": "Compose", "transforms": list(steps)}


#: MONAI 1.4 asks for the size of the patch.
OLD_SWIN = {"img_size": 96} if "img_size" in inspect.signature(SwinUNETR).parameters else {}
#: What sets a bundle of the zoo apart from another, with networks made small.
ZOO = {
    "spleen_ct_segmentation": {
        "preprocessing": compose(*BEFORE, SPACING, CT, transform("EnsureTyped")),
        "postprocessing": compose(SOFTMAX, INVERT, ARGMAX, SAVE),
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "checkpointloader": {"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'"},
        "initialize": ["$monai.utils.set_determinism(seed=123)", "$@checkpointloader(@evaluator)"],
    },
    "brats_mri_segmentation": {
        "network_def": {"_target_": "SegResNet", "blocks_down": [1, 1], "blocks_up": [1], "init_filters": 8,
                        "in_channels": 4, "out_channels": 3, "dropout_prob": 0.2},
        "preprocessing": compose(transform("LoadImaged"),
                                 transform("NormalizeIntensityd", nonzero=True, channel_wise=True)),
        "postprocessing": compose(transform("Activationsd", keys="pred", sigmoid=True), INVERT,
                                  transform("AsDiscreted", keys="pred", threshold=0.5), SAVE),
        "channels": 4,
    },
    "pancreas_ct_dints_segmentation": {
        "arch_ckpt_path": "$@bundle_root + '/models/search_code_18590.pt'",
        "arch_ckpt": "$torch.load(@arch_ckpt_path, map_location=torch.device('cuda'))",
        "dints_space": {"_target_": "monai.networks.nets.TopologyInstance", "channel_mul": 0.2, "num_blocks": 6,
                        "num_depths": 3, "use_downsample": True, "device": "$torch.device('cuda')",
                        "arch_code": ["$@arch_ckpt['arch_code_a']", "$@arch_ckpt['arch_code_c']"]},
        "network_def": {"_target_": "monai.networks.nets.DiNTS", "dints_space": "@dints_space", "in_channels": 1,
                        "num_classes": "@classes", "use_downsample": True,
                        "node_a": "$torch.from_numpy(@arch_ckpt['node_a'])"},
        "classes": 3,
    },
    "wholeBody_ct_segmentation": {
        "displayable_configs": {"highres": True, "sw_overlap": 0.25, "sw_batch_size": 1},
        "pixdim": "$[1.5, 1.5, 1.5] if @displayable_configs#highres else [3.0, 3.0, 3.0]",
        "modelname": "$'model.pt' if @displayable_configs#highres else 'model_lowres.pt'",
        "preprocessing": compose(transform("LoadImaged"), transform("EnsureTyped"), transform("EnsureChannelFirstd"),
                                 transform("Spacingd", pixdim="@pixdim", mode="bilinear"),
                                 transform("ScaleIntensityd", minv=-1.0, maxv=1.0)),
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 16], "padding_mode": "replicate",
                    "sw_batch_size": "@displayable_configs#sw_batch_size", "mode": "gaussian",
                    "overlap": "@displayable_configs#sw_overlap",
                    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"},
        "postprocessing": compose(SOFTMAX, ARGMAX, NEAREST, SAVE),
        "handlers": [{"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/' + @modelname"}],
    },
    "swin_unetr_btcv_segmentation": {
        "network_def": {"_target_": "SwinUNETR", "spatial_dims": 3, "in_channels": 1, "out_channels": 3,
                        "feature_size": 12, "use_checkpoint": False, "depths": [1, 1, 1, 1], **OLD_SWIN},
        "preprocessing": compose(transform("LoadImaged", reader="NibabelReader"), *BEFORE[1:], SPACING, CT),
    },
    "prostate_mri_anatomy": {
        "network_def": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [8, 16],
                        "strides": [2], "num_res_units": 2, "norm": "batch", "act": "prelu", "dropout": 0.15},
        "postprocessing": compose(ARGMAX, transform("KeepLargestConnectedComponentd", keys="pred",
                                                    applied_labels=[1, 2]), NEAREST, SAVE),
        "handlers": [{"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'",
                      "map_location": {"_target_": "torch.device", "device": "@device"}}],
    },
    "pediatric_abdominal_ct_segmentation": {
        "spatial_size": [96, 96, 96],
        "network_def": {"_target_": "monai.networks.nets.DynUNet", "spatial_dims": "$len(@spatial_size)",
                        "in_channels": 1, "out_channels": 3, "kernel_size": [3, 3, 3], "strides": [1, 2, [2, 2, 1]],
                        "upsample_kernel_size": [2, [2, 2, 1]], "filters": [8, 8, 8], "norm_name": "instance",
                        "deep_supervision": False, "res_block": True},
        "preprocessing": compose(*BEFORE, SPACING, transform("CropForegroundd", source_key="image", mode=["minimum"]),
                                 transform("CastToTyped", dtype="$torch.float32")),
    },
    "segmentation_template": {
        "image": "$monai.utils.CommonKeys.IMAGE",
        "pred": "$monai.utils.CommonKeys.PRED",
        "num_classes": 3,
        "network_def": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@num_classes",
                        "channels": [8, 16], "strides": [2]},
        "transforms": [transform("LoadImaged", keys="@image", image_only=True),
                       transform("EnsureChannelFirstd", keys="@image"), transform("ScaleIntensityd", keys="@image")],
        "preprocessing": {"_target_": "Compose", "transforms": "$@transforms"},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": compose({**SOFTMAX, "keys": "@pred"}, {**ARGMAX, "keys": "@pred"}, {**SAVE, "keys": "@pred"}),
    },
    "ventricular_short_axis_3label": {
        "network_def": {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": [8, 16],
                        "strides": [2], "num_res_units": 2},
        "preprocessing": compose(*BEFORE[:2], transform("ScaleIntensityd"), transform("EnsureTyped", device="@device")),
        "inferer": {"_target_": "SliceInferer", "roi_size": [16, 16], "spatial_dim": 2},
    },
    "spleen_deepedit_annotation": {
        "first": BEFORE,
        "extra_transforms": [{**CT, "_disabled_": True}, transform("EnsureTyped")],
        "preprocessing": {"_target_": "Compose", "transforms": "$@first + @extra_transforms"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_what_the_zoo_is_made_of_is_read_without_trust(tmp_path, monkeypatch, name):
    changes = dict(ZOO[name])
    channels = changes.pop("channels", 1)
    metadata = altered(METADATA, "network_data_format", "inputs", "image", value={"num_channels": channels})
    folder = write_bundle(tmp_path / "bundle", {**config(), **changes}, metadata=metadata, weights={})
    code = {"arch_code_a": np.ones((6, 10)), "arch_code_c": np.ones((6, 10)), "node_a": np.ones((7, 3))}
    torch.save(code, folder / "models" / "search_code_18590.pt")
    monkeypatch.setattr("ima_seg.monai.bundle._load_weights", lambda *_, **__: None)
    sigmoid = {"organ": [1], "lesion": [2], "background": [3]} if name.startswith("brats") else None
    model = load_bundle(folder, labels=sigmoid)
    assert isinstance(model.network, nn.Module) and model.weights == folder / "models" / "model.pt"
    assert model.image_key == "image" and not any("Save" in type(s).__name__ for s in model.postprocessing.transforms)
    assert None not in model.preprocessing.transforms and len(model.preprocessing.transforms) >= 2


@pytest.mark.parametrize("name", ["a#1", "%b @c $d", "ä ö"])
def test_the_folder_of_a_bundle_may_have_any_name(tmp_path, name):
    folder = write_bundle(tmp_path / name)
    assert load_bundle(folder).weights == folder.resolve() / "models" / "model.pt"


#: What monai.transforms has and no inference of a stranger gets: it runs or imports other code, waits, prints, wants a
#: batch or a whole data set, or is for signals and not for images.
OTHERS = """
    BatchInverseTransform ComputeHoVerMaps CuCIM CutMix CutOut DataStats Decollated InvertibleTransform Lambda
    LazyTransform MapTransform Mark MixUp PadListDataCollate CoarseTransform RangePop RangePush TorchIO TorchVision
    omizableTransform SignalContinuousWavelet SignalFillEmpty SignalRandAddGaussianNoise SignalRandAddSine
    SignalRandAddSinePartial SignalRandAddSquarePulse SignalRandAddSquarePulsePartial SignalRandDrop SignalRandScale
    SignalRandShift SignalRemoveFrequency SimulateDelay ToCupy ToPIL TraceableTransform Transform
    UltrasoundConfidenceMapTransform
"""  # fmt: skip


def test_every_transform_computes_or_saves_or_is_known_as_something_else():
    kinds = {kind for kind in vars(monai.transforms).values() if isinstance(kind, type)}
    kinds = {kind for kind in kinds if issubclass(kind, monai.transforms.Transform)}
    saving = {kind.__name__ for kind in kinds if is_saver(kind)}
    assert {"SaveImage", "SaveImaged", "SaveClassificationd"} <= saving and all(
        only_computes(kind) != is_saver(kind)
        or not {kind.__name__.removeprefix("Rand"), kind.__name__.removeprefix("Rand").removesuffix("d")}.isdisjoint(
            OTHERS.split()
        )
        for kind in kinds
    )
    acts = re.compile(r"\bopen\(|urlopen|urlretrieve|makedirs|\.mkdir\(|unlink|subprocess\.\w|os\.(remove|system)")
    root = Path(monai.transforms.__file__).parent
    found = {str(file.relative_to(root)) for file in root.rglob("*.py") if acts.search(file.read_text())}
    assert found <= {"io/array.py", "utils_create_transform_ims.py"}  # the savers, and what draws MONAI's documentation


def test_no_module_of_networks_is_new_that_fetches_or_runs_something():
    root = Path(monai.__file__).parent / "networks"
    acts = re.compile(
        r"\b(load_state_dict_from_url|download_url|load_url|hf_hub_download|cached_file|from_pretrained|urlopen|load_module|"
        r"torch\.load|locate|import_module|subprocess|pickle|build_sam_vit_b|_instantiate)\(|getattr\(models"
    )  # fmt: skip
    found = {
        f.stem
        for kind in ("blocks", "layers", "nets")
        for f in (root / kind).glob("*.py")
        if acts.search(f.read_text())
    }
    refused = {"hyena", "gmm", "cell_sam_wrapper", "milmodel", "torchvision_fc", "transchex"}
    behind_pretrained = {"text_embedding", "densenet", "efficientnet", "hovernet", "resnet", "senet"}
    in_functions = {"flexible_unet", "swin_unetr"}  # which classes do not call on their own
    assert found <= refused | behind_pretrained | in_functions
    for name in refused:
        for part in ("blocks", "layers", "nets"):
            if (root / part / f"{name}.py").exists():
                module = importlib.import_module(f"monai.networks.{part}.{name}")
                own = [k for k in vars(module).values() if isinstance(k, type) and k.__module__ == module.__name__]
                assert own and not any(map(only_computes, own))


def changed(where, index, **options):
    contents = config("coarse")
    steps = contents[where]["transforms"]
    steps[index] = {**steps[index], **options}
    return contents


def reordered(*steps):
    return {**config("coarse"), "postprocessing": compose(*steps)}


def without_channels(**options):
    contents = changed("preprocessing", 0, **options)
    del contents["preprocessing"]["transforms"][1]
    return contents


WRAPPED = {"_target_": "monai.apps.nnunet.get_nnunet_monai_predictor", "model_folder": "$@bundle_root + '/models'"}
SLIPS = {
    "labels interpolated": (reordered(SOFTMAX, ARGMAX, INVERT), "set its nearest_interp to true"),
    "no channel axis": (without_channels(), "ensure_channel_first: true"),
    "a wrapped nnU-Net": ({**config(), "network_def": WRAPPED}, "computes without gradients"),
    "a wrapped nnU-Net in code": (
        {**config(), "network": "$monai.apps.nnunet.ModelnnUNetWrapper(@x, '/models')"}, "evaluate the nnU-Net model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLIPS)
@pytest.mark.parametrize("trust", [False, True])
def test_small_slips_are_named_with_the_line_to_change(tmp_path, name, trust):
    contents, message = SLIPS[name]
    with pytest.raises(UserError, match=message):
        load_bundle(
            write_bundle(tmp_path / "bundle", contents, weights=state() if "wrapped" in name else None), trust=trust
        )


def state():
    return UNet(3, 1, 3, [8, 16], [2], num_res_units=1).state_dict()


FINE = {
    "nearest": reordered(SOFTMAX, ARGMAX, NEAREST),
    "made discrete again": reordered(SOFTMAX, ARGMAX, INVERT, transform("AsDiscreted", keys="pred", threshold=0.5)),
    "nothing to undo": {**config(), "postprocessing": compose(SOFTMAX, ARGMAX, INVERT)},
    "channel axis by the loader": without_channels(ensure_channel_first=True),
}


@pytest.mark.parametrize("name", FINE)
def test_what_only_looks_like_a_slip_is_evaluated(organs, tmp_path, name):
    model = load_bundle(write_bundle(tmp_path / "bundle", FINE[name]))
    case = model.prepare(organs.files())
    labels = case.predict(model.window(), case.base)
    assert labels.shape == read(organs.files().label).T.shape and set(np.unique(labels)) <= {0, 1, 2}


def test_channels_last_in_one_file_need_the_transform_that_moves_them(organs, tmp_path):
    (image,), label = organs.files().images, organs.files().label
    stored = nibabel.load(image)
    channels = np.stack([np.asarray(stored.dataobj)] * 2, -1)
    nibabel.save(nibabel.Nifti1Image(channels, stored.affine), tmp_path / image.name)
    contents = {**config(channels=2), **{"preprocessing": without_channels()["preprocessing"]}}
    metadata = altered(METADATA, "network_data_format", "inputs", "image", value={"num_channels": 2})
    model = load_bundle(write_bundle(tmp_path / "bundle", contents, metadata=metadata))
    files = organs.files()
    with pytest.raises(UserError, match=r"EnsureChannelFirstd|expected"):
        model.prepare(type(files)(files.case, (tmp_path / image.name,), label))


def test_classes_are_named_by_label_def_too(tmp_path):
    pred = {"num_channels": 3, "label_def": {"0": "background", "1": "liver", "2": "spleen"}}
    model = load_bundle(write_bundle(tmp_path / "bundle", metadata=altered(METADATA, *PRED, value=pred)))
    assert model.classes == {"liver": (1,), "spleen": (2,)}


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: nn.DataParallel(torch.compile(net, backend="eager"))])
def test_weights_of_a_wrapped_network_are_read(tmp_path, wrap):
    network = UNet(3, 1, 3, [8, 16], [2], num_res_units=1)
    folder = write_bundle(tmp_path / "bundle", weights={"model": wrap(network).state_dict()})
    loaded = load_bundle(folder).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())
    torch.save({"other." + key: value for key, value in network.state_dict().items()}, folder / "models" / "model.pt")
    with pytest.raises(UserError, match="does not fit"):
        load_bundle(folder)


def test_a_trusted_bundle_saves_nothing_while_it_is_evaluated(tmp_path):
    nested = compose(SOFTMAX, ARGMAX, compose({**SAVE, "_target_": "SaveImageDict"}), {**SAVE, "output_dir": "x"})
    model = load_bundle(write_bundle(tmp_path / "bundle", {**config(), "postprocessing": nested}), trust=True)
    assert [type(step).__name__ for step in model.postprocessing.flatten().transforms] == [
        "Activationsd",
        "AsDiscreted",
    ]
    assert json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text())["postprocessing"] == nested
