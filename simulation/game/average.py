"""The rule of the averaging game: whoever is closest to offset + ratio * average wins."""

from __future__ import annotations

from fractions import Fraction


def target_in_words(ratio: Fraction, offset: Fraction) -> str:
    """What to be closest to; see Game.target."""
    share = "the average" if ratio == 1 else f"{in_words(ratio)} {'of' if ratio < 1 else 'times'} the average"
    return f"{in_words(offset)} plus {share}" if offset else share


def in_words(number: Fraction) -> str:
    """A short decimal, if it is one exactly, and is not better known as a fraction."""
    if number.denominator == 1 or (number.denominator > 10 and Fraction(f"{float(number):.6g}") == number):
        return f"{float(number):.6g}" if number.denominator > 1 else str(number)
    return str(number)


def equilibria(ratio: Fraction, offset: Fraction, max_value: int) -> tuple[float, ...]:
    """The pure symmetric Nash equilibria in many players' game over 0..max_value; empty where every number is one.

    Best replies lead from any number to offset + ratio * number, within the range: its fixed points (Nagel, "Unraveling
    in Guessing Games: An Experimental Study", 1995).
    """
    if ratio == 1:
        return (float(max_value),) if offset else ()
    inner = offset / (1 - ratio)
    if ratio < 1:
        return (min(float(inner), float(max_value)),)
    return (0.0, float(max_value)) if offset == 0 else (float(max_value),)
