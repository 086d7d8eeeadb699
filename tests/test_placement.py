"""Even splits, and the ids that follow from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.cluster.placement import PlacementPlan, even_split
from simulation.rpc.endpoints import Endpoint, endpoints, run_of

small = st.integers(1, 40)


def place(participants, servers, moderators):
    pools = (endpoints(["node"], first, count) for first, count in ((1, servers), (5000, moderators)))
    return PlacementPlan("run", participants, *pools).assignments


@given(st.integers(0, 10_000), small)
def test_a_split_is_even_and_complete(total, parts):
    ranges = even_split(total, parts)
    sizes = [len(each) for each in ranges]
    assert [index for each in ranges for index in each] == list(range(total))
    assert len(ranges) == parts and max(sizes) - min(sizes) <= 1


@given(st.integers(1, 3000), small, small)
def test_every_participant_is_in_one_group_and_no_server_is_idle(participants, servers, moderators):
    groups = place(participants, servers, moderators)
    assert [i for g in groups for i in range(g.first, g.first + g.count)] == list(range(participants))
    assert len(groups) < servers + moderators
    for first, count, whose in ((1, servers, "server"), (5000, moderators, "moderator_server")):
        ports = range(first, first + count)
        work = [sum(g.count for g in groups if getattr(g, whose).port == port) for port in ports]
        assert max(work) - min(work) <= 1
    assert len({(g.server, g.moderator_server) for g in groups}) == len(groups)


@pytest.mark.parametrize(
    ("participants", "servers", "moderators", "used"),
    [
        (1001, 10, 4, (10, 4)),
        (3, 10, 4, (3, 3)),
        (1, 10, 4, (1, 1)),
        (100, 2, 5, (2, 5)),
        (10**9, 1024, 256, (1024, 256)),
    ],
)
def test_uneven_cases(participants, servers, moderators, used):
    groups = place(participants, servers, moderators)
    assert (len({g.server for g in groups}), len({g.moderator_server for g in groups})) == used
    assert sum(g.count for g in groups) == participants


def test_ports_are_the_same_on_every_host():
    assert endpoints(["a", "b"], 100, 2) == [
        Endpoint("a", 100),
        Endpoint("a", 101),
        Endpoint("b", 100),
        Endpoint("b", 101),
    ]
    assert str(Endpoint("a", 100)) == "a:100"
    assert run_of("run/group-3/7") == "run"
