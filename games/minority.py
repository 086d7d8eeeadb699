"""The minority game: each player chooses 0 or 1, and the side that fewer chose wins.

Source: Challet and Zhang, "Emergence of cooperation and organization in an evolutionary game", Physica A 246, 1997.
"""

from fractions import Fraction

from simulation.game import Game, Outcome, Rules, Tally, Units


class Minority(Game):
    """The side that fewer players chose wins. If both sides are equal or one is empty, there is no winner."""

    low, high = 0, 1
    whole_numbers = True

    def rules(self) -> Rules:
        return Rules(
            question="choose 0 or 1. The side that fewer players choose wins.",
            goal="the side that fewer chose",
            labels={"share_of_1": "share of players who chose 1", "winning_number": "side that fewer chose"},
        )

    def outcome(self, tally: Tally) -> Outcome:
        share = Fraction(tally.total, tally.answered)
        fewer = None if share in (0, Fraction(1, 2), 1) else int(share < Fraction(1, 2))
        return {"share_of_1": share, "winning_number": fewer}

    def payoffs(self, units: Units, outcome: Outcome) -> Units:
        """Return 1 for the winning side and 0 for the other."""
        return (units == outcome["winning_number"]).astype(int)
