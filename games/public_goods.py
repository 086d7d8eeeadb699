"""The public goods game: contributions are multiplied and shared equally, so that contributing nothing pays most.

Source: Ledyard, "Public Goods: A Survey of Experimental Research", in the Handbook of Experimental Economics, 1995.
"""

from typing import Any

from numpy.typing import NDArray

from simulation.game import Game, Outcome, Rules, Tally, Units, setting


class PublicGoods(Game):
    """Each player has an endowment and contributes a part of it. The highest payoff wins."""

    endowment: int = setting(20, "what each player has", 1, 10**9)
    multiplier: float = setting(1.6, "factor of all contributions before they are shared", 0, 10**6)
    high = property(lambda self: self.endowment)

    def rules(self) -> Rules:
        return Rules(
            question=f"you have {self.endowment:,}; give the number of these that you contribute. All contributions "
            f"are multiplied by {self.multiplier:g} and shared equally among all, and you keep the rest of yours. "
            "The highest payoff wins.",
            goal="the highest payoff",
            labels={"average": "average contribution", "average_payoff": "average payoff"},
        )

    def outcome(self, tally: Tally) -> Outcome:
        average = tally.total / tally.answered / self.scale
        return {"average": average, "average_payoff": self.endowment + (self.multiplier - 1) * average}

    def payoffs(self, units: Units, outcome: Outcome) -> NDArray[Any]:
        """Return what the player keeps plus the share of all contributions."""
        return self.endowment - units / self.scale + self.multiplier * outcome["average"]

    def equilibrium(self) -> tuple[float, ...]:
        """Return 0, or the endowment if the multiplier exceeds the number of players; one point returns 1/n of it."""
        players = max(self.population.total, 1)
        return () if self.multiplier == players else (float(self.endowment if self.multiplier > players else 0),)
