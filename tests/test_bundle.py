"""MONAI bundles: their own inference reproduced with gradients, and evaluations of them.

One file: the tests share bundles and runs that take long to make.
"""

import json
import shutil

import monai
import nibabel
import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer, SlidingWindowInfererAdapt
from torch import nn

from ima_seg.cli import main
from ima_seg.errors import UserError
from ima_seg.files import file_hash
from ima_seg.monai.bundle import load_bundle
from ima_seg.monai.window import InfererWindow, make_window
from tests.bundle_data import CLASSES, METADATA, PRED, altered, config, read, write_bundle
from tests.evaluation_runs import comparable, evaluated, failures, records, settings

WINDOWS = {
    "constant": SlidingWindowInferer((8, 6, 7), sw_batch_size=3),
    "gaussian": SlidingWindowInferer((8, 6, 7), overlap=0.6, mode="gaussian", sigma_scale=(0.2, 0.1, 0.125)),
    "one number": SlidingWindowInferer(5, overlap=(0.0, 0.5, 0.3), cache_roi_weight_map=True, sw_batch_size=2),
    "padded": SlidingWindowInferer((16, 6, 20), padding_mode="replicate", mode="gaussian"),
    "padded with a value": SlidingWindowInferer((16, 6, 20), cval=-1.5),
    "open": SlidingWindowInferer((-1, 6, None), overlap=0.5),
    "adaptive": SlidingWindowInfererAdapt((8, 6, 7), sw_batch_size=2),
    "buffered": SlidingWindowInferer((8, 6, 7), buffer_steps=1, sw_batch_size=2),
    "simple": SimpleInferer(),
    "slices": SliceInferer(roi_size=(7, 5), spatial_dim=1, sw_batch_size=4, overlap=0.4),
}


def network(dims=3, channels=2, outputs=3):
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
    return nn.Sequential(conv(channels, 6, 3, padding=1), nn.Tanh(), conv(6, outputs, 3, padding=1)).double()


@pytest.mark.parametrize("name", WINDOWS)
def test_logits_and_gradient_are_those_of_the_inferer_itself_in_one_graph(name):
    inferer, net = WINDOWS[name], network(2 if name == "slices" else 3).requires_grad_(False)
    x = torch.randn(1, 2, 13, 9, 14, dtype=torch.double)
    leaf = x.clone().requires_grad_(True)
    expected = inferer(leaf, net)
    outer = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, leaf, outer)
    window = make_window(net, inferer, outputs=3)
    assert isinstance(window, InfererWindow) == (name != "slices")
    with torch.no_grad():
        assert (window(x) - expected).abs().max() < 1e-5
    ours = x.clone().requires_grad_(True)
    logits = window(ours)
    (ours_gradient,) = torch.autograd.grad(logits, ours, outer.to(logits))
    assert (logits - expected).abs().max() < 1e-5
    assert (ours_gradient - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("name", ["gaussian", "slices"])
def test_the_memory_is_that_of_one_batch_of_tiles(name):
    """Activations that autograd keeps: those of one batch, however many batches there are."""
    kept = []
    net = network(2 if name == "slices" else 3).float().requires_grad_(False)
    window = make_window(net, WINDOWS[name], outputs=3)
    hidden = nn.Tanh()
    hidden.register_forward_hook(lambda module, inputs, output: kept.append(output.requires_grad))
    net[1] = hidden
    x = torch.randn(1, 2, 13, 9, 14, requires_grad=True)

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        logits = window(x)
    # Six hidden channels of every tile would be far more than the windows' inputs.
    assert sum(kept) == 0 or name == "slices"
    assert sum(saved) < 40 * x.numel() and logits.requires_grad
    many = len(kept)
    logits.sum().backward()
    assert len(kept) == 2 * many and x.grad.abs().max() > 0


@pytest.mark.parametrize("output", ["wrong number", "another size", "a dictionary"])
def test_outputs_that_are_no_logits_are_refused(output):
    class Wrong(nn.Module):
        def forward(self, x):
            return {"a dictionary": {"out": x}, "another size": x[..., ::2], "wrong number": x}[output]

    window = make_window(Wrong(), WINDOWS["constant"], outputs=2 if output == "another size" else 3)
    with pytest.raises(UserError, match=r"returned (\(|dict)"):
        window(torch.randn(1, 2, 9, 9, 9))


RUNS = {
    "plain": ("plain", {}),
    "resampled and clipped": ("coarse", {}),
    "whole image": ("plain", {"inferer": {"_target_": "SimpleInferer"}}),
    "gaussian": (
        "coarse",
        {"inferer": {"_target_": "SlidingWindowInferer", "roi_size": [20, 12, 24], "overlap": 0.6, "mode": "gaussian"}},
    ),
    "sigmoid": ("plain", {"sigmoid": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_predictions_are_the_files_that_monai_bundle_run_writes(organs, tmp_path, name):
    pytest.importorskip("ignite")
    preprocessing, changes = RUNS[name]
    weights = torch.load(organs.bundle(preprocessing) / "models" / "model.pt")
    folder = write_bundle(tmp_path / "bundle", config(preprocessing, **changes), weights=weights)
    monai.bundle.run(
        run_id="run",
        config_file=str(folder / "configs" / "inference.json"),
        meta_file=str(folder / "configs" / "metadata.json"),
        bundle_root=str(folder),
        dataset_dir=str(organs.data[0]),
        output_dir=str(tmp_path / "out"),
    )
    values = {"background": [1, 2], "organ": [1, 2], "lesion": [2]}
    metadata = altered(METADATA, "network_data_format", "outputs", "pred", "channel_def", "0", value="body")
    if name == "sigmoid":
        (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
        values["body"] = values.pop("background")
    model = load_bundle(folder, labels=values if name == "sigmoid" else None)
    window = model.window()
    for index, case_name in enumerate(organs.names):
        case = model.prepare(organs.files(index))
        ours = case.predict(window, case.base)
        written = read(tmp_path / "out" / f"{case_name}_trans.nii.gz")
        assert (ours != written.T if name != "sigmoid" else ours != written.transpose(3, 2, 1, 0)).mean() == 0
        assert ours.any() and not ours.all()


@pytest.mark.parametrize("preprocessing", ["plain", "coarse"])
def test_native_units_are_measured_and_perturbations_go_there_and_back(organs, preprocessing):
    model = load_bundle(organs.bundle(preprocessing))
    case = model.prepare(organs.files())
    image = read(organs.files().images[0]).astype(float)
    assert case.scale == pytest.approx([image.std() if preprocessing == "plain" else 300.0 * case.sd[0]], rel=1e-5)
    values = case.padded[0][(slice(None), *case.box)]
    assert case.sd == pytest.approx([float(values[values != 0].std())], rel=1e-4)
    assert case.sd == pytest.approx([1.0], rel=1e-3) or preprocessing == "coarse"
    assert case.native_range == pytest.approx([np.subtract(*np.percentile(image, (99.5, 0.5)))])
    assert case.resampled == (preprocessing == "coarse")
    assert np.array_equal(case.raw.image[0].T, image) and case.image_voxels == image.size
    if preprocessing == "plain":
        # An independent way: the perturbed network input is that of the perturbed file, up to its own normalisation.
        native = np.random.default_rng(0).normal(size=case.raw.image.shape) * 30
        moved = case.from_native(native)
        other = case.altered((case.raw.image + native).astype(np.float32))
        shift, scale = image.mean(), image.std()
        changed = image + native[0].T
        undone = other.base * changed.std() / scale + (changed.mean() - shift) / scale
        inside = moved[0] != 0
        assert ((case.base + moved - undone)[0, 0][inside]).abs().max() < 1e-3
        assert np.allclose(case.native_delta(moved), native, atol=1e-2)
    else:
        smooth = np.ones_like(case.raw.image) * 60
        inside = case.from_native(smooth)[0, 2:-2, 2:-2, 2:-2]
        assert torch.allclose(inside, torch.tensor(0.2 / case.sd[0]), atol=1e-5)


def test_only_the_image_is_perturbed_and_not_its_padding(organs):
    model = load_bundle(organs.bundle())
    case, window = model.prepare(organs.files()), model.window()
    assert case.base.shape[2:] == case.raw.reference.shape[::-1] and case.padded.shape[2:] == (28, 24, 26)
    x = (case.base + 0.1 * torch.randn_like(case.base)).requires_grad_(True)
    before = (torch.tensor(case.padded.shape[2:]) - torch.tensor(x.shape[2:])) // 2
    index = (..., *(slice(int(b), int(b) + size) for b, size in zip(before, x.shape[2:], strict=True)))
    framed = case.padded.clone()
    framed[index] = x * case.sd[0]
    expected = model.inferer(framed, model.network)[index]
    outer = torch.randn_like(expected)
    logits = case.network(window, whole=True)(x)
    assert torch.allclose(logits, expected, atol=1e-4) and logits.shape[2:] == case.reference.shape[2:]
    ours, theirs = (torch.autograd.grad(values, x, outer)[0] for values in (logits, expected))
    assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))


def test_the_reference_lies_where_the_bundles_own_transforms_would_put_it(organs, tmp_path):
    model = load_bundle(organs.bundle("coarse"))
    case = model.prepare(organs.files())
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd

    own = Compose([
        LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", axcodes="RAS"),
        Spacingd("image", pixdim=[1.3, 1.3, 1.4], mode="nearest"),
    ])({"image": str(organs.files().label)})["image"]  # fmt: skip
    assert (case.reference[0] != own).float().mean() < 0.002 and case.reference.any()


def test_an_evaluation_and_its_report(organs, tmp_path):
    folder = organs.bundle()
    chosen = settings(
        attacks=["fgsm", "pgd", "patch-pgd", "gaussian", "disappear", "minimal"], eps=[0.02, 0.3], steps=4,
        corruptions=["blur"], save_adversarial=True, limit=1, targets=["organ"],
    )  # fmt: skip
    report, failed = evaluated({"unet": folder}, organs.data, tmp_path / "out", chosen)
    assert failed == 0 and not failures(tmp_path / "out")
    found = records(tmp_path / "out")
    by = {(r.attack, r.eps, r.severity): r for r in found.values()}
    clean, pgd = by["clean", None, None], by["pgd", 0.3, None]
    assert list(clean.classes) == CLASSES and clean.classes["organ"].dice > 0.4 and pgd.dice < 0.7 * clean.dice
    assert pgd.dice < by["gaussian", 0.3, None].dice
    for eps in (0.02, 0.3):
        assert by["pgd", eps, None].size.rms == pytest.approx(eps, rel=1e-3)
    std = read(organs.files().images[0]).std()
    assert pgd.size.native_rms == pytest.approx([0.3 * std], rel=1e-3) and 0 < pgd.size.ssim < 1
    image = tmp_path / "out" / pgd.disk.image[0]
    change = read(image) - read(organs.files().images[0])
    assert image.name == f"{organs.names[0]}.nii.gz" and pgd.disk.rms == pytest.approx(0.3, rel=0.01)
    assert np.sqrt((change**2).mean()) == pytest.approx(pgd.disk.rms * std, rel=1e-3)
    assert by["corruption:blur", None, 5].dice != clean.dice
    text = report.read_text()
    for words in ("Phantom organs 0.3.1", "SlidingWindowInferer", "16 × 16 × 16", "models/model.pt",
                  "T1: 1 network units in the median case", file_hash(folder / "models" / "model.pt")):  # fmt: skip
        assert words in text
    assert "mirroring" not in text.split("Attacked system")[1][:600]


def test_a_stopped_evaluation_goes_on_and_parts_add_up(organs, tmp_path):
    chosen = settings(attacks=["pgd", "gaussian"], eps=[0.1], steps=2)
    models = {"a": organs.bundle(), "b": organs.bundle("coarse")}
    evaluated(models, organs.data, tmp_path / "whole", chosen)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    lines = (tmp_path / "cut" / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / "records.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:40])
    with pytest.raises(UserError, match="--resume"):
        evaluated(models, organs.data, tmp_path / "cut", chosen)
    evaluated(models, organs.data, tmp_path / "cut", chosen, resume=True)
    for part in range(2):
        evaluated(models, organs.data, tmp_path / "parts", chosen, num_parts=2, part_id=part)
    whole = comparable(tmp_path / "whole")
    assert len(whole) == 3 * 2 * 3 and comparable(tmp_path / "cut") == whole == comparable(tmp_path / "parts")


def test_without_a_line_to_original_intensities_their_units_are_refused(organs, tmp_path):
    folder = organs.bundle("gamma")
    for changes in ({"save_adversarial": True}, {"unit": "percent"}):
        with pytest.raises(UserError, match="no line between original intensities"):
            evaluated({"a": folder}, organs.data, tmp_path / "out", settings(**changes))
        assert not (tmp_path / "out").exists()
    report, failed = evaluated({"a": folder}, organs.data, tmp_path / "out", settings(eps=[0.1], limit=2))
    pgd = next(r for r in records(tmp_path / "out").values() if r.attack == "pgd")
    assert failed == 0 and pgd.size.native_rms == [] and pgd.panel is None and 0 < pgd.size.ssim < 1
    assert pgd.size.rms == pytest.approx(0.1, rel=1e-3)
    text = report.read_text()
    assert "Worst cases" not in text and "<td>0.1</td>" in text


def test_several_channels_lie_in_one_file_or_in_one_each(organs, tmp_path):
    (image,), label = organs.files().images, organs.files().label
    stored = nibabel.load(image)
    first = np.asarray(stored.dataobj, np.float32)
    channels = np.stack([first, np.sqrt(first + 10) * 30], -1)
    (tmp_path / "one").mkdir()
    (tmp_path / "each").mkdir()
    nibabel.save(nibabel.Nifti1Image(channels, stored.affine), tmp_path / "one" / image.name)
    for index in range(2):
        name = image.name.replace(".nii", f"_{index:04d}.nii")
        nibabel.save(nibabel.Nifti1Image(channels[..., index], stored.affine), tmp_path / "each" / name)
    contents = config(channels=2)
    contents["preprocessing"]["transforms"][3]["channel_wise"] = True
    inputs = {"num_channels": 2, "modality": "MR"}
    metadata = altered(METADATA, "network_data_format", "inputs", "image", value=inputs)
    folder = write_bundle(tmp_path / "bundle", contents, metadata=metadata)
    model = load_bundle(folder)
    found = {}
    for kind in ("one", "each"):
        (files,), problems = model.find_cases(tmp_path / kind, label.parent, limit=1)
        model.check_case(files)
        found[kind] = model.prepare(files)
        assert not problems and files.case == organs.names[0]
    one, each = found["one"], found["each"]
    assert torch.equal(one.base, each.base) and np.array_equal(one.raw.image, each.raw.image)
    assert one.scale == pytest.approx([channels[..., 0].std(), channels[..., 1].std()], rel=1e-4)
    changed = one.altered(one.raw.image * 2)
    assert torch.allclose(changed.base, one.base, atol=1e-5), "z-scores do not change with the gain"
    assert not torch.allclose(one.altered(one.raw.image[::-1].copy()).base, one.base, atol=0.1)
    chosen = settings(attacks=["gaussian"], eps=[5.0], unit="percent", save_adversarial=True, limit=1)
    evaluated({"a": folder}, (tmp_path / "one", label.parent), tmp_path / "out", chosen)
    noise = next(r for r in records(tmp_path / "out").values() if r.attack == "gaussian")
    assert read(tmp_path / "out" / noise.disk.image[0]).shape == channels.shape
    assert min(noise.size.percent_rms) <= 5 * 1.01 and len(noise.size.native_rms) == 2


def test_cases_that_do_not_fit_are_noted_and_the_others_go_on(organs, tmp_path):
    shutil.copytree(organs.data[0], tmp_path / "images")
    shutil.copytree(organs.data[1], tmp_path / "labels")
    first, second, third = organs.names
    stored = nibabel.load(tmp_path / "images" / f"{first}.nii.gz")
    values = np.asarray(stored.dataobj)
    nibabel.save(
        nibabel.Nifti1Image(np.stack([values] * 2, -1), stored.affine), tmp_path / "images" / f"{first}.nii.gz"
    )
    label = nibabel.load(tmp_path / "labels" / f"{second}.nii.gz")
    nibabel.save(
        nibabel.Nifti1Image(np.asarray(label.dataobj) * 3, label.affine), tmp_path / "labels" / f"{second}.nii.gz"
    )
    data = tmp_path / "images", tmp_path / "labels"
    _, failed = evaluated({"a": organs.bundle()}, data, tmp_path / "out", settings(attacks=["gaussian"]))
    messages = {failure.case: failure.message for failure in failures(tmp_path / "out")}
    assert failed == 2 and {key[0] for key in records(tmp_path / "out")} == {third}
    assert "2 channels, the bundle 1" in messages[first] and "--bundle-labels" in messages[second]


def test_postprocessing_that_leaves_another_grid_is_refused(organs, tmp_path):
    contents = config("coarse")
    del contents["postprocessing"]["transforms"][1]
    model = load_bundle(write_bundle(tmp_path / "bundle", contents))
    case = model.prepare(organs.files())
    with pytest.raises(UserError, match="Invertd"):
        case.predict(model.window(), case.base)


def test_overlapping_classes_of_a_sigmoid_are_counted_by_themselves(organs, tmp_path):
    weights = torch.load(organs.bundle() / "models" / "model.pt")
    channels = {"0": "body", "1": "organs", "2": "lesion"}
    metadata = altered(METADATA, *PRED, "channel_def", value=channels)
    folder = write_bundle(tmp_path / "bundle", config(sigmoid=True), metadata=metadata, weights=weights)
    out = tmp_path / "out"
    chosen = settings(limit=1, bundle_labels={"body": [1, 2], "organs": [1, 2], "lesion": [2]})
    report, failed = evaluated({"a": folder}, organs.data, out, chosen)
    assert failed == 0 and report.is_file()
    model = load_bundle(folder, labels=chosen.bundle_labels)
    case = model.prepare(organs.files())
    clean = next(r for r in records(out).values() if r.attack == "clean")
    reference = read(organs.files().label).T
    masks = case.predict(model.window(), case.base)
    assert masks.shape == (3, *reference.shape) and masks.dtype == bool
    for index, (name, values) in enumerate(model.classes.items()):
        there = np.isin(reference, values)
        assert clean.classes[name].tp == (masks[index] & there).sum()
        assert clean.classes[name].fp == (masks[index] & ~there).sum()


def test_a_bundle_beside_an_nnunet_model(phantoms, tmp_path):
    images, labels = phantoms.images("mr3d"), phantoms.labels("mr3d")
    classes = json.loads((phantoms.raw("mr3d") / "dataset.json").read_text())["labels"]
    names = {str(value): name for name, value in classes.items()}
    metadata = altered(METADATA, *PRED, value={"num_channels": len(names), "channel_def": names})
    folder = write_bundle(tmp_path / "bundle", config(outputs=len(names)), metadata=metadata)
    models = {"nnU-Net": phantoms.model("mr3d"), "bundle": folder}
    with pytest.raises(UserError, match="--unit percent"):
        evaluated(models, (images, labels), tmp_path / "out", settings())
    chosen = settings(attacks=["pgd", "transfer"], eps=[3.0], unit="percent", limit=1)
    report, failed = evaluated(models, (images, labels), tmp_path / "out", chosen)
    found = records(tmp_path / "out")
    assert failed == 0 and {(r.model, r.attack) for r in found.values() if r.kind == "transfer"} == {
        ("nnU-Net", "transfer:bundle"), ("bundle", "transfer:nnU-Net")
    }  # fmt: skip
    for record in found.values():
        assert record.size is None or max(record.size.percent_rms) <= 3.0 * 1.001
    assert "1 SD, bundle" in report.read_text() and "1 SD, nnU-Net" not in report.read_text()
    other = write_bundle(tmp_path / "other", metadata=altered(METADATA, *PRED, "channel_def", "2", value="tumour"))
    with pytest.raises(UserError, match="only models of one task"):
        evaluated({**models, "other": other}, (images, labels), tmp_path / "third", chosen)


def test_the_command_line(organs, tmp_path, capsys):
    images, labels = organs.data
    short = ["-i", images, "-gt", labels, "-o", tmp_path / "out", "-device", "cpu", "--limit", "1", "--steps", "1"]
    bundle = organs.bundle()
    arguments = ["--bundle", bundle, "--attack", "fgsm", "--eps", "0.1", "--name", "mine", "--corruption", "blur"]
    assert main([str(a) for a in ("evaluate", *short, *arguments)]) == 0
    assert {key[1] for key in records(tmp_path / "out")} == {"mine"}
    capsys.readouterr()
    for more, message in (
        (["--bundle-labels", "organ"], "CLASS=VALUE"),
        (["-step_size", "0.25"], "its inferer has the overlap"),
        (["--budget", "slice"], "budget 'slice' is for 2D models"),
        (["--unit", "hu"], "single CT channel"),
    ):
        assert main([str(a) for a in ("evaluate", *short, *arguments, *more)]) == 2
        assert message in capsys.readouterr().err
    assert main([str(a) for a in ("evaluate", *short, "--bundle", tmp_path)]) == 2
    assert "MONAI bundle with its configs" in capsys.readouterr().err


def test_hu_of_a_ct_bundle(organs, tmp_path):
    image = {"modality": "CT", "format": "hounsfield", "num_channels": 1}
    metadata = altered(METADATA, "network_data_format", "inputs", "image", value=image)
    folder = write_bundle(tmp_path / "bundle", config("coarse"), metadata=metadata)
    chosen = settings(attacks=["gaussian"], eps=[30.0], unit="hu", limit=1)
    evaluated({"a": folder}, organs.data, tmp_path / "out", chosen)
    noise = next(r for r in records(tmp_path / "out").values() if r.attack == "gaussian")
    case = load_bundle(folder).prepare(organs.files())
    assert noise.eps_network == pytest.approx(0.1 / case.sd[0], rel=1e-5) and noise.size.native_rms == pytest.approx(
        [30.0], rel=1e-3
    )
