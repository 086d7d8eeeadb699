"""A participant that draws from what was answered in a recorded run, so that a model is asked only in that run."""

from bisect import bisect_right
from collections.abc import Sequence

from simulation.agents.participant import Participant
from simulation.game.rules import Question, draw_below

# For each round and each combination of personas: the distinct answers in units, and how often one up to it was given
Recorded = dict[int, dict[tuple[str, ...], tuple[Sequence[int], Sequence[int]]]]


class Surrogate(Participant):
    """A participant that gives an answer of the same round in the recorded run, from those with the same personas.

    A run plays with a subclass that holds the recorded answers, so that they travel once to each server.
    """

    recorded: Recorded
    persona_sets: tuple[str, ...] = ()  # those that tell the recorded answers of a round apart

    async def answer(self, question: Question) -> float | str:
        round_number = question.round or self.last_round(question)  # 0: a question outside the game
        if round_number == 0:
            return "no number yet"
        names = tuple(self.personas[topic].name for topic in self.persona_sets)
        units, up_to = self.recorded[round_number][names]
        drawn = draw_below(up_to[-1], self.game.seed, round_number, self.index)
        return units[bisect_right(up_to, drawn)] / self.game.scale


def surrogate_of(topics: tuple[str, ...], answers: Recorded) -> type[Surrogate]:
    """Return the class for a run. It is pickled by value."""
    return type("SurrogateOfRun", (Surrogate,), {"persona_sets": topics, "recorded": answers})
