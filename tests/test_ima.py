import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ima_seg import IMA, IMASettings, Labels, UserError
from ima_seg.ops import perturbation_size
from tests.models import TinyUNet, leave
from tests.test_boundary import trained_unet

SETTINGS = IMASettings(
    eps_max=1.0, delta=0.2, steps=5, refine_steps=2, start="random", criterion="dice", tau=0.45, share=1.0,
    precision="fp32",
)  # fmt: skip


def make_ima(settings=SETTINGS, labels=None, **options):
    return IMA.from_settings(settings, labels=labels or Labels(2), patch_voxels=256, epochs=10, **options)


def cross_entropy(y):
    def loss(output, rows=slice(None)):
        return torch.nn.functional.cross_entropy(output[0] if isinstance(output, list) else output, y[rows, 0])

    return loss


def batch_of_all_kinds():
    """A trained network and a batch: two searchable patches, one without foreground, one with a wrong reference."""
    network, x, target = trained_unet(2)
    y = target.onehot[:, 1].view(6, 1, 16, 16).long()
    x, y = x[:4], y[:4].clone()
    y[2] = 0
    y[3] = 1 - y[3]
    return network, x, y


def test_gradient_is_that_of_the_weighted_sum_of_clean_and_adversarial_loss():
    network, x, y = batch_of_all_kinds()
    report = make_ima().step(network, x, y, list("abcd"), loss=cross_entropy(y))
    accumulated = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    beta = SETTINGS.beta
    direct = (1 - beta) * cross_entropy(y)(network(x)) + beta * cross_entropy(y)(network(report.adversarial))
    torch.testing.assert_close(report.loss, direct.detach())
    parameters = [p for p in network.parameters() if p.grad is not None]
    for ours, expected in zip(accumulated, torch.autograd.grad(direct, parameters), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_each_kind_of_patch_is_treated_as_the_method_says():
    network, x, y = batch_of_all_kinds()
    ima = make_ima()
    report = ima.step(network, x, y, list("abcd"), loss=cross_entropy(y))
    assert report.searched.tolist() == [True, True, False, False]
    assert report.background.tolist() == [False, False, True, False]
    assert report.below.tolist() == [False, False, False, True]
    moved = perturbation_size(report.adversarial - x, "l2")
    assert (moved[:3] > 0).all() and moved[3] == 0, "below tau there is no boundary to look for"
    torch.testing.assert_close(moved, report.distance, rtol=1e-4, atol=1e-6)
    summary = ima.end_epoch()
    assert summary.visits == 2, "neither background nor below-tau patches are visits"
    assert ima.ledger.cases["c"].margin == ima.ledger.cases["d"].margin == ima.ledger.delta


def test_background_can_be_left_clean():
    network, x, y = batch_of_all_kinds()
    ima = make_ima(SETTINGS.model_copy(update={"background_steps": 0}))
    report = ima.step(network, x, y, list("abcd"), loss=cross_entropy(y))
    assert torch.equal(report.adversarial[2], x[2])


def test_nothing_to_attack_costs_a_standard_step():
    network, x, y = batch_of_all_kinds()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    for ima, rows in ((make_ima(), [3]), (make_ima(SETTINGS.model_copy(update={"beta": 0.0})), [0, 1, 2, 3])):
        calls.clear()
        network.zero_grad()
        report = ima.step(network, x[rows], y[rows], [str(r) for r in rows], loss=cross_entropy(y[rows]))
        assert len(calls) == 1 and report.adversarial is None and report.passes.total == 0
        got = network.last[1].weight.grad.clone()
        (expected,) = torch.autograd.grad(cross_entropy(y[rows])(network(x[rows])), network.last[1].weight)
        torch.testing.assert_close(got, expected)
        assert ima.end_epoch().visits == 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_margins_grow_to_the_boundary_and_differ_between_cases(norm, dims):
    network, x, target = trained_unet(dims)
    y = target.onehot[:, 1].view(6, 1, *(16,) * dims).long()
    settings = SETTINGS.model_copy(update={"norm": norm, "eps_max": 3.0, "delta": 0.1, "steps": 10, "rule": "paper"})
    ima = make_ima(settings)
    for epoch in range(80):  # an L-infinity margin moves by rare whole steps, when that is depends on the starts
        ima.step(network, x, y, list("abcdef"), loss=cross_entropy(y))
        summary = ima.end_epoch()
        if epoch >= 24 and summary.equilibrium:
            break
    margins = ima.ledger.get(list("abcdef"))
    assert (margins > 0.1).all() and (margins < 3.0).all()
    # An L-infinity walk soon has every voxel at its bound, so those margins differ by whole steps.
    assert margins.unique().numel() == 6 if norm == "l2" else margins.unique().numel() > 1
    assert summary.equilibrium, "a network that does not train has fixed boundaries"


def test_regions_ignore_label_channels_and_deep_supervision_go_through():
    labels = Labels(2, regions=True, ignore_label=3)
    network = TinyUNet(3, channels=4, outputs=2, heads=True)
    x = torch.randn(2, 4, 8, 8, 8)
    y = torch.zeros(2, 3, 8, 8, 8)
    y[:, 0, 2:6], y[:, 1, 3:5], y[:, 2, 7:] = 1, 1, 1
    ima = make_ima(
        IMASettings(criterion="dice", tau=0.01, share=1.0, steps=3, precision="fp32"), labels, image_channels=2
    )
    bce = torch.nn.BCEWithLogitsLoss()
    report = ima.step(network, x, y, ["a", "b"], loss=lambda out, rows: bce(out[0], y[rows, :2]))
    assert report.searched.all()
    assert torch.equal(report.adversarial[:, 2:], x[:, 2:]) and not torch.equal(report.adversarial[:, :2], x[:, :2])


def test_half_precision_search_finds_nearly_the_same_boundary():
    network, x, target = trained_unet(2)
    y = target.onehot[:, 1].view(6, 1, 16, 16).long()
    distances = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        settings = SETTINGS.model_copy(update={"precision": precision, "delta": 0.9, "steps": 20})
        distances.append(make_ima(settings).step(network, x, y, list("abcdef"), loss=cross_entropy(y)).distance)
    torch.testing.assert_close(distances[0], distances[1], rtol=0.1, atol=0)


def test_precisions_that_do_not_exist_are_refused():
    network, x, y = batch_of_all_kinds()
    with pytest.raises(UserError, match="'fp16' does not exist on device 'cpu'"):
        make_ima(SETTINGS.model_copy(update={"precision": "fp16"})).step(
            network, x, y, list("abcd"), loss=cross_entropy(y)
        )


def test_case_ids_must_match_the_batch():
    network, x, y = batch_of_all_kinds()
    with pytest.raises(UserError, match="3 case ids for a batch of 4"):
        make_ima().step(network, x, y, list("abc"), loss=cross_entropy(y))


def test_compiled_network_is_trained_and_attacked():
    network, x, y = batch_of_all_kinds()
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager")
    reports = []
    for model in (network, compiled):
        torch.manual_seed(0)
        reports.append(make_ima().step(model, x, y, list("abcd"), loss=cross_entropy(y)))
    torch.testing.assert_close(reports[0].adversarial, reports[1].adversarial, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(reports[0].loss, reports[1].loss, rtol=1e-3, atol=1e-4)


def test_shrinking_batches_of_a_compiled_network_stay_compiled():
    import torch._dynamo.config as config

    from ima_seg.attacks.network import RECOMPILE_LIMIT, allow_recompiles

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: getattr(config, name)}):  # pytest's own patches leave the setting undefined
        allow_recompiles()
        assert getattr(config, name) >= RECOMPILE_LIMIT
        _compiles_each_size_once()


def _compiles_each_size_once():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    network, x, target = trained_unet(2)
    y = target.onehot[:, 1].view(6, 1, 16, 16).long()
    compiled = torch.compile(network, backend="aot_eager")
    for rows in (6, 5, 4, 3, 2, 1):
        make_ima().step(compiled, x[:rows], y[:rows], list("abcdef")[:rows], loss=cross_entropy(y[:rows]))
    frames = counters["frames"]
    graphs = counters["stats"]["unique_graphs"]
    for rows in (6, 5, 4, 3, 2, 1):
        make_ima().step(compiled, x[:rows], y[:rows], list("abcdef")[:rows], loss=cross_entropy(y[:rows]))
    assert frames["ok"] == frames["total"]
    assert counters["stats"]["unique_graphs"] <= graphs + 2, "batch sizes are compiled once, not at every step"


def _train_on_rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    network, x, target = trained_unet(2)
    y = target.onehot[:, 1].view(6, 1, 16, 16).long()
    ids = list("abcabc")
    network.low = torch.nn.Identity()  # unused in this network, and DDP waits for every parameter
    model = DistributedDataParallel(network)
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    ima = make_ima()
    rows = torch.arange(rank, 6, world)
    for _ in range(3):
        optimiser.zero_grad()
        ima.step(model, x[rows], y[rows], [ids[i] for i in rows], loss=cross_entropy(y[rows]))
        optimiser.step()
        ima.end_epoch()
    weights = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.save({"table": ima.ledger.table(), "weights": weights}, f"{folder}/{rank}.pt")
    leave()


def test_two_processes_train_one_network_with_one_ledger(tmp_path):
    mp.spawn(_train_on_rank, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["table"] == second["table"]
    assert torch.equal(first["weights"], second["weights"])
    assert [row["visits"] for row in first["table"]] == [6, 6, 6]
