"""Several hosts on one machine: network namespaces with a cable each to one switch, and a copy of the checkout in each.

    with network_of(folder) as network:
        network.start_servers()
        node1 = network["node1"]
        node1.run("run_simulation.sh", "4", "1000")
        network.cut("node2")

The switch, a bridge, lives in a namespace of its own, so that nothing is added to this machine's own network, and any
number of networks may exist at once. Processes are those of this machine: a test signals them by pid.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Checkout, copy_checkout

from simulation.rpc.cluster_key import load_or_make

NODES = ("node1", "node2", "node3", "node4")  # what HOSTS names
UNTRUSTED = "untrusted"  # on the same switch, but not a host of the cluster, and with another cluster key
BASE_PORT = 12330
SERVER_PER_HOST, MODERATOR_NUM = 4, 1
NAMES_OF_NAMESPACES = Path("/etc/netns")  # `ip netns exec` mounts what is in a namespace's folder here over /etc
OURS = "simulation"  # what the names of our namespaces begin with
_serial = itertools.count()


@dataclass(kw_only=True)
class Host(Checkout):
    """One host of a network: `run`, `start`, `play` of its checkout happen in its namespace, with its HOST_NAME."""

    name: str
    namespace: str
    address: str

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        return super().start(*command, **{**options, "env": {"HOST_NAME": self.name, **options.get("env", {})}})

    def pid_at(self, port: int) -> int:
        """The process of the agent server on this port."""
        return self.pid(port - self.base_port)

    def logs(self) -> dict[int, str]:
        """What its agent servers have logged so far, by port."""
        found = (self.path / "run/servers").glob("[0-9]*.log")
        return {int(path.stem): path.read_text() for path in found}

    def inside(self) -> list[psutil.Process]:
        """Everything that runs in the namespace, whatever started it."""
        return processes_in(self.namespace)

    def names(self, names: dict[str, str]) -> None:
        """Write the host's /etc/hosts, name to address; seen at once by everything on it."""
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        self.etc("hosts", "\n".join(lines) + "\n")

    @property
    def etc_folder(self) -> Path:
        """Where the files are that are the host's own under /etc."""
        return NAMES_OF_NAMESPACES / self.namespace

    def etc(self, name: str, text: str) -> None:
        """Write a file that is the host's own under /etc; a new one is seen by what is started from now on."""
        self.etc_folder.mkdir(parents=True, exist_ok=True)
        (self.etc_folder / name).write_text(text)


class Network:
    """node1 to node4 with one cluster key and one configs/cluster.env, the untrusted host, and their switch."""

    def __init__(self, folder: Path) -> None:
        self._prefix = f"{OURS}-{os.getpid()}-{_created(os.getpid())}-{next(_serial)}"
        self._switch = f"{self._prefix}-switch"
        self._namespaces: list[str] = []
        self._folder = folder
        self.hosts: dict[str, Host] = {}

    def build(self) -> None:
        """Make switch, hosts and cables; `close` removes what there is, also after a failure here."""
        self._add(self._switch)
        _ip("-n", self._switch, "link", "add", "name", "bridge0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge0", "up")
        load_or_make(self._folder / "key")
        addresses = {name: f"10.77.0.{number + 1}" for number, name in enumerate((*NODES, UNTRUSTED))}
        for name in addresses:
            self.hosts[name] = self._host(name, addresses)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    @property
    def nodes(self) -> list[Host]:
        """The hosts of the cluster, without the untrusted one."""
        return [self.hosts[name] for name in NODES]

    @property
    def names(self) -> dict[str, str]:
        """The addresses by host name, as written to every host's /etc/hosts."""
        return {host.name: host.address for host in self.hosts.values()}

    def cut(self, name: str) -> None:
        """Pull the host's cable at the switch: packets to and from it are lost, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        """Plug the cable in again."""
        _ip("-n", self._switch, "link", "set", f"to-{name}", "up")

    def start_servers(
        self, names: Iterable[str] = NODES, server_per_host: int = SERVER_PER_HOST, **options: Any
    ) -> None:
        """Start the agent servers of these hosts, all at once; it is fine if exactly these run already."""
        self._everywhere(names, "start_all_server.sh", str(server_per_host), **options)

    def stop_servers(self, names: Iterable[str] = NODES) -> None:
        """Stop the agent servers of these hosts, all at once; it is fine if none runs."""
        self._everywhere(names, "stop_all_server.sh")

    def close(self) -> None:
        """Remove everything; fails if stopping the servers leaves a process, or a half-written file."""
        left: list[str] = []
        try:
            self.stop_servers(self.hosts)
            for host in self.hosts.values():
                left += [f"{host.name}: {' '.join(process.cmdline())[-150:]}" for process in host.inside()]
                left += [str(path) for path in host.path.rglob("*.new")]
        finally:
            for namespace in self._namespaces:
                _remove(namespace)
        assert not left, f"left behind: {left}"

    def _everywhere(self, names: Iterable[str], *command: str, **options: Any) -> None:
        hosts = [self.hosts[name] for name in names]
        with ThreadPoolExecutor(len(hosts)) as pool:
            for host, done in zip(hosts, pool.map(lambda host: host.run(*command, **options), hosts), strict=True):
                assert done.returncode == 0, f"{host.name}: {done.stderr}"

    def _host(self, name: str, addresses: dict[str, str]) -> Host:
        namespace = self._add(f"{self._prefix}-{name}")
        port = f"to-{name}"  # of the switch
        _ip("-n", self._switch, "link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge0", "up")
        _ip("-n", namespace, "address", "add", f"{addresses[name]}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", link, "up")
        path = copy_checkout(self._folder / name / "a b")
        if name != UNTRUSTED:
            shutil.copytree(self._folder / "key", path / ".cluster")
        settings = f'BASE_PORT={BASE_PORT}\nMODERATOR_NUM={MODERATOR_NUM}\nHOSTS="{" ".join(NODES)}"\n'
        (path / "configs/cluster.env").write_text(settings)
        in_front = ("ip", "netns", "exec", namespace)
        host = Host(path, BASE_PORT, in_front, name=name, namespace=namespace, address=addresses[name])
        host.names(addresses)
        return host

    def _add(self, namespace: str) -> str:
        _ip("netns", "add", namespace)
        self._namespaces.append(namespace)
        return namespace


@contextlib.contextmanager
def network_of(folder: Path) -> Iterator[Network]:
    """Four hosts and an untrusted one, with nothing running; skips where network namespaces cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("hosts are network namespaces here, which takes root")
    if shutil.which("ip") is None:
        pytest.skip("hosts are network namespaces here, which takes the command ip (Debian: apt install iproute2)")
    remove_leftovers()
    network = Network(folder)
    try:
        network.build()
        yield network
    finally:
        network.close()


def remove_leftovers() -> None:
    """Remove the namespaces of test sessions that were aborted, what runs in them, and their files."""
    listed = [line.split()[0] for line in _ip("netns", "list").splitlines()]
    for namespace in {*listed, *(path.name for path in NAMES_OF_NAMESPACES.glob("*"))}:
        session = re.fullmatch(rf"{OURS}-(\d+)-(\d+)-\d+-\w+", namespace)
        if session and _created(int(session[1])) != int(session[2]):
            _remove(namespace)


def processes_in(namespace: str) -> list[psutil.Process]:
    """Everything that runs in a namespace."""
    found = []
    for pid in _ip("netns", "pids", namespace).split():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _remove(namespace: str) -> None:
    """Remove a namespace, the processes and interfaces in it, and its files; another session may be doing the same."""
    if Path("/run/netns", namespace).exists():
        with contextlib.suppress(AssertionError):
            running = processes_in(namespace)
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(running, timeout=5)
            _ip("netns", "delete", namespace)
        assert namespace not in _ip("netns", "list").split(), f"{namespace} cannot be removed"
    shutil.rmtree(NAMES_OF_NAMESPACES / namespace, ignore_errors=True)
    with contextlib.suppress(OSError):  # somebody else's are in it, or it is gone
        NAMES_OF_NAMESPACES.rmdir()


def _created(pid: int) -> int:
    try:
        return int(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return -1


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
