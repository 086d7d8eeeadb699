"""Who the participants are: exact shares, dealt out by the seed alone."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from games.average import Average
from simulation.cluster.placement import even_split
from simulation.game.population import (
    MODEL,
    Grouping,
    ModelShare,
    Persona,
    Population,
    assign_many,
    largest_remainder,
)
from simulation.results.run_files import game_to_json, parse_game
from simulation.settings import SimulationConfig

totals = st.integers(1, 3000)
weights = st.lists(st.integers(1, 20), min_size=1, max_size=7)
seeds = st.integers(0, 2**64 - 1)
EDUCATION_OF_SEED_7 = [2, 2, 2, 1, 1, 0, 2, 0, 1, 1, 2, 2, 2, 2, 0, 0, 0, 2, 1, 2]


def shares_of(weights):
    return [Fraction(weight, sum(weights)) for weight in weights]


def population_of(seed, total, *sets, models=(), round_robin_models=()):
    made = {
        f"set {place}": tuple(Persona(f"P{number}", share) for number, share in enumerate(shares_of(each)))
        for place, each in enumerate(sets)
    }
    mixture = tuple(ModelShare(f"m{place}", share, f"model {place}") for place, share in enumerate(models))
    return Population(seed, total, made, mixture, round_robin_models)


@given(totals, weights)
def test_every_participant_is_assigned_and_each_share_is_exact_to_one(total, weights):
    shares = shares_of(weights)
    counts = largest_remainder(total, shares)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))


@given(seeds, totals, weights, st.integers(1, 40), st.integers(1, 5))
def test_assignment_does_not_depend_on_placement(seed, total, weights, servers, moderators):
    counts = largest_remainder(total, shares_of(weights))
    together = assign_many(seed, "education", counts, 0, total)
    assert np.bincount(together, minlength=len(counts)).tolist() == list(counts)
    for parts in (even_split(total, servers), even_split(total, servers * moderators)):
        apart = [assign_many(seed, "education", counts, part.start, len(part)) for part in parts]
        assert np.concatenate(apart).tolist() == together.tolist()
    one = total // 2
    assert Grouping("education", (), counts, seed).part_of(one) == together[one]


@given(seeds, totals, weights, weights)
def test_one_participant_and_arrays_give_the_same_parts(seed, total, first, second):
    population = population_of(seed, total, first, second, models=shares_of([1, 2]))
    *sets, models = population.groupings
    assert [parts.topic for parts in sets] == ["set 0", "set 1"] and models.topic == MODEL
    participant = total - 1
    for place, parts in enumerate(sets):
        there = parts.name_indices(participant, 1)[0]
        assert (
            population.personas_of(participant)[place].name
            == parts.names[there]
            == population.label_of(parts.topic, participant)
        )
        assert np.bincount(parts.name_indices(0, total), minlength=len(parts.names)).tolist() == list(parts.counts)
    called = models.names[models.name_indices(participant, 1)[0]]
    assert f"model {population.model_of(participant)[1:]}" == called == population.label_of(MODEL, participant)


def test_the_assignment_of_a_seed_is_fixed():
    assert (
        assign_many(7, "education", largest_remainder(20, shares_of([1, 1, 2])), 0, 20).tolist() == EDUCATION_OF_SEED_7
    )
    assert (
        assign_many(8, "education", largest_remainder(20, shares_of([1, 1, 2])), 0, 20).tolist() != EDUCATION_OF_SEED_7
    )


def test_assignments_of_topics_are_independent():
    halves = largest_remainder(100_000, shares_of([1, 1]))
    one, other = (assign_many(7, topic, halves, 0, 100_000) for topic in ("education", "occupation"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.02  # neighbours sit on the same server


def test_round_robin_models_are_grouped_by_their_server_name():
    population = population_of(7, 11, round_robin_models=("llama", "qwen", "llama"))
    (parts,) = population.groupings
    assert parts.names == ("llama", "qwen") and population.model_of(3) is None
    assert parts.name_indices(3, 3).tolist() == [0, 1, 0]
    assert [population.label_of(MODEL, participant) for participant in (3, 4, 5)] == ["llama", "qwen", "llama"]
    assert np.bincount(parts.name_indices(0, 11)).tolist() == [7, 4]
    assert population_of(7, 11, round_robin_models=("llama", "llama")).groupings == ()
    alike = Population(
        7, 10, models=(ModelShare("cold", Fraction(1, 2), "llama"), ModelShare("hot", Fraction(1, 2), "llama"))
    )
    assert alike.groupings[0].names == ("cold", "hot") and alike.groupings[0].name_indices(0, 10).sum() == 5
    other = ModelShare("other", Fraction(1, 2), "qwen")
    mixed = Population(7, 20, models=(*(replace(each, share=Fraction(1, 4)) for each in alike.models), other))
    (parts,) = mixed.groupings
    assert (parts.names, parts.counts) == (("cold", "hot", "qwen"), (5, 5, 10))


@given(seeds, totals, weights)
def test_a_population_survives_a_round_trip_through_json(seed, total, weights):
    population = population_of(seed, total, weights, models=shares_of([1, 1]), round_robin_models=("m",))
    text = json.dumps(game_to_json(Average(seed, 100, 0, 0.0, population=population)))
    assert parse_game(text, SimulationConfig(seed=seed, participant_num=total)).population == population
