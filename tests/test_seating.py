"""Who sits where as servers come and go: everybody in exactly one group, on servers that live."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from simulation.cluster.placement import PlacementPlan
from simulation.rpc.endpoints import Endpoint

SERVERS = [Endpoint(f"node{number % 3}", 1000 + number // 3) for number in range(9)]
CHAIRS = [Endpoint(f"node{number % 3}", 2000 + number // 3) for number in range(6)]


def living(pool):
    return st.lists(st.sampled_from(pool), min_size=1, unique=True)


@given(
    st.integers(1, 500),
    st.integers(1, len(SERVERS)),
    st.integers(1, len(CHAIRS)),
    st.lists(st.tuples(living(SERVERS), living(CHAIRS), st.booleans()), max_size=6),
)
def test_everyone_sits_in_exactly_one_group_on_a_living_server(participants, servers, moderator_servers, events):
    seating = PlacementPlan("run", participants, SERVERS[:servers], CHAIRS[:moderator_servers])
    ids = {
        assignment.oid: (assignment.first, assignment.count, assignment.server) for assignment in seating.assignments
    }
    for up, chairs_up, new_round in events:
        before = {assignment.oid: assignment for assignment in seating.assignments}
        if new_round:
            seating.restore_preferred(up, chairs_up)
        seating.reassign(up, chairs_up, up)
        assignments = seating.assignments
        assert [assignment.first for assignment in assignments] == sorted(
            assignment.first for assignment in assignments
        )
        assert all(one.first + one.count == other.first for one, other in pairwise(assignments))
        assert (assignments[0].first, assignments[-1].first + assignments[-1].count) == (0, participants)
        assert all(
            assignment.server in up and assignment.moderator_server in chairs_up and assignment.count > 0
            for assignment in assignments
        )
        for assignment in assignments:  # an id is one group for ever
            assert ids.setdefault(assignment.oid, (assignment.first, assignment.count, assignment.server)) == (
                assignment.first,
                assignment.count,
                assignment.server,
            )
        if not new_round:
            stayed = [assignment for assignment in before.values() if assignment.server in up]
            assert {assignment.oid for assignment in stayed} <= {assignment.oid for assignment in assignments}


@given(st.integers(9, 500), living(SERVERS))
def test_those_of_lost_servers_are_shared_out_evenly(participants, up):
    seating = PlacementPlan("run", participants, SERVERS, CHAIRS)
    before = {assignment.oid for assignment in seating.assignments}
    seating.reassign(up, CHAIRS, up)
    new = dict.fromkeys(up, 0)
    for assignment in seating.assignments:
        if assignment.oid not in before:
            new[assignment.server] += assignment.count
    assert max(new.values()) - min(new.values()) <= 1


def test_they_come_home_when_their_server_is_back():
    seating = PlacementPlan("run", 100, SERVERS, CHAIRS)
    home = [
        (assignment.first, assignment.count, assignment.server, assignment.moderator_server)
        for assignment in seating.assignments
    ]
    seating.reassign(SERVERS[1:], CHAIRS[1:], SERVERS[1:])
    assert [assignment.server for assignment in seating.assignments if assignment.server == SERVERS[0]] == []
    seating.restore_preferred(SERVERS, CHAIRS)
    seating.reassign(SERVERS, CHAIRS, SERVERS)
    assert [
        (assignment.first, assignment.count, assignment.server, assignment.moderator_server)
        for assignment in seating.assignments
    ] == home


def test_without_servers_they_sit_nowhere():
    seating = PlacementPlan("run", 10, SERVERS[:2], CHAIRS[:1])
    seating.reassign(SERVERS[:1], CHAIRS, SERVERS[:1])
    assert {assignment.server for assignment in seating.assignments} == {SERVERS[0]}
    seating.reassign(SERVERS[1:2], CHAIRS, [])
    assert {assignment.server for assignment in seating.assignments} == {None}
    seating.unassign_server(SERVERS[0])
    assert sum(assignment.count for assignment in seating.assignments) == 10
