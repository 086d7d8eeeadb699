"""The guessing game (Nagel, "Unraveling in Guessing Games: An Experimental Study", American Economic Review, 1995)."""

from fractions import Fraction
from typing import Any

from simulation.game import Game, Outcome, Rules, Tally, Units, closest, setting
from simulation.game.analysis import NOTES, guessing_game


class Average(Game):
    """The answers closest to offset + ratio * statistic win. The statistic is the mean, median or maximum of all."""

    ratio: Fraction = setting(Fraction(1), "factor of the statistic, such as 2/3 or 0.51", Fraction(1, 10**6), 10)
    offset: Fraction = setting(Fraction(0), "added to ratio * statistic, such as 5 or 1/2", Fraction(0), 10**9)
    statistic: str = setting("mean", "figure of all answers", choices=("mean", "median", "maximum"))
    numbers_announced: bool = setting(False, "announce how often each number was given, too")

    @property
    def target(self) -> str:
        """Return what to be closest to: "the average", "2/3 of the average" or "5 plus 1/2 of the average"."""
        part = "" if self.ratio == 1 else f"{_words(self.ratio)} {'of' if self.ratio < 1 else 'times'} "
        share = f"{part}the {self._figure}"
        return f"{_words(self.offset)} plus {share}" if self.offset else share

    @property
    def _figure(self) -> str:
        return "average" if self.statistic == "mean" else self.statistic

    def rules(self) -> Rules:
        figure, wins = self._figure, "is announced, and whoever is closest to"
        it = "it" if self.target == f"the {figure}" else self.target
        return Rules(
            question=f"give a number from 0 to {self.max_value}. The {figure} of all answers {wins} {it} wins.",
            goal=f"the number closest to {self.target}",
            won=f"the closest to {it}" if it == "it" else f"the closest to {{winning_number}}, {it}",
            prompt=f"In every round each of you gives {self.number_words} from 0 to {self.max_value}. "
            f"The {figure} of all numbers {wins} {self.target} wins.",
            labels={"winning_number": "number to be closest to"},
            notes=NOTES,
        )

    def outcome(self, tally: Tally) -> Outcome:
        figures: dict[str, Any] = {"mean": tally.average, "median": tally.median, "maximum": tally.maximum}
        figure = figures[self.statistic]() / self.scale
        return {self._figure: figure, "winning_number": self.offset + self.ratio * figure}

    def payoffs(self, units: Units, outcome: Outcome) -> Units:
        """Return 1 for the answers closest to the winning number, and 0 for all others. The comparison is exact."""
        return closest(units, outcome["winning_number"] * self.scale).astype(int)

    def equilibrium(self) -> tuple[float, ...]:
        """Return the fixed points of the best reply x -> offset + ratio * x, limited to 0..max_value."""
        highest = float(self.max_value)
        if self.ratio < 1:
            return (min(float(self.offset / (1 - self.ratio)), highest),)
        return (highest,) if self.offset else () if self.ratio == 1 else (0.0, highest)

    def analyses(self, *rounds: Any) -> Outcome:
        """Return reasoning steps, tau and more if 0 < ratio < 1; see `Game.analyses`."""
        is_guessing_game = self.statistic == "mean" and self.ratio < 1 and not self.offset
        return guessing_game(self, *rounds) if is_guessing_game else {}


def _words(number: Fraction) -> str:
    """Format a number as `3` or `2/3`, or as a decimal if the denominator exceeds 10 and the decimal is exact."""
    decimal = f"{float(number):.6g}"
    return decimal if number.denominator > 10 and Fraction(decimal) == number else str(number)
