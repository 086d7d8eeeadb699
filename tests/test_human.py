"""Runs beside figures of people: announcing all numbers as in the laboratory, human data, and the comparison."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from games.average import Average
from simulation.errors import SettingsError
from simulation.game.population import Population
from simulation.game.tally import Tally, announcement_of, score, value_counts
from simulation.results.run_files import game_to_json, parse_game
from simulation.runs.run_spec import new_run
from simulation.settings import SimulationConfig


def tally_of(answers) -> Tally:
    return Tally(len(answers), *value_counts(np.array(answers, np.int64)))


# --- All numbers are announced ---------------------------------------------------------------------------------------


def test_all_numbers_are_announced_if_the_setting_says_so():
    result = score(Average(decimals=1), 1, tally_of([0, 0, 0, 170, 225, 225]))
    silent, full = (announcement_of(result, Average(decimals=1, numbers_announced=each)) for each in (False, True))
    assert full.numbers == ((0.0, 3), (17.0, 1), (22.5, 2))
    assert full.text == f"{silent.text} The numbers were 0 (3 times), 17 and 22.5 (2 times)."
    assert silent == replace(full, numbers=(), text=silent.text)
    alone = score(Average(), 1, tally_of([7]))
    assert announcement_of(alone, Average(numbers_announced=True)).text.endswith(" The numbers were 7.")
    nothing = announcement_of(score(Average(), 1, Tally(0)), Average(numbers_announced=True))
    assert nothing.numbers == () and nothing.text == "Round 1: nobody answered."


def test_a_saved_game_of_ones_own_announces_numbers_as_it_was_played(tmp_path):
    game = Average(numbers_announced=True, population=Population(total=3))
    config = SimulationConfig(game=f"{tmp_path}/own.py:Own", participant_num=3)
    assert parse_game(json.dumps(game_to_json(game)), config).numbers_announced
    assert not parse_game(json.dumps(game_to_json(replace(game, numbers_announced=False))), config).numbers_announced


@pytest.mark.parametrize("settings", [{"decimals": 1}, {"decimals": 6, "participant_num": 1001}, {}])
def test_only_announcements_of_bounded_length_are_accepted(settings):
    config = SimulationConfig(**{"participant_num": 10**6} | settings, set=("numbers_announced=true",), seed=1)
    assert new_run(config).game.numbers_announced
    with pytest.raises(SettingsError, match=r"^--set numbers_announced=true: would list up to 1,002 different numbers"):
        new_run(replace(config, decimals=2, participant_num=1002))


@pytest.mark.parametrize("answers", [range(9_983, 10_001), [each // 2 for each in range(19_966, 19_984)], [9_999] * 18])
def test_the_estimate_counts_announced_numbers(answers):
    config = SimulationConfig(agent_type="llm", participant_num=18, rounds=3, decimals=2, ratio="2/3", seed=1)
    silent, full = (new_run(replace(config, set=(f"numbers_announced={each}",))) for each in ("false", "true"))
    one, other = ([each.prompt_tokens for each in spec.estimate(range(1, 4))] for spec in (silent, full))
    texts = [announcement_of(score(each.game, 1, tally_of(answers)), each.game).text for each in (silent, full)]
    longer = 18 * (len(texts[1]) - len(texts[0])) / 4  # tokens of all participants
    assert other[0] == one[0] and other[1] - one[1] >= longer > 0 and other[2] - one[2] >= 2 * longer
