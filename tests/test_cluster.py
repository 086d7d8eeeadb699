"""Games on servers that stay up: placement, seeds, dispatch, results, kept agents, leases."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics

import psutil
import pytest
from conftest import ROOT, open_again, until

from simulation.rpc.channels import channel_to, install_tls
from simulation.rpc.cluster_key import load

# Counts in main's own process what it does once per run: Python imports this at its start if PYTHONPATH says so
COUNTER = """
import atexit, json, os, pathlib, sys
os.environ.update(GRPC_VERBOSITY="NONE", GRPC_DNS_RESOLVER="native")
import cloudpickle, grpc
counts = {"handshakes": {}, "others": {}, "credentials": 0, "keys": 0, "classes": 0}

class Calls(grpc.UnaryUnaryClientInterceptor):
    def __init__(self, target):
        self.target = target
    def intercept_unary_unary(self, continuation, details, request):
        call = continuation(details, request)
        if details.method.endswith("/handshake") and call.exception() is None:  # else no server listens yet
            kind = "others" if json.loads(request) else "handshakes"
            counts[kind][self.target] = counts[kind].get(self.target, 0) + 1
        return call

def counted(module, name, count):
    function = getattr(module, name)
    def call(*arguments, **more):
        count(*arguments)
        return function(*arguments, **more)
    setattr(module, name, call)

def add(name, amount=1):
    counts[name] += amount

secure_channel = grpc.secure_channel
grpc.secure_channel = lambda target, *rest, **more: grpc.intercept_channel(
    secure_channel(target, *rest, **more), Calls(target)
)
counted(grpc, "ssl_channel_credentials", lambda *_: add("credentials"))
counted(cloudpickle, "dumps", lambda value, *_: add("classes", ".Mine'" in repr(value)))
def audit(event, args):
    if event == "open" and str(args[0]).endswith("cluster.key") and not args[2] & os.O_CREAT:
        add("keys")

sys.addaudithook(audit)
if not {"--launch", "--owned"} & {*sys.argv}:
    atexit.register(lambda: pathlib.Path(__file__).with_name("counts.json").write_text(json.dumps(counts)))
"""

STEPS = ("assign", "begin", "collect", "announce")  # what is called in each round, but for heartbeats and answers


def table(out: str) -> dict[int, list[str]]:
    """The rows of --status, by port."""
    return {int(line.split()[0]): line.split() for line in out.splitlines()[1:]}


def agents(cluster) -> list[int]:
    rows = table(cluster.run("start_all_server.sh", "--status").stdout)
    return [int(row[5]) for row in rows.values()]


@pytest.mark.parametrize(
    "participants", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(1000, marks=pytest.mark.slow), 1001]
)
def test_every_participant_is_asked_once(cluster, participants):
    summary = cluster.play("3", str(participants), "--sleep-time", "0", "--seed", "7")
    (played,) = summary["rounds"]
    assert (played["asked"], played["answered"], played["failed"]) == (participants, participants, 0)
    rows = cluster.answers()
    assert [row["participant"] for row in rows] == list(range(participants))
    values = [row["value"] for row in rows]
    assert played["average"] == pytest.approx(statistics.fmean(values))
    assert played["median"] == statistics.median(values)
    assert played["std"] == pytest.approx(statistics.pstdev(values))
    assert (played["min"], played["max"]) == (min(values), max(values))
    nearest = min(abs(value - played["average"]) for value in values)
    winners = [index for index, value in enumerate(values) if math.isclose(abs(value - played["average"]), nearest)]
    assert played["winners"] == {"count": len(winners), "participants": [f"P{index}" for index in winners[:10]]}
    assert agents(cluster) == [0] * 7


def test_summary_and_console_follow_the_contract(cluster):
    done = cluster.run("run_simulation.sh", "3", "1000", "--seed", "7", "--rounds", "2")
    assert done.returncode == 0
    summary = cluster.summary()
    assert summary["status"] == "complete" and summary["llm"] is None
    assert set(summary) >= {"run_id", "status", "config", "cluster", "seconds", "rounds", "llm"}
    assert set(summary) >= {"started", "program", "python", "packages", "sources"}
    assert set(summary["seconds"]) == {"connect", "create", "rounds", "total"}
    assert summary["cluster"]["lost"] == []
    assert [entry["round"] for entry in summary["rounds"]] == [1, 2]
    entry_keys = "round asked answered failed failures ended outcome winning_answers reassigned average median std"
    assert set(summary["rounds"][0]) == {*(*entry_keys.split(), "min", "max", "winning_number", "winners", "seconds")}
    assert summary["config"]["seed"] == 7
    lines = done.stdout.splitlines()
    assert re.match(r"Moderator: The average value is 51\.778 \[takes \d+\.\d+ s", lines[0]), lines[0]
    assert lines[1] == "Moderator: P4, P118, P406, P562, P587, P742, P745 win with 52, the closest to it."
    assert any("█" in line for line in lines)
    for expected in (
        "init 1000 random participant agents...",
        "init 4 moderator agents...",
        "[init takes ",
        "round 1: asking 1000 participants",
        "round 2: asking 1000 participants",
    ):
        assert expected in done.stderr
    run = cluster.path / "runs" / "latest"
    assert run.resolve().name == summary["run_id"]
    assert {path.name for path in run.iterdir()} == {
        *("summary.json", "answers.parquet", "game.json", "source"),
        *("analysis.json", "histogram.png", "rounds.png", "report.html"),
    }
    assert (run / "histogram.png").read_bytes().startswith(b"\x89PNG")
    rows = cluster.answers()
    assert len(rows) == 2000 and [row["round"] for row in rows] == [1] * 1000 + [2] * 1000
    report = cluster.run("main.py", "--role", "report", "--run-dir", str(run))
    assert report.returncode == 0
    assert report.stdout.splitlines()[:4] == lines[:4]


def test_a_seed_repeats_the_game_on_any_layout_and_dispatch(cluster, checkout):
    common = ("--sleep-time", "0.01", "--rounds", "2", "--decimals", "2")
    cluster.play("3", "301", "--seed", "7", *common)
    wanted = cluster.answers()
    assert len({row["value"] for row in wanted}) > 400
    cluster.play("3", "301", "--seed", "7", "--dispatch", "agent", *common)
    assert cluster.answers() == wanted
    checkout.play("2", "301", "--seed", "7", *common, env={"MODERATOR_PER_HOST": "5"})
    assert checkout.answers() == wanted
    assert checkout.summary()["cluster"]["moderators"] == 5
    cluster.play("3", "301", "--seed", "8", *common)
    assert cluster.answers() != wanted


def test_a_drawn_seed_is_printed_and_repeats_the_game(cluster):
    done = cluster.run("run_simulation.sh", "3", "100", "--sleep-time", "0")
    seed, values = cluster.summary()["config"]["seed"], cluster.values()
    assert f"seed {seed}; --seed {seed} plays this game again" in done.stderr
    cluster.play("3", "100", "--sleep-time", "0", "--seed", str(seed))
    assert cluster.values() == values
    cluster.play("3", "100", "--sleep-time", "0")
    assert cluster.summary()["config"]["seed"] != seed


def test_many_decimals_are_counted_exactly(cluster):
    summary = cluster.play(
        "3", "5000", "--seed", "7", "--sleep-time", "0", "--max-value", "1000000000", "--decimals", "6"
    )
    assert len(set(cluster.values())) == 5000
    assert summary["rounds"][0]["average"] == pytest.approx(statistics.fmean(cluster.values()), rel=1e-12)


def test_64000_participants(cluster):
    summary = cluster.play("3", "64000", "--seed", "7", "--sleep-time", "0")
    assert summary["rounds"][0]["answered"] == 64_000
    assert len(cluster.values()) == 64_000
    assert (cluster.path / "runs/latest/summary.json").stat().st_size < 100_000


def test_a_run_directory_is_named_and_never_overwritten(cluster, tmp_path):
    folder = tmp_path / "my results"
    cluster.play("3", "10", "--sleep-time", "0", "--run-dir", str(folder))
    before = (folder / "summary.json").read_bytes()
    assert (cluster.path / "runs/latest").resolve() == folder
    again = cluster.run("run_simulation.sh", "3", "10", "--run-dir", str(folder))
    assert again.returncode == 2 and "holds results already" in again.stderr
    assert (folder / "summary.json").read_bytes() == before


def test_kept_agents_can_be_asked_until_the_next_run(cluster):
    summary = cluster.play("3", "30", "--sleep-time", "0", "--seed", "7", "--rounds", "2", "--keep-agents")
    last, (winner, *_) = cluster.values()[30:], summary["rounds"][1]["winners"]["participants"]
    run = cluster.path / "runs" / summary["run_id"]
    assert sum(agents(cluster)) == 34

    def ask(participant: int):
        number = str(participant)
        return cluster.run(
            "main.py", "--role", "ask", "--run-dir", str(run), "--participant", number, "--text", "Well?"
        )

    for participant in (0, 17, 29):
        reply = ask(participant)
        assert reply.returncode == 0 and float(reply.stdout) == last[participant]  # and no number drawn now
    reply = cluster.run("main.py", "--role", "ask", "--run-dir", str(run), "--winner", "--text", "Well?")
    assert reply.returncode == 0 and float(reply.stdout) == last[int(winner[1:])]
    assert "participants 0 to 29" in ask(30).stderr
    cluster.play("3", "1", "--sleep-time", "0")  # on one server, and all of them let go of what was kept
    assert agents(cluster) == [0] * 7
    gone = ask(17)
    assert gone.returncode == 3 and "--keep-agents" in gone.stderr and len(gone.stderr.splitlines()) == 1


TALKATIVE = """
from participant import Participant

class Talkative(Participant):
    async def answer(self, question):
        return "33.333 is near" if self.index == 1 and question.round == 0 else 100 / 3
"""


def test_a_reply_of_a_class_is_printed_like_the_numbers_of_the_game(cluster, tmp_path):
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    cluster.play("3", "2", "--agent-class", str(tmp_path / "talkative.py"), "--decimals", "2", "--keep-agents")
    for number, printed in (("0", "33.33\n"), ("1", "33.333 is near\n")):
        ask = ("main.py", "--role", "ask", "--run-dir", "runs/latest", "--participant", number, "--text", "Why?")
        assert cluster.run(*ask).stdout == printed


def test_agents_of_a_killed_main_are_dropped_after_the_lease(cluster):
    process = cluster.start("run_simulation.sh", "3", "300", "--sleep-time", "600", "--lease", "3")
    try:
        until(lambda: sum(agents(cluster)) == 304, 30, "the agents are there")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        until(lambda: sum(agents(cluster)) == 0, 15, "the agents are gone")
    finally:
        process.kill()
        process.communicate()
    open_again(cluster)
    # whichever server is first: a moderator that is dropped deletes its groups
    assert any("sent no heartbeat" in log.read_text() for log in cluster.path.glob("run/servers/*.log"))


def test_the_lease_does_not_expire_while_main_is_busy(cluster):
    """A round three times as long as the lease: polls renew it, and so does the heartbeat between them."""
    summary = cluster.play("3", "12", "--sleep-time", "6", "--lease", "2")
    assert summary["rounds"][0]["answered"] == 12


def test_two_mains_use_the_same_servers_concurrently(cluster, tmp_path):
    games = [
        cluster.start(
            "run_simulation.sh", "3", "200", "--seed", seed, "--sleep-time", "1", "--run-dir", str(tmp_path / seed)
        )
        for seed in ("7", "8")
    ]
    for game in games:
        _, err = game.communicate(timeout=120)
        assert game.returncode == 0, err
    assert cluster.answers(tmp_path / "7") != cluster.answers(tmp_path / "8")
    cluster.play("3", "200", "--seed", "7", "--sleep-time", "0")
    assert cluster.answers() == cluster.answers(tmp_path / "7")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_runs_leave_the_memory_of_the_servers_flat(cluster):
    def memory_mb() -> float:
        return sum(psutil.Process(cluster.pid(offset)).memory_full_info().uss for offset in range(7)) / 2**20

    for _ in range(3):
        cluster.play("3", "20000", "--sleep-time", "0")
    settled = memory_mb()
    for _ in range(20):
        cluster.play("3", "20000", "--sleep-time", "0")
    assert memory_mb() < settled * 1.1 + 5
    assert agents(cluster) == [0] * 7


def test_network_traffic_does_not_grow_with_the_participants(checkout):
    checkout.cold = True  # a new Python process imports the module that counts the calls
    layout = ("--server-per-host", "3", "--moderator-per-host", "4", "--base-port", str(checkout.base_port))
    counter = {"PYTHONPATH": str(ROOT / "benchmarks/call_counter")}
    started = checkout.run("main.py", "--role", "participant", *layout, env=counter)  # scripts ignore the variable
    assert started.returncode == 0, started.stderr
    checkout.cold = False
    install_tls(load(checkout.path / ".cluster"))
    channels = [channel_to(f"localhost:{checkout.base_port + offset}") for offset in range(7)]

    def served() -> dict[str, list[int]]:
        counts = [json.loads(channel.unary_unary("/benchmark/served")(b"", timeout=60)) for channel in channels]
        return {
            name: [sum(each) for each in zip(*(one.get(name, (0, 0, 0)) for one in counts), strict=True)]
            for name in STEPS
        }

    crossed = []
    for participants in ("1000", "100000"):
        before = served()
        checkout.play("3", participants, "--sleep-time", "0", "--seed", "7")
        crossed.append(
            {name: [b - a for a, b in zip(before[name], after, strict=True)] for name, after in served().items()}
        )
    few, many = crossed
    groups, moderators = 6, 4  # 3 servers' and 4 moderators' shares meet 6 times
    for name in STEPS:
        assert few[name][0] == many[name][0] == groups * (name != "assign") + moderators
        assert min(few[name][1:]) > 0
        assert sum(many[name][1:]) < 1.2 * sum(few[name][1:])  # larger numbers take a few more bytes
    assert checkout.run("stop_all_server.sh").returncode == 0


@pytest.mark.parametrize(
    "running",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["servers that run", "servers of the run"],
)
def test_a_run_greets_each_server_once_and_prepares_everything_once(cluster, checkout, tmp_path, running):
    own = cluster if running else checkout
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from participant import Participant\nclass Mine(Participant):\n"
        "    async def answer(self, question):\n        return 50\n"
    )
    (tmp_path / "sitecustomize.py").write_text(COUNTER)
    flags = ("--server-per-host", "3", "--base-port", str(own.base_port), "--agent-class", f"{mine}:Mine")
    own.cold = True
    try:
        done = own.run("main.py", *flags, "--rounds", "3", env={"PYTHONPATH": str(tmp_path)})
    finally:
        own.cold = False
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    each = {f"127.0.0.1:{own.base_port + offset}": 1 for offset in range(7)}
    assert counts.pop("handshakes") == each
    assert counts.pop("others") == each  # the end of the run
    assert counts == {"credentials": 1, "keys": 1, "classes": 1}


def test_status_shows_a_row_per_server(cluster):
    rows = table(cluster.run("start_all_server.sh", "--status").stdout)
    assert list(rows) == [cluster.base_port + offset for offset in range(7)]
    assert [row[1] for row in rows.values()] == ["participant"] * 3 + ["moderator"] * 4
    assert [int(row[2]) for row in rows.values()] == [cluster.pid(offset) for offset in range(7)]
    assert all(float(row[6]) > 5 for row in rows.values())


def test_a_second_start_succeeds_for_the_same_set_only(cluster):
    pids = [cluster.pid(offset) for offset in range(7)]
    assert cluster.run("start_all_server.sh", "3").returncode == 0
    other = cluster.run("start_all_server.sh", "4")
    assert other.returncode == 3 and "7 agent servers are already running" in other.stderr
    swapped = cluster.run("start_all_server.sh", "4", env={"MODERATOR_NUM": "3"})
    assert swapped.returncode == 3 and "3 for participants and 4 for moderators" in swapped.stderr
    assert [cluster.pid(offset) for offset in range(7)] == pids


def test_a_run_with_another_layout_is_refused(cluster):
    runs = cluster.runs()
    done = cluster.run("run_simulation.sh", "2", "10", env={"MODERATOR_PER_HOST": "5"})
    assert done.returncode == 3
    assert "3 participant and 4 moderator servers" in done.stderr and "this run asks for 2 and 5" in done.stderr
    assert "; give --server-per-host 3 --moderator-per-host 4, or restart them: ./stop_all_server.sh" in done.stderr
    assert cluster.runs() == runs


def test_servers_of_another_version_of_the_program_are_refused(cluster):
    source = cluster.path / "participant.py"
    before = source.read_bytes()
    source.write_bytes(before + b"\n# edited after the servers were started\n")
    try:
        done = cluster.run("run_simulation.sh", "3", "10")
        assert done.returncode == 3 and "runs another version" in done.stderr
        assert "another version" in cluster.run("start_all_server.sh", "3").stderr
    finally:
        source.write_bytes(before)
    cluster.play("3", "10", "--sleep-time", "0")
