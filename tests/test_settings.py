import math

import pytest

from ima_seg.errors import UserError
from ima_seg.methods.ima_settings import DEFAULT_EPS_MAX, IMASettings
from ima_seg.methods.settings import differences, load_settings, read_settings_file


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("IMA_CONFIG", raising=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"taw": 0.5}, "unknown setting 'taw'; did you mean 'tau'"),
        ({"learning": 1}, "unknown setting 'learning'; the settings there are: norm, unit"),
        ({"delta": 0}, "delta is 0; it must be positive"),
        ({"eps_max": -0.1}, "eps_max is -0.1; it must be positive"),
        ({"eps_max": "large"}, "eps_max = 'large'"),
        ({"norm": "l1"}, r"norm = 'l1'.*'l2' or 'linf'"),
        ({"criterion": "dice", "tau": 1.5}, "tau = 1.5"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"beta": float("nan")}, "beta = nan"),
        ({"rule": "median"}, "rule = 'median'"),
        ({"delta": 0.5, "eps_max": 0.1}, "delta 0.5 is more than eps_max 0.1"),
        ({"delta": 0.5}, "delta 0.5 is more than eps_max 0.3"),
        ({"epochs": True}, "epochs is true; no setting is a boolean"),
        ({"start": "clean"}, r"start = 'clean'.*'random' or 'mixed'"),
        ({"start": "gradient"}, "start = 'gradient': it was removed"),
        ({"steady_interval": 1}, "the setting 'steady_interval' was removed"),
        ({"unit": "l2", "norm": "linf"}, "unit 'l2' goes with norm 'l2'"),
    ],
)
def test_each_mistake_is_named_with_its_source(values, message):
    with pytest.raises(UserError, match=message) as caught:
        IMASettings.parse(values, source="mine.toml")
    assert str(caught.value).startswith("mine.toml: ")


def test_toml_and_yaml_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text('norm = "linf"\neps_max = 0.1\n[ima]\n'.replace("[ima]\n", ""))
    (tmp_path / "b.yaml").write_text("ima:\n  norm: linf\n  eps_max: 0.1\n")
    assert read_settings_file(tmp_path / "a.toml") == read_settings_file(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.toml", None, "does not exist"),
        ("a.ini", "x = 1", "ends in '.ini'; use .toml"),
        ("a.toml", "x = = 1", "cannot be read"),
        ("a.yaml", "[1, 2]", "holds a list"),
        ("b.yaml", "a: [", "cannot be read"),
        ("deep.toml", "x = " + "[" * 30_000, "cannot be read"),
        ("deep.yaml", "[" * 3_000, "cannot be read"),
        ("laughs.yaml", "a: &a [x, x]\nb: &b [*a, *a]\ntau: [*b, *b]", "has an alias"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_settings(IMASettings(), file=str(tmp_path / name))
    assert name in str(caught.value)


def test_a_threshold_says_what_it_is_of():
    """It used to be a Dice where nothing was said, and is a share now: neither is guessed."""
    with pytest.raises(UserError, match=r"file: tau is 0\.6, but not of what.*criterion = 'relative', 'dice'"):
        IMASettings.parse({"tau": 0.6}, source="file")
    assert IMASettings.parse({"tau": 0.6, "criterion": "dice"}, source="file").tau == 0.6
    paper = IMASettings(criterion="dice", tau=0.6)
    assert IMASettings.parse({"tau": 0.7}, source="file", base=paper).criterion == "dice"


def test_precedence_is_file_then_plans_then_preset(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text('criterion = "dice"\ntau = 0.7\n')
    monkeypatch.setenv("IMA_CONFIG", str(tmp_path / "a.toml"))
    preset = IMASettings(criterion="dice", tau=0.5, steps=20, epochs=50)
    settings = load_settings(base=preset, plans={"ima": {"tau": 0.55, "steps": 7}})
    assert (settings.tau, settings.steps, settings.epochs) == (0.7, 7, 50)
    with pytest.raises(UserError, match="plans, section 'ima': unknown setting 'foo'"):
        load_settings(IMASettings(), plans={"ima": {"foo": 1}})
    with pytest.raises(UserError, match="section 'ima' is a list"):
        load_settings(IMASettings(), plans={"ima": [1]})


def test_automatic_sizes_and_units():
    assert IMASettings().resolve_sizes(patch_voxels=2240, epochs=1000) == (DEFAULT_EPS_MAX / 50, DEFAULT_EPS_MAX)
    assert IMASettings().resolve_sizes(patch_voxels=2240, epochs=5)[0] == pytest.approx(DEFAULT_EPS_MAX / 10)
    delta, eps_max = IMASettings(unit="l2", eps_max=15, delta=2).resolve_sizes(patch_voxels=2240, epochs=50)
    assert (delta, eps_max) == pytest.approx((2 / math.sqrt(2240), 15 / math.sqrt(2240)))
    with pytest.raises(UserError, match="more than eps_max"):
        IMASettings(unit="l2", delta=50).resolve_sizes(patch_voxels=100, epochs=50)


def test_sizes_do_not_outlive_their_unit():
    base = IMASettings(eps_max=0.3, delta=0.04)
    changed = IMASettings.parse({"unit": "l2", "eps_max": 10}, source="x", base=base)
    assert (changed.eps_max, changed.delta) == (10, "auto")
    assert IMASettings.parse({"steps": 7}, source="x", base=base).delta == 0.04


def test_removed_settings_make_a_difference_only_where_they_did_something():
    now = IMASettings(start="random", criterion="dice", share=1.0).model_dump()
    old = {name: value for name, value in now.items() if name not in ("start", "criterion")}
    assert not differences({**old, "steady_interval": 1}, now)
    assert differences({**old, "steady_interval": 4}, now) == "steady_interval: 4 there, None now"
    assert differences({**now, "start": "gradient"}, now) == "start: gradient there, random now"


def test_trainings_of_a_version_with_other_settings_go_on_only_with_what_they_were():
    new = {"share": 0.5, "crossing_share": 0.7, "ema": 0.99, "teacher": "standard", "teacher_weight": 2.0}
    base = {"criterion": "dice", "start": "random", "rule": "paper"}
    now = IMASettings(**base).model_dump()
    old = {name: value for name, value in now.items() if name not in new}
    assert not differences(old, {**now, "share": 1.0, "ema": 0.0})
    for name, value in new.items():
        assert f"{value} now" in differences(old, {**now, "share": 1.0, "ema": 0.0, name: value})
    assert "rule: mean there, paper now" in differences({**old, "rule": "mean"}, now)


def test_paper_presets_follow_from_the_recipes():
    import nnunet_trainers as trainers
    from ima_seg.data.recipes import load_recipe

    for trainer, recipe in (
        (trainers.nnUNetTrainerIMA_paperHeart, "msd_heart"),
        (trainers.nnUNetTrainerIMA_paperHippocampus, "msd_hippocampus"),
        (trainers.nnUNetTrainerIMA_paperProstate, "msd_prostate"),
    ):
        delta, eps_max = trainer.preset.resolve_sizes(patch_voxels=1, epochs=50)
        assert eps_max == pytest.approx(load_recipe(recipe).eps_max_rms), recipe
        assert delta == pytest.approx(load_recipe(recipe).delta_rms), recipe
        assert trainer.preset.rule == "paper" and trainer.preset.steps == 20 and trainer.preset.epochs == 50
