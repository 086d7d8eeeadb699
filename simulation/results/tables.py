"""Aligned tables for a terminal, reduced to the columns that fit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence

INDENT = 2  # spaces; some tables are printed with it


def fitting(widths: Sequence[int], dropped: Iterable[int], room: int, gap: int) -> list[int]:
    """Return the indices of the columns that fit side by side into `room`, with `gap` spaces between two of them.

    `dropped` are the indices of columns that may be dropped, the least important first.
    """
    columns = [column for column, width in enumerate(widths) if width]
    for index in dropped:
        if sum(widths[column] + gap for column in columns) - gap <= room:
            break
        columns = [column for column in columns if column != index]
    return columns


def table_lines(
    head: Sequence[str], rows: Sequence[Sequence[str]], dropped: Iterable[str] = (), left: Iterable[str] | None = None
) -> list[str]:
    """Return a table for standard output; on a terminal, only the columns that fit.

    The last cell of a row that is shorter than `head` may have any length. Columns with the headings `dropped` may be
    left out, the least important first. Those with the headings `left` are left-aligned (default: the first column).
    """
    from rich.cells import cell_len  # noqa: PLC0415 - some letters, such as Chinese ones, take two columns

    lefts = head[:1] if left is None else [*left]
    whole = [row for row in rows if len(row) == len(head)]
    widths = [max(map(cell_len, column)) for column in zip(head, *whole, strict=True)]
    columns = list(range(len(head)))
    if sys.stdout.isatty():
        order = [head.index(name) for name in dropped if name in head]
        columns = fitting(widths, order, shutil.get_terminal_size().columns - INDENT, gap=2)
    lines = []
    for row in (head, *rows):
        aligned = row if len(row) == len(head) else row[:-1]
        cells = []
        for column in [column for column in columns if column < len(aligned)]:
            blanks = " " * (widths[column] - cell_len(row[column]))
            cells.append(row[column] + blanks if head[column] in lefts else blanks + row[column])
        lines.append("  ".join([*cells, *row[len(aligned) :]]).rstrip())
    return lines
