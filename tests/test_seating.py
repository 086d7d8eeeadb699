"""Who sits where as servers come and go: everybody in exactly one group, on servers that live."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from simulation.cluster.placement import Seating
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
def test_everyone_sits_in_exactly_one_group_on_a_living_server(participants, servers, chairs, events):
    seating = Seating("run", participants, SERVERS[:servers], CHAIRS[:chairs])
    ids = {seat.oid: (seat.first, seat.count, seat.server) for seat in seating.seats}
    for up, chairs_up, new_round in events:
        before = {seat.oid: seat for seat in seating.seats}
        if new_round:
            seating.bring_home(up, chairs_up)
        seating.reseat(up, chairs_up, up)
        seats = seating.seats
        assert [seat.first for seat in seats] == sorted(seat.first for seat in seats)
        assert all(one.first + one.count == other.first for one, other in pairwise(seats))
        assert (seats[0].first, seats[-1].first + seats[-1].count) == (0, participants)
        assert all(seat.server in up and seat.chair in chairs_up and seat.count > 0 for seat in seats)
        for seat in seats:  # an id is one group for ever
            assert ids.setdefault(seat.oid, (seat.first, seat.count, seat.server)) == (
                seat.first,
                seat.count,
                seat.server,
            )
        if not new_round:
            stayed = [seat for seat in before.values() if seat.server in up]
            assert {seat.oid for seat in stayed} <= {seat.oid for seat in seats}


@given(st.integers(9, 500), living(SERVERS))
def test_those_of_lost_servers_are_shared_out_evenly(participants, up):
    seating = Seating("run", participants, SERVERS, CHAIRS)
    before = {seat.oid for seat in seating.seats}
    seating.reseat(up, CHAIRS, up)
    new = dict.fromkeys(up, 0)
    for seat in seating.seats:
        if seat.oid not in before:
            new[seat.server] += seat.count
    assert max(new.values()) - min(new.values()) <= 1


def test_they_come_home_when_their_server_is_back():
    seating = Seating("run", 100, SERVERS, CHAIRS)
    home = [(seat.first, seat.count, seat.server, seat.chair) for seat in seating.seats]
    seating.reseat(SERVERS[1:], CHAIRS[1:], SERVERS[1:])
    assert [seat.server for seat in seating.seats if seat.server == SERVERS[0]] == []
    seating.bring_home(SERVERS, CHAIRS)
    seating.reseat(SERVERS, CHAIRS, SERVERS)
    assert [(seat.first, seat.count, seat.server, seat.chair) for seat in seating.seats] == home


def test_without_servers_they_sit_nowhere():
    seating = Seating("run", 10, SERVERS[:2], CHAIRS[:1])
    seating.reseat(SERVERS[:1], CHAIRS, SERVERS[:1])
    assert {seat.server for seat in seating.seats} == {SERVERS[0]}
    seating.reseat(SERVERS[1:2], CHAIRS, [])
    assert {seat.server for seat in seating.seats} == {None}
    seating.evict(SERVERS[0])
    assert sum(seat.count for seat in seating.seats) == 10
