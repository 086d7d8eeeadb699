"""Placement: assigns groups to servers and moderators as servers fail and recover. Pure: makes no calls."""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import groupby, pairwise

from simulation.rpc.endpoints import Endpoint, GroupAssignment


def even_split(total: int, parts: int) -> list[range]:
    """Split 0 .. total-1 into `parts` consecutive ranges whose sizes differ by at most 1. Longer ranges come first."""
    size, longer = divmod(total, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


class PlacementPlan:
    """The assignment of all groups of a run to servers and moderators.

    All servers and all moderators share the participants evenly, in participant order: these are their preferred ones.
    While a server is down, the others share its participants evenly. A group is the intersection of a server's range
    and a moderator's range, so there are fewer groups than servers + moderators.
    """

    def __init__(
        self, run: str, participants: int, servers: Sequence[Endpoint], moderators: Sequence[Endpoint]
    ) -> None:
        self._run = run
        self._moves = 0
        server_starts = [each.start for each in even_split(participants, len(servers))]
        moderator_starts = [each.start for each in even_split(participants, len(moderators))]
        self._preferred = [
            GroupAssignment(
                *(f"{run}/group-{first}", first, stop - first),
                servers[bisect_right(server_starts, first) - 1],
                moderators[bisect_right(moderator_starts, first) - 1],
            )
            for first, stop in pairwise(sorted({*server_starts, *moderator_starts, participants}))
        ]
        self.assignments = [*self._preferred]  # in participant order; every participant is in exactly one group

    def restore_preferred(self, servers: Collection[Endpoint], moderator_servers: Collection[Endpoint]) -> None:
        """Move groups back to their preferred servers and moderators that are in `servers` or `moderator_servers`."""
        starts = [each.first for each in self._preferred]
        pieces_of = groupby(self.assignments, lambda piece: bisect_right(starts, piece.first) - 1)
        self.assignments = []
        for preferred, (_, group) in zip(self._preferred, pieces_of, strict=True):
            pieces = [*group]
            if preferred.server in servers and any(each.server != preferred.server for each in pieces):
                oid = self._new_id(preferred.first)
                pieces = [replace(preferred, oid=oid, moderator_server=pieces[0].moderator_server)]
            if preferred.moderator_server in moderator_servers:
                pieces = [replace(each, moderator_server=preferred.moderator_server) for each in pieces]
            self.assignments += pieces

    def unassign_server(self, server: Endpoint) -> None:
        """Remove a lost server from all assignments."""
        self.assignments = [replace(each, server=None) if each.server == server else each for each in self.assignments]

    def reassign(
        self, servers: Collection[Endpoint], moderator_servers: Sequence[Endpoint], onto: Sequence[Endpoint]
    ) -> None:
        """Move groups away from servers outside `servers` and from moderators outside `moderator_servers`.

        Participants that need another server are split evenly over the servers in `onto`. If `onto` is empty, they get
        no server. `moderator_servers` must not be empty.
        """
        servers, moderators_up = set(servers), set(moderator_servers)
        displaced = sum(each.count for each in self.assignments if each.server not in servers)
        stops = [share.stop for share in even_split(displaced, max(len(onto), 1))]
        moved, assignments = 0, list[GroupAssignment]()
        for number, each in enumerate(self.assignments):
            moderator_server = each.moderator_server
            if moderator_server not in moderators_up:
                moderator_server = moderator_servers[number % len(moderator_servers)]
            if each.server in servers:
                assignments.append(replace(each, moderator_server=moderator_server))
                continue
            first, stop = each.first, each.first + each.count
            while first < stop:  # split the group where the share of a server ends
                share = bisect_right(stops, moved)
                count, server = min(stop - first, stops[share] - moved), onto[share] if onto else None
                assignments.append(GroupAssignment(self._new_id(first), first, count, server, moderator_server))
                first, moved = first + count, moved + count
        self.assignments = assignments

    def _new_id(self, first: int) -> str:
        self._moves += 1
        return f"{self._run}/group-{first}.{self._moves}"
