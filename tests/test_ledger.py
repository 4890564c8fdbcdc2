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
def test_one_visit_moves_a_margin_as_the_rules_say(rule):
    ledger = MarginLedger(delta=0.04, eps_max=0.2, rule=rule)
    visit(ledger, "held")
    visit(ledger, "crossed", 0.02)
    ledger.register(["unseen"])
    ledger.step()
    margins = ledger.get(["held", "crossed", "unseen"])
    # One that held grows by delta under all of them; q is 0.8.
    moved_back = {"grow": 0.04, "paper": 0.03, "ame": 0.02, "quantile": 0.04 - 0.04 / 4}[rule]
    grown = 0.04 + 0.04 * (0.9 if rule == "ame" else 1)
    torch.testing.assert_close(margins, torch.tensor([grown, moved_back, 0.04]))


def test_rules_differ_where_visits_disagree():
    expected = {
        "paper": 0.1 + 0.04,  # one lucky patch expands
        "grow": 0.1 + 0.04,
        "ame": (0.1 + 0.04 * 0.9**2 + 2 * 0.04) / 3,
        "quantile": 0.1 + 0.04 * (0.8 / 3 - 0.2 * 2 / 3) / 0.8,
    }
    for rule, margin in expected.items():
        ledger = MarginLedger(delta=0.04, eps_max=1.0, rule=rule)
        ledger.register(["a"])
        ledger.cases["a"].margin = 0.1
        for distance in (None, 0.02, 0.06):
            visit(ledger, "a", distance)
        ledger.step()
        assert ledger.cases["a"].margin == pytest.approx(margin), rule


def at_rest(draw, *, delta, visits, crossing_share=0.8, seed=0):
    """Mean margin of a case over the second half of a training, a ``draw(generator)`` the boundary of each patch."""
    ledger = MarginLedger(delta=delta, eps_max=1.0, crossing_share=crossing_share)
    generator, margins = torch.Generator().manual_seed(seed), []
    # As many steps of delta as are needed to get there and stay: those of one visit are noisy.
    epochs = round(60 / delta) if visits == 1 else round(12 / delta)
    for _ in range(epochs):
        boundaries, margin = draw(visits, generator), ledger.get(["a"])
        crossed = boundaries <= margin
        ledger.record(["a"] * visits, crossed=crossed, distance=boundaries, counts=torch.ones(visits, dtype=torch.bool))
        ledger.step()
        margins.append(margin.item())
    half = margins[len(margins) // 2 :]
    return sum(half) / len(half)


def two_kinds(visits, generator):
    """Half of the patches have their boundary about .02, half about .28."""
    far = torch.rand(visits, generator=generator) < 0.5
    return torch.where(far, 0.28, 0.02) + 0.04 * (torch.rand(visits, generator=generator) - 0.5)


@pytest.mark.parametrize("visits", [1, 20])
@pytest.mark.parametrize("delta", [0.03, 0.006])
def test_a_margin_rests_at_the_quantile_whatever_the_step_and_the_visits(delta, visits):
    # 80 % of the boundaries lie below 0.26 + 0.04 * 0.6.
    assert at_rest(two_kinds, delta=delta, visits=visits) == pytest.approx(0.284, rel=0.05)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_crossing_share_is_the_share_of_the_patches_that_cross(share):
    uniform = lambda visits, generator: 0.1 + 0.3 * torch.rand(visits, generator=generator)  # noqa: E731
    found = at_rest(uniform, delta=0.01, visits=5, crossing_share=share)
    assert found == pytest.approx(0.1 + 0.3 * share, rel=0.05)


def test_adaptive_margin_evolution_takes_ever_smaller_steps_and_has_no_cap():
    ledger = MarginLedger(delta=0.1, eps_max=100.0, rule="ame")
    margins = []
    for _ in range(60):
        margins.append(ledger.get(["a"]).item())
        visit(ledger, "a")
        ledger.step()
    steps = [after - before for before, after in itertools.pairwise(margins)]
    # Within a step's rounding to float32.
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(steps))
    assert steps[0] == pytest.approx(0.09) and margins[-1] > 1
    visit(ledger, "a", 0.37)
    ledger.step()
    assert ledger.cases["a"].margin == pytest.approx(0.37), "the crossing itself, no mean with the old margin"


def test_why_a_case_was_never_searched_is_kept():
    ledger = MarginLedger(delta=0.04, eps_max=0.2)
    no, yes = torch.tensor([False] * 3), torch.tensor([True, False, False])
    ledger.record(
        ["below", "background", "searched"], crossed=no, distance=torch.zeros(3), counts=yes.flip(0), below=yes,
        background=torch.tensor([False, True, False]),
    )  # fmt: skip
    ledger.register(["undrawn"])
    summary = ledger.step()
    assert summary.never_searched == 3
    other = MarginLedger(delta=0.04, eps_max=0.2)
    other.load_state_dict(ledger.state_dict())
    obstacles = {case: record.obstacle for case, record in other.cases.items()}
    assert obstacles.pop("searched") == ""
    assert obstacles == {
        "below": "all patches with foreground had crossed without perturbation",
        "background": "no patch had foreground",
        "undrawn": "not drawn yet",
    }


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
        ({"rule": "median"}, "'median'; the rules there are: 'quantile'"),
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
