"""Every method in nnU-Net and in MONAI's engine: the same step as by hand; saved, and resumed."""

import copy
import json

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents, PrepareBatchExtraInput
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks.nets import DynUNet

import nnunet_trainers
from ima_seg import Labels, Target, UserError
from ima_seg.attacks.losses import dice_ce_loss
from ima_seg.methods import METHODS
from ima_seg.monai import AdversarialSupervisedTrainer, TrainingHandler
from tests.models import TinyUNet
from tests.monai_data import IMA, items, loader, make_trainer
from tests.nnunet_data import make_trainer as make_nnunet_trainer
from tests.test_methods import EPS, climbed, close, gradients

LOSS = DiceCELoss(softmax=True, to_onehot_y=True)
SETTINGS = {
    "pgdat": {"eps": EPS, "steps": 2, "step_factor": 2.0},
    "trades": {"eps": EPS, "steps": 2, "step_factor": 2.0, "weight": 6.0},
}


@pytest.fixture(autouse=True)
def start(monkeypatch):
    """Attacks start at the clean image and a little to the side instead of at random."""
    monkeypatch.setattr("ima_seg.attacks.problem.random_start", lambda like, radius, norm, seeds, mask=None: side(like))


def side(like):
    return 0.05 * torch.linspace(-1, 1, like[0].numel()).view(1, *like.shape[1:]).expand_as(like)


def full(output):
    if isinstance(output, (list, tuple)):
        return output[0]
    return output[:, 0] if output.ndim == 5 else output  # heads of 2D


def value(name, network, x, y, labels, loss):
    """The loss of the method, written out."""

    def kl(clean, logits):
        p = clean.softmax(1)
        return (p * (p.log() - logits.softmax(1).log())).sum(1).mean((1, 2))

    def predict(batch):
        return full(network(batch))

    if name == "pgdat":
        target = Target.from_raw(y, Labels(labels))
        return loss(network(climbed(predict, x, lambda z, _: dice_ce_loss(z, target), side(x), 2, EPS)))
    clean = predict(x).detach()
    perturbed = climbed(predict, x, lambda z, _: kl(clean, z), side(x), 2, EPS)
    return loss(network(x)) + 6 * kl(predict(x), predict(perturbed)).mean()


def trained(network=None, method=None, **options):
    method = method or {"name": "trades", "labels": 2, **SETTINGS["trades"]}
    return make_trainer(network, kind=AdversarialSupervisedTrainer, method=method, **options)


@pytest.mark.parametrize("name", ["pgdat", "trades"])
@pytest.mark.parametrize("heads", ["one", "list", "stack", "stack as list"])
def test_the_step_in_monai_is_that_of_the_formula(name, heads):
    network, loss = TinyUNet(2, outputs=2, heads=heads == "list"), LOSS
    if heads.startswith("stack"):
        network = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], deep_supervision=True,
                          deep_supr_num=1)  # fmt: skip
    if heads == "stack":
        loss = lambda stack, y: LOSS(stack[:, 0], y) + LOSS(stack[:, 1], y) / 2  # noqa: E731
    elif heads != "one":
        loss = DeepSupervisionLoss(LOSS)
    batches = loader(items(), 4)
    method = {"name": name, "labels": 2, "precision": "fp32", **SETTINGS[name]}
    trainer = trained(network, method, train_data_loader=batches, loss_function=loss, lr=0.0)
    got, seen = [], []
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED,
        lambda engine: got.extend(p.grad.clone() for p in network.parameters() if p.grad is not None),
    )
    trainer.add_event_handler(
        IterationEvents.FORWARD_COMPLETED, lambda engine: seen.append(engine.state.output["pred"])
    )
    trainer.run()
    (batch,) = batches
    x, y = batch["image"].as_tensor(), batch["label"].as_tensor()
    whole = value(
        name, network, x, y, 2,
        lambda out: loss(list(out.unbind(1)) if heads == "stack as list" else out, y),
    )  # fmt: skip
    close(got, gradients(network, whole))
    assert getattr(trainer.state, f"{name}_report").loss.item() == pytest.approx(whole.item(), rel=1e-4)
    assert len(seen) == 1 and full(seen[0]).shape == (4, 2, 16, 16)
    if name == "trades":
        torch.testing.assert_close(full(seen[0]), full(network(x)))
    assert trainer.state.metrics[f"{name}_loss"] == pytest.approx(whole.item(), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ima"])
def test_every_method_trains_in_monai(name):
    network = TinyUNet(2, outputs=2)
    before = copy.deepcopy(network.state_dict())
    trainer = trained(network, {"name": name, "labels": 2, "eps": EPS, "precision": "fp32"}, data=items(files=False))
    trainer.run()
    assert any(not torch.equal(before[key], now) for key, now in network.state_dict().items())
    assert trainer.state.metrics[f"{name}_loss"] > 0 and trainer.training.course.history[0]["loss"] > 0
    replays = METHODS[name].settings_class().model_dump().get("replays", 1)
    assert trainer.state.output[0]["pred"].shape == (2, 16, 16) and trainer.method.updates_per_batch == replays


class Scaled(TinyUNet):
    def forward(self, x, scale):
        assert len(scale) == len(x)
        return super().forward(x) * scale.view(-1, 1, 1, 1)


@pytest.mark.parametrize("name", ["trades", "te"])
def test_further_inputs_and_inferers_of_all_the_passes(name):
    data = [{**item, "scale": torch.tensor(1.0 + i)} for i, item in enumerate(items())]
    options = {"train_data_loader": loader(data, 4), "inferer": SlidingWindowInferer((16, 16), sw_batch_size=8)}
    method = {"name": name, "labels": 2, "precision": "fp32"}
    trainer = trained(Scaled(2, outputs=2), method, prepare_batch=PrepareBatchExtraInput(["scale"]),
                      train_data_loader=options["train_data_loader"])  # fmt: skip
    trainer.run()
    assert trainer.method.threat.image_channels == 1
    trained(TinyUNet(2, outputs=2), method, **options).run()


def test_a_handler_may_replace_the_clean_prediction():
    losses = []
    for factor in (1.0, 2.0):
        trainer = trained(TinyUNet(2, outputs=2), lr=0.0)
        torch.manual_seed(0)

        def double(engine, factor=factor):
            engine.state.output["pred"] = engine.state.output["pred"] * factor

        trainer.add_event_handler(IterationEvents.FORWARD_COMPLETED, double)
        trainer.run()
        losses.append(trainer.state.output[0]["loss"])
    assert losses[0] != losses[1]


def test_a_handler_may_replace_stacked_heads_by_one():
    network = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], deep_supervision=True, deep_supr_num=1)
    trainer = trained(network, {"name": "noise", "labels": 2})

    def first(engine):
        engine.state.output["pred"] = engine.state.output["pred"][:, 0]

    trainer.add_event_handler(IterationEvents.FORWARD_COMPLETED, first)
    trainer.run()
    assert trainer.state.output[0]["pred"].shape == (2, 16, 16)


@pytest.mark.parametrize("name", ["trades", "te"])
def test_a_training_in_monai_goes_on_where_it_was_saved(tmp_path, name):
    first = TinyUNet(2, outputs=2)

    def make(epochs, load=False):
        network = copy.deepcopy(first)
        method = {"name": name, "labels": 2, "eps": EPS, "steps": 1, "precision": "fp32"}
        trainer = trained(network, method, epochs=epochs, train_handlers=[TrainingHandler(tmp_path)])
        objects = {"net": network, "opt": trainer.optimizer, "trainer": trainer}
        if load:
            trainer.load_state_dict({"epoch": 1, "max_epochs": epochs, "epoch_length": 2})
            CheckpointLoader(str(tmp_path / "checkpoint_epoch=1.pt"), objects).attach(trainer)
        elif epochs > 1:
            CheckpointSaver(str(tmp_path), objects, save_interval=1).attach(trainer)
        trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: torch.manual_seed(engine.state.epoch))
        return trainer

    whole, resumed = make(2), None
    whole.run()
    resumed = make(2, load=True)
    resumed.run()
    for one, other in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other)
    rows = [[{**row, "seconds": 0} for row in t.training.course.history] for t in (whole, resumed)]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert (tmp_path / f"{name}_history.csv").read_text().count("\n") == 3
    saved = whole.training.state_dict()
    assert saved["method"] == whole.method.name and ("mean" in saved["method_state"]) == (name == "te")
    other = trained(method={"name": "fgsmat", "labels": 2})
    with pytest.raises(UserError, match=f"is of a training by {whole.method.name}, not by FGSMAT"):
        other.training.load_state_dict(saved)


def test_mistakes_are_explained(caplog):
    with pytest.raises(UserError, match="no method 'trade'; the methods there are"):
        trained(method={"name": "trade", "labels": 2})
    with pytest.raises(UserError, match="describes no method; give its name"):
        trained(method={"labels": 2})
    with pytest.raises(UserError, match="trades: unknown setting 'replays'"):
        trained(method={"name": "trades", "labels": 2, "replays": 2})
    trainer, plain = trained(), make_trainer(kind=SupervisedTrainer)
    plain.run()
    trainer.load_state_dict(plain.state_dict())
    assert "TRADES: the checkpoint holds no state of a TRADES training" in caplog.text


@pytest.mark.skipif("accumulation_steps" not in SupervisedTrainer.__init__.__code__.co_varnames, reason="MONAI 1.6")
def test_replays_do_not_accumulate_gradients():
    with pytest.raises(UserError, match="FreeAT makes 4 updates from each batch, so that gradients cannot accumulate"):
        trained(method={"name": "freeat", "labels": 2}, accumulation_steps=2)


def test_the_general_trainer_trains_by_ima_as_its_own_does():
    network, weights = TinyUNet(2, outputs=2), []
    for options in ({"ima": IMA}, {"kind": AdversarialSupervisedTrainer, "method": {"name": "ima", **IMA}}):
        torch.manual_seed(0)
        trainer = make_trainer(copy.deepcopy(network), **options)
        trainer.run()
        weights.append(list(trainer.network.parameters()))
        assert trainer.state_dict()["ima"]["ledger"] and trainer.state.metrics["ima_margin_q50"] > 0
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


# --- nnU-Net ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nnunet")
@pytest.mark.parametrize("name", ["pgdat", "trades"])
def test_the_step_in_nnunet_is_that_of_the_formula(name, tmp_path, monkeypatch):
    file = tmp_path / "settings.toml"
    file.write_text("".join(f"{key} = {json.dumps(setting)}\n" for key, setting in SETTINGS[name].items()))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("IMA_CONFIG", str(file))
    trainer = make_nnunet_trainer(f"nnUNetTrainer{name.upper()}", configuration="2d")
    trainer.initialize()
    got, network = [], trainer.network

    def update():
        got.extend(p.grad.clone() for p in network.parameters() if p.grad is not None)
        return torch.zeros(())

    monkeypatch.setattr(trainer, "_update", update)
    heads = [head.shape[2:] for head in network(torch.zeros(1, 1, *trainer.configuration_manager.patch_size))]
    x = torch.randn(2, 1, *heads[0])
    targets = [torch.randint(0, 3, (2, 1, *shape)) for shape in heads]
    result = trainer.train_step({"data": x, "target": targets, "keys": ["a", "b"]})
    whole = value(name, network, x, targets[0], 3, lambda output: trainer.loss(output, targets))
    close(got, gradients(network, whole))
    assert float(result["loss"]) == pytest.approx(whole.item(), rel=1e-4)


def test_every_method_has_its_trainer():
    presets = {getattr(nnunet_trainers, name).preset.section for name in nnunet_trainers.__all__}
    assert presets == set(METHODS)
