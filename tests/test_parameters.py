"""Parameters of a user's class: declared by annotation, set by flag or experiment file, and checked."""

from __future__ import annotations

import json

import pytest
from conftest import one_line

from simulation.agents.participant import Participant
from simulation.cluster.agent_class import load_agent_class
from simulation.game.parameters import declared

NOISY = """
from __future__ import annotations
from fractions import Fraction
from participant import Participant
from simulation.game import setting


class Base(Participant):
    start: int = 40


class Noisy(Base):
    noise: float = 5.0
    share: Fraction = Fraction(1, 2)
    style: str = setting("calm", "how to play", choices=("calm", "wild"))
    loud: bool = False
    table: list[str] = []
    _hidden: int = 3

    async def answer(self, question):
        return self.start + self.noise * self.share + (10 if self.loud else 0) + (20 if self.style == "wild" else 0)


class Level(Participant):
    noise: float = 1.0

    async def answer(self, question):
        return self.noise
"""


@pytest.fixture
def noisy(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    return tmp_path / "noisy.py"


def test_annotated_attributes_with_defaults_are_parameters(noisy):
    cls = load_agent_class(f"{noisy}:Noisy", False, "--agent-class", ("noise=2", "Noisy.style=wild"))
    plain = load_agent_class(f"{noisy}:Noisy", False)
    assert [*declared(cls, Participant)] == ["start", "noise", "share", "style", "loud"]
    assert (cls.noise, cls.style, cls.start) == (2.0, "wild", 40)
    assert (plain.noise, plain.style) == (5.0, "calm")  # the user's class is not changed
    assert cls.__bases__ == plain.__bases__ and cls.__name__ == "Noisy"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--set nois=5", "--set nois=5: there is no such parameter; did you mean noise?"),
        ("--set noise=x", "--set noise 'x': must be a number"),
        ("--set noise=nan", "--set noise nan: must be a finite number"),
        ("--set loud=5", "--set loud 5: must be true or false"),
        ("--set style=odd", "--set style odd: must be one of calm, wild"),
        ("--set table=5", "--set table=5: there is no such parameter"),
        ("--set share=1/0", "--set share 1/0: must be a number such as 2/3"),
        ("--set noise=1 --set Noisy.noise=2", "noise is set twice"),
        ("--set start=1 --game game.py:Clash", "start is a parameter of the game Clash and of the class Noisy"),
    ],
)
def test_wrong_types_and_unknown_names_are_refused(command, noisy, monkeypatch, flags, words):
    monkeypatch.chdir(noisy.parent)
    (noisy.parent / "game.py").write_text(
        "from simulation.game import Game, Rules, setting\n\n\nclass Clash(Game):\n    start: int = setting(1, 'x')\n"
        "    def rules(self): return Rules('q', 'g')\n    def outcome(self, tally): return {}\n"
        "    def payoffs(self, units, outcome): return units\n"
    )
    status, err = command("--agent-class", "noisy.py:Noisy", *flags.split())
    assert status == 2 and words in one_line(err), err


def test_a_parameter_of_two_classes_needs_the_name_of_one(command, noisy, monkeypatch):
    monkeypatch.chdir(noisy.parent)
    players = ("--players", "noisy.py:Noisy=1/2,noisy.py:Level=1/2")
    status, err = command(*players, "--set", "noise=2")
    assert status == 2 and "--set noise=2: which one? write Noisy.noise or Level.noise" in one_line(err)
    status, err = command(*players, "--set", "Level.noisy=2")
    assert status == 2 and "did you mean noise?" in one_line(err)


def test_parameters_reach_the_servers_are_recorded_and_swept(cluster, noisy):
    flags = ("--agent-class", f"{noisy}:Noisy", "--set", "noise=4", "--set", "loud=true")
    summary = cluster.play("3", "20", *flags)
    assert set(cluster.values()) == {40 + 4 / 2 + 10}
    recorded = {"statistic": "mean", "numbers_announced": False, "start": 40, "noise": 4.0, "share": "1/2"}
    assert summary["config"]["set"] == recorded | {"style": "calm", "loud": True}
    resumed = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert resumed.returncode == 0 and set(cluster.values()) == {52.0}, resumed.stderr
    changed = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "3", "--set", "noise=6")
    assert changed.returncode == 2
    assert "--set noise=6: the run in runs/latest was started with 4.0" in one_line(changed.stderr)
    (cluster.path / "x.yaml").write_text(
        f"agent_class: {noisy}:Noisy\nset: {{noise: [2, 8], loud: true}}\nparticipant_num: 20\n"
    )
    swept = cluster.run("run_simulation.sh", "--experiment", "x.yaml", "--server-per-host", "3")
    assert swept.returncode == 0 and "noise" in swept.stdout, swept.stderr
    runs = sorted(path.parent for path in (cluster.path / "runs/latest").glob("*/summary.json"))
    assert [path.name for path in runs] == ["01-noise=2", "02-noise=8"]
    averages = [json.loads((path / "summary.json").read_text())["rounds"][0]["average"] for path in runs]
    assert averages == [51.0, 54.0]
    refused = cluster.run("run_simulation.sh", "--experiment", "x.yaml", "--server-per-host", "3", "--set", "nose=1")
    assert refused.returncode == 2 and "did you mean noise?" in one_line(refused.stderr)
