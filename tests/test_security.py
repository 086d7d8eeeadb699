"""Servers and clients without the cluster key are refused, and so are keys that others can read."""

from __future__ import annotations

import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from conftest import until
from untrusted import attack
from waiting import Gates

from simulation.errors import ClusterError, SettingsError
from simulation.rpc.channels import channel_to, handshake, install_tls
from simulation.rpc.cluster_key import load, load_or_make
from simulation.rpc.endpoints import Endpoint


def test_untrusted_clients_are_refused_for_any_request(cluster, tmp_path):
    written = tmp_path / "written by an untrusted client"
    gates = Gates(tmp_path)
    process = cluster.start("run_simulation.sh", "3", "100", "--seed", "7", *gates.flags)
    try:
        log = cluster.path / f"run/servers/{cluster.base_port}.log"
        until(lambda: "group-0" in log.read_text(), 20, "the round has begun")
        certificate = load(cluster.path / ".cluster").certificate
        became = attack(f"127.0.0.1:{cluster.base_port}", certificate, load_or_make(tmp_path / "other"), written)
    finally:
        gates.open()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(became) == 15 and set(became.values()) == {"UNAVAILABLE"}, became
    assert not written.exists()
    assert cluster.summary()["rounds"][0]["answered"] == 100


def test_a_client_with_the_key_is_accepted(cluster):
    install_tls(load(cluster.path / ".cluster"))
    assert handshake(Endpoint("localhost", cluster.base_port), 60).pid == cluster.pid(0)


def test_a_client_with_another_key_gets_an_error_that_says_so(cluster, tmp_path):
    install_tls(load_or_make(tmp_path / "other"))
    with pytest.raises(ClusterError, match="does not hold this cluster's key"):
        handshake(Endpoint("localhost", cluster.base_port), 60)
    done = cluster.run("run_simulation.sh", "3", "10", env={"CLUSTER_KEY_DIR": str(tmp_path / "other")})
    assert done.returncode == 3 and "does not hold this cluster's key" in done.stderr


@pytest.mark.parametrize("name", ["localhost", "build-localhost", "mylocalhost", "localhost.example.org", "n1"])
def test_only_localhost_means_the_loopback_address(tmp_path, monkeypatch, name):
    install_tls(load_or_make(tmp_path / "key"))
    monkeypatch.setattr("simulation.rpc.channels.grpc.secure_channel", lambda target, *_, **__: target)
    assert channel_to(f"{name}:12330") == f"{'127.0.0.1' if name == 'localhost' else name}:12330"
    install_tls(load_or_make(tmp_path / "key"))  # no later test gets this channel


def test_servers_listen_on_loopback_only(cluster):
    listening = {
        connection.laddr.ip
        for process in cluster.processes()
        for connection in process.net_connections()
        if connection.status == "LISTEN" and connection.laddr.port >= cluster.base_port
    }
    assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1"}


def test_the_key_is_private_and_kept(tmp_path):
    folder = tmp_path / "deep" / "key"
    made = load_or_make(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert load_or_make(folder) == made
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("there", [True, False])
def test_a_key_is_made_at_the_target_of_a_link(tmp_path, there):
    target, link = tmp_path / "secrets/of mine", tmp_path / "key"
    if there:
        target.mkdir(parents=True)
    link.symlink_to("secrets/of mine")
    assert load_or_make(link) == load(target) and link.is_symlink()


def test_concurrent_first_starts_agree_on_one_key(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: load_or_make(tmp_path / "key"), range(8)))
    assert len({key.certificate for key in keys}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize(("name", "mode"), [(".", 0o750), ("cluster.key", 0o640), ("cluster.crt", 0o644)])
def test_a_key_that_others_can_read_is_refused(tmp_path, name, mode):
    folder = tmp_path / "key"
    load_or_make(folder)
    (folder / name).chmod(mode)
    with pytest.raises(SettingsError, match="can be read by others: chmod"):
        load_or_make(folder)


def test_a_damaged_key_is_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    load_or_make(one), load_or_make(other)
    (one / "cluster.key").write_bytes((other / "cluster.key").read_bytes())
    with pytest.raises(SettingsError, match="damaged"):
        load(one)
    (one / "cluster.key").write_bytes(b"garbage")
    with pytest.raises(SettingsError, match="damaged"):
        load(one)
    (one / "cluster.key").unlink()
    with pytest.raises(SettingsError, match="incomplete"):
        load_or_make(one)


@pytest.mark.parametrize(("ahead", "said"), [(timedelta(days=2), "is valid from"), (timedelta(days=-3651), "expired")])
def test_a_key_outside_its_validity_is_refused(tmp_path, monkeypatch, ahead, said):
    monkeypatch.setattr("simulation.rpc.cluster_key.CLOCK_SKEW", -ahead)
    monkeypatch.setattr("simulation.rpc.cluster_key.VALID_FOR", ahead + timedelta(days=3650))
    with pytest.raises(SettingsError, match=said):
        load_or_make(tmp_path / "key")


def test_a_port_with_another_protocol_is_untrusted(checkout):
    with socket.create_server(("127.0.0.1", checkout.base_port)) as server:
        server.settimeout(20)
        process = checkout.start("run_simulation.sh", "2", "10")
        _, err = process.communicate(timeout=120)
    assert process.returncode == 3 and "Traceback" not in err
    assert f"port {checkout.base_port} of localhost is taken by another program" in err
