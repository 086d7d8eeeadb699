"""Placement: which server hosts each group as servers fail and recover. Pure: makes no calls.

Every participant has a preferred server and moderator. While one of these is down, others take over; a lost server's
participants are spread evenly. They move back at the start of a round, once their server answers again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from simulation.rpc.endpoints import Endpoint, GroupAssignment, group_id


class PlacementPlan:
    """All groups of a run and their servers.

    Args:
        run: The run's remote id.
        participants: Number of participants.
        servers: The participant servers.
        moderator_servers: The moderator servers.
    """

    def __init__(
        self, run: str, participants: int, servers: Sequence[Endpoint], moderator_servers: Sequence[Endpoint]
    ) -> None:
        self._run = run
        self._made = 0
        self._homes = [
            GroupAssignment(
                group_id(run, each.first),
                each.first,
                each.count,
                servers[each.server],
                moderator_servers[each.moderator],
            )
            for each in place(participants, len(servers), len(moderator_servers))
        ]
        self._pieces = [[home] for home in self._homes]

    @property
    def assignments(self) -> list[GroupAssignment]:
        """Return the desired groups in participant order; every participant is in exactly one."""
        return [assignment for pieces in self._pieces for assignment in pieces]

    def restore_preferred(self, servers: Collection[Endpoint], moderator_servers: Collection[Endpoint]) -> None:
        """Move groups back to their preferred server and moderator where these are among the given servers."""
        for number, (home, pieces) in enumerate(zip(self._homes, self._pieces, strict=True)):
            if home.server in servers and any(assignment.server != home.server for assignment in pieces):
                self._pieces[number] = [
                    replace(home, oid=self._new_id(home.first), moderator_server=pieces[0].moderator_server)
                ]
            if home.moderator_server in moderator_servers:
                self._pieces[number] = [
                    replace(assignment, moderator_server=home.moderator_server) for assignment in self._pieces[number]
                ]

    def unassign_server(self, server: Endpoint) -> None:
        """Remove a server, whose objects are gone, from all assignments."""
        self._pieces = [
            [replace(assignment, server=None) if assignment.server == server else assignment for assignment in pieces]
            for pieces in self._pieces
        ]

    def reassign(
        self, servers: Collection[Endpoint], moderator_servers: Sequence[Endpoint], onto: Sequence[Endpoint]
    ) -> None:
        """Move all groups to the given servers and moderators.

        Args:
            servers: Servers whose groups stay.
            moderator_servers: Servers whose moderators keep their groups and take over the others; at least one.
            onto: Servers that receive the displaced participants in even shares; if empty, these get no server.
        """
        servers, chairs_alive = set(servers), set(moderator_servers)
        away = [assignment for assignment in self.assignments if assignment.server not in servers]
        shares = even_split(sum(assignment.count for assignment in away), max(len(onto), 1))
        stops = [share.stop for share in shares]
        passed = 0
        for number, pieces in enumerate(self._pieces):
            new: list[GroupAssignment] = []
            for assignment in pieces:
                if assignment.server in servers:
                    new.append(assignment)
                    continue
                at, end = assignment.first, assignment.first + assignment.count
                while at < end:  # split where a server's share ends
                    share = bisect_right(stops, passed)
                    count = min(end - at, stops[share] - passed)
                    server = onto[share] if onto else None
                    new.append(GroupAssignment(self._new_id(at), at, count, server, assignment.moderator_server))
                    at, passed = at + count, passed + count
            moderator_server = moderator_servers[number % len(moderator_servers)]
            self._pieces[number] = [
                assignment
                if assignment.moderator_server in chairs_alive
                else replace(assignment, moderator_server=moderator_server)
                for assignment in new
            ]

    def _new_id(self, first: int) -> str:
        self._made += 1
        return f"{group_id(self._run, first)}.{self._made}"


@dataclass(frozen=True)
class GroupPlace:
    """The indices of the server and the moderator of participants first .. first+count-1."""

    moderator: int
    server: int
    first: int
    count: int


def even_split(total: int, parts: int) -> list[range]:
    """Split 0 .. total-1 into `parts` consecutive ranges whose sizes differ by at most one, longer ones first."""
    size, longer = divmod(total, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return [range(starts[part], starts[part + 1]) for part in range(parts)]


def place(participants: int, servers: int, moderators: int) -> list[GroupPlace]:
    """Split the participants evenly over all servers and evenly over all moderators.

    A group is the intersection of a server's range and a moderator's range, so there are fewer than servers +
    moderators groups. They are in participant order, and every participant is in exactly one.
    """
    groups: list[GroupPlace] = []
    server_ranges = even_split(participants, servers)
    moderator_ranges = even_split(participants, moderators)
    server = moderator = first = 0
    while first < participants:
        while server_ranges[server].stop <= first:
            server += 1
        while moderator_ranges[moderator].stop <= first:
            moderator += 1
        stop = min(server_ranges[server].stop, moderator_ranges[moderator].stop)
        groups.append(GroupPlace(moderator, server, first, stop - first))
        first = stop
    return groups
