"""The game of the lowest unique number: the smallest number that only one player gave wins.

Source: Ostling, Wang, Chou and Camerer, "Testing Game Theory in the Field: Swedish LUPI Lottery Games", American
Economic Journal: Microeconomics 3, 2011.
"""

from simulation.game import Game, Outcome, Rules, Tally, Units


class LowestUnique(Game):
    """The smallest number that only one player gave wins. Without such a number, there is no winner."""

    low = 1
    whole_numbers = True

    def rules(self) -> Rules:
        return Rules(
            question=f"give a number from 1 to {self.max_value}. The smallest number that only one player gives wins.",
            goal="the smallest number that only one player gave",
            labels={"unique_numbers": "count of numbers given once", "winning_number": "smallest of them"},
        )

    def outcome(self, tally: Tally) -> Outcome:
        unique = tally.units[tally.counts == 1]
        return {"unique_numbers": len(unique), "winning_number": int(unique[0]) if len(unique) else None}

    def payoffs(self, units: Units, outcome: Outcome) -> Units:
        """Return 1 for the winning number and 0 for all others."""
        return (units == outcome["winning_number"]).astype(int)
