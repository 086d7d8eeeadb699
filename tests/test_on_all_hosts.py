"""One command for all hosts, over real ssh: each host is an address of this machine where a real sshd listens."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, Checkout, clean_up, copy_checkout, free_ports, one_line, until

SSHD = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")
LOOPBACK = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
NO_SSHD_THERE = "127.0.0.9"
OUTSIDE = "198.18.77."  # of the range for benchmarks of networks, which nobody routes
GAME = "./run_simulation.sh"
DOCS = ROOT / "docs/cluster.md"


@dataclass
class Hosts:
    """Several hosts: addresses with a folder each, in which `ssh` to it begins."""

    addresses: list[str]
    folders: dict[str, Path]
    here: Checkout  # the checkout of the first one, from which commands are given
    known: Path  # the hosts' keys that ssh has accepted

    def env(self, **settings: str) -> dict[str, str]:
        config = str(self.here.path.parent.parent / "ssh config")
        return {"HOSTS": " ".join(self.addresses), "REMOTE_DIR": "a b", "SSH_CONFIG": config} | settings

    def run(self, *arguments: str, status: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
        done = self.here.run("on_all_hosts.sh", *arguments, env=self.env(**settings))
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def checkout(self, address: str) -> Path:
        return self.folders[address] / "a b"

    def script(self, text: str) -> str:
        """Give every host a script; returns its name."""
        for address in self.addresses:
            path = self.checkout(address) / "script.sh"
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)
        return "script.sh"


def make_key(path: Path) -> str:
    """Make an ssh key, and return its public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", path], check=True)
    return path.with_suffix(".pub").read_text()


def start_sshd(folder: Path, addresses: list[str], folders: dict[str, Path], port: int) -> subprocess.Popen[bytes]:
    """Serve ssh on these addresses, with keys and settings of its own; sessions begin in their address's folder."""
    (folder / "authorized_keys").write_text(make_key(folder / "user_key"))
    make_key(folder / "host_key")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # it refuses to start without, whose service makes it
    lines = [f"ListenAddress {address}:{port}" for address in addresses]
    lines += [f'HostKey "{folder}/host_key"', f'AuthorizedKeysFile "{folder}/authorized_keys"', "PidFile none"]
    lines += ["StrictModes no", "UsePAM no", "PasswordAuthentication no", "KbdInteractiveAuthentication no"]
    lines += ["PermitRootLogin prohibit-password", "MaxStartups 100"]
    for address in addresses:
        run = f"cd {shlex.quote(str(folders[address]))}; exec sh {shlex.quote(str(folder / 'login shell'))}"
        lines += [f"Match LocalAddress {address}", f'ForceCommand {run} "$SSH_ORIGINAL_COMMAND"']
    # Stands for the login shell, whichever it is: each gives other characters than these a meaning of its own
    (folder / "login shell").write_text('case "$1" in "" | *[!a-z/]*) exit 9 ;; esac; exec $1\n')
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    (folder / "ssh config").write_text(
        f'Host *\nPort {port}\nIdentityFile "{folder}/user_key"\nIdentitiesOnly yes\nIdentityAgent none\n'
        f'UserKnownHostsFile "{folder}/known hosts"\nGlobalKnownHostsFile none\n'
    )
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    until(lambda: process.poll() is not None or listens(addresses[-1], port), 10, "sshd listens")
    assert process.poll() is None, (folder / "sshd.log").read_text()
    return process


def listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def several(folder: Path, addresses: list[str]) -> Iterator[Hosts]:
    """Hosts with a checkout each, which git would have cloned there."""
    if SSHD is None:
        pytest.skip("no sshd here (Debian: apt install openssh-server)")
    folders = {address: folder / f"host {number}" for number, address in enumerate(addresses)}
    for path in folders.values():
        copy_checkout(path / "a b")
    base_port = free_ports(25)
    checkouts = [Checkout(path / "a b", base_port) for path in folders.values()]
    sshd = start_sshd(folder, addresses, folders, base_port + 24)
    try:
        yield Hosts(addresses, folders, checkouts[0], folder / "known hosts")
    finally:
        for session in psutil.Process(sshd.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                session.kill()
        sshd.terminate()
        sshd.wait()
    for checkout in checkouts:
        clean_up(checkout)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Three hosts on the loopback network, on which no agent servers run."""
    yield from several(tmp_path, LOOPBACK)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts whose agent servers reach each other: addresses that are not the loopback network's."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("addresses of its own need root and the program ip (Debian: apt install iproute2)")
    added: list[str] = []
    try:
        for number in range(11, 250):  # those that another run of the tests has added are taken
            address = f"{OUTSIDE}{number}"
            if subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=False).returncode == 0:
                added.append(address)
            if len(added) == 2:
                break
        assert len(added) == 2
        yield from several(tmp_path, added)
    finally:
        for address in added:
            subprocess.run(["ip", "address", "del", f"{address}/32", "dev", "lo"], check=True)


def lines_of(text: str, address: str) -> list[str]:
    """What one host said."""
    return [line.removeprefix(f"{address}: ") for line in text.splitlines() if line.startswith(f"{address}: ")]


def summary_of(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_about_clusters(outside):
    """Every command of docs/cluster.md on two hosts, but for those of Slurm and the one that installs vLLM."""
    commands = re.findall(r"```shell\n(.*?)```", DOCS.read_text(), re.DOTALL)
    commands = [line for block in commands for line in block.splitlines() if line]
    commands = [line for line in commands if "sbatch" not in line and line != "./start_vllm.sh --install"]
    assert len(commands) >= 5 and any(command.startswith(GAME) for command in commands)
    said = {}
    for command in commands:
        done = outside.here.run(*shlex.split(command), env=outside.env())
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said[command] = done
        if not command.startswith((GAME, "./run_simulation.sh --install-only")):
            assert summary_of(done) == "2 of 2 hosts succeeded"
    started = next(done for command, done in said.items() if "start_all_server.sh 10" in command)
    status = next(done for command, done in said.items() if "--status" in command)
    for address in outside.addresses:
        assert f"are ready on {address}, ports" in lines_of(started.stdout, address)[0]
        assert len(lines_of(status.stdout, address)) == 1 + 10 + 4
        assert not list(outside.checkout(address).glob("run/servers/*.pid"))
    summary = outside.here.summary()
    assert summary["config"]["hosts"] == outside.addresses
    assert all(entry["answered"] == entry["asked"] > 0 for entry in summary["rounds"])


def test_output_is_streamed_with_the_name_of_its_host(hosts):
    script = hosts.script('echo "one  $HOST_NAME"; echo two >&2; read -r _ <go; printf three')
    for address in hosts.addresses:
        os.mkfifo(hosts.checkout(address) / "go")
    process = hosts.here.start("on_all_hosts.sh", f"./{script}", env=hosts.env(), bufsize=1)
    early = sorted(process.stdout.readline() for _ in hosts.addresses)
    assert early == [f"{address}: one  {address}\n" for address in hosts.addresses]
    for address in hosts.addresses:
        (hosts.checkout(address) / "go").write_text("\n")
    out, err = process.communicate(timeout=120)
    assert sorted(out.splitlines()) == [f"{address}: three" for address in hosts.addresses]
    for address in hosts.addresses:
        assert lines_of(err, address)[-1] == "two"
    assert process.returncode == 0 and err.splitlines()[-1] == "3 of 3 hosts succeeded"


def test_settings_arrive_unchanged(hosts):
    script = hosts.script(
        'for a in "$@" "$HOST_NAME" "$BASE_PORT" "$MODEL_PATH" "$CLUSTER_KEY_DIR" "${HOSTS-}" "${MAX_VALUE-none}"; '
        'do printf "[%s]" "$a"; done; echo; read -r line || echo "no input"; echo "${SSH_CONFIG-none}"'
    )
    strange = 'it\'s a "path" $HOME `id` \\ * {a,b} !1 ^ %s \\n'
    (hosts.here.path / "configs/cluster.env").write_text("MAX_VALUE=7\n")
    done = hosts.run(script, "a b", "", "c'd", "-n", BASE_PORT="15000", MODEL_PATH=strange, CLUSTER_KEY_DIR="/my keys")
    for address in hosts.addresses:
        assert lines_of(done.stdout, address) == [
            f"[a b][][c'd][-n][{address}][15000][{strange}][/my keys][{' '.join(hosts.addresses)}][none]",
            "no input",
            "none",
        ]


def test_exit_statuses_are_kept_and_reported(hosts):
    script = hosts.script('case "$HOST_NAME" in *.2) echo broken >&2; exit 4 ;; *.3) exit 1 ;; esac')
    done = hosts.run(script, status=4)
    assert lines_of(done.stderr, LOOPBACK[1])[-1] == "broken"
    assert summary_of(done) == (
        f"1 of 3 hosts succeeded; {LOOPBACK[1]} failed with exit status 4; {LOOPBACK[2]} failed with exit status 1"
    )
    refused = hosts.run("start_all_server.sh", "many", status=2)
    assert all("must be a whole number" in lines_of(refused.stderr, address)[-1] for address in hosts.addresses)
    assert hosts.run("stop_all_server.sh").stdout.count("no agent servers were running") == 3


def test_only_a_script_that_ran_to_its_end_succeeds(hosts):
    """Some login shells end with 0 though they run nothing, and some with a status of their own."""
    login_shell = hosts.known.parent / "login shell"
    script = hosts.script('printf "no end of line"; exit "$1"')
    for ending in ("exit 0", "exit 7"):
        login_shell.write_text(f"{ending}\n")
        done = hosts.run(script, "0", status=3, HOSTS=LOOPBACK[0])
        told = f"{LOOPBACK[0]} has not run it: its login shell ended with exit status {ending[-1]}"
        assert summary_of(done) == f"0 of 1 hosts succeeded; {told}"
        login_shell.write_text(f"$1\n{ending}\n")
        done = hosts.run(script, "0", HOSTS=LOOPBACK[0])
        assert summary_of(done) == "1 of 1 hosts succeeded" and lines_of(done.stdout, LOOPBACK[0]) == ["no end of line"]
        done = hosts.run(script, "4", status=4, HOSTS=LOOPBACK[0])
        assert summary_of(done) == f"0 of 1 hosts succeeded; {LOOPBACK[0]} failed with exit status 4"


def test_an_unreachable_host_fails_alone(hosts):
    done = hosts.run("stop_all_server.sh", status=3, HOSTS=f"{LOOPBACK[0]} {NO_SSHD_THERE} no.such.host.invalid")
    assert lines_of(done.stdout, LOOPBACK[0]) == ["no agent servers were running"]
    assert "Connection refused" in lines_of(done.stderr, NO_SSHD_THERE)[-1]
    failed = f"ssh to {NO_SSHD_THERE} failed; ssh to no.such.host.invalid failed"
    assert summary_of(done) == f"1 of 3 hosts succeeded; {failed}"


def test_a_host_without_the_checkout_is_reported(hosts):
    shutil.rmtree(hosts.checkout(LOOPBACK[1]))
    done = hosts.run("stop_all_server.sh", status=2)
    assert lines_of(done.stderr, LOOPBACK[1])[-1].startswith("error: there is no folder a b: clone")
    (hosts.checkout(LOOPBACK[2]) / "stop_all_server.sh").unlink()
    done = hosts.run("stop_all_server.sh", status=2)
    assert "there is no ./stop_all_server.sh in" in lines_of(done.stderr, LOOPBACK[2])[-1]


def test_a_hosts_key_is_accepted_once_and_then_checked(hosts):
    assert "Permanently added" in hosts.run("stop_all_server.sh").stderr
    assert "Permanently added" not in hosts.run("stop_all_server.sh").stderr
    other = make_key(hosts.known.parent / "other_key").split()
    lines = hosts.known.read_text().splitlines()
    changed = [line for line in lines if LOOPBACK[1] in line]
    assert changed
    for line in changed:
        lines[lines.index(line)] = " ".join([line.split()[0], *other[:2]])
    hosts.known.write_text("\n".join(lines) + "\n")
    done = hosts.run("stop_all_server.sh", status=3)
    assert any("Host key verification failed" in line for line in lines_of(done.stderr, LOOPBACK[1]))
    assert summary_of(done) == f"2 of 3 hosts succeeded; ssh to {LOOPBACK[1]} failed"


def key_files(checkout: Path, folder: str = ".cluster") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (checkout / folder).iterdir()}


@pytest.mark.parametrize("folder", [".cluster", "my keys/of the cluster"])
def test_push_key_copies_the_key_to_all_hosts(hosts, folder):
    settings = {} if folder == ".cluster" else {"CLUSTER_KEY_DIR": folder}
    done = hosts.run("push-key", **settings)
    assert lines_of(done.stdout, LOOPBACK[0]) == ["has the cluster key already"]
    own = key_files(hosts.here.path, folder)
    assert set(own) == {".gitignore", "cluster.crt", "cluster.key"}
    for address in hosts.addresses[1:]:
        assert lines_of(done.stdout, address) == ["has the cluster key now"]
        checkout = hosts.checkout(address)
        assert key_files(checkout, folder) == own
        assert mode(checkout / folder) == 0o700 and mode(checkout / folder / "cluster.crt") == 0o600
        assert mode(checkout / folder / "cluster.key") == 0o600
        assert [path.name for path in (checkout / folder).parent.glob("*cluster*")] == [Path(folder).name]
    assert hosts.run("push-key", **settings).stdout.count("has the cluster key already") == 3


def test_push_key_replaces_another_key_by_force_only(hosts):
    hosts.run("push-key", HOSTS=" ".join(LOOPBACK[:2]))
    shutil.rmtree(hosts.here.path / ".cluster")
    theirs = key_files(hosts.checkout(LOOPBACK[1]))
    done = hosts.run("push-key", status=2)
    assert "holds another cluster key" in lines_of(done.stderr, LOOPBACK[1])[-1]
    assert summary_of(done) == f"2 of 3 hosts succeeded; {LOOPBACK[1]} failed with exit status 2"
    assert key_files(hosts.checkout(LOOPBACK[1])) == theirs
    assert key_files(hosts.checkout(LOOPBACK[2])) == key_files(hosts.here.path) != theirs
    done = hosts.run("push-key", "--force")
    assert lines_of(done.stdout, LOOPBACK[1]) == ["has the cluster key now, in place of another"]
    assert key_files(hosts.checkout(LOOPBACK[1])) == key_files(hosts.here.path)
    assert mode(hosts.checkout(LOOPBACK[1]) / ".cluster/cluster.key") == 0o600


def test_push_key_makes_an_open_folder_private(hosts):
    (hosts.checkout(LOOPBACK[1]) / ".cluster").mkdir(mode=0o755)
    hosts.run("push-key")
    assert mode(hosts.checkout(LOOPBACK[1]) / ".cluster") == 0o700


def test_the_key_is_never_readable_by_others(tmp_path):
    """The receiving side under a umask that lets everyone read, held up in the middle by its own input."""
    lines = b"secret\n" * 20_000  # more than a pipe holds
    process = subprocess.Popen(
        ["sh", "-c", f"umask 022; set -- .cluster; {(ROOT / 'scripts/receive_key.sh').read_text()}"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdin.write(lines)
    process.stdin.flush()
    draft = until(lambda: list(tmp_path.glob(".cluster.*/cluster.crt")), 10, "the first file is being written")[0]
    assert mode(draft) == 0o600 and mode(draft.parent) == 0o700 and not (tmp_path / ".cluster").exists()
    process.stdin.write(b"\nkey\n")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and out == b"has the cluster key now\n"
    assert mode(tmp_path / ".cluster") == 0o700 and not list(tmp_path.glob(".cluster.*"))
    assert (tmp_path / ".cluster/cluster.crt").read_bytes() == lines
    assert (tmp_path / ".cluster/cluster.key").read_bytes() == b"key\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_sessions(hosts, number):
    script = hosts.script("echo begun; read -r _ <go")
    for address in hosts.addresses:
        os.mkfifo(hosts.checkout(address) / "go")
    process = hosts.here.start("on_all_hosts.sh", script, env=hosts.env())
    for _ in hosts.addresses:
        assert process.stdout.readline().endswith(": begun\n")
    below = psutil.Process(process.pid).children(recursive=True)
    assert sum(child.name() == "ssh" for child in below) == 3
    process.send_signal(number)
    assert process.wait(timeout=120) == 128 + number
    gone, alive = psutil.wait_procs(below, timeout=60)
    assert not alive and gone
    for address in hosts.addresses:  # what runs on a host may finish
        (hosts.checkout(address) / "go").write_text("\n")
    process.communicate()


@pytest.mark.parametrize(
    "arguments",
    ["", "rm -rf x", "/bin/sh -c true", "../a.sh", "scripts/lib.sh", "on_all_hosts.sh stop_all_server.sh", "no_such.sh"]
    + ["main.py", "push-key now", "push-key --force now", "--force", "./push-key"],
)
def test_bad_usage_is_one_line(checkout, arguments):
    done = checkout.run("on_all_hosts.sh", *arguments.split(), env={"HOSTS": "127.0.0.1"})
    assert done.returncode == 2 and "usage: ./on_all_hosts.sh" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "HOSTS names no host"),
        ({"HOSTS": "-oProxyCommand=id"}, "is no name of a host"),
        ({"HOSTS": "a;b"}, "is no name of a host"),
        ({"HOSTS": "me@a"}, "is no name of a host"),
        ({"HOSTS": "a b a"}, "HOSTS names a twice"),
        ({"HOSTS": "a Node b nODE"}, "HOSTS names Node twice"),
        ({"HOSTS": "a", "SSH_CONFIG": "/no/such"}, "SSH_CONFIG=/no/such cannot be read"),
    ],
)
def test_bad_settings_are_one_line(checkout, settings: dict[str, Any], said):
    done = checkout.run("on_all_hosts.sh", "stop_all_server.sh", env=settings)
    assert done.returncode == 2 and said in one_line(done.stderr)


def test_make_key_prints_the_folder_of_the_key(checkout):
    done = checkout.run("main.py", "--role", "participant", "--make-key")
    assert done.returncode == 0 and done.stdout == f"{checkout.path}/.cluster\n"
    made = key_files(checkout.path)
    assert checkout.run("main.py", "--role", "participant", "--make-key").returncode == 0
    assert key_files(checkout.path) == made
    (checkout.path / ".cluster").chmod(0o755)
    done = checkout.run("main.py", "--role", "participant", "--make-key")
    assert done.returncode == 2 and "can be read by others" in one_line(done.stderr)
