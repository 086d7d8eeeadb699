"""Addresses of agent servers, ids of the objects there, and which group is where."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from simulation.errors import SettingsError


@dataclass(frozen=True, order=True)
class Endpoint:
    """The address of one agent server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


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


@dataclass(frozen=True)
class GroupAssignment:
    """One group: participants first .. first+count-1.

    Attributes:
        oid: Its remote id, which is never used again for another one.
        server: Its participant server; None where nobody is left to ask them.
        chair: The server of the moderator who asks it.
    """

    oid: str
    first: int
    count: int
    server: Endpoint | None
    moderator_server: Endpoint


def address_of(host_name: str) -> str:
    """The IPv4 address that a host name stands for, which may be a loopback address for `localhost` alone.

    Raises SettingsError if there is none that other hosts could use; its message leaves it to the caller to say who.
    """
    try:
        address = socket.gethostbyname(host_name)
    except (OSError, UnicodeError):  # the latter for what cannot be a name
        raise SettingsError("no address is known for this name; check /etc/hosts or DNS") from None
    parsed = ipaddress.ip_address(address)
    if host_name != "localhost" and (parsed.is_loopback or parsed.is_unspecified):
        raise SettingsError(
            f"the name stands for {address} here, where no other host can reach it; give it the host's address in the "
            "network, in /etc/hosts or DNS"
        )
    return address


def ranges(ports: list[int]) -> str:
    """Sorted ports in few words: `12330-12335, 12338`."""
    starts = [port for port in ports if port - 1 not in ports]
    ends = [port for port in ports if port + 1 not in ports]
    return ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)
    )
