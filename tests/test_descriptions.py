"""Mutated and hostile plans.json and dataset.json: the right model or one line, and no effect."""

import copy
import json
import re
import shutil

import pytest
import torch

from ima_seg.cli import main
from ima_seg.errors import UserError
from ima_seg.methods.ima_settings import IMASettings
from ima_seg.methods.settings import load_settings
from ima_seg.nnunet.folder import load_model
from ima_seg.nnunet.margins import read_margins, show_margins
from ima_seg.nnunet.plans import vary_plans
from tests.folder_data import (
    ARCHITECTURE,
    CHECKPOINT,
    DATASET,
    LEFT_OUT,
    PLANS,
    changed,
    mutations,
    outcome,
    state,
)


@pytest.fixture
def model(sound, tmp_path):
    """A copy of it."""
    return shutil.copytree(sound[0], tmp_path / "model")


@pytest.mark.parametrize(("name", "content", "seed"), [("plans.json", PLANS, 1), ("dataset.json", DATASET, 2)])
def test_mutated_descriptions_are_read_rightly_or_refused_in_a_line(sound, model, name, content, seed):
    expected = sound[1].networks[0]
    refused, count = 0, 240 if name == "plans.json" else 120
    for what, mutated in mutations(content, count, seed):
        (model / name).write_text(json.dumps(mutated))
        found = []
        message = outcome(lambda found=found: found.append(load_model(model)), name)
        if message is None:
            found[0].card()
            assert len(found[0].channels) == 1 and len(found[0].classes) == 2, what
            weights = found[0].networks[0].state_dict()
            assert all(torch.equal(value, weights[key]) for key, value in expected.state_dict().items()), what
        refused += message is not None
    assert count // 3 < refused < count, "the mutations reach what is read, and not only that"


CONFIGURATION = ("configurations", "base")
PLANS_CASES = [
    ("plans.json", ("image_reader_writer",), "MyDicomIO", "names 'MyDicomIO' as image_reader_writer, which this inst"),
    ("plans.json", ("label_manager",), "Mine", "names 'Mine' as label_manager, which this installation does not have"),
    ("plans.json", (*CONFIGURATION, "preprocessor_name"), "Mine", "install the package it comes from"),
    ("plans.json", (*CONFIGURATION, "preprocessor_name"), "np", "names 'np' as preprocessor_name"),
    ("plans.json", (*CONFIGURATION, "normalization_schemes"), ["Mine"], "names 'Mine' as normalisation"),
    ("plans.json", (*CONFIGURATION, "normalization_schemes"), ["ImageNormalization"], "is not known to ima-seg"),
    ("plans.json", (*CONFIGURATION, "normalization_schemes"), [], r"is \[\] for the 1 channels of dataset.json"),
    ("plans.json", (*CONFIGURATION, "use_mask_for_norm"), [True, True], "for the 1 channels of dataset.json"),
    ("plans.json", (*CONFIGURATION, "resampling_fn_data"), "mine", "names 'mine' as resampling_fn_data"),
    ("plans.json", (*CONFIGURATION, "resampling_fn_seg_kwargs"), {"oder": 1}, "unexpected keyword argument 'oder'"),
    ("plans.json", (*CONFIGURATION, "patch_size"), [8, 8, 7], "cannot be used; correct its architecture or patch_size"),
    ("plans.json", (*CONFIGURATION, "patch_size"), [8, 8], "have not as many axes"),
    ("plans.json", (*CONFIGURATION, "patch_size"), [10**4] * 3, "voxels"),
    ("plans.json", (*CONFIGURATION, "spacing"), [1.0, 0.0, 1.0], r"spacing\.1 is 0\.0"),
    ("plans.json", (*CONFIGURATION, "inherits_from"), "3d", "'3d', which 'base' inherits from, inherits from itself"),
    ("plans.json", ("configurations", "3d", "inherits_from"), "none", "is not there; there are: base, 3d"),
    ("plans.json", ("configurations", "3d", "previous_stage"), "3d", "previous_stage is '3d' itself"),
    ("plans.json", (*CONFIGURATION, "spacing"), [1.0, 1e-7, 1.0], r"spacing\.1 is 1e-07"),
    ("plans.json", (*CONFIGURATION, "spacing"), [1e7, 1.0, 1.0], r"spacing\.0 is 1000"),
    ("plans.json", ("foreground_intensity_properties_per_channel", "0", "std"), 1e-7, "std is 1e-07"),
    ("plans.json", ("foreground_intensity_properties_per_channel", "0", "mean"), -1e9, "mean is -1000"),
    ("plans.json", ("foreground_intensity_properties_per_channel", "0", "percentile_99_5"), 1e300, "99_5 is 1e"),
    ("dataset.json", ("modality",), 5, "modality is 5, no table of channels; leave it out"),
    ("plans.json", ("configurations", "3d"), LEFT_OUT, "'3d', which the checkpoint was trained for, is not there"),
    ("plans.json", ("configurations", "3d", "architecture"), LEFT_OUT, "is without 'architecture'"),
    ("plans.json", ("transpose_backward",), [1, 2, 0], "does not undo transpose_forward"),
    ("plans.json", ("foreground_intensity_properties_per_channel", "0"), LEFT_OUT, r"per_channel\.0"),
    ("plans.json", ("foreground_intensity_properties_per_channel", "0", "std"), 0.0, "std is 0.0"),
    ("dataset.json", ("channel_names",), {"CT": 0}, r"channel_names has the keys 'CT'; they must be"),
    ("dataset.json", ("channel_names",), {"1": "CT"}, r"channel_names has the keys '1'; they must be"),
    ("dataset.json", ("labels",), {"0": "background", "1": "organ"}, r"labels\.0 is 'background'"),
    ("dataset.json", ("labels",), {"background": 0, "organ": 2}, r"values \[0, 2\]; they must be 0, 1, 2"),
    ("dataset.json", ("labels",), {"background": 0, "a": 1, "b": 1}, "two classes the same value"),
    ("dataset.json", ("labels",), {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order is None"),
    ("dataset.json", ("labels",), {"background": 0, "a": 1, "ignore": 5}, "labels.ignore is 5; it must follow"),
    ("dataset.json", ("file_ending",), "/../x.nii.gz", "no name of a file"),
    ("dataset.json", ("dataset",), {"../x": {"images": ["a"], "label": "b"}}, "no name of a file"),
    ("dataset.json", ("dataset",), {"a": {"images": "a", "label": "b"}}, r"dataset\.a\.images is 'a'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "value", "expected"), PLANS_CASES)
def test_what_is_wrong_in_a_description_is_named(model, name, path, value, expected):
    content = PLANS if name == "plans.json" else DATASET
    (model / name).write_text(json.dumps(changed(content, path, value)))
    message = outcome(lambda: load_model(model), name)
    assert message is not None and re.search(expected, message), message
    assert message.startswith(str(model)) or "the network that" in message


LABELS_AS_TEXT = {"background": "0", "organ": "1", "lesion": 2.0}


def test_other_spellings_that_nnunet_reads_are_read(model, sound):
    """Channels in any order and by their old name, labels as text, old names and architectures in plans."""
    arguments = ARCHITECTURE["arch_kwargs"]
    old = changed(PLANS, ("configurations", "3d", "architecture"), LEFT_OUT)
    old["configurations"]["3d"] |= {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 2, "unet_max_num_features": 4,
        "n_conv_per_stage_encoder": [1, 1], "n_conv_per_stage_decoder": [1], "num_pool_per_axis": [1, 1, 1],
        "pool_op_kernel_sizes": arguments["strides"], "conv_kernel_sizes": arguments["kernel_sizes"],
    }  # fmt: skip
    intensities = old.pop("foreground_intensity_properties_per_channel")
    old["foreground_intensity_properties_by_modality"] = intensities
    (model / "plans.json").write_text(json.dumps(old))
    dataset = {
        **DATASET,
        "modality": DATASET["channel_names"],
        "labels": {"background": "0", "organ": "1", "lesion": 2.0},
    }
    del dataset["channel_names"]
    (model / "dataset.json").write_text(json.dumps(dataset))
    found, expected = load_model(model), sound[1]
    assert (found.channels, found.classes, found.labels) == (expected.channels, expected.classes, expected.labels)
    image = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(found.networks[0](image), expected.networks[0](image))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("network_class_name",), "os.system", "no module of dynamic_network_architectures"),
        (("network_class_name",), "builtins.eval", "no module of"),
        (("network_class_name",), "torch.nn.Module.load_state_dict", "no module of"),
        (("network_class_name",), "torch.nn.modules.module.torch.load", "no module of"),
        (("network_class_name",), "torch.nn.nowhere.np", "no module of|does not have"),
        (("network_class_name",), "my_package.nets.UMamba", "no module of .* pass --trust-checkpoint"),
        (("arch_kwargs", "nonlin"), "nnunetv2.run.run_training.run_training_entry", "no module of"),
        (("arch_kwargs", "conv_op"), "torch.nn.Conv9d", "names 'torch.nn.Conv9d' as a part of the network, which this"),
        (("arch_kwargs", "features_per_stage"), [10**9, 10**9], "cannot be used|does not fit"),
        (("arch_kwargs", "features_per_stage"), [2, 10**7], "cannot be used|does not fit"),
        (("arch_kwargs", "n_stages"), 10**9, "n_stages is 1000000000, more than"),
        (("arch_kwargs", "n_conv_per_stage"), [1, 10**7], "n_conv_per_stage is"),
    ],
)
def test_hostile_architectures_are_neither_imported_nor_allocated(model, path, value, expected):
    plans = changed(PLANS, ("configurations", "3d", "architecture", *path), value)
    (model / "plans.json").write_text(json.dumps(plans))
    message = outcome(lambda: load_model(model), "plans.json")
    assert message is not None and re.search(expected, message), message


def test_a_trusted_network_that_is_not_installed_is_named(model):
    path = ("configurations", "3d", "architecture", "network_class_name")
    (model / "plans.json").write_text(json.dumps(changed(PLANS, path, "my_package.nets.UMamba")))
    with pytest.raises(UserError, match=r"plans\.json names 'my_package.*install the package it comes from"):
        load_model(model, trust=True)


# --- margins, and what is named as a model ---------------------------------------------------------------------------


def test_an_unfinished_fold_is_named_and_the_others_shown(model, capsys):
    (model / "fold_1").mkdir()
    assert main(["margins", str(model)]) == 0
    output = capsys.readouterr().out.replace("\n", "")
    assert "fold_0" in output and f"no margins are shown of fold_1: {model / 'fold_1'} has no checkpoint" in output
    assert main(["margins", str(model), "-f", "1"]) == 2
    assert "fold_1 has no checkpoint" in capsys.readouterr().err
    (model / CHECKPOINT).unlink()
    assert main(["margins", str(model)]) == 2
    assert "no fold_* with a checkpoint" in capsys.readouterr().err


def test_a_damaged_fold_is_named_and_the_others_shown(model, capsys):
    (model / "fold_1").mkdir()
    damaged = model / "fold_1" / "checkpoint_final.pth"
    damaged.write_bytes((model / CHECKPOINT).read_bytes()[:1000])
    assert main(["margins", str(model)]) == 0
    output = capsys.readouterr().out
    assert "after 1 epochs" in output and f"no margins are shown of fold_1: {damaged}" in output.splitlines()[-1]
    assert main(["margins", str(model), "-f", "1"]) == 2
    shutil.copy(damaged, model / CHECKPOINT)
    assert main(["margins", str(model)]) == 2
    assert "(and no margins in 1 other folds)" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["../../x", "a/b", "a\\b", "/etc/x"])
def test_case_ids_of_a_ledger_lead_nowhere(model, tmp_path, case):
    content = torch.load(model / CHECKPOINT, weights_only=False)
    content["ima"]["ledger"]["cases"] = [case, "b"]
    torch.save(content, model / CHECKPOINT)
    before = sorted(tmp_path.rglob("*"))
    (fold,), _ = read_margins(model)
    with pytest.raises(UserError, match="a path, not a name"):
        show_margins(fold, images=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_model_folder_says_which_is(model, tmp_path, capsys):
    archive = shutil.make_archive(str(tmp_path / "model"), "zip", model)
    parent = model.parent
    for named, expected in (
        (archive, "nnUNetv2_install_pretrained_model_from_zip"),
        (model / "fold_0", rf"is a fold of a model; name the model's folder, {model}"),
        (parent, rf"holds some; name one of them: {model}"),
        (parent / "none", "does not exist"),
        (model / CHECKPOINT, rf"final\.pth is a checkpoint; name its model's folder, {model}\b"),
    ):
        evaluation = ["evaluate", "-i", "x", "-gt", "x", "-o", str(tmp_path / "o"), "-m", str(named), "--corruption"]
        for command in (["margins", str(named)], ["export", str(named), "-o", str(tmp_path / "o")], evaluation):
            assert main(command) == 2
            assert re.search(expected, capsys.readouterr().err), command


def test_a_broken_link_is_no_checkpoint(model):
    (model / CHECKPOINT).unlink()
    (model / CHECKPOINT).symlink_to(model / "gone.pth")
    with pytest.raises(UserError, match=r"has checkpoint_final\.pth; train a fold first"):
        load_model(model)


def test_sections_and_old_plans_that_cannot_be_changed_are_named():
    with pytest.raises(UserError, match="the section 'ima' is a list"):
        load_settings(IMASettings(), plans={"ima": [1]})
    flat = copy.deepcopy(PLANS)
    flat["configurations"] = {"2d": {**flat["configurations"]["base"]}}
    with pytest.raises(UserError, match="2d is without 'architecture'; only networks of stages can be changed"):
        vary_plans(flat, "x", features=4)
    assert vary_plans(flat, "x", batch_size=7)["configurations"]["2d"]["batch_size"] == 7
    assert state()["voxels"] == 512
