"""Bundles of strangers: nothing that they ask for happens, however they write it.

One file: the table of what they ask for and the watch over its effects belong together.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest
import torch
from monai.data import MetaTensor

from ima_seg.errors import UserError
from ima_seg.monai.bundle import load_bundle
from tests.bundle_data import config, transform, write_bundle

#: Stands in a config for a folder of the user, beside the bundle.
OUT = "WATCHED"


def chain(name, options):
    """A config whose pre- or post-processing is the usual one, and then ``options`` at the end of its transforms."""
    contents = config()
    contents[name]["transforms"] = [*contents[name]["transforms"][: 6 if name == "preprocessing" else 3], *options]
    return contents


FOLDER, FILE = {"output_dir": OUT}, {"filename": f"{OUT}/user.csv", "overwrite": True}
MAPPING = {"mapping_file_path": f"{OUT}/user.json"}
SAVERS = {
    "SaveImaged": transform("SaveImaged", keys="pred", **FOLDER),
    "SaveImageD": transform("SaveImageD", keys="pred", **FOLDER),
    "its full name": transform("monai.transforms.io.dictionary.SaveImageDict", keys="pred", **FOLDER),
    "a name found elsewhere": transform("monai.transforms.compose.Compose.__init__", keys="pred"),
    "array": {"_target_": "SaveImage", **FOLDER},
    "SaveClassificationd": transform("SaveClassificationd", keys="pred", **FILE),
    "SaveClassificationDict": transform("monai.transforms.SaveClassificationDict", keys="pred", **FILE),
    "WriteFileMapping": {"_target_": "monai.transforms.WriteFileMapping", **MAPPING},
    "WriteFileMappingd": transform("WriteFileMappingd", keys="pred", **MAPPING),
}
PLACES = {
    "last": lambda saver: {"": [saver]},
    "nested": lambda saver: {
        "": [{"_target_": "Compose", "transforms": [{"_target_": "OneOf", "transforms": [saver]}]}]
    },
    "a reference": lambda saver: {"": ["@more::0"], "more": [saver]},
    "an expression": lambda saver: {"transforms": "$@first + @more", "more": [saver]},
    "a macro": lambda saver: {"": ["%more#0"], "more": [saver]},
}
ELSEWHERE = {
    "the inferer": lambda saver: {"inferer": saver},
    "an inferer's argument": lambda saver: {"inferer": {"_target_": "SimpleInferer", "x": saver}},
    "a network": lambda saver: {"network_def": {"_target_": "monai.networks.nets.NetAdapter", "model": saver}},
    "required": lambda saver: {
        "inferer": {"_target_": "SimpleInferer", "_requires_": {"_target_": "UNet", "x": saver}}
    },
}


def placed(where, place, saver):
    more = dict(PLACES[place](saver))
    contents = chain(where, more.pop("", []))
    if "transforms" in more:
        contents["first"] = contents[where]["transforms"]
        contents[where]["transforms"] = more.pop("transforms")
    return contents | more


def network(name, **options):
    return {"network_def": {"_target_": name, **options}}


def first(**options):
    contents = config()
    contents["preprocessing"]["transforms"][0] |= options
    return contents


def later(**options):
    return chain("preprocessing", [options])


def expression(text, **more):
    return {"inferer": {"_target_": "SlidingWindowInferer", "roi_size": [8, 8, 8], "overlap": text}, **more}


SQUARES = {"a0": "$10 ** 64", **{f"a{i}": f"$@a{i - 1} * @a{i - 1}" for i in range(1, 60)}}
LAUGHS = {"a0": ["ha"] * 10, **{f"a{i}": [f"@a{i - 1}"] * 10 for i in range(1, 20)}}
MACROS = {"a0": ["ha"] * 10, **{f"a{i}": [f"%a{i - 1}"] * 10 for i in range(1, 20)}}
URL = "http://127.0.0.1:9/weights.pth"
CHANGES = {
    # networks that fetch or read weights, or compile
    "a url": network("HoVerNet", pretrained_url=URL),
    "a url under another key": network("UNet", spatial_dims=3, in_channels=1, out_channels=3, channels=[8], act=URL),
    "pretrained by default": network("EfficientNetBN", model_name="efficientnet-b0"),
    "pretrained by default, 2": network("monai.networks.nets.resnet.ResNetFeatures", model_name="resnet10"),
    "pretrained by default, 3": network("monai.networks.blocks.fcn.FCN"),
    "pretrained": network("DenseNet121", spatial_dims=2, in_channels=3, out_channels=3, pretrained=True),
    "pretrained by reference": network("SEResNet50", spatial_dims=2, pretrained="@flag") | {"flag": True},
    "pretrained by expression": network("FlexibleUNet", in_channels=3, backbone="resnet18", pretrained="$1 == 1"),
    "torchvision": network("TorchVisionFCModel", model_name="resnet18", weights="DEFAULT"),
    "multiple instances": network("MILModel", num_classes=2),
    "transformers": network("Transchex", in_channels=3),
    "unpickled": network("monai.networks.nets.cell_sam_wrapper.CellSamWrapper", checkpoint=f"{OUT}/user.csv"),
    "compiled": network("monai.networks.layers.gmm.GaussianMixtureModel", channel_count=1),
    # networks and images that fill the memory
    "a large network": network("torch.nn.Linear", in_features=50_000, out_features=50_000),
    "a large network within": {"network": {"_target_": "torch.nn.modules.container.ModuleList",
        "modules": [{"_target_": "torch.nn.Linear", "in_features": 50_000, "out_features": 50_000}]}},
    "many networks": {"network": {"_target_": "torch.nn.modules.container.ModuleList", "modules": [
        {"_target_": "torch.nn.Linear", "in_features": 6_000, "out_features": 6_000}] * 2}},
    "repeats": later(_target_="RepeatChanneld", keys="image", repeats=10**9),
    "a large pad": later(_target_="SpatialPadd", keys="image", spatial_size=[8, 8, 10**9]),
    "a large size": later(_target_="Resized", keys="image", spatial_size=10**9),
    # paths
    "an absolute path": network("UNet", act=f"{OUT}/user.csv"),
    "a path upwards": network("UNet", act="../../user.csv"),
    "a path upwards, backslashes": network("UNet", norm="..\\..\\user.csv"),
    "a home": network("UNet", norm=["~/x", {}]),
    "an expression for a path": network("UNet", act="$@bundle_root + '/../user.csv'"),
    "a key of a path": network("UNet", act=["relu", {"/etc/passwd": 1}]),
    "a link": network("UNet", act="link/user.csv"),
    # classes and functions
    "a handler": {"inferer": {"_target_": "CSVSaver", "filename": "user.csv"}},
    "a data set": {"inferer": {"_target_": "PersistentDataset", "data": [], "transform": None, "cache_dir": OUT}},
    "a bundle": {"inferer": {"_target_": "monai.bundle.run"}},
    "a download": {"inferer": {"_target_": "monai.apps.download_url", "url": URL}},
    "a hub": network("torch.hub.load", repo_or_dir="x"),
    "torch.load": network("torch.load", f=f"{OUT}/user.csv"),
    "torch.load by a detour": network("monai.networks.nets.unet.torch.load", f=f"{OUT}/user.csv"),
    "parallel": network("torch.nn.parallel.DistributedDataParallel", module="@network"),
    "system": {"inferer": {"_target_": "os.system", "command": "touch user.csv"}},
    "eval": {"inferer": {"_target_": "builtins.eval", "source": "1"}},
    "a target by reference": {"inferer": {"_target_": "@name"}, "name": "os.getcwd"},
    "a target by expression": {"inferer": {"_target_": "$os.getcwd"}},
    "a target that is none": {"inferer": {"_target_": ["SimpleInferer"]}},
    "another inferer": {"inferer": {"_target_": "PatchInferer", "merger_cls": "monai.inferers.ZarrAvgMerger"}},
    "debugging": {"inferer": {"_target_": "SimpleInferer", "_mode_": "debug"}},
    "debugging by reference": {"inferer": {"_target_": "SimpleInferer", "_mode_": "@mode"}, "mode": "debug"},
    "a breakpoint": {"inferer": {"_target_": "SimpleInferer", "_debug_": True}},
    "a partial": {"inferer": {"_target_": "SimpleInferer", "_mode_": "callable"}},
    "code behind a requirement": {"inferer": {"_target_": "SimpleInferer", "_requires_": "$open('user.csv', 'w')"}},
    "code behind a switch": {"inferer": {"_target_": "SimpleInferer", "_disabled_": "$open('user.csv', 'w')"}},
    "a function": later(_target_="Lambdad", keys="image", func="$@network"),
    "torchvision's transforms": later(_target_="TorchVisiond", keys="image", name="ColorJitter"),
    "a delay": later(_target_="SimulateDelayd", keys="image", delay_time=1e9),
    "printing": later(_target_="DataStatsd", keys="image"),
    "cupy": later(_target_="ToCupyd", keys="image"),
    # readers
    "a reader": first(reader="os.system"),
    "a reader in a list": first(reader=["NibabelReader", "os.system"]),
    "a reader by reference": first(reader="@name") | {"name": "os.system"},
    "a map that writes": first(mmap="r+"),
    "a converter": first(converter="@network_def"),
    # expressions
    "import": expression("$__import__('os').system('touch user.csv')"),
    "import as an item": expression("@imports::0"),
    "open": expression("$open('user.csv', 'w')"),
    "lambda": expression("$(lambda: 1)()"),
    "a comprehension": expression("$[x for x in range(10**9)]"),
    "dunder": expression("$().__class__.__bases__[0].__subclasses__()"),
    "dunder of a reference": expression("$@network.__class__"),
    "another method": expression("$@network.load_state_dict(1)"),
    "an attribute of torch": expression("$torch.hub"),
    "an attribute of an enumeration": expression("$monai.utils.CommonKeys.PRED.__class__"),
    "a format": expression("$'%1000000000d' % 1"),
    "an f-string": expression("$f'{1:1000000000}'"),
    "powers": expression("$9 ** 9 ** 9 ** 9"),
    "a long text": expression("$'a' * 10 ** 9"),
    "a long list": expression("$[0] * 10 ** 9"),
    "a shift": expression("$1 << 10 ** 10"),
    "a range": expression("$list(range(10 ** 9))"),
    "a rounding": expression("$round(5, -10 ** 9)"),
    "squares of squares": expression("@a59", **SQUARES),
    "a text of lists of lists": expression("$str(@a19)", **LAUGHS),
    "compared lists of lists": expression("$@a19 == @b", b=["@a19"], **LAUGHS),
    "sizes of lists of lists": later(_target_="Spacingd", keys="image", pixdim="@a19") | LAUGHS,
    "shown lists of lists": network("SEResNet50", spatial_dims=2, pretrained="@a19") | LAUGHS,
    "a reader of lists of lists": first(reader="@a19") | LAUGHS,
    "brackets": expression("$" + "(" * 900 + "1" + ")" * 900),
    "minuses": expression("$" + "-" * 999 + "1"),
    "an endless text": expression("$" + "1+" * 1900 + "1"),
    "torch.load in an expression": expression("$torch.load(@file)", file=f"{OUT}/user.csv"),
    "a splat": expression("$os.path.join(*['a'])"),
    # references and macros
    "a reference to itself": expression("@x", x="$@x"),
    "a circle": expression("@x", x="@y", y="@x"),
    "no such reference": expression("@nothing::here"),
    "a macro of a macro of": expression("%a19", **MACROS),
    "a macro of itself": expression("%x", x="%x"),
    "a file": expression(f"%{OUT}/user.json::inferer"),
    "a file upwards": expression("%../../user.json::inferer"),
    "a file of its own": expression("%configs/metadata.json::name"),
    "a merge": {"+inferer": {"overlap": 0.1}},
    "an item set from outside": {"inferer#overlap": 0.1},
    # weights
    "weights elsewhere": {"handlers": [{"_target_": "CheckpointLoader", "load_path": f"{OUT}/user.pt"}]},
    "weights upwards": {"handlers": [{"_target_": "CheckpointLoader", "load_path": "models/../../watched/user.pt"}]},
    "weights from code": {"handlers": [{"_target_": "CheckpointLoader", "load_path": "$open('user.csv', 'w')"}]},
}  # fmt: skip


def yaml_of(text):
    def write(folder, _):
        (folder / "configs" / "inference.json").unlink()
        (folder / "configs" / "inference.yaml").write_text(text)

    return write


def linked(name):
    def write(folder, watched):
        shutil.move(folder / name, watched / "moved")
        (folder / name).symlink_to(watched / "moved")

    return write


def raw(name, text):
    return lambda folder, _: (folder / "configs" / name).write_text(text)


LINES = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))
MERGES = "\n".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))
FILES = {
    "json of 30,000 levels": raw("inference.json", '{"a": ' + "[" * 30_000 + "]" * 30_000 + "}"),
    "json of 60 levels": raw("inference.json", '{"a": ' + "[" * 60 + "]" * 60 + "}"),
    "json of many values": raw("inference.json", json.dumps({"a": [0] * 20_000})),
    "json of 2 MB": raw("inference.json", json.dumps({"a": ["x" * 1000] * 2000})),
    "json of a long key": raw("inference.json", json.dumps({"x" * 100_000: 1})),
    "metadata of 30,000 levels": raw("metadata.json", '{"a": ' + "[" * 30_000 + "]" * 30_000 + "}"),
    "yaml of 30,000 levels": yaml_of("a: " + "[" * 30_000 + "]" * 30_000),
    "yaml that laughs": yaml_of("a0: &a0 [ha, ha]\n" + LINES),
    "yaml that merges": yaml_of("a0: &a0 {x: ha}\n" + MERGES),
    "yaml in itself": yaml_of("a: &a [*a]"),
    "yaml with an object": yaml_of("a: !!python/object/apply:os.system ['touch user.csv']"),
    "yaml of a long number": yaml_of("a: " + "1:" * 200_000 + "1"),
    "a linked config": linked("configs/inference.json"),
    "linked metadata": linked("configs/metadata.json"),
    "linked weights": linked("models/model.pt"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("template") / "bundle")


@pytest.fixture
def stranger(tmp_path, template, monkeypatch):
    """Write a bundle by (contents, spoil), beside files of the user; afterwards nothing else must have happened."""
    watched, here, folder = tmp_path / "watched", tmp_path / "here", tmp_path / "bundle"
    for place in (watched, here):
        place.mkdir()
        for name in ("user.csv", "user.json", "user.pt", "image.nii.gz"):
            (place / name).write_text('{"inferer": 1}')
    monkeypatch.chdir(here)
    effects = []

    def effect(*arguments, **_):
        effects.append(arguments)
        raise OSError("no effects in this test")

    for owner, name in ((socket, "socket"), (urllib.request, "urlopen"), (subprocess, "Popen"), (time, "sleep")):
        monkeypatch.setattr(owner, name, effect)

    def state():
        return {path: path.is_file() and (path.read_bytes(), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")}

    def write(contents, spoil=lambda folder, watched: None):
        shutil.copytree(template, folder)
        text = json.dumps(contents).replace(OUT, str(watched))
        (folder / "configs" / "inference.json").write_text(text)
        (folder / "link").symlink_to(watched)
        spoil(folder, watched)
        before.update(state())
        return folder

    before = {}
    yield write
    assert not effects and state() == before


def refused(folder):
    with pytest.raises(UserError) as found:
        load_bundle(folder)
    assert "\n" not in str(found.value) and str(folder) in str(found.value) and len(str(found.value)) < 900
    return str(found.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SAVERS)
def test_savers_are_left_out_of_the_post_processing_and_refused_before(stranger, name, place):
    folder = stranger(placed("preprocessing", place, SAVERS[name]))
    message = refused(folder)
    assert "would run code" in message if "elsewhere" in name else SAVERS[name]["_target_"] in message


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [name for name in SAVERS if "elsewhere" not in name])
def test_savers_of_the_post_processing_are_left_out(stranger, name, place):
    contents = placed("postprocessing", place, SAVERS[name])
    model = load_bundle(stranger(contents))
    chosen = [step for step in model.postprocessing.flatten().transforms if type(step).__name__ != "Invertd"]
    assert not any("Save" in type(step).__name__ or "Write" in type(step).__name__ for step in chosen)
    data = {"pred": MetaTensor(torch.rand(3, 4, 4, 4), meta={"filename_or_obj": "user.csv", "saved_to": "x"})}
    for step in chosen:
        data = step(data)
    assert data["pred"].shape == (1, 4, 4, 4)


@pytest.mark.parametrize("place", ELSEWHERE)
@pytest.mark.parametrize("name", ["SaveImaged", "SaveClassificationd"])
def test_savers_anywhere_else_are_refused(stranger, name, place):
    refused(stranger(config(**ELSEWHERE[place](SAVERS[name]))))


@pytest.mark.parametrize("name", CHANGES)
def test_configs_that_would_act_are_refused(stranger, name):
    refused(stranger({**config(), **CHANGES[name]}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a large network", "Linear, that has 2500050000 weights, more than "),
        ("a large network within", "Linear, that has 2500050000 weights, more than "),
        ("many networks", "Linear, that has 72012000 weights, more than "),
        ("repeats", "a size above 65536, repeats=1000000000"),
        ("a large pad", "a size above 65536, spatial_size="),
        ("a large size", "a size above 65536, spatial_size="),
    ],
)
def test_what_would_fill_the_memory_is_named(stranger, name, words):
    assert words in refused(stranger({**config(), **CHANGES[name]}))


@pytest.mark.parametrize("name", FILES)
def test_files_that_would_cost_too_much_or_lead_out_are_refused(stranger, name):
    refused(stranger(config(), FILES[name]))


def test_there_are_enough_of_them():
    assert len(SAVERS) * len(PLACES) * 2 + len(ELSEWHERE) * 2 + len(CHANGES) + len(FILES) > 180
    assert len(CHANGES) + len(FILES) >= 80
