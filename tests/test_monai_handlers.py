"""Margins and robustness as handlers: checkpoints, files, ranks, metrics under attack."""

import copy
import csv

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Events
from monai.data import partition_dataset
from monai.engines import SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceLoss
from monai.metrics import DiceMetric
from torch.nn.parallel import DistributedDataParallel

from ima_seg import Labels, Target, UserError
from ima_seg.attacks import Problem, pgd
from ima_seg.monai import Attack, MarginLedgerHandler, RobustnessHandler
from tests.models import Hyperplane, TinyUNet, leave
from tests.monai_data import IMA, items, loader, make_trainer


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def seeded(trainer):
    """Random starts that follow from the epoch, so that a resumed training repeats them."""
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: torch.manual_seed(engine.state.epoch))
    return trainer


@pytest.mark.parametrize("key", ["trainer", "ima"])
def test_a_training_that_was_killed_goes_on_exactly(tmp_path, key):
    start = TinyUNet(2, outputs=2)

    def make(save=False, load=None):
        network, handler = copy.deepcopy(start), MarginLedgerHandler()
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        objects = {"net": network, "opt": optimizer, "ima": handler}
        # A saver that comes first in the list still saves margins that have moved.
        saver = [CheckpointSaver(str(tmp_path), objects, save_interval=1)] if save and key == "ima" else []
        trainer = make_trainer(network, epochs=4, optimizer=optimizer, train_handlers=[*saver, handler])
        if key == "trainer":
            objects = {"net": network, "opt": optimizer, "trainer": trainer}
            if save:
                CheckpointSaver(str(tmp_path), objects, save_interval=1).attach(trainer)
        if load:
            trainer.load_state_dict({"epoch": 2, "max_epochs": 4, "epoch_length": 2})
            CheckpointLoader(str(load), objects).attach(trainer)
        return seeded(trainer)

    whole = make()
    whole.run()
    killed = make(save=True)
    killed.add_event_handler(Events.ITERATION_STARTED(once=5), lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        killed.run()
    resumed = make(load=tmp_path / "checkpoint_epoch=2.pt")
    resumed.run()
    assert whole.ima.ledger.table() == resumed.ima.ledger.table()
    assert whole.ima.ledger.epoch == 4 and all(row["visits"] == 4 for row in whole.ima.ledger.table())
    for one, other in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other)
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in t.training.course.history]
        for t in (whole, resumed)
    ]
    assert str(timeless[0]) == str(timeless[1])


def test_tables_are_written_with_the_cases_that_were_not_drawn(tmp_path):
    handler = MarginLedgerHandler(tmp_path, cases=["imagesTr/case_0", "later"], native={"hu": 250.0})
    make_trainer(epochs=2, train_handlers=[handler]).run()
    rows = {row["case"]: row for row in table(tmp_path / "ima_margins.csv")}
    assert sorted(rows) == [*(f"imagesTr/case_{i}" for i in range(4)), "later"]
    for row in rows.values():
        assert float(row["training_margin_l2"]) == pytest.approx(float(row["training_margin_rms"]) * 16, rel=1e-4)
        assert float(row["training_margin_hu"]) == pytest.approx(float(row["training_margin_rms"]) * 250, rel=1e-4)
    assert rows["later"]["visits"] == "0" and rows["imagesTr/case_0"]["visits"] == "2"
    history = table(tmp_path / "ima_history.csv")
    assert [row["epoch"] for row in history] == ["0", "1"] and float(history[1]["passes_per_sample"]) > 0
    assert (tmp_path / "ima_progress.png").stat().st_size > 10_000


def test_settings_that_changed_and_checkpoints_without_margins_are_named(caplog):
    trainer = make_trainer()
    trainer.run()
    state = trainer.state_dict()
    other = make_trainer(ima={**IMA, "tau": 0.7})
    other.load_state_dict(state)
    assert "tau: 0.001 there, 0.7 now" in caplog.text
    assert other.ima.ledger.table() == trainer.ima.ledger.table()
    plain = make_trainer(kind=SupervisedTrainer)
    plain.run()
    fresh = make_trainer()
    fresh.load_state_dict(plain.state_dict())
    assert "no margin ledger; all margins start anew at 0.05" in caplog.text and fresh.state.epoch == 1


def test_a_handler_without_ima_is_refused():
    with pytest.raises(UserError, match="attach it to an IMASupervisedTrainer"):
        make_trainer(kind=SupervisedTrainer, train_handlers=[MarginLedgerHandler()])


def _train_on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = TinyUNet(2, outputs=2)
    network.low = torch.nn.Identity()  # unused in this network, and DDP waits for every parameter
    part = partition_dataset(items(6), num_partitions=2, even_divisible=True)[rank]
    robust = RobustnessHandler(loader(part), 2, eps=[0.1])
    handlers = [MarginLedgerHandler(folder), robust]
    trainer = make_trainer(DistributedDataParallel(network), data=part, epochs=3, train_handlers=handlers)
    trainer.run()
    weights = torch.cat([p.detach().flatten() for p in network.parameters()])
    metrics = {name: value for name, value in trainer.state.metrics.items() if name.startswith("robust")}
    torch.save({"table": trainer.ima.ledger.table(), "weights": weights, "metrics": metrics}, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.slow  # two processes that import MONAI
def test_two_processes_train_with_equal_margins(tmp_path):
    mp.spawn(_train_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["table"] == second["table"] and first["metrics"] == second["metrics"]
    assert torch.equal(first["weights"], second["weights"])
    assert [row["visits"] for row in first["table"]] == [3] * 6
    assert len(table(tmp_path / "ima_margins.csv")) == 6


# --- RobustnessHandler -----------------------------------------------------------------------------------------------


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def hyperplane():
    """A network whose images all lie 0.1 per voxel (RMS) from a boundary beyond which all is wrong."""
    data = items(2, shape=(8, 8))
    mask = data[0]["label"][0].as_tensor() > 0
    network = Hyperplane(torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)), mask)
    for item in data:
        item["label"] = data[0]["label"]
        away = network.weight.detach() / network.weight.norm() * 8
        item["image"].copy_(item["image"] + (0.1 - network.distance(item["image"][None].as_tensor(), "l2")) * away)
    return network, data


def test_metrics_break_at_the_distance_of_the_boundary_and_training_is_not_touched():
    network, data = hyperplane()
    writer = Writer()
    handler = RobustnessHandler(loader(data), Attack(2, steps=5, precision="fp32"), eps=[0.09, 0.11], interval=2,
                                summary_writer=writer)  # fmt: skip
    trainer = make_trainer(network, data=data, epochs=2, lr=0.0, train_handlers=[handler])
    states = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: states.append(dict(engine.state.metrics)))
    handler.attach(spy := make_trainer(network, data=data, lr=0.0))
    network.train()
    flags = [m.training for m in network.modules()]
    before = torch.get_rng_state()
    spy.state.metrics.clear()
    handler(spy)
    assert torch.equal(before, torch.get_rng_state()), "the random state of the training is untouched"
    assert [m.training for m in network.modules()] == flags and all(p.requires_grad for p in network.parameters())
    assert all(p.grad is None for p in network.parameters())
    assert spy.state.metrics == pytest.approx(
        {"robust_dice_clean": 1.0, "robust_dice_0.09": 1.0, "robust_dice_0.11": 0.0}, abs=1e-6
    )
    writer.scalars.clear()
    trainer.run()
    assert "robust_dice_clean" not in states[0] and states[1]["robust_dice_0.11"] == pytest.approx(0, abs=1e-6)
    assert {(tag, step) for tag, _, step in writer.scalars} == {
        ("robust/dice/clean", 2), ("robust/dice/0.09", 2), ("robust/dice/0.11", 2)
    }  # fmt: skip


def test_whole_images_are_attacked_through_the_sliding_window():
    network = TinyUNet(2, outputs=3).eval()
    inferer = SlidingWindowInferer((16, 16), sw_batch_size=2, overlap=0.5, mode="gaussian")
    data = items(2, shape=(24, 20))
    metric = DiceMetric(include_background=False, reduction="mean_batch")
    handler = RobustnessHandler(
        loader(data), Attack(3, steps=3, precision="fp32"), eps=[0.5], inferer=inferer, metrics={"d": metric}
    )
    trainer = make_trainer(network, data=data, ima={**IMA, "labels": 3})
    handler(trainer)
    found = trainer.state.metrics
    # The same by hand, with the graph of all windows kept.
    x, y = (torch.stack([item[key].as_tensor() for item in data]) for key in ("image", "label"))
    problem = Problem(lambda t: inferer(t, network), x, Target.from_raw(y, Labels(3)), precision="fp32",
                      generator=torch.Generator().manual_seed(0))  # fmt: skip
    result = pgd(problem, 0.5, steps=3)
    for level, images in (("clean", x), ("0.5", result.adversarial)):
        predicted = torch.nn.functional.one_hot(inferer(images, network).argmax(1), 3).movedim(-1, 1)
        expected = DiceMetric(include_background=False, reduction="mean_batch")
        expected(predicted, torch.nn.functional.one_hot(y[:, 0].long(), 3).movedim(-1, 1))
        for i, value in enumerate(expected.aggregate().tolist()):
            assert found[f"robust_d_{level}_{i}"] == pytest.approx(value, nan_ok=True, abs=1e-5)
    assert found["robust_d_0.5_0"] < found["robust_d_clean_0"]


def test_regions_and_ignored_voxels():
    labels = Labels(2, regions=True, ignore_label=3)
    handler = RobustnessHandler([], labels, eps=[0.1])
    logits = torch.tensor([[[[1.0, -1, 1]], [[-1.0, 1, 1]]]])
    y = torch.tensor([[[[1.0, 1, 0]], [[0.0, 1, 0]], [[0.0, 0, 1]]]])
    predicted, expected = handler.discretise(logits, y)
    assert predicted.tolist() == [[[[1, 0, 0]], [[0, 1, 0]]]] and expected.tolist() == [[[[1, 1, 0]], [[0, 1, 0]]]]


def test_a_loss_of_ones_own_must_be_per_sample():
    data = items(2)
    network = TinyUNet(2, outputs=2)
    options = {"softmax": True, "to_onehot_y": True}
    own = Attack(2, loss=DiceLoss(**options, reduction="none"), steps=2)
    trainer = make_trainer(network, data=data)
    RobustnessHandler(loader(data), own, eps=[0.5])(trainer)
    assert trainer.state.metrics["robust_dice_0.5"] <= trainer.state.metrics["robust_dice_clean"]
    mean = Attack(2, loss=DiceLoss(**options), steps=2)
    with pytest.raises(UserError, match=r"returned a tensor of shape \(\) for 2 samples.*reduction='none'"):
        RobustnessHandler(loader(data), mean, eps=[0.5])(trainer)
    assert all(p.requires_grad for p in network.parameters()), "flags are restored after a mistake, too"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": 2, "eps": []}, "one or more positive budgets"),
        ({"attack": 2, "eps": [0.1], "interval": 0}, "at least 1"),
        ({"attack": object(), "eps": [0.1]}, "give discretise"),
    ],
)
def test_wrong_arguments_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        RobustnessHandler([], **options)
