"""Placement: which server hosts each group as servers fail and recover. Pure: makes no calls.

Every participant has a preferred server and moderator. While one of these is down, others take over; a lost server's
participants are spread evenly. They move back at the start of a round, once their server answers again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from simulation.rpc.endpoints import Endpoint, GroupAssignment


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
    return [range(start, stop) for start, stop in pairwise(starts)]


def place(participants: int, servers: int, moderators: int) -> list[GroupPlace]:
    """Split the participants evenly over all servers and evenly over all moderators, in participant order.

    A group is the intersection of a server's and a moderator's range: there are fewer than servers + moderators groups.
    """
    server_starts = [each.start for each in even_split(participants, servers)]
    moderator_starts = [each.start for each in even_split(participants, moderators)]
    return [
        GroupPlace(
            bisect_right(moderator_starts, first) - 1, bisect_right(server_starts, first) - 1, first, stop - first
        )
        for first, stop in pairwise(sorted({*server_starts, *moderator_starts, participants}))
    ]


class PlacementPlan:
    """All groups of a run and their servers."""

    def __init__(
        self, run: str, participants: int, servers: Sequence[Endpoint], moderator_servers: Sequence[Endpoint]
    ) -> None:
        self._run = run
        self._moves = 0
        places = place(participants, len(servers), len(moderator_servers))
        self._preferred = [
            GroupAssignment(
                f"{run}/group-{each.first}",
                each.first,
                each.count,
                servers[each.server],
                moderator_servers[each.moderator],
            )
            for each in places
        ]
        self._pieces = [[each] for each in self._preferred]  # the parts of each preferred group, as they are now

    @property
    def assignments(self) -> list[GroupAssignment]:
        """Return the desired groups in participant order; every participant is in exactly one."""
        return [assignment for pieces in self._pieces for assignment in pieces]

    def restore_preferred(self, servers: Collection[Endpoint], moderator_servers: Collection[Endpoint]) -> None:
        """Move groups back to their preferred server and moderator where these are among the given servers."""
        for number, preferred in enumerate(self._preferred):
            pieces = self._pieces[number]
            if preferred.server in servers and any(each.server != preferred.server for each in pieces):
                oid = self._new_id(preferred.first)
                pieces = [replace(preferred, oid=oid, moderator_server=pieces[0].moderator_server)]
            if preferred.moderator_server in moderator_servers:
                pieces = [replace(each, moderator_server=preferred.moderator_server) for each in pieces]
            self._pieces[number] = pieces

    def unassign_server(self, server: Endpoint) -> None:
        """Remove a server, whose objects are gone, from all assignments."""
        for pieces in self._pieces:
            pieces[:] = [replace(each, server=None) if each.server == server else each for each in pieces]

    def reassign(
        self, servers: Collection[Endpoint], moderator_servers: Sequence[Endpoint], onto: Sequence[Endpoint]
    ) -> None:
        """Move all groups to the given servers and moderators.

        Args:
            servers: Servers whose groups stay.
            moderator_servers: Servers whose moderators keep their groups and take over the others; at least one.
            onto: Servers that receive the displaced participants in even shares; if empty, these get no server.
        """
        servers, moderators_up = set(servers), set(moderator_servers)
        displaced = sum(each.count for each in self.assignments if each.server not in servers)
        stops = [share.stop for share in even_split(displaced, max(len(onto), 1))]
        moved = 0
        for number, pieces in enumerate(self._pieces):
            new: list[GroupAssignment] = []
            for piece in pieces:
                if piece.server in servers:
                    new.append(piece)
                    continue
                first, stop = piece.first, piece.first + piece.count
                while first < stop:  # split where a server's share ends
                    share = bisect_right(stops, moved)
                    count = min(stop - first, stops[share] - moved)
                    server = onto[share] if onto else None
                    new.append(GroupAssignment(self._new_id(first), first, count, server, piece.moderator_server))
                    first, moved = first + count, moved + count
            taker = moderator_servers[number % len(moderator_servers)]
            self._pieces[number] = [
                each if each.moderator_server in moderators_up else replace(each, moderator_server=taker)
                for each in new
            ]

    def _new_id(self, first: int) -> str:
        self._moves += 1
        return f"{self._run}/group-{first}.{self._moves}"
