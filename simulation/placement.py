"""Who sits where: even splits of index ranges over servers and moderators; pure arithmetic."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Endpoint:
    """The address of one agent server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class GroupPlace:
    """Participants first .. first+count-1 sit on one server, and one moderator asks them."""

    moderator: int
    server: int
    first: int
    count: int


def even_split(total: int, parts: int) -> list[range]:
    """Split 0..total-1 into `parts` consecutive ranges whose sizes differ by at most one, the longer ones first."""
    size, longer = divmod(total, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return [range(starts[part], starts[part + 1]) for part in range(parts)]


def place(participants: int, servers: int, moderators: int) -> list[GroupPlace]:
    """Split the participants evenly over all servers, and evenly over all moderators.

    A group is where a server's range and a moderator's range meet, so there are fewer than servers + moderators
    groups, in the order of their participants, and every participant is in exactly one.
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


def group_of(groups: Sequence[GroupPlace], participant: int) -> GroupPlace:
    """The group that a participant sits in, of groups in the order of their participants; raises IndexError."""
    found = bisect_right(groups, participant, key=lambda group: group.first) - 1
    if found < 0 or participant >= groups[found].first + groups[found].count:
        raise IndexError(participant)
    return groups[found]


def endpoints(hosts: Sequence[str], first_port: int, per_host: int) -> list[Endpoint]:
    """The servers of all hosts, host by host; every host uses the same ports."""
    return [Endpoint(host, first_port + offset) for host in hosts for offset in range(per_host)]


def group_id(run_id: str, first: int) -> str:
    """The remote id of the group that starts with participant `first`; its participants are `<group id>/<index>`."""
    return f"{run_id}/group-{first}"


def run_of(remote_id: str) -> str:
    """The run that a remote id belongs to."""
    return remote_id.partition("/")[0]


def remote_run(run_id: str, part: str) -> str:
    """What a run is called on the servers: a run that is resumed is another one there, as the former may still be."""
    return f"{run_id}~{part}"


def same_run(one: str, other: str) -> bool:
    """Whether two names on the servers are of the same run, played in parts."""
    return one.partition("~")[0] == other.partition("~")[0]
