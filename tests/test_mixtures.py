"""Mixtures of players: exact shares by the seed, groups of several classes, and surrogates of recorded runs."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from agentscope.message import Msg
from conftest import MODELS, ROOT, estimate_of, one_line, until
from fake_model import WORDING, FakeModel
from hypothesis import given
from hypothesis import strategies as st

from games.average import Average
from participant import LLMParticipant
from simulation.agents.group import ParticipantGroup
from simulation.agents.participant import Participant
from simulation.cluster.agent_class import serialize_agent_class
from simulation.cluster.placement import even_split
from simulation.errors import SettingsError
from simulation.game.population import KIND, MODEL, NO_MODEL, ModelShare, PlayerShare, Population, assign_many
from simulation.game.rules import draw, question_for
from simulation.llm.chat import load_models
from simulation.llm.model_configs import asked_models
from simulation.results.reader import read_run
from simulation.results.run_files import game_to_json, parse_game
from simulation.runs.experiment import Experiment
from simulation.runs.run_spec import new_run
from simulation.settings import SimulationConfig, labels_of, parse_players, players_text

LEVEL_K = f"{ROOT}/examples/level_k.py:LevelK"
OWN = """
from agentscope.message import Msg
from participant import LLMParticipant, Participant


class Blocking(Participant):
    numbers = ()

    def recall(self, numbers):
        self.numbers = numbers

    def reply(self, x=None):
        return Msg(self.name, str(10 * x.metadata["round"] + len(self.numbers)), "assistant")


class Stubborn(LLMParticipant):
    def system(self):
        return "You are stubborn."
"""


def population_of(seed, total, weights):
    """LLM players with models in turn, with a mixture, and with one of their own; and others, in these shares."""
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    thirds = tuple(ModelShare(f"m{number}", Fraction(1, 3), f"model {number // 2}") for number in range(3))
    mixture = (ModelShare("m1", Fraction(1, 4), "model 0"), ModelShare("m3", Fraction(3, 4), "model 3"))
    models = [thirds, mixture, (ModelShare("m2", Fraction(1), "model 1"),), (), ()]
    players = [
        PlayerShare(f"kind {number}", share, asked)
        for number, (share, asked) in enumerate(zip(shares, models, strict=False))
    ]
    return Population(seed, total, players=tuple(players))


@given(st.integers(0, 2**64 - 1), st.integers(1, 3000), st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_shares_of_kinds_and_of_their_models_are_exact_for_any_placement(seed, total, weights):
    population = population_of(seed, total, weights)
    kinds = population.kind_indices(0, total)
    models = [population.model_of(index) for index in range(min(total, 200))]
    labels = population.by_topic[MODEL].name_indices(0, total)
    for number, player in enumerate(population.players):
        mine = kinds == number
        assert abs(mine.sum() - player.share * total) < 1
        for name in {each.model for each in player.models}:
            share = sum(each.share for each in player.models if each.model == name)
            asking = (mine & (labels == population.by_topic[MODEL].names.index(name))).sum()
            assert abs(asking - share * int(mine.sum())) < len(player.models)
        for index, model in enumerate(models):
            if mine[index]:
                assert (model in {each.name for each in player.models}) if player.models else model is None
                assert population.label_of(KIND, index) == player.label
                assert (population.label_of(MODEL, index) == NO_MODEL) is (model is None)
    for parts in (even_split(total, 7), even_split(total, 2)):
        apart = [population.kind_indices(part.start, len(part)) for part in parts]
        assert np.concatenate(apart).tolist() == kinds.tolist()
        asking = sum(population.asking(part.start, len(part)) for part in parts)
        assert asking == sum(bool(population.players[kind].models) for kind in kinds)
    config = SimulationConfig(seed=seed, participant_num=total, players="random")
    assert parse_game(json.dumps(game_to_json(Average(seed, population=population))), config).population == population


def test_labels_of_kinds_have_as_many_folders_as_needed(tmp_path):
    text = "random=1/8,/a/x/p.py:P=1/8,/a/y/p.py:P=1/8,llm:/a/y/p.py:P=1/8,surrogate:/r/one=1/4,surrogate:/r/two=1/4"
    labels = ["random", "x/p.py:P", "y/p.py:P", "llm:y/p.py:P", "surrogate:r/one", "surrogate:r/two"]
    assert labels_of(parse_players(text)) == labels
    assert labels_of(parse_players("/a/p.py:P=1/2,surrogate:/r/one=1/2")) == ["P", "surrogate"]
    assert players_text("/a/p.py:P=1/2,surrogate:/r/one=1/2") == "P=1/2,surrogate:one=1/2"
    folder = tmp_path / "01-noise=1,repeat=1"
    folder.mkdir()
    assert [kind.run for kind in parse_players(f"surrogate:{folder}")] == [str(folder)]
    assert [kind.run for kind in parse_players(f"surrogate:{folder}=1")] == [str(folder)]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("random=1/5,/r/03-fee=10,repeat=1/p.py:P=4/5", {"random": "1/5", "/r/03-fee=10,repeat=1/p.py:P": "4/5"}),
        ("random=1/2,my/fee=2/p.py:P=1/2", {"random": "1/2", "my/fee=2/p.py:P": "1/2"}),
        ("surrogate:/r/01-x=1,repeat=1=1/2,a.py:P=1/2", {"surrogate:/r/01-x=1,repeat=1": "1/2", "a.py:P": "1/2"}),
        ("/a/x=1,y=2/p.py:P", {"/a/x=1,y=2/p.py:P": "1"}),
        ("my own, 1/p.py=0.5, random = 1/2", {"my own, 1/p.py": "1/2", "random": "1/2"}),
    ],
)
def test_paths_of_kinds_may_contain_commas_and_equals_signs(text, kinds):
    assert {kind.text: str(kind.share) for kind in parse_players(text)} == kinds


def test_kinds_are_assigned_as_personas_are():
    population = population_of(7, 100, [1, 1, 1, 1])
    alone = Population(7, 100, players=tuple(replace(each, models=()) for each in population.players))
    dealt = assign_many(7, KIND, (25, 25, 25, 25), 0, 100).tolist()
    assert population.kind_indices(0, 100).tolist() == alone.kind_indices(0, 100).tolist() == dealt
    assert [each.topic for each in alone.groupings] == [KIND]
    assert [each.topic for each in population.groupings] == [KIND, MODEL]
    assert population.by_topic[MODEL].names == ("model 0", "model 1", "model 3", NO_MODEL)
    assert population.players_in_words == "25 kind 0, 25 kind 1, 25 kind 2, 25 kind 3"


def test_a_file_names_kinds_relative_to_itself(tmp_path):
    text = "players:\n- llm\n- {llm: 1/4, sub/mine.py: 0.25, surrogate:../run: 1/2}\n- {random: 1/2, mine.py:A: 1/2}\n"
    (tmp_path / "a, b").mkdir()
    (tmp_path / "a, b/x.yaml").write_text(text)
    sweep = Experiment(str(tmp_path / "a, b/x.yaml"), {}).sweep
    here = f"{tmp_path}/a, b"
    assert [each.players for each in sweep.configs.values()] == [
        "llm=1",
        f"llm=1/4,{here}/sub/mine.py=1/4,surrogate:{tmp_path}/run=1/2",
        f"random=1/2,{here}/mine.py:A=1/2",
    ]
    assert [*sweep.configs][1:] == ["02-players=llm=1-4,mine.py=1-4,surrogate-run=1-2", "03-players=random=1-2,A=1-2"]
    assert [each.uses_models for each in sweep.configs.values()] == [True, True, False]
    assert type(sweep).from_json(json.loads(json.dumps(sweep.to_json()))) == sweep


def test_runs_of_a_sweep_can_be_named():
    config = SimulationConfig(players="surrogate:/r/01-rounds=2,seed=1=1/2, llm:model_2=1/2")
    assert [(each.run, each.model) for each in config.kinds] == [("/r/01-rounds=2,seed=1", None), (None, "model_2")]
    assert SimulationConfig(players="surrogate:/r/01-ratio=1-2").kinds[0].run == "/r/01-ratio=1-2"
    assert SimulationConfig(players="surrogate:/r/01-seed=1=1").kinds[0].run == "/r/01-seed=1"


BAD = [
    ("robot", "'robot' is no kind of player; known are random, llm, llm:MODEL, FILE.py:CLASS, surrogate:RUN"),
    ("llm=1/2,random=1/3", "the shares add up to 5/6; they must add up to exactly 1"),
    ("llm=1/2,llm=1/2", "names llm twice"),
    ("random=1,random=0", "names random twice"),
    (f"{LEVEL_K}=1/2,{ROOT}/tests/../examples/level_k.py:LevelK=1/2", "level_k.py:LevelK twice"),
    ("llm=x,random=1/2", "'llm=x,random' is no kind of player"),
    ("llm=0,random=1", "the share of llm, 0: must be from 1/1000000000 to 1"),
    ("surrogate:", "'surrogate:' is no kind of player"),
    ("", "'' is no kind of player"),
    (",".join(f"f{number}.py=0.005" for number in range(200)), "has 200 kinds of players; the maximum is 100"),
]


@pytest.mark.parametrize(("players", "problem"), BAD)
def test_invalid_players_are_refused(players, problem):
    with pytest.raises(SettingsError, match=re.escape(problem)) as refused:
        SimulationConfig(players=players)
    assert str(refused.value).startswith("--players ") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--players", "llm", "--agent-type", "random"), "--players: does not go with --agent-type"),
        (("--players", "llm", "--agent-class", LEVEL_K), "--players: does not go with --agent-class"),
        (("--players", "nowhere.py:A"), "--players nowhere.py:A: there is no file nowhere.py"),
        (("--players", "examples/level_k.py:LevelJ"), "has no class LevelJ derived from Participant; did you mean"),
        (("--players", "random", "--max-attempts", "2"), "--max-attempts 2: does nothing with --players random=1"),
        (("--players", "mine.py:Stubborn"), "Stubborn asks a model: write it as llm:mine.py:Stubborn"),
        (("--players", "llm:model_9"), "model_9: configs/model_configs.json has no such model"),
        (("--players", "surrogate:examples"), "/examples: cannot read its summary.json"),
    ],
)
def test_players_that_cannot_play_are_refused(checkout, flags, problem):
    (checkout.path / "mine.py").write_text(OWN)
    done = checkout.run("run_simulation.sh", "2", "10", *flags)
    assert done.returncode == 2 and problem in one_line(done.stderr)
    assert not checkout.runs()


def test_only_players_that_ask_models_cost(tmp_path):
    one = {"seed": 1, "participant_num": 1000, "rounds": 2, "model_configs": str(MODELS), "model_per_host": 2}
    alone = estimate_of(SimulationConfig(**one | {"participant_num": 200}, agent_type="llm"))
    for players in (f"llm=1/5,{LEVEL_K}=4/5", "random=4/5,llm:model_1=1/10,llm:model_2=1/10"):
        config = SimulationConfig(**one, players=players)
        assert asked_models(config) == ["model_1", "model_2"]
        costs = estimate_of(config)
        assert [each.answer_tokens for each in costs] == [each.answer_tokens for each in alone]
        assert costs[0].requests == pytest.approx(alone[0].requests, rel=0.2)
    few = estimate_of(SimulationConfig(**one | {"participant_num": 10**6}, players="llm=0.000003,random=0.999997"))
    assert few[0].requests == 3  # one for each participant
    assert asked_models(SimulationConfig(**one, players="random")) == []


class Rule(Participant):
    async def answer(self, question):
        await self.think(0.01)
        return 1


class Blocking(Participant):
    def reply(self, x=None):
        return Msg(self.name, "2", "assistant")


def test_only_players_that_ask_models_wait_for_each_other(tmp_path, monkeypatch):
    """In one group, while the model server says nothing: few wait for it, and all others have answered."""
    monkeypatch.setattr("simulation.agents.hosted_participants.TURN", 4)
    fake = FakeModel()
    fake.held = lambda _text: True
    entry = {"config_name": "model_1", "model_type": "openai_chat", "model_name": "participant-model"}
    (tmp_path / "models.json").write_text(json.dumps([entry | {"client_args": {"base_url": fake.url}}]))
    config = SimulationConfig(players="llm=1/3,random=1/3,llm:model_1=1/3", samples_per_request=1,
                              model_configs=str(tmp_path / "models.json"))  # fmt: skip
    load_models(config)
    asked = (ModelShare("model_1", Fraction(1), "participant-model"),)
    names = ("llm", "rule", "blocking")
    players = tuple(PlayerShare(name, Fraction(1, 3), asked if name == "llm" else ()) for name in names)
    game = Average(7, 100, 0, 0.0, config, prompt=WORDING, population=Population(7, 90, players=players))
    packed = serialize_agent_class(LLMParticipant, Rule, Blocking)
    group = ParticipantGroup("run/group-0", 0, 90, game, packed, 4, 60.0)
    try:
        until(lambda: group.progress(1.0).finished, 10, "built")
        kinds = [type(group.participant(index)).__name__ for index in range(90)]
        assert Counter(kinds) == {"LLMParticipant": 30, "Rule": 30, "Blocking": 30}
        group.begin(question_for(game, 1, ()), tokens_each=1000)
        assert group.chat.budget.left == 30 * 1000
        until(lambda: group.progress(1.0).done == 60 and len(fake.bodies) == 4, 10, "answered")
        assert fake.most_at_once == 4
        fake.held = None
        until(lambda: group.progress(1.0).finished, 10, "answered by the model")
        units = group.answers(0, 90).units.tolist()
        assert [units[index] for index in range(90) if kinds[index] == "Rule"] == [1] * 30
        assert [units[index] for index in range(90) if kinds[index] == "Blocking"] == [2] * 30
        group.begin(question_for(game, 2, ()))
        group.halt()  # of all ways of asking
        assert group.progress().finished
    finally:
        group.close()
        fake.close()


# --- On real servers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(cluster):
    path = cluster.path / "my" / "own.py"
    path.parent.mkdir()
    path.write_text(OWN)
    return "my/own.py"


def values_by_kind(cluster, number=1):
    """The values that each kind gave in a round."""
    run = read_run(cluster.path / "runs/latest")
    kinds = run.game.population.by_topic[KIND]
    labels = [kinds.names[index] for index in kinds.name_indices(0, run.config.participant_num)]
    found = {label: [] for label in kinds.names}
    for row in cluster.answers():
        if row["round"] == number:
            found[labels[row["participant"]]].append(row["value"])
    return found


def test_groups_of_several_classes_are_asked_in_either_dispatch_and_remember(cluster, own):
    players = f"random=1/2,{own}:Blocking=1/5,examples/level_k.py:LevelK=3/10"
    flags = ("--players", players, "--personas", "levels", "--seed", "7", "--sleep-time", "0", "--teams", "kind")
    done = cluster.run("run_simulation.sh", "3", "100", *flags, env={"AGENT_TYPE": "llm"})
    assert done.returncode == 0, done.stderr
    assert "init 100 (50 random, 20 Blocking, 30 LevelK) participant agents..." in done.stderr
    assert "The teams' averages are random " in done.stdout and "Blocking 10" in done.stdout
    first = cluster.values()
    found = values_by_kind(cluster)
    assert {label: len(values) for label, values in found.items()} == {"random": 50, "Blocking": 20, "LevelK": 30}
    assert found["Blocking"] == [10.0] * 20 and set(found["LevelK"]) >= {50.0}
    game, population = Average(7), read_run(cluster.path / "runs/latest").game.population
    assert all(
        value == draw(game, 1, index)
        for index, value in enumerate(first)
        if population.label_of(KIND, index) == "random"
    )
    report = (cluster.path / "runs/latest/report.html").read_text()
    assert "100 participants (50 random, 20 Blocking, 30 LevelK)" in report and 'data-topic="kind"' in report
    text = cluster.run("main.py", "--role", "report", "--run-dir", "runs/latest").stdout
    assert "kind " in text and "Blocking" in text
    # a resumed run gives its memory to the class that has one
    resumed = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert values_by_kind(cluster, 2)["Blocking"] == [21.0] * 20
    changed = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--players", "random")
    assert changed.returncode == 2 and "cannot be changed on resume" in one_line(changed.stderr)
    cluster.play("3", "100", *flags, "--dispatch", "agent")
    assert cluster.values() == first


def test_language_models_play_with_others(cluster, own, fake):
    players = f"llm=1/20,llm:{own}:Stubborn=1/20,examples/level_k.py:LevelK=3/5,{own}:Blocking=3/10"
    flags = ("--players", players, "--personas", "levels", "--seed", "7", "--sleep-time", "0", "--rounds", "2")
    dry = cluster.run("run_simulation.sh", "3", "600", *flags, "--dry-run")
    assert "participants: 600 (30 llm, 30 Stubborn, 360 LevelK, 180 Blocking), 200 on each server" in dry.stdout
    summary = cluster.play("3", "600", *flags, "--max-tokens", "1000000")
    assert summary["rounds"][1]["answered"] == 600 and len(fake.texts) == 120
    systems = Counter(body["messages"][0]["content"] == "You are stubborn." for body in fake.bodies)
    assert systems[True] and systems[False]
    assert summary["llm"]["requests"] == len(fake.bodies)
    found = values_by_kind(cluster)
    assert Counter(found["llm"] + found["Stubborn"]) == Counter(map(float, fake.texts[:60]))
    assert found["Blocking"] == [10.0] * 180


def test_a_budget_is_for_the_players_that_ask(cluster, fake):
    """Few ask, and in few groups: each of them gets its whole share."""
    summary = cluster.play("3", "3000", "--players", "llm=1/1000,random=999/1000", "--seed", "7", "--sleep-time", "0",
                           "--max-tokens", "1000")  # fmt: skip
    assert summary["rounds"][0]["answered"] == 3000 and summary["llm"]["completion_tokens"] == 9


@pytest.fixture(scope="module")
def recorded(cluster):
    """The folder of a run in which language models and others played."""
    players = "llm=3/5,random=2/5"
    flags = ("--players", players, "--personas", "education", "--rounds", "2", "--sleep-time", "0", "--seed", "3")
    with contextlib.closing(FakeModel(port=cluster.model_port)):
        cluster.play("3", "500", *flags)
    return (cluster.path / "runs/latest").resolve()


def distributions(run_path, kind, persona=None):
    """How often each value was given in each round by players of a kind, and by those with a persona."""
    run, found = read_run(run_path), {}
    groupings = (run.game.population.by_topic[topic] for topic in (KIND, "education"))
    labels = ([each.names[at] for at in each.name_indices(0, run.config.participant_num)] for each in groupings)
    wanted = [one == kind and persona in (None, other) for one, other in zip(*labels, strict=True)]
    table = pq.read_table(run_path / "answers.parquet").to_pydict()
    for number, index, value in zip(table["round"], table["participant"], table["value"], strict=True):
        if wanted[index]:
            found.setdefault(number, Counter())[value] += 1
    return found


def test_surrogates_draw_from_the_answers_of_models_by_round_and_persona(cluster, recorded):
    flags = ("--rounds", "2", "--seed", "5", "--personas", "education", "--sleep-time", "0")
    players = ("--players", f"surrogate:{recorded}=9/10,random=1/10")
    done = cluster.run("run_simulation.sh", "3", "20000", *players, *flags)
    assert done.returncode == 0, done.stderr
    path = (cluster.path / "runs/latest").resolve()
    source = f"draws from the answers by education of run {cluster.summary(recorded)['run_id']}"
    report = (path / "report.html").read_text()
    assert f"9/10 of the participants; {source}" in report and "18,000 surrogate" in report
    assert f"9/10 surrogate: {source}" in cluster.run("main.py", "--role", "report", str(path)).stdout
    for persona in ("doctorate", "high school"):
        before, now = distributions(recorded, "llm", persona), distributions(path, "surrogate", persona)
        for number in (1, 2):
            asked, drawn = sum(before[number].values()), sum(now[number].values())
            assert (asked, drawn) == (pytest.approx(60, abs=15), pytest.approx(3600, abs=150))
            assert now[number].keys() <= before[number].keys()
            expected = np.array([before[number][value] / asked * drawn for value in before[number]])
            chi_square = ((np.array([now[number][value] for value in before[number]]) - expected) ** 2 / expected).sum()
            assert chi_square < len(expected) + 5 * np.sqrt(2 * len(expected))
    assert distributions(path, "surrogate", "doctorate") != distributions(path, "surrogate", "high school")
    values = cluster.values()
    cluster.play("3", "20000", *players, *flags)
    assert cluster.values() == values
    small = cluster.play("3", "200", *players, *flags, "--dispatch", "agent")
    agent = cluster.values()
    cluster.play("3", "200", *players, *flags)
    assert cluster.values() == agent and small["rounds"][0]["answered"] == 200
    # other personas: the answers of all
    config = SimulationConfig(players=f"surrogate:{recorded}", participant_num=10, seed=1, rounds=2)
    spec = new_run(config)
    ((topics, answers),) = spec.recorded.values()
    everyone = Counter()
    for value, count in distributions(recorded, "llm")[1].items():
        everyone[value] += count
    units, up_to = answers[1][()]
    assert topics == () and list(units) == sorted(everyone) and up_to[-1] == 300
    assert spec.plan_lines()[3].startswith("surrogate: draws from the answers of run ")


def test_a_run_with_surrogates_repeats_and_resumes_without_the_recorded_run(cluster, recorded, tmp_path):
    recorded = shutil.copytree(recorded, recorded.with_name(f"{recorded.name}-copy"))  # as it is removed here
    name = recorded.name
    flags = ("--players", f"surrogate:{recorded}=1/2,random=1/2", "--personas", "education", "--sleep-time", "0")
    summary = cluster.play("3", "400", *flags)
    path, answers = (cluster.path / "runs/latest").resolve(), cluster.answers()
    kept = [f"{name}/{file}" for file in ("answers.parquet", "game.json", "summary.json")]
    assert sorted(each["name"] for each in summary["sources"])[:3] == kept
    repeated = yaml.safe_load((path / "source/experiment.yaml").read_text())
    assert repeated["players"] == f"surrogate:{name}=1/2,random=1/2"
    shutil.copytree(path / "source", tmp_path / "elsewhere")
    shutil.rmtree(recorded)
    done = cluster.run(
        "run_simulation.sh", "--experiment", str(tmp_path / "elsewhere/experiment.yaml"), "--server-per-host", "3"
    )
    assert done.returncode == 0, done.stderr
    assert cluster.answers() == answers and len({each["value"] for each in answers}) > 10
    done = cluster.run("run_simulation.sh", "--resume", str(path), "--rounds", "2")
    assert done.returncode == 0, done.stderr
    resumed = cluster.summary(path)
    assert [each["answered"] for each in resumed["rounds"]] == [400, 400]
    assert resumed["sources"] == summary["sources"]


def test_a_run_that_does_not_fit_is_refused(cluster, recorded, fake):
    name = recorded.relative_to(cluster.path)
    start = f"--players surrogate:{name}: "
    for flags, problem in (
        (("--rounds", "3"), "that run has 2 finished rounds, and this game has 3"),
        (("--ratio", "2/3"), "that run has ratio 1, and this game 2/3"),
        (("--offset", "1"), "that run has offset 0, and this game 1"),
        (("--decimals", "1"), "that run has decimals 0, and this game 1"),
        (("--max-value", "99"), "that run has high 100, and this game 99"),
        (("--game", "minority"), "that run played the game average, not minority"),
    ):
        done = cluster.run("run_simulation.sh", "3", "10", "--players", f"surrogate:{name}", *flags)
        assert done.returncode == 2 and f"{start}{problem}" in one_line(done.stderr), done.stderr
    fake.for_ever("words")
    cluster.play("3", "10", "--agent-type", "llm", "--max-attempts", "1", status=4)
    failed = (cluster.path / "runs/latest").resolve().relative_to(cluster.path)
    done = cluster.run("run_simulation.sh", "3", "10", "--players", f"surrogate:{failed}")
    assert done.returncode == 2 and "round 1 of that run has no answers of participants" in one_line(done.stderr)
    (cluster.path / "x.yaml").write_text(f"rounds: 3\nplayers: {{surrogate:{name}: 1}}\n")
    done = cluster.run("run_simulation.sh", "--experiment", "x.yaml", "--server-per-host", "3")
    assert done.returncode == 2 and one_line(done.stderr).startswith("error: x.yaml, line 2: players surrogate:")
