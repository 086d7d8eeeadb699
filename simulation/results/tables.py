"""Tables for a terminal: the columns that fit, aligned."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence

INDENT = 2  # some tables are printed with it


def fitting(widths: Sequence[int], dropped: Iterable[int], room: int, gap: int) -> list[int]:
    """Return the places of the columns that fit beside each other.

    Args:
        widths: The width of each column.
        dropped: The places of those that may be left out, the least important first.
        room: The width of the terminal.
        gap: The blanks between two columns.
    """
    places = [place for place, width in enumerate(widths) if width]
    for place in dropped:
        if sum(widths[each] + gap for each in places) - gap <= room:
            break
        places = [each for each in places if each != place]
    return places


def table_lines(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    dropped: Iterable[str] = (),
    left: Iterable[str] | None = None,
) -> list[str]:
    """Return a table for standard output: whole, or in the columns that fit where that is a terminal.

    Args:
        head: The heads of the columns.
        rows: A cell for each column, or fewer: then the last one may be as long as it is.
        dropped: The heads of columns that may be left out, the least important first.
        left: Those of columns that begin at the left; otherwise it is the first.
    """
    from rich.cells import cell_len  # noqa: PLC0415 - some letters, such as Chinese ones, take two columns

    heads, lefts = list(head), head[:1] if left is None else [*left]
    whole = [row for row in rows if len(row) == len(heads)]
    widths = [max(map(cell_len, column)) for column in zip(heads, *whole, strict=True)]
    places = list(range(len(heads)))
    if sys.stdout.isatty():
        order = [heads.index(name) for name in dropped if name in heads]
        places = fitting(widths, order, shutil.get_terminal_size().columns - INDENT, gap=2)
    lines = []
    for row in (heads, *rows):
        cells = []
        for place in places:
            if place < len(row) - (len(row) < len(heads)):
                blanks = " " * (widths[place] - cell_len(row[place]))
                cells.append(row[place] + blanks if heads[place] in lefts else blanks + row[place])
        lines.append("  ".join(cells if len(row) == len(heads) else [*cells, row[-1]]).rstrip())
    return lines
