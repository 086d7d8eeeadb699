"""Aligned tables for a terminal, reduced to the columns that fit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence

INDENT = 2  # spaces; some tables are printed with it


def fitting(widths: Sequence[int], dropped: Iterable[int], room: int, gap: int) -> list[int]:
    """Return the indices of the columns that fit side by side.

    Args:
        widths: The width of each column.
        dropped: The indices of columns that may be dropped, the least important first.
        room: The width of the terminal.
        gap: The spaces between two columns.
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
    """Return a table for standard output; on a terminal, only the columns that fit.

    Args:
        head: The column headings.
        rows: A cell for each column, or fewer: then the last one may have any length.
        dropped: The headings of columns that may be dropped, the least important first.
        left: The headings of left-aligned columns (default: the first column).
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
