"""The live page of --dashboard, in a real browser, beside real runs whose servers die or which are stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import CONTRAST, NO_UTF8, is_free, one_line, open_again, until
from waiting import Gates

from games.average import Average
from simulation.cluster.failure_detector import ServerStatus
from simulation.errors import Ended
from simulation.game.answer_sheet import BINS, CAUSES_COUNTED, AnswerSheet, bins_of
from simulation.game.tally import RoundResult, Tally, Winners
from simulation.hosts import agent_server
from simulation.llm.responses import Usage
from simulation.monitoring.dashboard import PAGE
from simulation.monitoring.dashboard_state import GRID_CELLS, SERVERS_LISTED, TROUBLED_LISTED, DashboardState
from simulation.results.console_report import histogram
from simulation.rpc.endpoints import Endpoint, GroupAssignment
from simulation.rpc.messages import HeartbeatReply, Progress
from simulation.runs.console import Stage
from simulation.settings import SimulationConfig

NASTY = "<img src=x onerror=alert(1)>"
SLOW = f"""
import pathlib
from participant import Participant

class Slow(Participant):
    async def answer(self, question):
        await self.think(self.index % 400 / 100)
        while question.round == 1 and self.index % 400 >= 300 and not pathlib.Path("{{gate}}").exists():
            await self.think(0.25)
        if self.index % 1000 == 3:
            raise ValueError("{NASTY}")
        return self.index % 50
"""
PARTICIPANTS = 12_000


class Run:
    """A run with a dashboard, in the background."""

    def __init__(self, checkout, log: Path, *command: str, port: int = 0, **env: str) -> None:
        self.log = log
        command = command if command[0] == "main.py" else ("run_simulation.sh", *command)
        with log.open("w") as stderr:
            self.process = checkout.start(*command, "--dashboard", str(port), stderr=stderr, env=env)
        until(lambda: "dashboard: " in log.read_text() or self.process.poll() is not None, 30, "the page is served")
        found = re.search(r"dashboard: (http://127\.0\.0\.1:(\d+)/[\w-]{20,}/)", log.read_text())
        assert found is not None, log.read_text()
        self.url, self.port = found[1], int(found[2])

    def end(self, status: int, timeout_s: float = 60) -> None:
        out, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == status, (out, self.log.read_text())
        assert "Traceback" not in self.log.read_text()

    def state(self) -> dict[str, Any]:
        return json.loads(urllib.request.urlopen(self.url + "state", timeout=60).read())

    def ask(self, path: str, method: str = "GET", **headers: str) -> int:
        """The status of a request with these headers."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, method=method, headers=named)) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture
def slow(tmp_path) -> str:
    (tmp_path / "slow.py").write_text(SLOW.format(gate=tmp_path / "gate"))
    return f"{tmp_path / 'slow.py'}:Slow"


def number_in(page, selector: str) -> int:
    text = page.locator(selector).first.text_content().replace(",", "")
    return int(text) if text.isdecimal() else 0


def bar_heights(page) -> list[float]:
    return page.eval_on_selector_all("#histogram rect", "bars => bars.map(bar => +bar.getAttribute('height'))")


def test_a_page_shows_a_round_a_lost_server_and_the_end(cluster, page, tmp_path, slow):
    flags = ("3", str(PARTICIPANTS), "--rounds", "2", "--agent-class", slow, "--seed", "7")
    run = Run(cluster, tmp_path / "stderr", *flags)
    page.goto(run.url)
    page.get_by_role("heading", name="Round 1 of 2", exact=True).wait_for()
    seen: list[int] = []
    until(lambda: seen.append(number_in(page, "#done")) or seen[-1] > 2000, 10, "answers come in")
    os.kill(cluster.pid(1), signal.SIGKILL)
    lost = f"localhost:{cluster.base_port + 1} is lost"
    page.locator("#messages").get_by_text(lost).wait_for(timeout=90_000)
    page.locator(".cells li.lost, .cells li.back").wait_for(timeout=90_000)
    until(lambda: "reassigned4,000" in page.locator("#facts").text_content(), 15, "who was reassigned is shown")
    until(lambda: seen.append(number_in(page, "#done")) or seen[-1] >= 6000, 15, "answers come in after the loss")
    assert len(set(seen)) >= 3, seen  # none, some, and more of the answers
    (tmp_path / "gate").touch()
    heights = bar_heights(page)
    assert len(heights) == BINS and sum(height > 0 for height in heights) == 50, heights
    page.get_by_role("heading", name="Round 2 of 2", exact=True).wait_for(timeout=90_000)
    assert page.locator("#played tr").count() == 1
    page.locator(".cells li.plays").nth(6).wait_for(timeout=90_000)  # the lost one is back
    shown = page.locator(".cells .load").all_text_contents()
    until(lambda: any("CPU" in text for text in page.locator(".cells .load").all_text_contents()), 5, shown)
    run.end(4)  # as some do not answer
    summary = cluster.summary()
    page.locator("#status.partial").wait_for(timeout=90_000)
    rows = [
        row.split("|")
        for row in page.eval_on_selector_all(
            "#played tr", "rows => rows.map(row => Array.from(row.children, cell => cell.textContent).join('|'))"
        )
    ]
    assert len(rows) == 2
    for row, played in zip(reversed(rows), summary["rounds"], strict=True):
        assert row[:3] == [str(played["round"]), f"{played['average']:.2f}", f"{played['winning_number']:.2f}"]
        numbers = [int(cell.replace(",", "")) for cell in row[3:6]]
        assert numbers == [played["winners"]["count"], played["failed"], played["reassigned"]]
        assert row[6] == f"{played['seconds']:.2f}"
    last = summary["rounds"][-1]
    assert number_in(page, "#done") == last["answered"]
    assert page.locator("#total").text_content() == f"answered, {last['failed']} failed, of 12,000"
    assert page.locator("#bar").evaluate("bar => bar.value") == 1  # all outcomes are in
    assert page.locator(".cells li.plays").count() == 0 and page.locator(".cells li.ended").count() == 7
    assert "play it again: ./run_simulation.sh --experiment" in page.locator("#runs").text_content()
    failed = sum(played["failed"] for played in summary["rounds"])
    assert page.locator("#causes").text_content() == f"{failed}ValueError: {NASTY} (slow.py, line 11)"
    assert f"is partial · results in {cluster.path}/runs/{summary['run_id']}" in page.locator("#runs").text_content()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.wait_for_timeout(2_000)
    assert not requests and page.locator("#notice").is_hidden() and not page.locator("#stop").is_visible()


def test_the_button_stops_the_run_and_keeps_results(cluster, page, tmp_path):
    run = Run(cluster, tmp_path / "stderr", "3", "300", "--rounds", "50", "--sleep-time", "1")
    page.goto(run.url)
    until(lambda: page.locator("#played tr").count() >= 1, 20, "a round is played")
    page.get_by_role("button", name="Stop and keep results").click()
    page.get_by_role("button", name="Continue the run").click()
    assert run.state()["stopping"] is False
    page.get_by_role("button", name="Stop and keep results").click()
    page.get_by_role("button", name="Stop the run").click()
    run.end(130)
    assert cluster.summary()["status"] == "interrupted" and len(cluster.summary()["rounds"]) >= 1
    page.locator("#status.interrupted").wait_for(timeout=90_000)
    assert "stopping; results so far are kept" in run.log.read_text()


def test_the_button_pauses_the_run_and_lets_it_continue(cluster, page, tmp_path):
    run = Run(cluster, tmp_path / "stderr", "3", "300", "--rounds", "4", "--sleep-time", "1")
    page.goto(run.url)
    until(lambda: page.locator("#played tr").count() >= 1, 20, "a round is played")
    page.get_by_role("button", name="Pause", exact=True).click()
    page.locator("#status.paused").wait_for(timeout=90_000)
    until(lambda: run.state()["run"]["round"] is None, 60, "the round under way has ended")
    played = len(run.state()["run"]["rounds"])
    page.wait_for_timeout(2_000)  # longer than a round
    assert played < 4 and len(run.state()["run"]["rounds"]) == played
    page.get_by_role("button", name="Continue", exact=True).click()
    run.end(0)
    assert len(cluster.summary()["rounds"]) == 4


def test_requests_of_other_origins_are_refused(cluster, tmp_path):
    run = Run(cluster, tmp_path / "stderr", "3", "300", "--sleep-time", "600", port=cluster.base_port + 23)
    policy = urllib.request.urlopen(run.url).headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    own = f"http://127.0.0.1:{run.port}"
    until(lambda: run.state()["run"] and run.state()["run"]["round"], 20, "the round is under way")
    for headers in (
        {},  # no origin
        {"Origin": "http://evil.example"},
        {"Origin": own, "Host": f"evil.example:{run.port}"},
        {"Origin": f"http://evil.example:{run.port}", "Host": f"evil.example:{run.port}"},
        {"Origin": own, "Sec_Fetch_Site": "cross-site"},
    ):
        assert run.ask("stop", "POST", **headers) == 403, headers
    assert run.ask("stop") == 403 and run.ask("report?run=../x") == 404
    assert run.ask("", Host=f"evil.example:{run.port}") == 403 and run.ask("state", Host="127.0.0.1") == 403
    assert run.ask("state", Sec_Fetch_Site="cross-site") == 403
    with pytest.raises(OSError):
        socket.create_connection((_own_address(), run.port), 1)
    for path in ("", "state", "wrong/", "wrong/state"):  # as other users of this machine could ask
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{own}/{path}")
    assert run.state()["stopping"] is False and run.process.poll() is None
    assert run.ask("stop", "POST", Origin=own) == 200
    run.end(130)
    assert is_free(run.port)


def _own_address() -> str:
    """An address of this machine that is not 127.0.0.1."""
    return "127.0.0.2"


@pytest.mark.slow
def test_the_page_works_in_any_locale(cluster, tmp_path):
    gates, folder = Gates(tmp_path), tmp_path / "läuft"
    flags = ("--base-port", str(cluster.base_port), "--server-per-host", "3", "--participant-num", "30", *gates.flags)
    command = ("main.py", *flags, "--run-dir", str(folder))
    run = Run(replace(cluster, cold=True), tmp_path / "stderr", *command, **NO_UTF8)
    text = urllib.request.urlopen(run.url).read().decode()
    assert not text.isascii() and text.rstrip().endswith("</html>")
    gates.open()
    run.end(0)
    assert {"summary.json", "report.html"} < {path.name for path in folder.iterdir()}


def test_the_page_links_to_the_report(cluster, page, tmp_path):
    folder, gates = tmp_path / "run", Gates(tmp_path)
    run = Run(cluster, tmp_path / "stderr", "3", "300", *gates.flags, "--run-dir", str(folder))
    page.goto(run.url)
    page.get_by_role("heading", name="Round 1 of 1", exact=True).wait_for()
    assert page.get_by_role("link", name="save the report").count() == 0
    gates.open()
    run.end(0)
    link = page.get_by_role("link", name="save the report")
    link.wait_for(timeout=90_000)
    with page.expect_download() as download:
        link.click()
    assert Path(download.value.path()).read_bytes() == (folder / "report.html").read_bytes()


def test_a_taken_port_is_one_line(checkout):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = checkout.run("run_simulation.sh", "2", "100", "--dashboard", str(port))
    assert done.returncode == 2
    assert f"--dashboard {port}: port {port} of 127.0.0.1 is not available" in one_line(done.stderr)
    assert checkout.runs() == set() and checkout.processes() == []


@pytest.mark.slow  # test_imports.py has the same of a run without one
@pytest.mark.parametrize("asked", [False, True])
def test_only_a_run_with_a_dashboard_imports_it(cluster, asked):
    flags = ["--base-port", str(cluster.base_port), "--server-per-host", "3", "--participant-num", "30"]
    flags += ["--sleep-time", "0"] + ["--dashboard", "0"] * asked
    program = "import sys, main; main.main(sys.argv[1:]); print(*sorted(sys.modules))"
    command = [sys.executable, "-c", program, *flags]
    done = subprocess.run(command, cwd=cluster.path, capture_output=True, text=True, timeout=60, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "simulation.runs.run" in modules, done.stderr
    page = {"simulation.monitoring.dashboard", "aiohttp.web"}
    assert page & {*modules} == (page if asked else set())


def test_participants_asked_one_by_one_are_shown_too(cluster, tmp_path):
    gates = Gates(tmp_path, "self.index % 2")
    run = Run(cluster, tmp_path / "stderr", "3", "600", "--dispatch", "agent", *gates.flags)

    def some_answers() -> list[int] | None:
        urllib.request.urlopen(run.url + "state?page=me").read()
        told = run.state()["run"]
        counts = told["distribution"]["counts"] if told and told["round"] else []
        return counts if 0 < sum(counts) < 600 else None

    until(some_answers, 30, "answers of the round under way are shown")
    gates.open()
    urllib.request.urlopen(run.url + "state?page=me&done=1").read()
    run.end(0)


@pytest.mark.parametrize(("max_value", "decimals"), [(1, 0), (10, 0), (100, 0), (101, 0), (1000, 2), (10**9, 6)])
def test_a_partial_histogram_counts_what_the_tally_counts(max_value, decimals):
    game = Average(7, max_value, decimals, 0.0)
    draws = np.random.default_rng(7)
    sheet = AnswerSheet(5, 200_000)
    for place, units in enumerate(draws.integers(0, game.numbers, 150_000).tolist()):
        sheet.record(place, units)
    counts, failures = sheet.partial_histogram(game)
    assert sum(counts) == 150_000 and failures == {}
    for place in range(150_000, 200_000):
        sheet.fail(place, (f"cause {place % (2 * CAUSES_COUNTED)}", None, Ended.COMPLETE))
    (counts, failures), tally = sheet.partial_histogram(game), sheet.tally()
    _, wanted = histogram(tally, 0, game.numbers - 1, BINS)
    assert counts == [*wanted] and len(counts) == bins_of(game.numbers)[1] <= BINS
    assert sum(failures.values()) == 50_000 and len(failures) == CAUSES_COUNTED + 1


def test_heartbeats_carry_histograms_and_the_load_of_the_server_when_asked(monkeypatch):
    servicer = agent_server.SimulationServicer(SimulationConfig(), 12330, {}, threading.Event())
    clock, used = [100.0], [5.0]
    monkeypatch.setattr(agent_server.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(agent_server.time, "process_time", lambda: used[0])
    monkeypatch.setattr(servicer, "_cpu", (100.0, 5.0, 0.0))

    def seen(cpu_s: float, clock_s: float, numbers: int = 101) -> HeartbeatReply:
        clock[0], used[0] = clock_s, cpu_s
        reply = HeartbeatReply.from_json(servicer.heartbeat(json.dumps(["run", 1, 0.0, numbers, {}]).encode(), None))
        assert reply is not None
        return reply

    assert (seen(5.5, 101.0, numbers=0).cpu, seen(5.5, 101.0, numbers=0).memory_mb) == (None, None)
    assert seen(5.5, 101.0).cpu == 0.5 and seen(5.5, 101.0).memory_mb > 1
    assert seen(5.6, 101.1).cpu == 0.5  # too soon after the last measurement
    assert seen(5.6, 102.0).cpu == pytest.approx(0.1)


def run_on(servers: int, lost: int) -> Any:
    """A run in its first round, as the view sees it, on so many servers of which the first ones are lost."""
    config = SimulationConfig(participant_num=10 * servers, server_per_host=1000)
    ends = [Endpoint(f"node{number // 1000}", 12330 + number % 1000) for number in range(servers)]
    assignments = [
        GroupAssignment(f"run/group-{n}", 10 * n, 10, each if n >= lost else None, ends[-1])
        for n, each in enumerate(ends)
    ]
    replies = [
        HeartbeatReply("it", {each.oid: Progress(n % 11, 10, 1)}, 0.5, 20.0) for n, each in enumerate(assignments)
    ]
    statuses = {
        each: ServerStatus(
            replies[n], time.monotonic(), 0.0, n >= lost, n >= lost, int(n < lost), "is gone" * (n < lost)
        )
        for n, each in enumerate(ends)
    }
    cluster = SimpleNamespace(active_assignments=assignments[lost:], observe=lambda: statuses)
    simulation = SimpleNamespace(cluster=cluster, usage=Usage(), reassigned=10 * lost)
    return SimpleNamespace(
        config=config,
        run_id="run",
        spec=SimpleNamespace(label="run 2 of 4: ratio 2/3"),
        game=Average(7, 100, 0, 1.0),
        results=[],
        usage=Usage(),
        under_way=(1, time.monotonic() - 2),
        simulation=simulation,
    )


def state_of(run: dict[str, Any], stage: Stage, **more: Any) -> dict[str, Any]:
    """What the page asks for, of a run that is under way."""
    state = {"over": False, "running": True, "run": run, "stage": stage._asdict(), "stopping": False}
    return state | {"log": [], "ended": []} | more


def show(page, state: dict[str, Any]) -> None:
    """Open the page where this is all that it is ever told."""

    def answer(route):
        asked = "state?" in route.request.url
        text = json.dumps(state) if asked else PAGE.read_text()
        route.fulfill(body=text, content_type="application/json" if asked else "text/html")

    page.route("**/*", answer)
    page.goto("http://127.0.0.1:9/")
    page.locator("#status").get_by_text("connecting").wait_for(state="hidden")


@pytest.mark.parametrize(
    "servers", [SERVERS_LISTED, SERVERS_LISTED + 1, pytest.param(600, marks=pytest.mark.slow), 9000]
)
def test_many_servers_are_a_grid_of_bounded_size(servers, page):
    view = DashboardState(run_on(servers, lost=30))
    stage = Stage("answers in", 5 * servers, 10 * servers, time.monotonic())  # not before its round
    run = view.state(stage)
    state = run["servers"]
    assert state["states"] == {"plays": servers - 30, "lost": 30}
    assert run["round"]["done"] == 5 * servers
    state = state_of(run, stage)
    assert len(json.dumps(state)) < 20_000
    show(page, state)
    page.get_by_text(f"{servers:,} servers: 30 lost, {servers - 30:,} active").wait_for()
    squares = 0 if servers == SERVERS_LISTED else min(servers, GRID_CELLS)
    assert page.locator(".grid i").count() == squares
    assert page.locator(".cells li").count() == (servers if squares == 0 else TROUBLED_LISTED)
    assert page.locator(".grid i.l").count() == min(squares, 30)
    if squares:  # what a host's servers do together is shown all the same; the last server asks all groups, too
        playing = min(servers, 1000) - 30
        participants = 10 * playing * (2 if servers <= 1000 else 1)
        line = f"{participants:,} participants, {playing / 2:.2f} cores busy, {20 * playing:,} MB resident"
        assert page.locator("#hosts h3 small").first.text_content() == line
    drawn = page.get_by_text(f"; the first {GRID_CELLS:,} are drawn")
    assert drawn.count() == (servers > GRID_CELLS)


def result_of(average: int) -> RoundResult:
    tally = Tally(640, np.array([average - 1, average + 1]), np.array([319, 319]), {NASTY: 2})
    outcome = {"average": Fraction(average), "winning_number": Fraction(3 * average)}
    return RoundResult(1, tally, outcome, (average + 1,), Winners(319, (1,)), 1.5)


@pytest.mark.parametrize(
    ("width", "height", "scheme"),
    [
        (375, 812, "light"),
        (1280, 900, "dark"),
        pytest.param(375, 812, "dark", marks=pytest.mark.slow),
        pytest.param(1280, 900, "light", marks=pytest.mark.slow),
    ],
)
def test_the_live_page_is_readable_in_any_size_and_colour_scheme(page, width, height, scheme):
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)
    stage = Stage("answers in", 320, 640, time.monotonic())
    run = run_on(64, lost=3)
    run.config = replace(run.config, rounds=2)
    run.results, run.under_way = [result_of(50)], (2, time.monotonic())
    show(
        page,
        state_of(DashboardState(run).state(stage), stage, log=[(time.time(), f"localhost:1 {NASTY} " + "x" * 300)]),
    )
    page.get_by_role("heading", name="Round 2 of 2").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for words in (
        "h1",
        "#about",
        ".pill",
        "h2",
        "dt",
        "dd",
        "td",
        "th",
        ".cells .state",
        ".cells .why",
        "#messages span",
        "svg text",
    ):
        assert page.locator(words).first.evaluate(CONTRAST) >= 4.5, words
    assert page.locator("img").count() == 0


def test_an_interrupted_round_and_its_counts_are_shown_as_they_ended(page):
    stage, run = Stage("answers in", 40, 40, time.monotonic()), run_on(4, lost=0)
    cut = replace(result_of(50), tally=replace(result_of(50).tally, ended=Ended.INTERRUPTED))
    run.config, run.results, run.under_way = replace(run.config, rounds=3), [cut], (1, 0.0)
    view = DashboardState(run)
    assert {row["done"] for row in view.state(stage)["servers"]["rows"]} == {0, 1, 2, 3}
    view.over = True
    ended = {"run_id": "run", "path": "runs/run", "error": "", "status": "interrupted", "written": True}
    ended |= {"report": False, "repeat": "", "resume": "./run_simulation.sh --resume runs/run"}
    show(page, state_of(view.state(stage), stage, running=False, over=True, ended=[ended]))
    page.get_by_role("heading", name="0 of 3 rounds played; round 1 was interrupted").wait_for()
    assert page.locator("#done").text_content() == "638"
    assert page.locator("#total").text_content() == "answered, 2 failed or were interrupted, of 640"
    assert page.locator("#bar").evaluate("bar => bar.value") < 1
    assert page.locator("#played tr.cut td").first.text_content() == "1 interrupted"
    assert page.locator(".cells li.plays").count() == 0
    assert page.locator("#servers-sum").text_content() == "4 servers: 4 used until the end of the run"
    assert page.locator(".cells .load").first.text_content().startswith("10 participants")
    assert "go on: ./run_simulation.sh --resume runs/run" in page.locator("#runs").text_content()


def test_failures_are_counted_apart_from_answers(page):
    run = run_on(4, lost=0)
    ((end, status), *_) = run.simulation.cluster.observe().items()
    progress = Progress(10, 10, 1, counts=[8] + [0] * (BINS - 1), failures={"a": 1, "b": 1})
    statuses = {
        **run.simulation.cluster.observe(),
        end: replace(status, reply=HeartbeatReply("it", {"run/group-0": progress})),
    }
    run.simulation.cluster.observe = lambda: statuses
    stage = Stage("answers in", 16, 40, time.monotonic())
    show(page, state_of(DashboardState(run).state(stage), stage))
    page.get_by_role("heading", name="Round 1 of 1").wait_for()
    assert page.locator("#done").text_content() == "14"
    assert page.locator("#total").text_content() == "answered, 2 failed, of 40"
    assert page.locator("#bar").evaluate("bar => bar.value") == 0.4
    assert page.locator("#histogram text").all_text_contents()[:2] == ["participants", "number"]


def test_a_winning_number_out_of_range_is_stated_and_not_drawn(page):
    stage = Stage("answers in", 640, 640, time.monotonic())
    run = run_on(4, lost=0)
    run.results = [result_of(50)]
    show(page, state_of(DashboardState(run).state(stage), stage))
    page.get_by_text("winning number 150").wait_for()
    assert page.locator("#histogram .mark").count() == 1 and page.locator("#histogram .wins").count() == 0


def test_the_page_of_several_runs_shows_the_current_one(page):
    ended = {"run_id": "first", "path": "runs/first", "error": "no servers", "status": "failed", "written": True}
    stage = Stage("participants created", 5, 40, time.monotonic())
    run = run_on(4, lost=0)
    run.under_way = (0, 0.0)
    show(page, state_of(DashboardState(run).state(stage), stage, ended=[{**ended, "report": False}]))
    page.get_by_role("heading", name="Participants created", exact=True).wait_for()
    assert page.locator("#status").text_content() == "running" and page.locator("#notice").is_hidden()
    assert page.locator("#about").text_content().startswith("run 2 of 4: ratio 2/3 · 40 random participants")
    assert "first is failed" in page.locator("#runs").text_content()


def test_a_page_reports_a_killed_run_and_does_not_show_another(cluster, browser, tmp_path):
    page = browser.new_page()
    run = Run(cluster, tmp_path / "killed", "3", "300", "--sleep-time", "600", port=cluster.base_port + 23)
    page.goto(run.url)
    page.get_by_role("heading", name="Round 1 of 1", exact=True).wait_for()
    (main,) = (process for process in cluster.processes() if "--participant-num" in process.info["cmdline"])
    main.kill()
    run.process.communicate(timeout=120)
    open_again(cluster)
    page.locator("#status").get_by_text("no answer").wait_for(timeout=90_000)
    assert page.locator("#notice").is_visible() and page.locator("#stop").is_disabled()
    assert page.title().startswith("no answer")
    again = Run(cluster, tmp_path / "again", "3", "300", "--sleep-time", "600", port=run.port)
    with page.expect_response(lambda response: response.status == 403):  # the other run has another token
        pass
    assert page.locator("#status").text_content().startswith("no answer")
    page.goto(again.url)
    page.get_by_text(f"{300} random participants").wait_for()
    page.locator("#status").get_by_text("running").wait_for(timeout=90_000)
    page.get_by_role("button", name="Stop and keep results").click()
    page.get_by_role("button", name="Stop the run").click()
    again.end(130)
    page.close()
