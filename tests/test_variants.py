"""The game's variants: ratio and offset, and what participants are told and ask about them."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from conftest import estimate_of, free_ports, one_line
from fake_model import WORDING, FakeModel
from hypothesis import given
from hypothesis import strategies as st

import main
from games.average import Average
from simulation.agents.participant import message_of, question_in
from simulation.errors import SettingsError
from simulation.game.population import Persona, Population
from simulation.game.rules import draw, game_of, question_for
from simulation.game.tally import RoundResult, Tally, Winners, announcement_of, score
from simulation.llm.model_configs import read_models
from simulation.llm.prompts import instruction, prompt_for, rules
from simulation.results.console_report import announcement_lines
from simulation.runs.scenario import build_game
from simulation.settings import SimulationConfig

GAME = Average(7, 100, 0, 0.0, ratio=Fraction(2, 3), offset=Fraction(5), prompt=WORDING)
QUESTION = question_for(GAME, 2, ())


@pytest.mark.parametrize(
    ("text", "same"), [("2/3", "2/3"), ("0.5", "1/2"), ("51/100", "51/100"), ("0.51", "51/100"), ("1", "1"), ("2", "2")]
)
def test_a_ratio_is_a_fraction_or_a_decimal(text, same):
    assert SimulationConfig(ratio=text).ratio == same


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ratio", "0"),
        ("ratio", "-1/2"),
        ("ratio", "1/0"),
        ("ratio", "half"),
        ("ratio", "nan"),
        ("ratio", "inf"),
        ("ratio", "11"),
        ("ratio", "1e-30"),
        ("ratio", "0." + "3" * 39),
        ("ratio", "٢/٣"),
        ("ratio", "1e999999999"),
        ("offset", "-1"),
        ("offset", "-1/2"),
        ("offset", "five"),
    ],
)
def test_an_invalid_ratio_or_offset_is_refused(setting, value):
    with pytest.raises(SettingsError, match=f"--{setting} {value[:20]}.*: must be"):
        game_of(SimulationConfig(**{setting: value}), None, Population())


@pytest.mark.parametrize(
    ("ratio", "offset", "words"),
    [
        ("1", "0", "the average"),
        ("2/3", "0", "2/3 of the average"),
        ("51/100", "0", "0.51 of the average"),
        ("1/2", "5", "5 plus 1/2 of the average"),
        ("4/3", "0", "4/3 times the average"),
        ("1", "2.5", "5/2 plus the average"),
    ],
)
def test_the_target_in_words(ratio, offset, words):
    assert Average(ratio=Fraction(ratio), offset=Fraction(offset)).target == words


@given(
    st.fractions(Fraction(1, 100), 3, max_denominator=100),
    st.fractions(0, 200, max_denominator=10),
    st.integers(1, 1000),
)
def test_no_player_gains_by_leaving_an_equilibrium(ratio, offset, max_value):
    equilibria = Average(max_value=max_value, ratio=ratio, offset=offset).equilibrium()
    for number in equilibria:
        best = min(max(offset + ratio * Fraction(number), 0), max_value)
        assert float(best) == pytest.approx(number, abs=1e-9)
    assert (equilibria == ()) == (ratio == 1 and offset == 0)


def result_of(game, *units):
    distinct, counts = np.unique(np.array(units, np.int64), return_counts=True)
    tally = Tally(len(units), distinct, counts)
    result = score(game, 1, tally)
    winners = [index for index, unit in enumerate(units) if unit in result.winning_units]
    return replace(result, winners=Winners(len(winners), tuple(winners[:10])), seconds=0.5)


def test_the_closest_to_offset_and_ratio_win():
    game = replace(GAME, decimals=1)
    result = result_of(game, 0, 250, 300, 1000)  # 0, 25, 30 and 100: 38.75 on average
    assert result.winning_number == 5 + Fraction(2, 3) * Fraction(155, 4)
    assert result.winning_units == (300,) and result.winners.lowest == (2,)
    assert announcement_lines(result, game) == [
        "Moderator: The average value is 38.7500 [takes 0.50 s]",
        "Moderator: P2 wins with 30.0, the closest to 30.8333, 5 plus 2/3 of the average.",
    ]


def test_a_winning_number_out_of_range_has_winners():
    result = result_of(replace(GAME, ratio=Fraction(4)), 10, 90, 100)
    assert result.winning_number > 100 and result.winning_units == (100,)


def test_prompts_contain_the_announcements():
    announcement = announcement_of(result_of(GAME, 0, 25, 30, 100), GAME)
    nothing = announcement_of(RoundResult(2, Tally(0)), GAME)
    question = question_for(GAME, 2, (announcement, nothing))
    prompt = prompt_for(rules(GAME), question, (30.0,), instruction(GAME))
    assert prompt.user.splitlines() == [
        "Round 1: the average was 38.75, so the number to be closest to was 30.833; 1 won with 30.",
        "Round 2: nobody answered.",
        "Your numbers so far: 30.",
        "Round 2: give a number from 0 to 100. The average of all answers is announced, and whoever is closest to "
        "5 plus 2/3 of the average wins. Just it.",
    ]
    assert "whoever is closest to 5 plus 2/3 of the average wins" in prompt.system


def test_prompts_contain_the_averages_of_teams():
    teams = (("red", Fraction(37, 2)), ("blue", Fraction(43, 2)), ("green", None))
    result = replace(result_of(replace(GAME, offset=Fraction(0)), 20, 20, 20, 20, 70), teams=teams)
    announcement = announcement_of(result, GAME)
    assert (announcement.teams[0], announcement.closest_teams) == (("red", 18.5), ("red", "blue"))
    heard = prompt_for("", question_for(GAME, 2, (announcement,)), ()).user.splitlines()[0]
    assert heard == (
        "Round 1: the average was 30, so the number to be closest to was 20; 4 won with 20. "
        "The averages of the teams were: red 18.5, blue 21.5, green none. The closest was that of red and blue."
    )
    assert question_in(message_of(question_for(GAME, 2, (announcement,))), GAME) == question_for(
        GAME, 2, (announcement,)
    )


@given(st.integers(0, 10**6), st.integers(1, 1000), st.integers(1, 99))
def test_teams_at_equal_distance_tie_exactly(off, parts, winning):
    teams = (("low", winning - Fraction(off, parts)), ("high", winning + Fraction(off, parts)), ("none", None))
    result = RoundResult(1, Tally(0), {"winning_number": Fraction(winning)}, teams=teams)
    assert announcement_of(result, GAME).closest_teams == ("low", "high")


def test_a_persona_fills_its_placeholder_or_comes_first():
    nurse = [
        Persona("nurse", Fraction(1), "You are a nurse {with braces}."),
        Persona("old", Fraction(1), "You are old."),
    ]
    assert rules(GAME, nurse).startswith("You are a nurse {with braces}. You are old. You give a whole number")
    placed = replace(GAME, prompt=replace(WORDING, system="Rules. {persona} Play on."))
    assert rules(placed, nurse) == "Rules. You are a nurse {with braces}. You are old. Play on."


def test_a_team_fills_its_placeholder_or_comes_last():
    assert rules(GAME, team="red").endswith("\nYour team is red.") and "team" not in rules(GAME)
    placed = replace(GAME, prompt=replace(WORDING, system="Play for {team}."))
    assert rules(placed, team="red {1}") == "Play for red {1}."


@pytest.mark.parametrize(("number", "decimals", "said"), [(123456789.123456, 6, "123456789.123456"), (700.0, 0, "700")])
def test_numbers_in_prompts_have_all_digits(number, decimals, said):
    game = Average(max_value=10**9, decimals=decimals)
    announcement = announcement_of(result_of(game, round(number * game.scale)), game)
    lines = prompt_for(
        "", replace(QUESTION, announcements=(announcement,), decimals=decimals), (number, None)
    ).user.splitlines()
    assert lines[0] == f"Round 1: the average was {said}; 1 won with {number:.{decimals}f}."
    assert lines[1] == f"Your numbers so far: {said}, none."


# --- On real servers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["group", "agent"])
def test_a_ratio_and_an_offset_are_played(cluster, dispatch):
    flags = ("--ratio", "1/2", "--offset", "5", "--rounds", "2", "--decimals", "1", "--max-value", "50")
    done = cluster.run(
        "run_simulation.sh", "3", "90", "--seed", "7", "--sleep-time", "0", "--dispatch", dispatch, *flags
    )
    assert done.returncode == 0, done.stderr
    summary = cluster.summary()
    game = Average(7, 50, 1, 0.0)
    for entry in summary["rounds"]:
        units = [draw(game, entry["round"], index) for index in range(90)]
        average = Fraction(sum(units), 900)
        winning = 5 + average / 2
        distance = [abs(Fraction(unit, 10) - winning) for unit in units]
        winners = [index for index in range(90) if distance[index] == min(distance)]
        assert entry["average"] == float(average) and entry["winning_number"] == float(winning)
        assert entry["winners"] == {"count": len(winners), "participants": [f"P{each}" for each in winners[:10]]}
        assert f"the closest to {float(winning):.4f}, 5 plus 1/2 of the average." in done.stdout
    assert summary["config"]["ratio"] == "1/2" and summary["config"]["offset"] == "5"


@pytest.mark.slow
def test_a_resumed_game_keeps_its_ratio(cluster):
    flags = ("--seed", "7", "--sleep-time", "0", "--ratio", "2/3")
    whole = cluster.play("3", "60", *flags, "--rounds", "3")
    cluster.play("3", "60", *flags, "--rounds", "1")
    resumed = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "3")
    assert resumed.returncode == 0, resumed.stderr
    told = [(entry["winning_number"], entry["winners"]) for entry in cluster.summary()["rounds"]]
    assert told == [(entry["winning_number"], entry["winners"]) for entry in whole["rounds"]]
    alike = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--ratio", "4/6")
    assert alike.returncode == 0, alike.stderr
    changed = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--ratio", "1/2")
    assert changed.returncode == 2 and "cannot be changed on resume" in one_line(changed.stderr)
    assert {entry["round"] for entry in cluster.summary()["cluster"]["times"]} == {1, 2, 3}


def test_times_of_a_round_add_up_to_it(cluster):
    summary = cluster.play("3", "90", "--sleep-time", "0.3", "--rounds", "2")
    for entry, times in zip(summary["rounds"], summary["cluster"]["times"], strict=True):
        assert times["round"] == entry["round"]
        parts = [times[name] for name in ("model_s", "client_s", "slowest_s", "rpc_s")]
        assert all(part >= 0 for part in parts) and sum(parts) == pytest.approx(entry["seconds"], abs=0.002)
        assert times["model_s"] > 0.2  # thinking


def said_to(fake):
    """The messages of all requests, system and user."""
    return [tuple(message["content"] for message in body["messages"]) for body in fake.bodies]


def test_the_selected_prompt_is_used_and_stored(cluster, fake):
    summary = cluster.play("3", "30", "--agent-type", "llm", "--prompt", "rational", "--ratio", "2/3", "--rounds", "2")
    assert summary["config"]["prompt"] == "rational"
    assert all("2/3 of the average" in system for system, *_ in said_to(fake))
    later = [user for _, user, *_ in said_to(fake) if "Round 2: give" in user]
    winning = summary["rounds"][0]["winning_number"]
    assert later and all(f"the number to be closest to was {round(winning, 3):g};" in user for user in later)
    assert all(f"; {summary['rounds'][0]['winners']['count']} won with" in user for user in later)
    basic = cluster.play("3", "6", "--agent-type", "llm")
    assert basic["config"]["prompt"] == "basic"
    systems = {system for system, *_ in said_to(fake)}
    assert len(systems) == 2


def test_step_by_step_parses_the_last_line_or_asks_for_the_number(cluster, fake):
    fake.thoughts = ["First I think of 50.\nThen of 2/3 of it.\n33\n", "I cannot say 20 or 30", "so it is 4"]
    fake.cut_off = {"so it is 4"}
    summary = cluster.play("3", "60", "--agent-type", "llm", "--prompt", "step_by_step", "--keep-agents")
    values = cluster.values()
    assert summary["rounds"][0]["answered"] == 60
    first = [body for body in fake.bodies if len(body["messages"]) == 2]
    second = [body for body in fake.bodies if len(body["messages"]) == 4]
    assert all("structured_outputs" not in body and body["max_tokens"] > 100 for body in first)
    assert all("structured_outputs" in body and body.get("n", 1) >= 1 for body in second)
    assert {body["messages"][2]["content"] for body in second} == {"I cannot say 20 or 30", "so it is 4"}
    asked_again = sum(body.get("n", 1) for body in second)
    assert asked_again == sum(thought != fake.thoughts[0] for thought in fake.thought)
    assert values.count(33.0) >= fake.thought.count(fake.thoughts[0]) > 0
    # what it thought is part of what it remembers
    fake.for_ever("talks")
    number = str(values.index(33.0)) if 33.0 in values else "0"
    done = cluster.run(
        *("main.py", "--role", "ask", "--run-dir", "runs/latest", "--participant", number, "--text", "Why?")
    )
    assert done.returncode == 0, done.stderr
    assert "What you thought before the last of them: " in fake.bodies[-1]["messages"][1]["content"]


def test_a_winner_is_asked_with_what_it_remembers(cluster, fake):
    summary = cluster.play("3", "60", "--agent-type", "llm", "--rounds", "2", "--keep-agents", "--ratio", "2/3")
    winner = int(summary["rounds"][-1]["winners"]["participants"][0][1:])
    fake.for_ever("talks")
    ask = ("main.py", "--role", "ask", "--run-dir", "runs/latest", "--winner", "--text", "Why that number?")
    done = cluster.run(*ask)
    assert (done.returncode, done.stdout.strip()) == (0, "between 0 and 100 I choose 37"), done.stderr
    system, user = (message["content"] for message in fake.bodies[-1]["messages"])
    own = [row["value"] for row in cluster.answers() if row["participant"] == winner]
    assert f"Your numbers so far: {own[0]:g}, {own[1]:g}." in user
    assert "Round 1: the average was" in user and "Round 2: the average was" in user
    assert user.endswith("Why that number?") and "2/3 of the average" in system
    assert "Answer with your number alone" not in system + user
    both = cluster.run(*ask, "--participant", "3")
    assert both.returncode == 2 and "--winner" in one_line(both.stderr)


def test_models_of_a_mixture_get_their_shares(checkout):
    port = free_ports(3)
    fakes = [FakeModel(port=port + place) for place in range(2)]
    entries = [
        {
            "config_name": name,
            "model_type": "openai_chat",
            "model_name": "participant-model",
            "client_args": {"base_url": fake.url},
        }
        for name, fake in zip(("llama", "qwen"), fakes, strict=True)
    ]
    path = checkout.path / "configs/model_configs.json"
    path.write_text(json.dumps(entries))
    try:
        flags = ("--agent-type", "llm", "--models", "llama=1/4,qwen=3/4", "--seed", "7")
        summary = checkout.play("2", "80", *flags)
        assert summary["rounds"][0]["answered"] == 80
        assert [len(fake.texts) for fake in fakes] == [20, 60]
        said = json.loads((checkout.path / "runs/latest/game.json").read_text())
        assert [each["share"] for each in said["cast"]["models"]] == ["1/4", "3/4"]
        # who asks which does not depend on the servers, nor on how they are asked
        fakes[0].for_ever("talks")
        fakes[1].for_ever("five")
        checkout.play("2", "80", *flags)
        values = checkout.values()
        assert sorted(values) == [5.0] * 60 + [37.0] * 20
        for other in (("3", "80"), ("1", "80", "--dispatch", "agent")):
            checkout.play(*other, *flags)
            assert checkout.values() == values
        # what was begun stays what it was
        path.write_text(json.dumps([entries[0], entries[1] | {"model_name": "another"}]))
        done = checkout.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
        assert done.returncode == 2 and "and it would ask participant-model, another" in one_line(done.stderr)
    finally:
        for fake in fakes:
            fake.close()


@pytest.mark.slow
def test_round_robin_models_stay_the_same_in_a_run(checkout):
    port = free_ports(3)
    fakes = [FakeModel(port=port + place) for place in range(2)]
    for fake, model in zip(fakes, ("llama", "qwen"), strict=True):
        fake.model = model
    entries = [
        {
            "config_name": f"model_{place + 1}",
            "model_type": "openai_chat",
            "model_name": fake.model,
            "client_args": {"base_url": fake.url},
        }
        for place, fake in enumerate(fakes)
    ]
    (checkout.path / "configs/model_configs.json").write_text(json.dumps(entries))
    try:
        checkout.play("2", "40", "--agent-type", "llm", "--model-per-host", "2", "--rounds", "1")
        assert [len(fake.texts) for fake in fakes] == [20, 20]
        resume = ("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2", "--model-per-host")
        other = checkout.run(*resume, "1")
        assert other.returncode == 2 and "asked llama, qwen; this cannot be changed" in one_line(other.stderr)
        again = checkout.run(*resume, "2")
        assert again.returncode == 0 and [len(fake.texts) for fake in fakes] == [40, 40], again.stderr
    finally:
        for fake in fakes:
            fake.close()


def config_of_a_mixture(tmp_path, models, **more):
    """The settings of a game among two models of which one may say much."""
    entries = [
        {
            "config_name": name,
            "model_type": "openai_chat",
            "model_name": name,
            "client_args": {"base_url": "http://localhost:1/v1"},
            "generate_args": {"max_tokens": most},
        }
        for name, most in (("short", 8), ("long", 4096))
    ]
    (tmp_path / "models.json").write_text(json.dumps(entries))
    return SimulationConfig(agent_type="llm", models=models, model_configs=str(tmp_path / "models.json"), **more)


def test_the_estimate_knows_every_model_of_a_mixture(tmp_path):
    for models in ("short=3/4,long=1/4", "long=1/4,short=3/4"):
        config = config_of_a_mixture(tmp_path, models)
        (entry,) = estimate_of(config)
        assert entry.answer_tokens == pytest.approx(750 * 8 + 250 * 4096, rel=0.05)


def test_the_estimate_of_tokens_is_an_upper_bound(tmp_path):
    config = config_of_a_mixture(
        tmp_path, "short=1/2,long=1/2", teams="model", ratio="2/3", decimals=2, rounds=4, prompt="team"
    )
    rounds = estimate_of(config)
    game = build_game(config, read_models(config))
    announcements = ()
    for entry in rounds:
        question = question_for(game, entry.round, announcements)
        prompt = prompt_for(rules(game, team="short"), question, (12.34,) * len(announcements), instruction(game))
        both = prompt.tokens + prompt._replace(thoughts="x" * 9999, thought_tokens=512).tokens
        assert entry.prompt_tokens >= both * 1000 * (entry.round > 1)
        teams = (("short", Fraction(3141592654, 10**8)), ("long", Fraction(2718281828, 10**8)))
        announcements += (
            announcement_of(replace(result_of(game, 2221, 2223, 5556), round=entry.round, teams=teams), game),
        )
    assert rounds[-1].answer_tokens >= 1000 * 512


def test_the_plan_names_what_a_hosted_model_needs(tmp_path, capsys):
    entry = {"config_name": "model_1", "model_type": "openai_chat", "model_name": "some-model"}
    entry |= {"client_args": {"base_url": "https://api.example.com/v1"}, "requests_per_minute": 60}
    (tmp_path / "models.json").write_text(json.dumps([entry]))
    flags = ["--agent-type", "llm", "--participant-num", "600", "--model-configs", str(tmp_path / "models.json")]
    assert main.main([*flags, "--samples-per-request", "1", "--model-per-host", "1", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    where = "model_1 is some-model at https://api.example.com/v1, outside the cluster; give --allow-remote-model if you"
    assert where in plan and "60 requests per minute allow all this in about 10 min" in plan
    assert main.main([*flags, "--allow-remote-model", "--model-per-host", "1", "--dry-run"]) == 0
    assert "outside the cluster" not in capsys.readouterr().out
