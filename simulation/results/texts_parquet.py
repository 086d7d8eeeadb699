"""Writing what language models wrote: Parquet files of texts, and of the prompts they answer."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simulation.llm.prompts import HASH_DIGITS, KeptText, RecordedText, hash_of
from simulation.results.answers_parquet import SCHEMA, row_writer, rows_in
from simulation.rpc.endpoints import TEXTS_PER_MESSAGE

_MODEL = ("model", pa.dictionary(pa.int32(), pa.string()))  # the name on its server
_WRITTEN = [(name, pa.string()) for name in ("prompt", "text", "thoughts")]
TEXTS = pa.schema([("round", pa.int32()), ("participant", pa.int64()), _MODEL, *_WRITTEN])
# Each prompt is in the file once, with the round that was the first to use it
PROMPTS = pa.schema([("first_round", pa.int32()), *((name, pa.string()) for name in ("prompt", "system", "user"))])


class Distinct:
    """A function that drops rows of prompts whose hash has been in an earlier row. Takes 16 bytes for each prompt."""

    def __init__(self) -> None:
        self._seen = np.array([b"~" * HASH_DIGITS])  # sorted; the last is beyond all hashes, so each search ends before

    def __call__(self, table: pa.Table) -> pa.Table:
        hashes, rows = np.unique(table["prompt"].to_numpy().astype(self._seen.dtype), return_index=True)
        places = np.searchsorted(self._seen, hashes)
        new = self._seen[places] != hashes
        self._seen = np.insert(self._seen, places[new], hashes[new])
        return table.take(pa.array(np.sort(rows[new])))


def well_formed(text: str) -> str:
    """Return a text that UTF-8 can encode: each lone surrogate is replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class RecordedTexts:
    """What models wrote in a recorded run, or only the answers of its first `rounds` rounds if it kept no texts.

    `seed` is the seed of that run if its answers repeat, otherwise None. In the first `whole_rounds` rounds, all
    participants answered, and prompts cannot differ. Raises OSError or ArrowInvalid if a file cannot be read.
    """

    def __init__(self, run: Path, rounds: int, seed: int | None, whole_rounds: int) -> None:
        self.seed, self.whole_rounds = seed, whole_rounds
        names = ("texts", "prompts", "answers")
        texts, self._prompts, answers = (
            [*run.glob(f"{each}.parquet")] or sorted(run.glob(f"{each}-*.parquet")) for each in names
        )
        self.has_texts = bool(texts)
        if texts:
            rows = pa.concat_tables(chain.from_iterable(rows_in(path, TEXTS) for path in texts))
            rows = rows.filter(pc.is_valid(rows["text"]))
        else:
            tables = chain.from_iterable(map(rows_in, answers))
            rows = pa.concat_tables(table.select(SCHEMA.names) for table in tables)
            rows = rows.filter(pc.and_(pc.is_valid(rows["value"]), pc.less_equal(rows["round"], rounds)))
            values = pa.array([f"{value:.15g}" for value in rows["value"].to_pylist()], pa.string())
            none = pa.nulls(len(rows), pa.string())
            rows = pa.table([rows["round"], rows["participant"], none, none, values, none], names=TEXTS.names)
        self._rows = rows.sort_by("participant")
        self._participants = self._rows["participant"].to_numpy()

    def of(self, first: int, count: int) -> Iterator[list[RecordedText]]:
        """Yield the texts of participants first .. first+count-1, in pieces for one message each."""
        start, stop = np.searchsorted(self._participants, (first, first + count)).tolist()
        for place in range(start, stop, TEXTS_PER_MESSAGE):
            piece = self._rows.slice(place, min(TEXTS_PER_MESSAGE, stop - place))
            yield [RecordedText(*row) for row in zip(*(piece[name].to_pylist() for name in TEXTS.names), strict=True)]

    def counts(self, participants: int, systems: Collection[str] | None) -> dict[int, int]:
        """Return by round how many texts of the first `participants` are recorded with one of `systems` or none."""
        rows = self._rows.slice(0, int(np.searchsorted(self._participants, participants)))
        if systems is not None and self._prompts:
            prompts = pa.concat_tables(chain.from_iterable(rows_in(path, PROMPTS) for path in self._prompts))
            same = prompts.filter(pc.is_in(prompts["system"], pa.array(sorted(systems), pa.string())))["prompt"]
            rows = rows.filter(pc.is_in(rows["prompt"], same.combine_chunks()))
        return Counter(rows["round"].to_pylist())


def write_texts(
    texts: IO[bytes], prompts: IO[bytes], round_number: int, pieces: Iterable[list[KeptText]]
) -> tuple[int, int]:
    """Write texts and their distinct prompts. Return how many there are, and how many have replaced characters."""
    kept, replaced, distinct = 0, 0, Distinct()
    with row_writer(texts, TEXTS) as write, row_writer(prompts, PROMPTS) as write_prompts:
        for piece in pieces:
            written = [tuple(each and well_formed(each) for each in (row.text, row.thoughts)) for row in piece]
            replaced += sum(each != (row.text, row.thoughts) for row, each in zip(piece, written, strict=True))
            kept += len(piece)
            hashes = {prompt: hash_of(prompt) for prompt in dict.fromkeys(row.prompt for row in piece)}
            rows = zip(piece, written, strict=True)
            values = [(round_number, row.participant, row.model, hashes[row.prompt], *each) for row, each in rows]
            used = [(round_number, name, *map(well_formed, prompt[:2])) for prompt, name in hashes.items()]
            if piece:
                write(pa.table([*zip(*values, strict=True)], schema=TEXTS))
                write_prompts(distinct(pa.table([*zip(*used, strict=True)], schema=PROMPTS)))
    return kept, replaced
