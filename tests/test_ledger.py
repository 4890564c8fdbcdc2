import itertools
import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ima_seg.errors import UserError
from ima_seg.methods.ledger import RULES, MarginLedger
from tests.models import leave


def visit(ledger, case, distance=None, counts=True):
    """One visit: held where ``distance`` is None, else crossed there."""
    ledger.record(
        [case],
        crossed=torch.tensor([distance is not None]),
        distance=torch.tensor([math.nan if distance is None else distance]),
        counts=torch.tensor([counts]),
    )


@pytest.mark.parametrize("rule", RULES)
def test_one_visit_moves_a_margin_as_the_paper_says(rule):
    ledger = MarginLedger(delta=0.04, eps_max=0.2, rule=rule)
    visit(ledger, "held")
    visit(ledger, "crossed", 0.02)
    ledger.register(["unseen"])
    ledger.step()
    margins = ledger.get(["held", "crossed", "unseen"])
    moved_back = 0.04 if rule == "grow" else 0.03
    torch.testing.assert_close(margins, torch.tensor([0.08, moved_back, 0.04]))


def test_rules_differ_where_visits_disagree():
    expected = {
        "paper": 0.1 + 0.04,  # one lucky patch expands
        "majority": (0.1 + 0.04) / 2,  # one of three held
        "mean": (0.14 + 2 * (0.1 + 0.04) / 2) / 3,
        "grow": 0.1 + 0.04,
    }
    for rule, margin in expected.items():
        ledger = MarginLedger(delta=0.04, eps_max=1.0, rule=rule)
        ledger.register(["a"])
        ledger.cases["a"].margin = 0.1
        for distance in (None, 0.02, 0.06):
            visit(ledger, "a", distance)
        ledger.step()
        assert ledger.cases["a"].margin == pytest.approx(margin), rule


@pytest.mark.parametrize("rule", RULES)
def test_copies_in_a_batch_equal_visits_in_several_batches_in_any_order(rule):
    visits = [("a", None), ("a", 0.013), ("b", 0.02), ("a", 0.031), ("b", None)]
    results = set()
    for order in itertools.permutations(visits):
        ledger = MarginLedger(delta=0.04, eps_max=1.0, rule=rule)
        for case, distance in order:
            visit(ledger, case, distance)
        ledger.step()
        results.add((ledger.cases["a"].margin, ledger.cases["b"].margin))
    together = MarginLedger(delta=0.04, eps_max=1.0, rule=rule)
    together.record(
        [case for case, _ in visits],
        crossed=torch.tensor([d is not None for _, d in visits]),
        distance=torch.tensor([d or 0.0 for _, d in visits]),
        counts=torch.ones(5, dtype=torch.bool),
    )
    together.step()
    results.add((together.cases["a"].margin, together.cases["b"].margin))
    assert len(results) == 1, "exact sums: equal to the last bit"


def test_visits_that_say_nothing_move_nothing():
    ledger = MarginLedger(delta=0.04, eps_max=0.2)
    for _ in range(3):
        visit(ledger, "background", counts=False)
        visit(ledger, "below", 0.0, counts=False)
        summary = ledger.step()
    assert ledger.get(["background", "below"]).tolist() == pytest.approx([0.04, 0.04])
    assert summary.visits == 0 and math.isnan(summary.crossed_share)
    assert not summary.equilibrium, "a training that has not begun to attack is not in equilibrium"


def test_margins_stay_within_zero_and_the_cap():
    ledger = MarginLedger(delta=0.15, eps_max=0.2, rule="paper")
    for _ in range(3):
        visit(ledger, "up")
        visit(ledger, "down", 0.0)
        ledger.step()
    assert ledger.cases["up"].margin == 0.2
    assert not ledger.cases["up"].expanding, "at the cap a case no longer expands"
    assert 0 <= ledger.cases["down"].margin < 0.02


def test_equilibrium_when_the_median_stops_growing():
    ledger = MarginLedger(delta=0.05, eps_max=1.0, patience=3)
    seen = []
    for epoch in range(10):
        for case in "abc":
            boundary = 0.3
            margin = ledger.get([case]).item()
            visit(ledger, case, None if margin < boundary else boundary)
        seen.append(ledger.step().equilibrium)
        assert ledger.epoch == epoch + 1
    assert not any(seen[:6]) and seen[-1]


def test_waiting_for_a_usable_network_is_no_equilibrium():
    ledger = MarginLedger(delta=0.05, eps_max=1.0, patience=3)
    ledger.register("abc")
    for _ in range(10):
        assert not ledger.step().equilibrium
    visit(ledger, "a")
    assert not ledger.step().equilibrium, "one case of three is not half"
    for _ in range(5):
        visit(ledger, "b", 0.05)
        assert not ledger.step().equilibrium
    assert ledger.step().equilibrium


def test_state_survives_weights_only_and_goes_on_exactly(tmp_path):
    first = MarginLedger(delta=0.04, eps_max=0.3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for case in "abcd":
            visit(first, case, torch.rand(1, generator=generator).item() if case < "c" else None)
        first.step()
    torch.save({"ima": first.state_dict()}, tmp_path / "checkpoint.pth")
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["ima"]
    json.dumps({k: v for k, v in state.items() if not isinstance(v, torch.Tensor)})
    second = MarginLedger(delta=0.04, eps_max=0.3)
    second.load_state_dict(state)
    assert second.table() == first.table()
    for ledger in (first, second):
        visit(ledger, "a", 0.1)
        visit(ledger, "new")
    assert first.step() == second.step()
    assert second.table() == first.table()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": -1.0}, "delta is -1.0"),
        ({"eps_max": float("nan")}, "eps_max is nan"),
        ({"delta": 0.5}, "more than eps_max"),
        ({"rule": "median"}, "'median'; the rules there are: 'paper'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        MarginLedger(**{"delta": 0.04, "eps_max": 0.2, **settings})


def test_bad_states_and_records_are_named():
    ledger = MarginLedger(delta=0.04, eps_max=0.2)
    with pytest.raises(UserError, match="version 99"):
        ledger.load_state_dict({**ledger.state_dict(), "version": 99})
    state = ledger.state_dict()
    del state["margin"]
    with pytest.raises(UserError, match="without 'margin'"):
        ledger.load_state_dict(state)
    with pytest.raises(UserError, match=r"crossed has shape \(1,\) for 2 case ids"):
        ledger.record(["a", "b"], crossed=torch.ones(1), distance=torch.ones(2), counts=torch.ones(2))


VISITS = [("a", None), ("b", 0.013), ("c", 0.3), ("a", 0.031), ("b", None), ("d", 0.1), ("a", 0.0077), ("e", None)]


def _rank(rank: int, world: int, folder: str, rule: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/{rule}_store", rank=rank, world_size=world)
    ledger = MarginLedger(delta=0.04, eps_max=0.2, rule=rule)
    for _ in range(2):
        for case, distance in VISITS[rank::world]:
            visit(ledger, case, distance)
        summary = ledger.step()
    torch.save({"table": ledger.table(), "visits": summary.visits}, f"{folder}/{rule}_{rank}.pt")
    leave()


@pytest.mark.parametrize("rule", RULES)
def test_two_processes_hold_the_margins_of_a_single_one(tmp_path, rule):
    mp.spawn(_rank, (2, str(tmp_path), rule), nprocs=2)
    single = MarginLedger(delta=0.04, eps_max=0.2, rule=rule)
    for _ in range(2):
        for case, distance in VISITS:
            visit(single, case, distance)
        single.step()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rule}_{rank}.pt")
        assert result["table"] == single.table()
        assert result["visits"] == len(VISITS)
