"""IMA in MONAI's engine: the step, events and state, networks with and without deep supervision, mistakes.

One file: the trainer's promises are tried on the same engine and network.
"""

import copy
import subprocess
import sys

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EMAHandler
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents, PrepareBatchExtraInput
from monai.handlers import MeanDice, StatsHandler, from_engine
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR, UNet
from monai.transforms import AsDiscreted

from ima_seg import Classes, Labels, UserError
from ima_seg.attacks.network import full_resolution
from ima_seg.methods import PGDAT, PGDATSettings
from ima_seg.monai import case_name, compat
from ima_seg.monai.trainer import make_method
from tests.models import TinyUNet
from tests.monai_data import IMA, items, loader, make_trainer

LOSS = DiceCELoss(softmax=True, to_onehot_y=True)


def networks():
    strides = [1, 2, 2]
    dynunet = DynUNet(2, 1, 2, [3, 3, 3], strides, strides[1:], filters=[4, 8, 8], deep_supervision=True,
                      deep_supr_num=1)  # fmt: skip
    return {
        "UNet": (UNet(3, 1, 2, (4, 8), (2,)), LOSS),
        "SegResNet": (SegResNet(3, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,)),
                      LOSS),
        "DynUNet": (dynunet, DeepSupervisionLoss(LOSS)),
        "list": (TinyUNet(2, outputs=2, heads=True), DeepSupervisionLoss(LOSS)),
        "SwinUNETR": (swin(), LOSS),
    }  # fmt: skip


def swin():
    options = {
        "in_channels": 1,
        "out_channels": 2,
        "feature_size": 12,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 1, 1),
    }
    try:
        return SwinUNETR(spatial_dims=3, **options)
    except TypeError:  # MONAI 1.4
        return SwinUNETR(img_size=(64, 32, 32), spatial_dims=3, **options)


@pytest.mark.parametrize("name", ["UNet", "SegResNet", "DynUNet", "list", "SwinUNETR"])
def test_an_epoch_of_each_network_records_margins_and_its_gradient_is_that_of_the_step(name):
    network, loss = networks()[name]
    dims = 2 if name in ("DynUNet", "list") else 3
    # Five halvings, and its instance norm wants two voxels at the end.
    data = items(2, shape=(64, 32, 32)) if name == "SwinUNETR" else items(4, dims)
    batches = loader(data, 1 if name == "SwinUNETR" else 2)
    network.train()
    twin = copy.deepcopy(network)
    settings = {**IMA, "steps": 1} if name == "SwinUNETR" else IMA
    trainer = make_trainer(network, lr=0.0, train_data_loader=batches, loss_function=loss, ima=settings)
    gradients, outputs = [], []
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED,
        lambda engine: gradients.append([None if p.grad is None else p.grad.clone() for p in network.parameters()]),
    )
    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda engine: outputs.append(engine.state.ima_report))
    torch.manual_seed(3)
    trainer.run()

    ima = make_method(settings, epochs=1, name="ima")
    torch.manual_seed(3)
    for batch, found, report in zip(batches, gradients, outputs, strict=True):
        twin.zero_grad()
        x, y = batch["image"].as_tensor(), batch["label"].as_tensor()
        forward = (lambda n, b: list(n(b).unbind(1))) if name == "DynUNet" else None
        names = [case_name(file) for file in batch["image"].meta["filename_or_obj"]]
        expected = ima.step(twin, x, y, names, loss=lambda out, rows, y=y: loss(out, y[rows]), forward=forward)
        torch.testing.assert_close(report.loss, expected.loss)
        assert torch.isfinite(report.loss) and report.searched.any()
        for gradient, parameter in zip(found, twin.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
    ima.end_epoch()
    assert trainer.ima.ledger.table() == ima.ledger.table()
    assert {record["visits"] for record in ima.ledger.table()} == {1}
    assert len(gradients) == 2 and all(m.training for m in network.modules())


def test_state_holds_what_handlers_expect_and_events_fire_as_in_the_supervised_trainer():
    fired = {}
    for kind in (SupervisedTrainer, None):
        losses = []
        options = {} if kind is None else {"kind": kind}
        handlers = [StatsHandler(name="test", output_transform=from_engine(["loss"], first=True))]
        trainer = make_trainer(
            postprocessing=AsDiscreted(keys=["pred", "label"], argmax=(True, False), to_onehot=2),
            key_train_metric={"dice": MeanDice(False, output_transform=from_engine(["pred", "label"]))},
            train_handlers=handlers, **options,
        )  # fmt: skip
        names = fired[kind] = []
        for event in IterationEvents:
            trainer.add_event_handler(event, lambda engine, event=event, names=names: names.append(event.name))
        trainer.add_event_handler(
            IterationEvents.MODEL_COMPLETED, lambda engine, losses=losses: losses.append(engine.state.output)
        )
        trainer.run()
        assert 0 <= trainer.state.metrics["dice"] <= 1
        (first, *_), *_ = losses
        assert first["pred"].shape == (2, 16, 16) and first["label"].shape == (2, 16, 16)
        assert isinstance(first["pred"], MetaTensor) and first["pred"].meta["filename_or_obj"].endswith("case_0.nii.gz")
        assert isinstance(first["loss"], float) and not first["image"].is_batch
    assert fired[None] == fired[SupervisedTrainer]
    assert trainer.state.metrics["ima_margin_q50"] > 0
    mean = (trainer.state.output[0]["clean_loss"] + trainer.state.output[0]["adversarial_loss"]) / 2
    assert trainer.state.output[0]["loss"] == pytest.approx(mean)


def test_without_attack_it_trains_as_the_supervised_trainer_does():
    start, weights = TinyUNet(2, outputs=2), []
    for kind, options in ((SupervisedTrainer, {}), (None, {"ima": {**IMA, "beta": 0.0}})):
        network = copy.deepcopy(start)
        make_trainer(network, epochs=2, **options, **({"kind": kind} if kind else {})).run()
        weights.append([p.detach() for p in network.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif("accumulation_steps" not in SupervisedTrainer.__init__.__code__.co_varnames, reason="MONAI 1.6")
def test_gradients_accumulate_over_iterations():
    network, steps = TinyUNet(2, outputs=2), []
    trainer = make_trainer(network, lr=0.0, data=items(6), accumulation_steps=2)
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (steps.append(network.last[1].weight.grad.clone()), step())
    each = []
    trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, lambda engine: each.append(engine.state.iteration))
    trainer.run()
    assert len(each) == 3 and len(steps) == 2, "after two iterations, and at the end of the epoch"


def test_gradient_scaler_and_autocast_surround_both_passes(monkeypatch):
    scaled = []

    class Scaler:
        def scale(self, loss):
            scaled.append(loss)
            return loss * 1024

        def step(self, optimizer):
            for p in network.parameters():
                if p.grad is not None:
                    p.grad /= 1024
            scaled.append("step")
            optimizer.step()

        def update(self):
            scaled.append("update")

    kinds = []
    real = torch.autocast

    def autocast(kind, **options):
        kinds.append((kind, options))
        return real("cpu", **options)

    monkeypatch.setattr("torch.autocast", autocast)
    monkeypatch.setattr("torch.cuda.amp.GradScaler", Scaler)
    network = TinyUNet(2, outputs=2)
    plain = copy.deepcopy(network)
    trainer = make_trainer(network, data=items(2), amp=True, amp_kwargs={"dtype": torch.bfloat16})
    seen = []
    network.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    torch.manual_seed(0)
    trainer.run()
    torch.manual_seed(0)
    make_trainer(plain, data=items(2)).run()
    assert [s if isinstance(s, str) else "loss" for s in scaled] == ["loss", "loss", "step", "update"]
    passes = [options for kind, options in kinds if kind == "cuda"]
    assert passes == [{"dtype": torch.bfloat16}] * 4, "forward and loss of two passes"
    assert seen[0] and seen[-1] and not any(seen[1:-1]), "the search computes in its own precision"
    torch.testing.assert_close(network.last[1].weight, plain.last[1].weight, rtol=0.05, atol=0.01)


class Shifted(TinyUNet):
    """Takes one more input per sample, whose sign decides which class is which, and one that is the same for all."""

    def forward(self, x, sign, scale=1.0):
        assert len(sign) == len(x)
        return super().forward(x) * sign.view(-1, 1, 1, 1) * scale


def test_the_search_gives_each_sample_its_own_further_inputs():
    data = [{**item, "sign": torch.tensor(1.0 if i % 2 else 0.5)} for i, item in enumerate(items(4))]
    network = Shifted(2, outputs=2)
    plain = TinyUNet(2, outputs=2)
    plain.load_state_dict(network.state_dict())
    trainer = make_trainer(network, train_data_loader=loader(data, 4), prepare_batch=PrepareBatchExtraInput(["sign"]))
    torch.manual_seed(3)
    trainer.run()
    # A positive factor on the logits changes no decision, so that the visits are those without it.
    other = make_trainer(plain, train_data_loader=loader(data, 4))
    torch.manual_seed(3)
    other.run()
    report = trainer.state.ima_report
    assert report.adversarial.shape == (4, 1, 16, 16)
    assert report.searched.all() and torch.equal(report.crossed, other.state.ima_report.crossed)
    assert trainer.ima.threat.image_channels == 1


def test_the_search_goes_through_the_inferer():
    network = TinyUNet(2, outputs=2)
    shapes = []
    network.register_forward_hook(lambda module, given, _: shapes.append((tuple(given[0].shape[2:]), module.training)))
    make_trainer(network, inferer=SlidingWindowInferer((8, 8), sw_batch_size=4, overlap=0)).run()
    assert {shape for shape, _ in shapes} == {(8, 8)}
    assert {training for _, training in shapes} == {True, False}


def test_one_hot_references_become_label_maps():
    reports = []
    for one_hot in (False, True):
        network = TinyUNet(2, outputs=2)
        network.load_state_dict({k: torch.full_like(v, 0.1) for k, v in network.state_dict().items()})
        loss = DiceCELoss(softmax=True, to_onehot_y=not one_hot)
        trainer = make_trainer(network, data=items(2, one_hot=one_hot), loss_function=loss)
        torch.manual_seed(0)
        trainer.run()
        reports.append(trainer.state.ima_report)
    torch.testing.assert_close(reports[0].distance, reports[1].distance)
    with pytest.raises(UserError, match="expected one channel of classes or 3 one-hot"):
        make_trainer(data=items(2, one_hot=True), ima={**IMA, "labels": 3}).run()


def test_case_ids_come_from_the_file_or_from_a_key():
    trainer = make_trainer()
    trainer.run()
    assert sorted(trainer.ima.ledger.cases) == [f"imagesTr/case_{i}" for i in range(4)]
    trainer = make_trainer(case_key="name")
    trainer.run()
    assert sorted(trainer.ima.ledger.cases) == ["n0", "n1", "n2", "n3"]
    numbered = [{**item, "number": torch.tensor(i)} for i, item in enumerate(items())]
    trainer = make_trainer(data=numbered, case_key="number")
    trainer.run()
    assert sorted(trainer.ima.ledger.cases) == ["0", "1", "2", "3"]
    assert case_name("/a/BraTS_001/t1.nii.gz") == "BraTS_001/t1" and case_name("/x.png") == "x"


@pytest.mark.parametrize("options", [{"data": items(files=False)}, {"case_key": "nothing"}, {"case_key": "label"}])
def test_missing_case_ids_are_explained(options):
    with pytest.raises(UserError, match=r"'case_id': f'case_\{number:04\}'.*\n.*case_key='case_id'"):
        make_trainer(**options).run()


def test_a_loss_per_sample_is_averaged_with_an_explanation(caplog):
    loss = DiceLoss(softmax=True, to_onehot_y=True, reduction="none")
    start = TinyUNet(2, outputs=2)
    weights = []
    for function in (loss, DiceLoss(softmax=True, to_onehot_y=True)):
        network = copy.deepcopy(start)
        torch.manual_seed(0)
        make_trainer(network, loss_function=function).run()
        weights.append(network.last[1].weight)
    torch.testing.assert_close(*weights)
    explained = [r.getMessage() for r in caplog.records if "reduction='mean'" in r.getMessage()]
    assert len(explained) == 1 and "(2, 2, 1, 1)" in explained[0]
    with pytest.raises(UserError, match="returned a dict"):
        make_trainer(loss_function=lambda p, y: {"loss": p.mean()}).run()


@pytest.mark.parametrize(
    ("ima", "message"),
    [
        ({"tau": 0.6}, "how to read the outputs"),
        (3, "how to read the outputs"),
        (PGDAT(PGDATSettings(), labels=Labels(2)), "how to read the outputs"),
        ({"labels": 2, "tua": 0.6}, "did you mean 'tau'"),
        ({"labels": 2, "epochs": 3}, "the trainer's max_epochs"),
        ({"labels": 2, "ema": 0.99}, r"ignite\.handlers\.EMAHandler\(network, momentum=1 - ema\)"),
        ({"labels": 2, "teacher": "standard"}, "teacher is 'standard'; give the trained network itself"),
        ({"labels": 2, "unit": "l2", "eps_max": 15, "delta": 2}, "patch_voxels"),
        ({"labels": 1}, "classes need 2 or more"),
    ],
)
def test_wrong_settings_are_explained(ima, message):
    with pytest.raises(UserError, match=message):
        make_trainer(ima=ima)


def test_settings_describe_what_is_trained():
    ima = make_method({"name": "ima", "labels": {"outputs": 3, "regions": True}, "image_channels": 2, "unit": "l2",
                       "eps_max": 15, "delta": 2, "patch_voxels": 2240}, epochs=50)  # fmt: skip
    assert ima.labels == Labels(3, regions=True) and ima.threat.image_channels == 2
    assert ima.ledger.eps_max == pytest.approx(15 / 2240**0.5)
    assert make_method(ima, epochs=3) is ima
    # Sizes that are not given follow from the length of the training.
    assert make_method({"labels": 2}, epochs=60, name="ima").ledger.delta == pytest.approx(0.3 / 20)


def test_ignites_average_follows_the_steps_and_a_teacher_stays_as_it_is():
    torch.manual_seed(0)
    network, teacher = TinyUNet(2, outputs=2), TinyUNet(2, outputs=2)
    before = copy.deepcopy(teacher.state_dict())
    average = EMAHandler(network, momentum=0.5)
    seen = []
    trainer = make_trainer(network, ima={**IMA, "teacher": teacher}, train_data_loader=loader(items(4, 2), 2))
    average.attach(trainer, name="momentum", event=Events.ITERATION_COMPLETED)
    weight = network.last[1].weight
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: seen.append(weight.detach().clone()))
    start = weight.detach().clone()
    trainer.run()
    expected = start
    for weight in seen:
        expected = 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(average.ema_model.last[1].weight, expected)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not torch.equal(start, seen[-1])


def test_an_own_iteration_is_refused():
    with pytest.raises(UserError, match="iteration_update would replace"):
        make_trainer(iteration_update=lambda engine, batch: None)


@pytest.mark.slow
def test_compiled_network_is_trained_and_attacked():
    network = TinyUNet(2, outputs=2)
    trainer = make_trainer(network, data=items(2), compile=True, compile_kwargs={"backend": "aot_eager"})
    trainer.run()
    assert trainer.state.ima_report.searched.all()
    assert isinstance(trainer.state.output[0]["pred"], MetaTensor)


def test_versions_are_checked(monkeypatch):
    monkeypatch.setattr(compat, "SUPPORTED", {"monai": "<1.0"})
    with pytest.raises(UserError, match=r'monai .* is installed, supported is <1.0; pip install "monai<1.0"'):
        compat.check_versions()
    monkeypatch.setattr(compat, "SUPPORTED", {"no-such-package": ">=1"})
    with pytest.raises(UserError, match="no-such-package is not installed"):
        compat.check_versions()


def test_importing_the_package_loads_neither_torch_nor_monai():
    program = "import sys, ima_seg.monai; print([m for m in ('torch', 'monai', 'ignite') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_full_resolution_of_stacked_heads_is_the_prediction():
    network, loss = networks()["DynUNet"]
    trainer = make_trainer(network, data=items(2), loss_function=loss, decollate=False)
    whole = []
    trainer.add_event_handler(
        IterationEvents.FORWARD_COMPLETED, lambda engine: whole.append(engine.state.output["pred"].detach().clone())
    )
    trainer.run()
    assert whole[0].shape == (2, 2, 2, 16, 16)
    torch.testing.assert_close(trainer.state.output["pred"].as_tensor(), full_resolution(list(whole[0].unbind(1))))
    # A loss that takes the stack, as one written for the SupervisedTrainer does, gets it.
    shapes = []
    stacked = make_trainer(
        network, data=items(2), loss_function=lambda p, y: shapes.append(p.shape) or LOSS(p[:, 0], y)
    )
    stacked.run()
    assert shapes == [(2, 2, 2, 16, 16)] * 2


def test_classifiers_train_through_the_engine():
    answers = torch.arange(8) % 2
    images = 0.3 * torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images[answers == 1, :, 4:12, 4:12] += 1
    data = [
        {"image": image, "label": answer, "case": f"c{i}"}
        for i, (image, answer) in enumerate(zip(images, answers, strict=True))
    ]
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2),
                                  torch.nn.Flatten(), torch.nn.Linear(16, 2))  # fmt: skip
    trainer = make_trainer(
        network, data, epochs=12, lr=1.0, loss_function=torch.nn.CrossEntropyLoss(), case_key="case",
        ima={"labels": Classes(2), "delta": 0.02, "precision": "fp32"},
    )  # fmt: skip
    trainer.run()
    report, ledger = trainer.state.ima_report, trainer.ima.ledger
    assert trainer.state.output[0]["pred"].shape == (2,) and len(report.searched) == 2
    assert sum(record.visits for record in ledger.cases.values()) > 0, "right images are searched"
    assert max(record.margin for record in ledger.cases.values()) > ledger.delta
