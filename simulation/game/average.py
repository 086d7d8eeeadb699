"""The rule of the averaging game: the answers closest to offset + ratio * average win."""

from fractions import Fraction


def target_in_words(ratio: Fraction, offset: Fraction) -> str:
    """Return the target as text, such as `5 plus 2/3 of the average`."""
    share = "the average" if ratio == 1 else f"{_number(ratio)} {'of' if ratio < 1 else 'times'} the average"
    return f"{_number(offset)} plus {share}" if offset else share


def _number(number: Fraction) -> str:
    """Format a number as `3` or `2/3`, or as a decimal if the denominator exceeds 10 and the decimal is exact."""
    decimal = f"{float(number):.6g}"
    return decimal if number.denominator > 10 and Fraction(decimal) == number else str(number)


def equilibria(ratio: Fraction, offset: Fraction, max_value: int) -> tuple[float, ...]:
    """Return the pure symmetric Nash equilibria of the game with many players; () if every number is an equilibrium.

    An equilibrium is a fixed point of the best reply. The best reply to an average x is offset + ratio * x, limited to
    0..max_value (Nagel, "Unraveling in Guessing Games: An Experimental Study", 1995).
    """
    if ratio == 1:
        return (float(max_value),) if offset else ()
    if ratio < 1:
        return (min(float(offset / (1 - ratio)), float(max_value)),)
    return (float(max_value),) if offset else (0.0, float(max_value))
