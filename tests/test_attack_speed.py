"""The speed benchmark compares like with like, and refuses to time what is wrong."""

from dataclasses import replace

import pytest
import torch

from benchmarks.shared import measuring
from benchmarks.speed import attack_contenders, attack_speed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough for more
    yield attack_speed
    torch.set_num_threads(threads)


def contender(benchmark, name):
    found = next(each for each in benchmark.CONTENDERS if each.name == name)
    if found.version is None:
        pytest.skip(f"{found.package} is not installed")
    return found


def problem(benchmark, dims, norm):
    name = list(benchmark.QUICK)[dims - 2]
    return replace(benchmark.fitted(name, benchmark.QUICK_NETWORKS[name], CPU), norm=norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_plain_loop_and_ours_reach_the_same_point(benchmark, dims, norm):
    posed = problem(benchmark, dims, norm)
    mine = contender(benchmark, "ima-seg fp32").make(posed)()
    theirs = benchmark.plain_loop(posed)()
    # A sign may flip where a gradient is all but zero.
    assert ((mine - theirs).abs() > 1e-3).float().mean() < 0.01
    assert benchmark.score(posed, mine) == pytest.approx(benchmark.score(posed, theirs), rel=1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["ima-seg default", "torchattacks", "foolbox", "ART", "adv-lib"])
def test_every_contender_reaches_the_loss_of_the_plain_loop_within_the_budget(benchmark, name, dims, norm):
    posed = problem(benchmark, dims, norm)
    each = contender(benchmark, name)
    if norm not in each.norms:
        pytest.skip(f"{name} has no {norm}")
    reference = benchmark.score(posed, benchmark.plain_loop(posed)())
    assert benchmark.score(posed, posed.x) < 0.985 * reference, "the attack must get somewhere"
    found = benchmark.judge(posed, each, reference)
    assert "wrong" not in found
    assert abs(found["loss_difference"]) <= 0.01
    assert 0.99 < found["size"] <= 1 + 1e-4


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("ima-seg fp32", []),
        ("ima-seg default", []),
        ("torchattacks", ["train/eval flags"]),
        ("foolbox", ["parameter gradients", "batch-norm statistics"]),
        ("ART", ["parameter gradients", "train/eval flags"]),
    ],
)
def test_what_is_left_changed_on_a_network_in_training_is_noticed(benchmark, name, changed):
    assert benchmark.alters(contender(benchmark, name), CPU) == changed


def test_what_is_left_behind_does_not_reach_the_next_contender(benchmark):
    posed = problem(benchmark, 2, "l2")
    benchmark.judge(posed, contender(benchmark, "foolbox"), 1.0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in posed.network.parameters())
    assert not any(module.training for module in posed.network.modules())


class Result:
    """Of a broken attack."""

    def __init__(self, adversarial):
        self.adversarial = adversarial


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda problem, eps, **_: Result(problem.x), "the plain loop's is"),
        (lambda problem, eps, **_: Result(problem.x + 1.01 * eps.max()), r"perturbation of 1\.01"),
    ],
)
def test_nothing_is_timed_or_written_when_ours_is_wrong(benchmark, broken, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(attack_contenders, "pgd", broken)
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=message) as refused:
        benchmark.main(["--device", "cpu", "--quick"])
    assert refused.value.code not in (None, 0)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_wrong_peer_is_listed_without_a_time(benchmark):
    def fails(posed):
        raise RuntimeError("no such head\nsecond line")

    peers = [
        benchmark.Contender("weak", lambda posed: lambda: posed.x, ""),
        benchmark.Contender("failing", fails, ""),
        benchmark.Contender("flat", lambda posed: lambda: posed.x.flatten(), ""),
    ]
    chosen = [contender(benchmark, "ima-seg fp32"), contender(benchmark, "plain loop"), *peers]
    rows = {row["contender"]: row for row in benchmark.measure(problem(benchmark, 2, "l2"), 1, chosen)}
    assert all("seconds" not in rows[each.name] for each in peers)
    assert rows["failing"]["wrong"] == "RuntimeError: no such head"
    assert rows["weak"]["wrong"].startswith("loss") and "shape" in rows["flat"]["wrong"]
    assert rows["plain loop"]["fastest_peer"] and rows["plain loop"]["to_fastest_peer"] == 1
    assert rows["ima-seg fp32"]["seconds"] > 0 and not rows["ima-seg fp32"]["fastest_peer"]


def test_memory_of_an_attack_is_that_of_the_passes_and_little_more(benchmark):
    sizes = [benchmark.peak_of("2D 24x24 x4", "plain", "l2", name, CPU) for name in ("floor", "ima-seg fp32")]
    assert all(0 <= size < 50 for size in sizes)


def test_bars_know_device_dimension_and_precision(benchmark):
    row = {"case": "3D", "network": "plain", "norm": "l2", "ratio": 0.5, "to_fastest_peer": 0.49}
    rows = [row | {"contender": "ima-seg default", "buffers_over_floor": 5.0}, row | {"contender": "plain loop"}]

    def passed(*arguments):
        return [(bar["what"], bar["measured"], bar["pass"]) for bar in benchmark.bars(*arguments)]

    memory = ("image-sized buffers over floor", 5.0, False)
    assert passed(rows, "cpu", True) == [("fastest peer / time", 2.041, True), ("time / floor", 0.5, True), memory]
    assert passed(rows, "cuda", True) == [("fastest peer / time", 2.041, True), memory]
    assert passed([{**rows[0], "case": "2D"}], "cuda", True) == [("fastest peer / time", 2.041, False), memory]
    assert [what for what, _, _ in passed(rows, "cpu", False)] == ["time / floor", "time / fastest peer", memory[0]]


def test_quick_prints_the_tables_and_writes_nothing(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    chosen = [contender(benchmark, "ima-seg fp32"), contender(benchmark, "plain loop")]
    missing = benchmark.Contender("absent", None, "", "no-such-package")
    monkeypatch.setattr(benchmark, "CONTENDERS", [*chosen, missing])
    benchmark.main(["--quick", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "Not installed, hence left out: absent." in text
    for case in benchmark.QUICK:
        for norm in ("l2", "linf"):
            lines = [line for line in text.splitlines() if line.startswith(f"| {case} |") and f"| {norm} |" in line]
            assert len(lines) == len(chosen) + 1 and "wrong" not in "".join(lines)
    assert not list(tmp_path.iterdir())
