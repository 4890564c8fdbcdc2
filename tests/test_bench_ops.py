"""The benchmark of the ops counts bytes as they are, and refuses to time what is wrong."""

import json

import pytest
import torch

from benchmarks.shared import baselines, measuring
from benchmarks.speed import op_cases
from benchmarks.speed import ops as ops_script
from ima_seg import ops

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """The script as a module that writes to ``tmp_path``."""
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    return ops_script


@pytest.fixture
def cases():
    """The module of the ops that the script has imported."""
    return op_cases


def problem(cases, name, shape):
    op = next(each for each in [*cases.IMAGE_OPS, *cases.LOGITS_OPS] if each.name == name)
    return cases.Problem(op, "a case", shape, CPU)


def test_quick_times_every_op_on_the_reference_and_writes_nothing(benchmark, cases, tmp_path, capsys):
    benchmark.main(["--quick", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    for each in [*cases.IMAGE_OPS, *cases.LOGITS_OPS]:
        count = 2 if each in cases.IMAGE_OPS else 3
        rows = [line.split("|") for line in lines if line.startswith(f"| {each.name} |")]
        assert [row[3].strip() for row in rows] == ["reference", "plain"] * count, "never Triton's interpreter"
        assert all(float(row[4]) > 0 and float(row[9]) > 0 for row in rows)
    assert not list(tmp_path.iterdir())


def test_a_full_run_stores_table_and_numbers(benchmark, cases, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "LEAST_SECONDS", 1e-4)
    monkeypatch.setattr(benchmark, "ALL_SETS", 2**14)
    monkeypatch.setattr(cases, "LARGE", "small")
    monkeypatch.setattr(cases, "IMAGES", {"small": (3, 1, 6, 5)})
    benchmark.main(["--device", "cpu", "--rounds", "1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ops_cpu.json", "ops_cpu.md"]
    stored = json.loads((tmp_path / "ops_cpu.json").read_text())
    assert stored["torch"] == torch.__version__ and stored["backends"] == ["reference"] and stored["bars"] == []
    assert len(stored["rows"]) == 2 * (len(cases.IMAGE_OPS) + 2 * len(cases.LOGITS_OPS))
    assert all(row["sets"] > 1 for row in stored["rows"] if row["op"].startswith("gradient_step"))
    assert capsys.readouterr().out.strip() == (tmp_path / "ops_cpu.md").read_text().strip()


BREAKS = {
    "gradient_step": lambda result: (result[0] * 1.001, result[1]),
    "random_start": lambda result: result.flip(0),
    "interpolate": lambda result: (result[0], result[1] + 1e-3),
    "dice_ce": lambda result: result * 1.0001,
    "hard_counts": lambda result: (result[0] + torch.eye(3, dtype=torch.int64)[0], result[1]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_nothing_is_timed_or_written_when_an_op_is_wrong(benchmark, name, monkeypatch, tmp_path, capsys):
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *a, **k: BREAKS[name](right(*a, **k)))
    with pytest.raises(SystemExit, match=f"^{name} .*|^{name}, ") as refused:
        benchmark.main(["--device", "cpu", "--quick"])
    assert "reference: wrong" in refused.value.code and refused.value.code.endswith("nothing is timed")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_wrong_gradient_or_composition_is_noticed(benchmark, cases, monkeypatch):
    posed = problem(cases, "dice_ce forward + backward", (2, 3, 4, 5))
    benchmark.check(posed)
    with monkeypatch.context() as patched:
        right = ops.registered.dice_ce_backward
        patched.setattr(ops.registered, "dice_ce_backward", lambda *a: right(*a) * 1.001)
        with pytest.raises(SystemExit, match=r"forward \+ backward, a case, reference: wrong"):
            benchmark.check(posed)
    monkeypatch.setattr(baselines, "rms", lambda image: torch.full((len(image), *(1,) * (image.ndim - 1)), 1e-6))
    with pytest.raises(SystemExit, match="gradient_step l2, a case, plain: wrong"):
        benchmark.check(problem(cases, "gradient_step l2", (2, 1, 4, 5)))
    with pytest.raises(SystemExit, match="random_start l2, a case, plain: wrong, beyond its radius"):
        benchmark.check(problem(cases, "random_start l2", (2, 1, 4, 5)))


def test_samples_beyond_the_first_part_are_compared_too(benchmark, cases, monkeypatch):
    posed = problem(cases, "gradient_step linf", (5, 1, 4, 5))
    monkeypatch.setattr(benchmark, "COMPARED", 40)  # two samples at a time
    benchmark.check(posed)
    right = ops.gradient_step

    def wrong_in_the_last(*arguments, **options):
        stepped, size = right(*arguments, **options)
        stepped[-1] += 1e-3
        return stepped, size

    monkeypatch.setattr(ops, "gradient_step", wrong_in_the_last)
    with pytest.raises(SystemExit, match="wrong"):
        benchmark.check(posed)


@pytest.mark.parametrize(
    ("name", "shape", "moved", "footprint"),
    [
        # 2 x 30 float32 are 240 bytes, as many bools 60.
        ("gradient_step l2", (2, 1, 6, 5), 5 * 240, 3 * 240),
        ("gradient_step linf", (2, 1, 6, 5), 3 * 240, 3 * 240),
        ("gradient_step l2, mask", (2, 1, 6, 5), 5 * 240 + 2 * 60, 3 * 240 + 60),
        ("gradient_step linf, box", (2, 1, 6, 5), 4 * 240, 4 * 240),
        ("random_start l2", (2, 1, 6, 5), 240, 240),
        ("interpolate l2", (2, 1, 6, 5), 3 * 240, 3 * 240),
        # Logits of 3 classes, and a byte for the class of each voxel.
        ("dice_ce forward", (2, 3, 6, 5), 720 + 60, 720 + 60),
        ("dice_ce forward + backward", (2, 3, 6, 5), 3 * 720 + 2 * 60, 2 * 720 + 60),
        ("hard_counts", (2, 3, 6, 5), 720 + 60, 720 + 60),
    ],
)
def test_bytes_are_those_counted_by_hand(cases, name, shape, moved, footprint):
    posed = problem(cases, name, shape)
    assert posed.op.moved(posed.inputs()) == moved
    assert posed.op.footprint(posed.inputs()) == footprint


def test_a_share_is_of_the_bandwidth_of_the_copy(benchmark, cases, monkeypatch):
    posed = problem(cases, "gradient_step l2", (2, 1, 6, 5))

    def timed(jobs, rounds, least, device):
        return {"reference": [1.0, 2.0, 2.0], "plain": [4.0] * 3, "copy_": [0.3, 0.6, 0.6]}

    monkeypatch.setattr(benchmark, "time_all", timed)
    ours, plain = benchmark.measure(posed, 3, 0.0, 0)
    # The copy moves 3/5 of the bytes.
    assert ours["share"] == 0.5 and ours["share_min_max"] == [0.5, 0.5] and ours["to_reference"] == 1
    assert plain["share"] == 0.25 and plain["to_reference"] == 2 and ours["call_us"] == 2e6


def test_bars_are_on_steps_of_kernels_and_fail_without_them(benchmark, cases):
    rows = [
        {"op": name, "case": cases.LARGE, "implementation": "triton", "share": share}
        for name, share in (("gradient_step l2", 0.81), ("gradient_step linf", 0.79), ("interpolate l2", 0.1))
    ]
    assert [bar["pass"] for bar in benchmark.bars(rows)] == [True, False]
    assert [bar["pass"] for bar in benchmark.bars([{**rows[0], "implementation": "plain"}])] == [False, False]


def test_measurements_last_long_enough(benchmark):
    made = []
    assert benchmark.enough(made.append, 3, 0.0, CPU) == 3 and made == [3, 3]
    cycle = benchmark.Cycle(lambda value: torch.full((2**8,), value).sum(), [1.0, 2.0, 3.0])
    calls = benchmark.enough(cycle, 1, 0.002, CPU)
    assert calls > 1 and sorted(float(value) / 2**8 for value in cycle.kept) == [1, 2, 3]


def test_on_a_gpu_the_interpreter_is_refused(benchmark, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert benchmark.backends(CPU) == ["reference"]
    with pytest.raises(SystemExit, match="interpreter"):
        benchmark.backends(torch.device("cuda"))


@pytest.mark.gpu
def test_quick_on_a_gpu_times_the_kernels_too(benchmark, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    benchmark.main(["--quick", "--device", "cuda"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| gradient_step l2 |")]
    assert [row[3].strip() for row in rows] == ["reference", "triton", "plain"] * 2
