"""Models of pictures: PNG, BMP and TIFF, in colour and grey, of 8 and 16 bits, flat and of three dimensions."""

import base64
import io
import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage.io import imread, imsave

from ima_seg.cli import main
from ima_seg.errors import UserError
from ima_seg.evaluate import EvaluationSettings, evaluate
from ima_seg.evaluate.report.panels import read_panel
from ima_seg.nnunet.case import prepare_case, read_case
from ima_seg.nnunet.folder import load_model
from ima_seg.nnunet.intensity import native_scale
from tests.picture_data import SIZE, make_model, make_pictures

SHORT = {"steps": 3, "mirroring": False}


def run(model, images, labels, out, **settings):
    """Evaluate; returns the records and failures."""
    settings = EvaluationSettings(**{"attacks": ["pgd"], "eps": [0.5], **SHORT, **settings})
    evaluate({"model": model}, images, labels, out, settings, device="cpu")
    read = [[json.loads(line) for line in file.read_text().splitlines()] if (file := out / name).exists() else []
            for name in ("records.jsonl", "failures.jsonl")]  # fmt: skip
    return read


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    """(model, images, labels) of pictures in colour."""
    root = tmp_path_factory.mktemp("eyes")
    images, labels = make_pictures(root)
    return make_model(root / "model", images, labels), images, labels


@pytest.fixture(scope="module")
def saved(eyes, tmp_path_factory):
    """An evaluation of one case with saved files."""
    out = tmp_path_factory.mktemp("saved")
    settings = {"limit": 1, "attacks": ["pgd", "gaussian"], "eps": [1.0], "save_adversarial": True}
    records, failures = run(*eyes, out, corruptions=["blur", "low_resolution", "gamma"], **settings)
    assert not failures and {r["attack"] for r in records} >= {"clean", "pgd", "gaussian", "corruption:gamma"}
    return out, records


def test_colours_are_evaluated_and_saved_as_such(eyes, saved):
    (model, images, labels), (out, records) = eyes, saved
    clean, pgd = (next(r for r in records if r["attack"] == name) for name in ("clean", "pgd"))
    assert clean["dice"] > 0.7 and pgd["dice"] < clean["dice"] - 0.05
    disk = pgd["disk"]
    (image,), (difference,) = ([out / name for name in disk[kind]] for kind in ("image", "difference"))
    original, pixels = imread(images / "eye0_0000.png"), imread(image)
    assert image.name == "eye0_0000.png" and (pixels.dtype, pixels.shape) == (np.uint8, (*SIZE, 3))
    assert (pixels != original).any(-1).mean() > 0.5
    assert np.array_equal(tifffile.imread(difference), pixels.astype(np.float32) - original)
    assert disk["rounded"] and abs(disk["dice"] - pgd["dice"]) < 0.05
    loaded = load_model(model)
    again = prepare_case(read_case(loaded, "eye0", [image], labels / "eye0.png"), loaded)
    window = loaded.window(step_size=0.5, mirroring=False)
    predicted, truth = again.predict(window, again.base) > 0, imread(labels / "eye0.png") > 0
    dice = 2 * (predicted[0] & truth).sum() / (predicted.sum() + truth.sum())
    assert disk["dice"] == pytest.approx(dice)
    page = (out / "report.html").read_text()
    assert "Pictures hold whole numbers" in page and "2 records of images that were resampled or rounded" in page


def test_perturbed_colours_stay_in_what_the_file_can_hold(eyes):
    model, images, labels = eyes
    loaded = load_model(model)
    case = prepare_case(read_case(loaded, "eye1", [images / "eye1_0000.png"], labels / "eye1.png"), loaded)
    large = case.base + 3 * torch.randn_like(case.base, generator=None)
    held = case.within(large)
    native = case.raw.image + case.native_delta(case.delta(held))
    assert native.min() == pytest.approx(0, abs=1e-3) and native.max() == pytest.approx(255, abs=1e-3)
    assert torch.equal(case.within(case.base), case.base) and torch.equal(case.within(held), held)
    # what lies beyond is not seen by the network, and has no gradient
    network = case.network(loaded.window(step_size=0.5, mirroring=False), whole=True)
    x = large.clone().requires_grad_(True)
    logits = network(x)
    assert torch.equal(logits, network(held))
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    assert (gradient[large != held] == 0).all() and gradient[large == held].abs().sum() > 0
    assert case.altered(case.raw.image * 4 - 200).raw.limits.tolist() == [[0, 255]] * 3
    assert case.altered(case.raw.image * 4 - 200).native_range.max() <= 255


def test_panels_are_in_colour(eyes, saved):
    out, _ = saved
    (panel,) = (out / "panels").iterdir()
    assert np.load(panel)["clean"].shape == (*SIZE, 3)
    shown = read_panel(panel)
    assert shown.colour and shown.window == (0, 255)
    pictures = {p.caption: Image.open(io.BytesIO(base64.b64decode(p.source.split(",")[1]))) for p in shown.pictures}
    red, green, blue = np.asarray(pictures["clean image"].convert("RGB")).reshape(-1, 3).mean(0)
    original = imread(eyes[1] / "eye0_0000.png").reshape(-1, 3).mean(0)
    assert np.allclose((red, green, blue), original, atol=4) and red > green > blue
    assert "Of images in colour it is shown in their colours" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("ending", "dtype", "top", "scheme"),
    [(".png", np.uint8, 255, "RGBTo01Normalization"), (".tif", np.uint16, 60000, "ZScoreNormalization"),
     (".bmp", np.uint8, 255, "ZScoreNormalization"), (".tif", np.float32, 1.0, "ZScoreNormalization")],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_formats(tmp_path, ending, dtype, top, scheme, channels):
    images, labels = make_pictures(tmp_path, ending=ending, channels=channels, dtype=dtype, top=top, cases=1)
    names = ["R", "G", "B"][:channels]
    model = make_model(tmp_path / "model", images, labels, ending=ending, names=names, scheme=scheme, steps=5)
    settings = {"eps": [20.0], "unit": "percent", "save_adversarial": True}
    records, failures = run(model, images, labels, tmp_path / "out", **settings)
    assert not failures
    pixels = imread(tmp_path / "out" / records[1]["disk"]["image"][0])
    original = imread(images / f"eye0_0000{ending}")
    assert (pixels.dtype, pixels.shape) == (dtype, original.shape) and not np.array_equal(pixels, original)
    assert records[1]["disk"]["rounded"] == (dtype != np.float32)
    assert records[1]["disk"]["dice"] == pytest.approx(records[1]["dice"], abs=0.1)


def test_stacks_with_their_spacing_aside(tmp_path):
    """nnU-Net's reader of 3D TIFF, one uint16 channel."""
    options = {"ending": ".tif", "channels": 1, "dtype": np.uint16, "top": 5000, "size": (8, *SIZE), "cases": 1}
    images, labels = make_pictures(tmp_path, **options)
    for folder in (images, labels):
        (folder / "eye0.json").write_text(json.dumps({"spacing": [2.0, 1.0, 1.0]}))
    model = make_model(tmp_path / "model", images, labels, ending=".tif", reader="Tiff3DIO", names=["light"], steps=5)
    records, failures = run(model, images, labels, tmp_path / "out", save_adversarial=True)
    assert not failures
    image = tmp_path / "out" / records[1]["disk"]["image"][0]
    pixels = tifffile.imread(image)
    assert (pixels.dtype, pixels.shape) == (np.uint16, (8, *SIZE))
    assert json.loads((image.parent / "eye0.json").read_text()) == {"spacing": [2.0, 1.0, 1.0]}
    for bad, message in (([1.0, 1.0, 1.0], "eye0.json has the spacing"), ("no", "Tiff3DIO cannot read")):
        (labels / "eye0.json").write_text(json.dumps({"spacing": bad}))
        assert message in refusal(load_model(model), images, labels)


def refusal(loaded, images, labels):
    found, problems = loaded.find_cases(images, labels)
    assert not problems
    with pytest.raises(UserError) as caught:
        loaded.check_case(found[0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("image", np.full((*SIZE, 4), 9, np.uint8), "reads 4 channel(s), but dataset.json names 3; save it without"),
        ("image", np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE), "reads 1 channel(s), but dataset.json"),
        ("image", np.zeros((*SIZE, 3), np.uint8), "all pixels have the value 0"),
        ("image", np.eye(9, dtype=np.uint8)[..., None].repeat(3, 2), "has the size 9 × 9, but"),
        ("label", np.ones((*SIZE, 3), np.uint8), "reads 3 channels, as of colours or a palette; save the label in"),
        ("label", np.full(SIZE, 255, np.uint8), "has the value 255, dataset.json has 0, 1"),
        ("label", np.zeros(SIZE, np.uint8), "the label has no foreground"),
        ("image", b"\x89PNG", "cannot read"),
        ("label", b"", "cannot read"),
    ],
)  # fmt: skip
def test_pictures_that_are_refused(eyes, tmp_path, name, pixels, message):
    images, labels = make_pictures(tmp_path, cases=1)
    file = {"image": images / "eye0_0000.png", "label": labels / "eye0.png"}[name]
    if isinstance(pixels, bytes):
        file.write_bytes(pixels)
    else:
        imsave(file, pixels, check_contrast=False)
    found = refusal(load_model(eyes[0]), images, labels)
    assert message in found and file.name in found


def test_values_that_the_normalisation_of_colours_does_not_take(tmp_path):
    options = {"ending": ".tif", "channels": 1, "dtype": np.uint16, "top": 3000, "cases": 1}
    images, labels = make_pictures(tmp_path, **options)
    model = make_model(tmp_path / "model", images, labels, ending=".tif", names=["rgb_to_0_1"], steps=0,
                       scheme="RGBTo01Normalization")  # fmt: skip
    (files,), _ = load_model(model).find_cases(images, labels)
    with pytest.raises(UserError, match=r"to [23].*nnU-Net demands 0 to 255; correct the image"):
        load_model(model).prepare(files)


def test_margins_in_native_units(eyes):
    """One file for the three channels; a z-scored channel's unit is its standard deviation."""
    model, images, _ = eyes
    plans, dataset = (json.loads((model / f"{name}.json").read_text()) for name in ("plans", "dataset"))
    scale = native_scale("eye0", images, plans=plans, configuration="2d", dataset_json=dataset)
    pixels = imread(images / "eye0_0000.png").astype(np.float64)
    inside = pixels[np.ix_(*(np.flatnonzero((pixels > 0).any((axis, 2))) for axis in (1, 0)))]
    assert list(scale) == ["R_native", "G_native", "B_native"]
    assert list(scale.values()) == pytest.approx(inside.reshape(-1, 3).std(0), rel=1e-4)


def test_corruptions_of_a_camera(eyes, tmp_path):
    """Without names those of scanners are left out."""
    model, images, labels = eyes
    command = ["evaluate", "-m", model, "-i", images, "-gt", labels, "-o", tmp_path, "--attack", "--corruption"]
    assert main([*map(str, command), "--limit", "1", "--disable_tta", "-device", "cpu"]) == 0
    names = {json.loads(line)["attack"] for line in (tmp_path / "records.jsonl").read_text().splitlines()}
    assert names == {"clean", "corruption:blur", "corruption:low_resolution"}
