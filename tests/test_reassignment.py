"""Placement as servers fail and recover: every participant in exactly one group, on servers that are up."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from simulation.cluster.placement import PlacementPlan
from simulation.rpc.endpoints import Endpoint

SERVERS = [Endpoint(f"node{number % 3}", 1000 + number // 3) for number in range(9)]
MODERATORS = [Endpoint(f"node{number % 3}", 2000 + number // 3) for number in range(6)]


def some_of(pool):
    return st.lists(st.sampled_from(pool), min_size=1, unique=True)


@given(
    st.integers(1, 500),
    st.integers(1, len(SERVERS)),
    st.integers(1, len(MODERATORS)),
    st.lists(st.tuples(some_of(SERVERS), some_of(MODERATORS), st.booleans()), max_size=6),
)
def test_every_participant_is_in_one_group_on_a_live_server(participants, servers, moderator_servers, events):
    plan = PlacementPlan("run", participants, SERVERS[:servers], MODERATORS[:moderator_servers])
    ids = {assignment.oid: (assignment.first, assignment.count, assignment.server) for assignment in plan.assignments}
    for up, moderators_up, new_round in events:
        before = {assignment.oid: assignment for assignment in plan.assignments}
        if new_round:
            plan.restore_preferred(up, moderators_up)
        plan.reassign(up, moderators_up, up)
        assignments = plan.assignments
        assert [assignment.first for assignment in assignments] == sorted(
            assignment.first for assignment in assignments
        )
        assert all(one.first + one.count == other.first for one, other in pairwise(assignments))
        assert (assignments[0].first, assignments[-1].first + assignments[-1].count) == (0, participants)
        assert all(
            assignment.server in up and assignment.moderator_server in moderators_up and assignment.count > 0
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


@given(st.integers(9, 500), some_of(SERVERS))
def test_participants_of_lost_servers_are_distributed_evenly(participants, up):
    plan = PlacementPlan("run", participants, SERVERS, MODERATORS)
    before = {assignment.oid for assignment in plan.assignments}
    plan.reassign(up, MODERATORS, up)
    new = dict.fromkeys(up, 0)
    for assignment in plan.assignments:
        if assignment.oid not in before:
            new[assignment.server] += assignment.count
    assert max(new.values()) - min(new.values()) <= 1


def test_they_move_back_when_their_server_is_back():
    plan = PlacementPlan("run", 100, SERVERS, MODERATORS)
    preferred = [
        (assignment.first, assignment.count, assignment.server, assignment.moderator_server)
        for assignment in plan.assignments
    ]
    plan.reassign(SERVERS[1:], MODERATORS[1:], SERVERS[1:])
    assert [assignment.server for assignment in plan.assignments if assignment.server == SERVERS[0]] == []
    plan.restore_preferred(SERVERS, MODERATORS)
    plan.reassign(SERVERS, MODERATORS, SERVERS)
    assert [
        (assignment.first, assignment.count, assignment.server, assignment.moderator_server)
        for assignment in plan.assignments
    ] == preferred


def test_without_servers_groups_are_unassigned():
    plan = PlacementPlan("run", 10, SERVERS[:2], MODERATORS[:1])
    plan.reassign(SERVERS[:1], MODERATORS, SERVERS[:1])
    assert {assignment.server for assignment in plan.assignments} == {SERVERS[0]}
    plan.reassign(SERVERS[1:2], MODERATORS, [])
    assert {assignment.server for assignment in plan.assignments} == {None}
    plan.unassign_server(SERVERS[0])
    assert sum(assignment.count for assignment in plan.assignments) == 10
