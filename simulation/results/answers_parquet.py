"""Reading and writing Parquet files of answers and texts. Only a bounded number of rows is in memory at a time.

A file of answers contains one row per participant and round. The rows are sorted by round, then by participant. After
the columns of SCHEMA follow those in which the participants of the run differ, and payoffs.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import csv

from simulation.game.answer_sheet import FAILED, Answers, top_causes
from simulation.game.game import Game
from simulation.game.tally import RoundResult, Tally, payoffs_of, value_counts

SCHEMA = pa.schema(
    [("round", pa.int32()), ("participant", pa.int64()), ("value", pa.float64()), ("failure", pa.string())]
)
SETTINGS_KEY = "simulation.settings"  # key of the settings, as JSON, in a file's metadata
# A file of ten million answers then has 9 MB; with the library's defaults 60 MB, and it takes three times as long.
ENCODING = {"participant": "DELTA_BINARY_PACKED"}
NO_DICTIONARY = ("participant", "won")
ROWS_AT_ONCE, TEXTS_AT_ONCE = 250_000, 10_000  # maximum numbers of answers and of texts read at once
BYTES_AT_ONCE = 64 * 2**20


def tables_of(
    result: RoundResult, answers: Iterable[Answers], game: Game, payoffs: bool, settings: dict[str, Any]
) -> Iterator[pa.Table]:
    """Yield a table for each piece of a round's answers. `settings` become metadata; `payoffs` adds columns."""
    units, metadata = result.tally.units, {SETTINGS_KEY: json.dumps(settings)}
    paid = payoffs_of(game, units, result.outcome) if payoffs and result.outcome else np.full(len(units), np.nan)
    groupings = {each.topic: each for each in game.population.groupings}
    groupings |= {"team": groupings[game.teams]} if game.teams is not None else {}
    for part in answers:
        failed, count = part.units < 0, len(part.units)
        columns = {
            "round": pa.array(np.full(count, result.round, np.int32)),
            "participant": pa.array(np.arange(part.first, part.first + count, dtype=np.int64)),
            "value": pa.array(part.units / game.scale, mask=failed),
            "failure": pa.array(part.causes, pa.string()).take(pa.array(FAILED - part.units, mask=~failed)),
        }
        for topic, grouping in groupings.items():
            indices = pa.array(grouping.name_indices(part.first, count).astype(np.int32))
            columns[topic] = pa.DictionaryArray.from_arrays(indices, pa.array(grouping.names, pa.string()))
        if payoffs:
            each_paid = np.full(count, np.nan)
            each_paid[~failed] = paid[np.searchsorted(units, part.units[~failed])]
            columns["payoff"] = pa.array(each_paid, mask=np.isnan(each_paid))
            columns["won"] = pa.array(np.isin(part.units, result.winning_units), mask=failed)
        yield pa.table(columns, metadata=metadata)


def write_rows(file: IO[bytes], tables: Iterable[pa.Table]) -> None:
    """Write tables to a file, as `row_writer` does."""
    rest = iter(tables)
    first = next(rest, SCHEMA.empty_table())
    with row_writer(file, first.schema) as write:
        for table in chain([first], rest):
            write(table)


@contextmanager
def row_writer(file: IO[bytes], schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Yield a function that writes a table. Each row group except the last has ROWS_AT_ONCE rows, or BYTES_AT_ONCE."""
    encoding = {name: each for name, each in ENCODING.items() if name in schema.names}
    dictionaries = [name for name in schema.names if name not in NO_DICTIONARY]
    with pq.ParquetWriter(file, schema, column_encoding=encoding or None, use_dictionary=dictionaries) as writer:
        waiting: list[pa.Table] = []

        def write(table: pa.Table) -> None:
            waiting.append(table)
            if sum(map(len, waiting)) >= ROWS_AT_ONCE or sum(each.nbytes for each in waiting) >= BYTES_AT_ONCE:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        yield write
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def rows_in(path: Path, schema: pa.Schema = SCHEMA) -> Iterator[pa.Table]:
    """Yield a file's rows as tables. Raises ArrowInvalid if columns are wrong or the first two lack a value."""
    with path.open("rb") as opened, pq.ParquetFile(opened) as file:
        if [*file.schema_arrow][: len(schema)] != [*schema]:
            raise pa.ArrowInvalid(f"{path} has other columns than {', '.join(schema.names)}, or of other types")
        for batch in file.iter_batches(ROWS_AT_ONCE if schema is SCHEMA else TEXTS_AT_ONCE):
            if any(batch[name].null_count for name in schema.names[:2]):
                raise pa.ArrowInvalid(f"{path} has rows without {' or '.join(schema.names[:2])}")
            yield pa.Table.from_batches([batch])


def joined_rows(paths: Sequence[Path], schema: pa.Schema = SCHEMA) -> Iterator[pa.Table]:
    """Yield the rows of several files. A column that only the last file has is null in files of older versions."""
    empty = pq.read_schema(paths[-1]).empty_table()
    for table in chain.from_iterable(rows_in(path, schema) for path in paths):
        yield pa.concat_tables([empty, table], promote_options="default")


def rows_by_round(path: Path, schema: pa.Schema = SCHEMA) -> Iterator[tuple[int, pa.Table]]:
    """Yield pairs of a round number and a table with rows of this round only. A round may have several tables."""
    for table in rows_in(path, schema):
        for number in np.unique(table[schema.names[0]].to_numpy()):
            yield int(number), table.filter(pc.equal(table[schema.names[0]], number))


def write_csv(path: Path, target: Path) -> None:
    """Write the rows of the Parquet file `path` to the CSV file `target`."""
    # dictionaries become texts
    schema = pa.schema([(each.name, getattr(each.type, "value_type", each.type)) for each in pq.read_schema(path)])
    with target.open("wb") as opened, csv.CSVWriter(opened, schema) as writer:
        for table in rows_in(path):
            writer.write_table(table.cast(schema))


def values_in(path: Path, first: int, count: int) -> NDArray[np.float64]:
    """Return the answers of participants first .. first+count-1 from a file of one round. Failed answers are NaN."""
    with pq.ParquetFile(path) as file:  # three times as fast as a filter
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        stops = np.cumsum(sizes)
        low, high = np.searchsorted(stops, (first, first + count - 1), side="right")
        column = file.read_row_groups(list(range(low, high + 1)), columns=["value"])["value"]
    return column.slice(first - int(stops[low]) + sizes[low], count).to_numpy()


def tally_in(table: pa.Table, scale: int) -> Tally:
    """Return the tally of a table in units of 1 / `scale`. `ended` is COMPLETE: rows do not state how a round ended."""
    values = table["value"].drop_null().to_numpy()
    units, counts = value_counts(np.rint(values * scale).astype(np.int64))
    causes = table["failure"].drop_null().value_counts()
    failures = top_causes(causes.field("counts").to_numpy(), lambda index: causes[index]["values"].as_py())
    return Tally(len(table), units, counts, failures)
