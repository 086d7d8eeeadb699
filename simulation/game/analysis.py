"""Analyses of guessing games with 0 < p < 1 as pure functions, and the analysis of a round by any game's `analyses`.

Shares are of the participants who answered. Sources:
Nagel, "Unraveling in Guessing Games: An Experimental Study", American Economic Review 85(5), 1995.
Camerer, Ho and Chong, "A Cognitive Hierarchy Model of Games", Quarterly Journal of Economics 119(3), 2004.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import numpy as np

from simulation.errors import one_line
from simulation.game.game import AllPairs, Game, Outcome, Pairs
from simulation.game.tally import Tally, payoffs_of

STEPS = 4  # reasoning steps with an interval: 0, 1, 2 and 3
MOST_TAU, TAU_STEPS = 100, 10_000  # the highest tau that is tried, and the number of steps in 1
SAMPLES = 1000  # of the bootstrap
BINS = 500  # of the bootstrap, if there are more distinct answers
ANALYSIS_LENGTH = 1000  # maximum number of characters of a round's analysis as JSON
DIGITS = 4  # decimal places of figures in results
NOTES = {  # what each figure means, for reports
    "steps": "Shares of answers by steps of reasoning (Nagel 1995). Step k is the interval from m p^(k+1/4) to "
    "m p^(k-1/4), where m is half the highest number in round 1, and later the last average. Step 0 ends at m, and "
    "answers of m or more are above.",
    "between_steps": "Share of answers below m and above the interval of step 3 that are in none of the intervals.",
    "tau": "Mean number of reasoning steps in the Poisson cognitive hierarchy (Camerer, Ho and Chong 2004): the value "
    "whose predicted mean is the average of round 1, with a 95 % bootstrap interval. There, each level above 0 gives "
    "the best reply to the mixture of all lower levels.",
    "dominated": "Share of dominated choices: numbers above p times the highest number, the most that p times an "
    "average can be.",
    "at_equilibrium": "Share of answers that are the Nash equilibrium.",
    "distance_to_equilibrium": "Distance of the average from the Nash equilibrium.",
    "fall": "Rate of fall of average and median since the last round: 0.3 means 30 % lower, a negative rate a rise.",
    "learning": "Learning direction: of the participants whose last number was above the last winning number, the "
    "share whose number is now lower; of those below it, the share whose number is now higher. Agree is the share of "
    "both together. Factor agree is this share for the number divided by the last average, as in Nagel 1995.",
}


def reasoning_steps(tally: Tally, scale: int, ratio: Fraction, reference: Fraction) -> dict[str, float]:
    """Return the shares of answers by steps of reasoning: "above", "0" to "3" and "higher" (Nagel 1995, section III).

    Step k is the interval from `reference` * ratio^(k + 1/4) to `reference` * ratio^(k - 1/4), closed below and open
    above, and compared exactly; step 0 ends at `reference`. Answers between two intervals belong to no step.
    """

    def below(quarters: int) -> int:  # how many answers are below reference * ratio^(quarters / 4)
        fourth_power = math.ceil((reference * scale) ** 4 * ratio**quarters)  # an edge itself may be irrational
        edge = math.isqrt(math.isqrt(fourth_power - 1)) + 1 if fourth_power > 0 else 0
        return int(tally.counts[: np.searchsorted(tally.units, edge)].sum())

    counts = {"above": tally.answered - below(0)}
    counts |= {f"{step}": below(max(4 * step - 1, 0)) - below(4 * step + 1) for step in range(STEPS)}
    counts["higher"] = below(4 * STEPS - 3)
    return {name: count / tally.answered for name, count in counts.items()}


def hierarchy_mean(tau: float, ratio: float, highest: float) -> float:
    """Return the mean number in the Poisson cognitive hierarchy (Camerer, Ho and Chong 2004, section II).

    The share of level k is Poisson with mean `tau`. Level 0 is uniform on 0 .. `highest`. Level k expects the lower
    levels in these proportions, and gives `ratio` times their mean number.
    """
    share, number = math.exp(-tau), highest / 2
    shares, total = share, share * number
    for level in range(1, math.ceil(tau + 12 * math.sqrt(tau)) + 12):
        share *= tau / level
        number = ratio * total / shares
        shares, total = shares + share, total + share * number
    return total / shares


def fit_tau(tally: Tally, scale: int, ratio: float, highest: float, seed: int) -> dict[str, Any]:
    """Return the `tau` whose predicted mean is that of the answers, as Camerer, Ho and Chong (2004) fit this game.

    `low` and `high` are the ends of the 95 % percentile bootstrap interval; `high` is None if no tau up to MOST_TAU
    predicts so low a mean. Without an estimate, return None for `tau`, and a `tau_reason`.
    """

    def tau_of(mean: float) -> float | None:  # 0 for a mean that is too high, and None for one too low
        every = range(MOST_TAU * TAU_STEPS + 1)
        step = bisect_left(every, -mean, key=lambda step: -hierarchy_mean(step / TAU_STEPS, ratio, highest))
        return step / TAU_STEPS if step < len(every) else None

    mean = float(Fraction(tally.total, tally.answered * scale))
    if tally.answered == 1:
        reason = "a single answer has no interval"
    elif mean > highest / 2:
        reason = f"the mean is above {highest / 2:g}, the highest that the model predicts (tau 0)"
    elif (estimate := tau_of(mean)) is None:
        reason = f"the mean is below what the model predicts for any tau up to {MOST_TAU}"
    else:
        units, counts = tally.units.astype(float), tally.counts
        if len(units) > BINS:  # replace the answers in each of BINS intervals by their mean
            width = -(-int(tally.units[-1] - tally.units[0] + 1) // BINS)
            starts = np.unique((tally.units - tally.units[0]) // width, return_index=True)[1]
            sums, counts = np.add.reduceat(units * counts, starts), np.add.reduceat(counts, starts)
            units = sums / counts
        samples = np.random.default_rng(seed).multinomial(tally.answered, counts / tally.answered, SAMPLES)
        ends = np.percentile(samples @ units / tally.answered / scale, [97.5, 2.5]).tolist()
        return {"tau": {"estimate": estimate, "low": tau_of(ends[0]), "high": tau_of(ends[1])}}
    return {"tau": None, "tau_reason": reason}


def learning_direction(pairs: Iterable[Pairs], winning_units: Fraction, means: tuple[float, float]) -> dict[str, Any]:
    """Return how many participants were `above` and `below` the last winning number, and the shares that moved to it.

    `pairs` has the last and the present answers in units. The share `agree` is of both together. `factor_agree` is
    this share for the adjustment factor: the answer divided by the mean that was known when it was given (`means`);
    changes within the rounding of answers do not count. A share is None if there are no such participants.
    Source: Nagel 1995, section V.
    """
    above = down = below = up = factor_agree = 0
    for before, after in pairs:
        change = after * means[0] - before * means[1]  # has the sign of the factor's change
        change[np.abs(change) <= sum(means) / 2] = 0
        was_above, was_below = before > math.floor(winning_units), before < math.ceil(winning_units)
        above, below = above + int(was_above.sum()), below + int(was_below.sum())
        down, up = down + int((after < before)[was_above].sum()), up + int((after > before)[was_below].sum())
        factor_agree += int((change < 0)[was_above].sum() + (change > 0)[was_below].sum())
    shares = {"went_down": (down, above), "went_up": (up, below), "agree": (down + up, above + below)}
    shares["factor_agree"] = factor_agree, above + below
    return {"above": above, "below": below} | {name: part / of if of else None for name, (part, of) in shares.items()}


def guessing_game(game: Any, tallies: Sequence[Tally], outcomes: Sequence[Outcome], pairs: AllPairs) -> Outcome:
    """Return the analyses of the averaging game with 0 < ratio < 1 and offset 0; see `Game.analyses`."""
    tally, scale, highest, found = tallies[-1], game.scale, Fraction(game.max_value), dict[str, Any]()
    is_first, last = len(tallies) == 1, outcomes[-2] if len(outcomes) > 1 else {}  # {} without answers
    if reference := highest / 2 if is_first else last.get("average"):  # at the equilibrium, 0, all steps are one
        found["steps"] = reasoning_steps(tally, scale, game.ratio, Fraction(reference))
        found["between_steps"] = 1 - sum(found["steps"].values())
    if is_first:
        found |= fit_tau(tally, scale, float(game.ratio), float(highest), game.seed)
    found["dominated"] = tally.counts[tally.units > math.floor(game.ratio * highest * scale)].sum() / tally.answered
    found["at_equilibrium"] = tally.counts[tally.units == 0].sum() / tally.answered
    found["distance_to_equilibrium"] = tally.total / (tally.answered * scale)
    if not is_first:
        figures: dict[str, Any] = {"mean": Tally.average, "median": Tally.median}
        values = {name: (of(tallies[-2]), of(tally)) for name, of in figures.items()}
        found["fall"] = {name: 1 - now / before if before else None for name, (before, now) in values.items()}
        if reference is not None and pairs is not None:
            before = outcomes[-3].get("average") if len(outcomes) > 2 else None
            means = float(highest / 2 if before is None else before), float(reference)
            found["learning"] = learning_direction(pairs, last["winning_number"] * scale, means)
    return found


def analyse(game: Game, tallies: Sequence[Tally], outcomes: Sequence[Outcome], pairs: AllPairs) -> dict[str, Any]:
    """Return the analysis of the latest round by `Game.analyses`, rounded; only `error` if that fails. Never raises."""
    if not tallies[-1].answered or not outcomes[-1]:
        return {}
    try:
        found: dict[str, Any] = _rounded(dict(game.analyses(tallies, outcomes, pairs)))
        if (length := len(json.dumps(found))) > ANALYSIS_LENGTH:
            raise ValueError(f"analyses returned {length:,} characters as JSON; at most {ANALYSIS_LENGTH:,} are kept")
        return found
    except BaseException as error:  # noqa: BLE001 - the user's game may raise anything
        return {"error": one_line(error)}


def _rounded(value: Any) -> Any:
    """Return a figure, a text, or a dictionary of these, as JSON has them. Raises ValueError for anything else."""
    if isinstance(value, Mapping):
        return {str(name): _rounded(each) for name, each in value.items()}
    if value is None or isinstance(value, str | bool):
        return value
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"analyses returned {value!r}, which is no finite number")
    return int(value) if isinstance(value, Integral) else round(float(value), DIGITS)


def mean_payoffs(game: Game, whole: Tally, outcome: Outcome, parts: Mapping[Any, Tally]) -> dict[Any, float | None]:
    """Return the mean payoff of each part of a round, to 4 significant digits; None of a part without answers."""
    if not outcome:
        return dict.fromkeys(parts)
    payoffs = payoffs_of(game, whole.units, outcome)
    sums = {name: payoffs[np.searchsorted(whole.units, part.units)] @ part.counts for name, part in parts.items()}
    return {name: float(f"{sums[name] / part.answered:.4g}") if part.answered else None for name, part in parts.items()}
