"""Addresses of agent servers, ids of remote objects, and group assignments."""

import ipaddress
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from simulation.errors import SettingsError

ANSWERS_PER_MESSAGE, TEXTS_PER_MESSAGE = 250_000, 2000


@dataclass(frozen=True, order=True)
class Endpoint:
    """The address of one agent server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def endpoints(hosts: Sequence[str], first_port: int, per_host: int) -> list[Endpoint]:
    """Return the servers of all hosts, ordered by host and port. Every host uses the same ports."""
    return [Endpoint(host, first_port + offset) for host in hosts for offset in range(per_host)]


@dataclass(frozen=True)
class GroupAssignment:
    """The assignment of one group, participants first .. first+count-1, to a server and a moderator server."""

    oid: str  # remote id of the group, never reused; the id of its participant `index` is `<oid>/<index>`
    first: int
    count: int
    server: Endpoint | None  # None if no server is available
    moderator_server: Endpoint

    def chunks(self, size: int = ANSWERS_PER_MESSAGE) -> Iterator[tuple[int, int]]:
        """Split the group into consecutive ranges of up to `size` participants. Yield (first index, length) of each."""
        stop = self.first + self.count
        return ((first, min(size, stop - first)) for first in range(self.first, stop, size))


def run_of(remote_id: str) -> str:
    """Return the name of the run to which a remote object belongs (see `remote_run`)."""
    return remote_id.partition("/")[0]


def remote_run(run_id: str, part: str) -> str:
    """Return a run's name on the servers. Each resume uses a new `part`, because old objects may still exist."""
    return f"{run_id}~{part}"


def same_run(one: str, other: str) -> bool:
    """Return whether two names from `remote_run` belong to the same run."""
    return one.partition("~")[0] == other.partition("~")[0]


def address_of(host_name: str) -> str:
    """Return the IPv4 address of a host name. Raises SettingsError if no address is known that other hosts can use."""
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host_name))
    except (OSError, UnicodeError):
        raise SettingsError("no address is known for this name; check /etc/hosts or DNS") from None
    if host_name != "localhost" and (address.is_loopback or address.is_unspecified):
        advice = "give it the host's address in the network, in /etc/hosts or DNS"
        raise SettingsError(f"the name stands for {address} here, where no other host can reach it; {advice}")
    return str(address)


def ranges(ports: Collection[int]) -> str:
    """Format sorted ports or other numbers as ranges, such as `12330-12335, 12338`."""
    starts = [port for port in ports if port - 1 not in ports]
    ends = [port for port in ports if port + 1 not in ports]
    return ", ".join(f"{start}-{end}" if start < end else f"{start}" for start, end in zip(starts, ends, strict=True))
