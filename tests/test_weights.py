"""Files of torch, and the names of what they hold."""

import pytest
import torch
from torch import nn

from ima_seg.weights import strip_prefixes


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def compiled_part():
    whole = network()
    whole[0] = torch.compile(whole[0], backend="eager")
    return whole


WRAPPED = {
    "bare": network,
    "DataParallel": lambda: nn.DataParallel(network()),
    "compiled": lambda: torch.compile(network(), backend="eager"),
    "compiled, then parallel": lambda: nn.DataParallel(torch.compile(network(), backend="eager")),
    "parallel, then compiled": lambda: torch.compile(nn.DataParallel(network()), backend="eager"),
    "a part compiled": compiled_part,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_of_a_wrapped_network_load_into_the_bare_one(name):
    state = WRAPPED[name]().state_dict()
    bare = network()
    bare.load_state_dict(strip_prefixes(state))
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(bare.state_dict().values(), state.values(), strict=True)
    )


def test_names_that_are_no_prefix_or_would_become_equal_are_left():
    for names in (["module.weight", "bias"], ["a._orig_mod.b", "a.b"], []):
        assert list(strip_prefixes(dict.fromkeys(names))) == names
