"""The rule of the averaging game: the answers closest to offset + ratio * average win."""

from __future__ import annotations

from fractions import Fraction


def target_in_words(ratio: Fraction, offset: Fraction) -> str:
    """Return the target in words; see Game.target."""
    share = "the average" if ratio == 1 else f"{in_words(ratio)} {'of' if ratio < 1 else 'times'} the average"
    return f"{in_words(offset)} plus {share}" if offset else share


def in_words(number: Fraction) -> str:
    """Return the number as text: a decimal if that is exact and the denominator exceeds 10, otherwise 3 or 2/3."""
    if number.denominator == 1 or (number.denominator > 10 and Fraction(f"{float(number):.6g}") == number):
        return f"{float(number):.6g}" if number.denominator > 1 else str(number)
    return str(number)


def equilibria(ratio: Fraction, offset: Fraction, max_value: int) -> tuple[float, ...]:
    """Return the pure symmetric Nash equilibria of the many-player game; empty if every number in 0..max_value is one.

    They are the fixed points of the best reply, which is offset + ratio * number within the range (Nagel, "Unraveling
    in Guessing Games: An Experimental Study", 1995).
    """
    if ratio == 1:
        return (float(max_value),) if offset else ()
    inner = offset / (1 - ratio)
    if ratio < 1:
        return (min(float(inner), float(max_value)),)
    return (0.0, float(max_value)) if offset == 0 else (float(max_value),)
