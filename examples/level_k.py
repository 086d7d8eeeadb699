"""Level-k participants, which use no model. Level 0 answers at random; level k gives the best reply to level k - 1.

    ./run_simulation.sh 2 1000 --agent-class examples/level_k.py:LevelK --personas levels --rounds 5 \
        --ratio 2/3 --decimals 2 --sleep-time 0

Source: Nagel, "Unraveling in Guessing Games: An Experimental Study", American Economic Review 85, 1995. Copy this file
to write your own participant class.
"""

from fractions import Fraction

from simulation.agents.participant import Participant
from simulation.game.rules import Question, draw


class LevelK(Participant):
    """A participant whose persona in the set "levels" states its level: "level 0", "level 1", ..."""

    @property
    def level(self) -> int:
        if "levels" not in self.personas:
            raise ValueError('LevelK takes its level from the personas "levels": give --personas levels')
        return int(self.personas["levels"].name.removeprefix("level "))

    async def answer(self, question: Question) -> float:
        """Return a random number at level 0. At level k, apply x -> offset + ratio * x to the last average k times."""
        level = self.level
        if level == 0:
            round_number = question.round or self.last_round(question)  # 0: a question outside the game
            return draw(self.game, round_number, self.index) / self.game.scale
        number = last_average(question)
        for _ in range(level):
            number = self.game.offset + self.game.ratio * number
        return float(min(number, question.max_value))


def last_average(question: Question) -> Fraction:
    """Return the last announced average, or the mean of random answers (max_value / 2) if there is none."""
    averages = [each.average for each in question.announcements if each.average is not None]
    return Fraction(averages[-1]) if averages else Fraction(question.max_value, 2)
