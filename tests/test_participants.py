"""A person's own participant: both kinds, from their file, and whatever goes wrong in it."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
from conftest import one_line, until

from simulation.cluster.agent_class import load_agent_class
from simulation.game.answer_sheet import KEPT

MINE = """
import asyncio
from decimal import Decimal
from fractions import Fraction

import numpy as np
from participant import Participant
from agentscope.message import Msg
from simulation.errors import UnusableAnswer

BONUS = 1


class Answering(Participant):
    async def answer(self, question):
        await asyncio.sleep(0.01)
        return 40 + BONUS + len(question.announcements)


class Replying(Participant):
    def reply(self, x):
        return Msg(self.name, f"between 0 and 100 I choose {20 + self.index % 3}", "assistant")


class Both(Answering):
    def reply(self, x):
        return Msg(self.name, "99", "assistant")


class WithInit(Participant):
    def __init__(self, index, game):
        super().__init__(index, game)
        self.mine = 10 * (index % 2)

    async def answer(self, question):
        return self.mine


class Failing(Participant):
    def __init__(self, index, game):
        super().__init__(index, game)
        if index == 1:
            raise ValueError("no seat")

    async def answer(self, question):
        if self.index == 2:
            return 1 / 0
        if self.index == 3:
            return "I will not say"
        if self.index == 4:
            return 1000
        if self.index == 5:
            raise SystemExit(3)
        if self.index == 6:
            raise asyncio.CancelledError
        if self.index == 7:
            return None
        return 50


class Kinds(Participant):
    async def answer(self, question):
        return [Fraction(100, 3), Decimal("4.5"), np.float64(7), np.array([5]), True, b"5", ["6"]][self.index]


class FailingReply(Participant):
    def reply(self, x):
        if self.index == 2:
            raise KeyError("lost")
        return Msg(self.name, "50", "assistant")


class Quoting(Participant):
    async def answer(self, question):
        words = ["interrupted", "out of tokens (--max-tokens)", "model server: HTTP 500", "other causes"]
        if self.index < 40:
            raise UnusableAnswer((words + [f"cause {self.index}"] * 40)[self.index])
        return 50


class Neither(Participant):
    pass


class NotAsync(Participant):
    def answer(self, question):
        return 5


class AsyncReply(Participant):
    async def reply(self, x):
        return Msg(self.name, "5", "assistant")


class Stranger:
    pass
"""
SHORT = "from participant import Participant\nclass Mine(Participant):\n    async def answer(self, q):\n"


def at(code: str) -> str:
    """Where a piece of MINE stands, as causes name it."""
    return f"random.py, line {MINE[: MINE.index(code)].count(chr(10)) + 1}"


FAILURES = {
    1: f"ValueError: no seat ({at('no seat')})",
    2: f"ZeroDivisionError: division by zero ({at('1 / 0')})",
    3: "no number in the answer",
    4: "number out of range (0 to 100)",
    5: f"SystemExit: 3 ({at('SystemExit(3)')})",
    6: f"CancelledError ({at('raise asyncio.CancelledError')})",
    7: "no number in the answer",
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("person") / "random.py"  # a name that also a library has
    path.write_text(MINE)
    return path


def test_imports_of_a_class_come_from_its_folder_or_extra_folders(checkout):
    """On the servers, too, whose current folder is another; also what is imported late."""
    own = checkout.path.parent / "mine"
    own.mkdir()
    (own / "late.py").write_text("NUMBER = 7\n")
    (own / "json.py").write_text("raise SystemExit('imported in place of the standard library')\n")
    (own / "seven.py").write_text(
        "import json, theirs\n"
        "from participant import Participant\n"
        "class Seven(Participant):\n"
        "    async def answer(self, question):\n"
        "        import late\n"
        "        return theirs.half(2 * late.NUMBER)\n"
    )
    (checkout.path / "extra").mkdir()
    (checkout.path / "extra/theirs.py").write_text("def half(number): return number // 2\n")
    (checkout.path / "extra/participant.py").write_text("raise SystemExit('imported in place of the program')\n")
    flags = ("1", "4", "--agent-class", f"{own}/seven.py:Seven")
    done = checkout.run("run_simulation.sh", *flags)
    assert done.returncode == 2 and "cannot be imported: ModuleNotFoundError: No module named 'theirs'" in done.stderr
    done = checkout.run("run_simulation.sh", *flags, env={"EXTRA_PYTHONPATH": "extra:no such"})
    assert done.returncode == 2 and "No such file or directory" in one_line(done.stderr)
    done = checkout.run("start_all_server.sh", "1", env={"EXTRA_PYTHONPATH": "no such"})
    assert done.returncode == 2 and "No such file or directory" in one_line(done.stderr)
    checkout.play(*flags, env={"EXTRA_PYTHONPATH": ":extra:", "MODERATOR_PER_HOST": "1"})
    assert checkout.values() == [7.0] * 4


@pytest.mark.parametrize("dispatch", ["group", pytest.param("agent", marks=pytest.mark.slow)])
def test_answer_and_reply_classes_play(cluster, mine, dispatch):
    for cls, expected in (
        ("Answering", [41.0] * 9 + [42.0] * 9),
        ("Replying", [20.0, 21.0, 22.0] * 6),
        ("Both", [41.0] * 9 + [42.0] * 9),
        ("WithInit", ([0.0, 10.0] * 5)[:9] * 2),
    ):
        cluster.play("3", "9", "--rounds", "2", "--agent-class", f"{mine}:{cls}", "--dispatch", dispatch)
        assert cluster.values() == expected


@pytest.mark.parametrize("dispatch", ["group", "agent"])
def test_an_exception_fails_only_its_participant_with_the_cause(cluster, mine, dispatch):
    done = cluster.run("run_simulation.sh", "3", "20", "--agent-class", f"{mine}:Failing", "--dispatch", dispatch)
    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
    assert f"ValueError: no seat ({at('no seat')}): 1" in done.stderr
    assert "number out of range (0 to 100), such as 1000: 1" in done.stderr
    (path,) = (cluster.path / "runs").glob("latest/failed_answers.jsonl")
    assert f"the tracebacks of the first failures are in {path.resolve()}" in done.stderr
    summary = cluster.summary()
    (played,) = summary["rounds"]
    assert summary["status"] == "partial"
    assert (played["asked"], played["answered"], played["failed"]) == (20, 13, 7)
    assert played["average"] == 50
    assert played["failures"]["no number in the answer"] == 2
    rows = cluster.answers()
    assert {row["participant"]: row["failure"] for row in rows if row["failure"]} == FAILURES
    assert [row["value"] for row in rows] == [None if index in FAILURES else 50.0 for index in range(20)]
    kept = {entry["participant"]: entry for entry in failed_answers(cluster)}
    assert {index: entry["failure"] for index, entry in kept.items()} == {k: v for k, v in FAILURES.items() if k != 7}
    assert kept[3]["text"] == "I will not say" and kept[4]["text"] == "1000"
    assert {index for index, entry in kept.items() if "traceback" in entry} == {1, 2, 5, 6}
    trace = kept[2]["traceback"].splitlines()
    assert trace[1].endswith(f'random.py", line {at("1 / 0").split()[-1]}, in answer') and len(trace) >= 3
    assert "return 1 / 0" in trace[2] and trace[-1] == "ZeroDivisionError: division by zero"
    cluster.play("3", "20", "--agent-class", f"{mine}:FailingReply", "--dispatch", dispatch, status=4)
    cause = f"KeyError: 'lost' ({at('KeyError')})"
    assert cluster.summary()["rounds"][0]["failures"] == {cause: 1}
    (entry,) = failed_answers(cluster)
    assert entry["failure"] == cause and "in reply" in entry["traceback"]


def failed_answers(cluster):
    return [json.loads(line) for line in (cluster.path / "runs/latest/failed_answers.jsonl").read_text().splitlines()]


LATE = """
from participant import Participant
class Late(Participant):
    async def answer(self, question):
        if question.round >= 2:
            raise ValueError(f"bad {self.index}" if question.round == 2 else "bad")
        return self.rng.normal(50, 10)
"""


def test_a_game_ends_when_everyone_fails_unless_it_is_to_keep_going(cluster, tmp_path):
    path = tmp_path / "late.py"
    path.write_text(LATE)
    flags = ("3", "60", "--agent-class", f"{path}:Late", "--rounds", "4", "--seed", "3")
    done = cluster.run("run_simulation.sh", *flags)
    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
    assert "seed 3; --seed 3 plays this game again if all random numbers of Late come from self.rng" in done.stderr
    reason = (
        "every participant failed in round 2 (--keep-going continues nevertheless): the game ends after round 2 of 4"
    )
    assert reason in done.stderr
    first = cluster.summary()
    assert first["status"] == "partial" and [each["failed"] for each in first["rounds"]] == [0, 60]
    kept = failed_answers(cluster)
    assert len(kept) == 2 * KEPT and all(
        each["failure"] == f"ValueError: bad {each['participant']} (late.py, line 6)" and each["round"] == 2
        for each in kept
    )
    answers = cluster.values()[:60]
    cluster.play(*flags, "--dispatch", "agent", "--keep-going", status=4)
    assert [each["failed"] for each in cluster.summary()["rounds"]] == [0, 60, 60, 60]
    assert cluster.values()[:60] == answers and len(set(answers)) > 10
    assert failed_answers(cluster) == kept
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "5")
    assert done.returncode == 4 and "has played 4 of 5 rounds" in done.stderr, done.stderr


@pytest.mark.parametrize("dispatch", ["group", pytest.param("agent", marks=pytest.mark.slow)])
def test_the_text_of_a_cause_has_no_effect(cluster, mine, dispatch):
    kind = ("--agent-class", f"{mine}:Quoting", "--dispatch", dispatch)
    summary = cluster.play("3", "60", "--rounds", "2", *kind, status=4)
    assert summary["status"] == "partial"
    assert [(each["answered"], each["failed"], each["ended"]) for each in summary["rounds"]] == [
        (20, 40, "complete")
    ] * 2
    words = {"interrupted", "out of tokens (--max-tokens)", "model server: HTTP 500", "other causes"}
    causes = {row["failure"] for row in cluster.answers()}
    assert not words & causes and {f"UnusableAnswer: {each} ({at('raise Unusable')})" for each in words} < causes
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "3")
    assert done.returncode == 4 and "has played 2 of 3 rounds" in done.stderr, done.stderr
    assert cluster.summary()["rounds"][:2] == summary["rounds"] and len(cluster.summary()["rounds"]) == 3


SHARING = """
import pathlib
from participant import Participant
class Mine(Participant):
    places = []
    def __init__(self, index, game):
        super().__init__(index, game)
        self.places.append(index)
    async def answer(self, question):
        while not pathlib.Path({gate!r}).exists():
            await self.think(0.05)
        return {base} + len(self.places)
"""


def test_a_class_is_loaded_once_per_run(cluster, tmp_path):
    """Two runs at once, whose classes have the same name, in files of the same name; each has 6 groups on 3 servers."""
    classes = []
    for base in (10, 50):
        path = tmp_path / str(base) / "mine.py"
        path.parent.mkdir()
        path.write_text(SHARING.format(gate=str(tmp_path / f"gate-{base}"), base=base))
        classes.append(("3", "12", "--agent-class", f"{path}:Mine", "--run-dir", str(tmp_path / f"run-{base}")))
    first = cluster.start("run_simulation.sh", *classes[0])
    until((tmp_path / "run-10/summary.json").exists, 30, "its groups are made")
    (tmp_path / "gate-50").touch()
    done = cluster.run("run_simulation.sh", *classes[1])
    assert done.returncode == 0, done.stderr
    (tmp_path / "gate-10").touch()
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    for base in (10, 50):
        assert {row["value"] for row in cluster.answers(tmp_path / f"run-{base}")} == {base + 4}
    logs = [path.read_text() for path in (cluster.path / "run/servers").glob("*.log")]
    assert len(logs) >= 7 and not any("already exists" in log for log in logs)


@pytest.mark.parametrize("dispatch", ["group", pytest.param("agent", marks=pytest.mark.slow)])
def test_all_number_types_count_equally(cluster, mine, dispatch):
    cluster.play("3", "7", "--agent-class", f"{mine}:Kinds", "--dispatch", dispatch, status=4)
    assert cluster.values() == [33, 4, 7, None, None, None, None]


def test_the_servers_see_the_newest_version_of_the_file(cluster, tmp_path):
    path = tmp_path / "mine.py"
    for number in (3, 4):
        path.write_text(SHORT + f"        return {number}\n")
        cluster.play("3", "5", "--agent-class", f"{path}:Mine")
        assert cluster.values() == [number] * 5


def test_a_round_without_answers(cluster, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SHORT + "        raise OSError('silent')\n")
    flags = ("--rounds", "2", "--keep-going")
    done = cluster.run("run_simulation.sh", "3", "5", "--agent-class", f"{path}:Mine", *flags)
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert done.stdout.startswith("Moderator: Nobody of 5 answered")
    played = cluster.summary()["rounds"]
    assert [entry["average"] for entry in played] == [None, None]
    assert [entry["failures"] for entry in played] == [{"OSError: silent (mine.py, line 4)": 5}] * 2


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        ("Neither", "neither answer nor reply"),
        ("NotAsync", "async def answer"),
        ("AsyncReply", "reply must be an ordinary method"),
        ("Stranger", "no class Stranger derived from Participant"),
        ("Missing", "no class Missing derived from Participant"),
    ],
)
def test_an_invalid_class_is_refused_before_anything_starts(cluster, mine, cls, expected):
    runs = cluster.runs()
    done = cluster.run("run_simulation.sh", "3", "5", "--agent-class", f"{mine}:{cls}")
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1
    assert cluster.runs() == runs


@pytest.mark.parametrize("content", ["def broken(:\n", "import no_such_library\n", "raise SystemExit(0)\n"])
def test_a_file_that_cannot_be_imported_is_refused(cluster, tmp_path, content):
    path = tmp_path / "mine.py"
    path.write_text(content)
    done = cluster.run("run_simulation.sh", "3", "5", "--agent-class", f"{path}:Mine")
    assert done.returncode == 2 and "cannot be imported" in done.stderr and len(done.stderr.splitlines()) == 1


WILD = """
import threading
from participant import Participant
from agentscope.message import Msg


class Odd(BaseException):
    pass


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Wild(Participant):
    def __init__(self, index, game):
        super().__init__(index, game)
        if index == 1:
            raise Odd("no seat")

    async def answer(self, question):
        if self.index == 2:
            raise Mute
        if self.index == 3:
            raise Odd("odd")
        if self.index == 4:
            raise ValueError("half a letter \\ud800")
        if self.index == 5:
            raise ValueError("many\\nlines " + "x" * 100_000)
        if self.index == 6:
            return next(iter([]))
        return 50


class WildReply(Participant):
    def reply(self, x):
        if self.index == 2:
            return next(iter([]))
        if self.index == 3:
            raise Odd("odd")
        if self.index == 4:
            threading.Event().wait()
        return Msg(self.name, "50", "assistant")
"""


@pytest.mark.parametrize("dispatch", ["group", pytest.param("agent", marks=pytest.mark.slow)])
def test_no_exception_of_a_participant_delays_others(cluster, tmp_path, dispatch):
    path = tmp_path / "wild.py"
    path.write_text(WILD)
    summary = cluster.play("3", "10", "--agent-class", f"{path}:Wild", "--dispatch", dispatch, status=4)
    assert (summary["rounds"][0]["answered"], summary["rounds"][0]["failed"]) == (4, 6)
    causes = {row["participant"]: row["failure"] for row in cluster.answers() if row["failure"]}
    assert causes[1] == "Odd: no seat (wild.py, line 20)" and causes[3] == "Odd: odd (wild.py, line 26)"
    assert causes[2] == "Mute: (its text cannot be shown) (wild.py, line 24)"
    assert causes[4] == "ValueError: half a letter \\ud800 (wild.py, line 28)"
    assert causes[5].startswith("ValueError: many lines xxx") and causes[5].endswith("xxx... (wild.py, line 30)")
    assert len(causes[5]) == 219
    assert causes[6].startswith("RuntimeError: coroutine raised StopIteration")
    assert (cluster.path / "runs/latest/summary.json").stat().st_size < 100_000


def test_a_blocked_reply_does_not_keep_the_server(cluster, tmp_path):
    path = tmp_path / "wild.py"
    path.write_text(WILD)
    flags = ("--agent-class", f"{path}:WildReply", "--reply-threads", "2")
    with (tmp_path / "stderr").open("w") as log:
        game = cluster.start("run_simulation.sh", "3", "8", *flags, stderr=log)
        until(lambda: "round 1: asking" in (tmp_path / "stderr").read_text(), 20, "the round has begun")
        game.send_signal(signal.SIGINT)
        game.communicate(timeout=120)
    assert game.returncode == 130
    assert cluster.summary()["rounds"][0]["failures"]["interrupted"] >= 1
    cluster.play("3", "4", *flags[:1], f"{path}:WildReply", "--reply-threads", "1", status=4)  # with threads of its own
    assert cluster.summary()["rounds"][0]["failures"] == {
        "StopIteration (wild.py, line 39)": 1,
        "Odd: odd (wild.py, line 41)": 1,
    }


def test_the_newest_version_of_a_file_is_loaded_even_if_its_size_and_time_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "mine.py"
    for number in (3, 4):
        path.write_text(f"{SHORT}        return {number}\n    def plus(self, x: {number}): ...\n")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        found = load_agent_class(f"{path}:Mine", False)
        assert found.plus.__annotations__ == {"x": number}  # evaluated: the program's own future imports do not apply


def test_a_user_file_in_the_checkout_can_be_an_agent_class(cluster):
    path = cluster.path / "my_file.py"  # written after the servers were started
    for number in (3, 4):
        path.write_text(SHORT + f"        return {number}\n")
        cluster.play("3", "5", "--agent-class", "my_file.py")  # its only class
        assert cluster.values() == [number] * 5
    path.unlink()
