"""Reading and writing Parquet files of answers. Only a bounded number of rows is in memory at a time.

A file contains one row per participant and round. The rows are sorted by round, then by participant.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simulation.game.answer_sheet import FAILED, Answers
from simulation.game.tally import Tally, top_causes, value_counts

SCHEMA = pa.schema(
    [("round", pa.int32()), ("participant", pa.int64()), ("value", pa.float64()), ("failure", pa.string())]
)
# With these encodings, a file of ten million answers has 9 MB. With the library's defaults, the file has 60 MB, and
# writing takes three times as long.
ENCODING: dict[str, Any] = {
    "use_dictionary": ["round", "value", "failure"],
    "column_encoding": {"participant": "DELTA_BINARY_PACKED"},
}
ROWS_AT_ONCE = 250_000  # maximum number of rows read at once; each row group except the last has at least as many


def rows_of(round_number: int, part: Answers, scale: int) -> pa.Table:
    """Return a table of the answers in `part`, all of one round, converted from units of 1 / `scale` to numbers."""
    failed = part.units < 0
    columns = [
        pa.array(np.full(len(part.units), round_number, np.int32)),
        pa.array(np.arange(part.first, part.first + len(part.units), dtype=np.int64)),
        pa.array(part.units / scale, mask=failed),
        pa.array(part.causes, pa.string()).take(pa.array(FAILED - part.units, mask=~failed)),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def write_rows(file: IO[bytes], tables: Iterable[pa.Table]) -> None:
    """Write tables to a file. Combine small ones: each row group except the last has at least ROWS_AT_ONCE rows."""
    with pq.ParquetWriter(file, SCHEMA, **ENCODING) as writer:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table)
            if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def rows_in(path: Path) -> Iterator[pa.Table]:
    """Yield a file's rows as tables. Raises ArrowInvalid if columns are wrong or a row has no round or participant."""
    with path.open("rb") as opened, pq.ParquetFile(opened) as file:
        if file.schema_arrow.remove_metadata() != SCHEMA:
            raise pa.ArrowInvalid(f"{path} has other columns than {', '.join(SCHEMA.names)}, or of other types")
        for batch in file.iter_batches(ROWS_AT_ONCE):
            if batch["round"].null_count or batch["participant"].null_count:
                raise pa.ArrowInvalid(f"{path} has rows without round or participant")
            yield pa.Table.from_batches([batch])


def rows_by_round(path: Path) -> Iterator[tuple[int, pa.Table]]:
    """Yield pairs of a round number and a table with rows of this round only. A round may have several tables."""
    for table in rows_in(path):
        for number in np.unique(table["round"].to_numpy()):
            yield int(number), table.filter(pc.equal(table["round"], number))


def values_in(path: Path, first: int, count: int) -> NDArray[np.float64]:
    """Return the answers of participants first .. first+count-1 from a file of one round. Failed answers are NaN."""
    with path.open("rb") as opened, pq.ParquetFile(opened) as file:
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
