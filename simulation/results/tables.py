"""Aligned text tables, and numbers as text. On a terminal, columns that do not fit are omitted."""

import csv
import io
import math
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from simulation.errors import printable
from simulation.settings import players_text

MOST_DECIMALS = 12  # of a column whose numbers are all small
INDENT = 2  # spaces that the callers print before some tables


def number_text(number: Fraction | float | None, digits: int = 3, padded: bool = False) -> str:
    """Format a number with at most `digits` decimals, or with three significant digits if it is below 0.1.

    If `padded`, a number that is not an int has exactly `digits` decimals. None becomes a dash.
    """
    if number is None or isinstance(number, int):
        return "–" if number is None else f"{number:,}"
    number = float(number)
    if 0 < abs(number) < 0.1 and not padded:
        return f"{number:.3g}"
    text = f"{number:,.{digits}f}"
    return text if padded or not digits else text.rstrip("0").rstrip(".")


def decimals_of(numbers: Iterable[Fraction | float | None], most: int) -> int:
    """Return with how many decimals to show all `numbers` of a column: at most `most`, and none if all are whole.

    The largest number has at least 4 significant digits. The smallest has 2, unless the largest would then have over 6.
    """
    sizes = [abs(float(each)) for each in numbers if each]
    if all(size.is_integer() for size in sizes):
        return 0
    large, small = (-math.floor(math.log10(size)) for size in (max(sizes), min(sizes)))
    return min(most, max(large + 3, min(small + 1, large + 5), 0))


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Return `rows` as the text of a CSV file."""
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


class Column(NamedTuple):
    """A table column: the texts of its cells, and the exact values to sort by."""

    heading: str
    texts: list[str]
    values: list[Any]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns of a table. The floats in a column have equal decimals (see `decimals_of`).

    A cell is a text, a number, None (shown as a dash), or a tuple such as `("{} to {}", low, high)`.
    """
    columns = []
    for heading in rows[0]:
        cells = [row[heading] if isinstance(row[heading], tuple) else ("{}", row[heading]) for row in rows]
        digits = decimals_of([each for cell in cells for each in cell if isinstance(each, float)], MOST_DECIMALS)

        def text(number: Any, digits: int = digits) -> str:
            return "-" if number is None else number if isinstance(number, str) else number_text(number, digits, True)

        texts = [form.format(*map(text, parts)) for form, *parts in cells]
        columns.append(Column(heading, texts, [cell[1] for cell in cells]))
    return columns


def value_text(name: str, value: Any) -> str:
    """Return the value of a setting in words, without the folders of files."""
    if name == "players" and value is not None:
        return printable(players_text(value).removesuffix("=1"))
    text = "none" if value is None else " ".join(value) if isinstance(value, tuple) else str(value)
    return printable(Path(text).name if name in ("agent_class", "game") else text)


def fitting(widths: Sequence[int], dropped: Iterable[int], room: int, gap: int) -> list[int]:
    """Return the columns with widths above 0 that fit into `room`, without the first of `dropped` if they do not."""
    columns = [column for column, width in enumerate(widths) if width]
    for index in dropped:
        if sum(widths[column] + gap for column in columns) - gap <= room:
            break
        columns = [column for column in columns if column != index]
    return columns


def table_lines(
    head: Sequence[str], rows: Sequence[Sequence[str]], dropped: Iterable[str] = (), left: Iterable[str] | None = None
) -> list[str]:
    """Return the lines of a table for standard output. If standard output is a terminal, omit columns that do not fit.

    If a row has fewer cells than `head`, its last cell may have any length. `dropped` are the headings of columns that
    may be omitted, the least important first. `left` are the headings of left-aligned columns (default: the first).
    """
    from rich.cells import cell_len  # noqa: PLC0415 - Chinese characters, for example, are two columns wide

    lefts = head[:1] if left is None else [*left]
    whole = [row for row in rows if len(row) == len(head)]
    widths = [max(map(cell_len, column)) for column in zip(head, *whole, strict=True)]
    columns = list(range(len(head)))
    if sys.stdout.isatty():
        order = [column for name in dropped for column in columns if head[column] == name]
        columns = fitting(widths, order, shutil.get_terminal_size().columns - INDENT, gap=2)
    lines = []
    for row in (head, *rows):
        aligned, cells = len(row) if len(row) == len(head) else len(row) - 1, list[str]()
        for column in [column for column in columns if column < aligned]:
            blanks = " " * (widths[column] - cell_len(row[column]))
            cells.append(row[column] + blanks if head[column] in lefts else blanks + row[column])
        lines.append("  ".join([*cells, *row[aligned:]]).rstrip())
    return lines


def column_lines(columns: Sequence[Column], dropped: Iterable[str], page: str) -> list[str]:
    """Return `table_lines` of columns, and a line that names the omitted ones, which the file `page` has."""
    headings, *rows = [each.heading for each in columns], *zip(*(each.texts for each in columns), strict=True)
    head, *lines = table_lines(headings, rows, dropped)
    omitted = [each for each in headings if each not in re.split(" {2,}", head.strip())]
    return [head, *lines, *([f"not shown here, but in {page}: {', '.join(omitted)}"] if omitted else [])]
