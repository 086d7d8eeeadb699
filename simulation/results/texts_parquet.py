"""Writing and sampling what language models wrote: Parquet files of texts, and of the prompts they answer."""

import hashlib
import json
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import pyarrow as pa

from simulation.llm.prompts import KeptText, Prompt
from simulation.results.answers_parquet import row_writer

TEXTS = pa.schema(
    [
        ("round", pa.int32()),
        ("participant", pa.int64()),
        ("model", pa.dictionary(pa.int32(), pa.string())),  # the name on its server
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("thoughts", pa.string()),
    ]
)
# Each prompt is in the file once, with the round that was the first to use it
PROMPTS = pa.schema([("first_round", pa.int32()), *((name, pa.string()) for name in ("prompt", "system", "user"))])
HASH_DIGITS = 16


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


def hash_of(prompt: Prompt) -> str:
    """Return a short hash of the messages of a prompt, the same in all runs."""
    return hashlib.sha256(json.dumps(prompt.messages).encode()).hexdigest()[:HASH_DIGITS]


def write_texts(
    texts: IO[bytes], prompts: IO[bytes], round_number: int, pieces: Iterable[list[KeptText]]
) -> tuple[int, int]:
    """Write the texts of one round and their distinct prompts to two files, piece by piece.

    Return how many texts there are, and in how many of them characters were replaced (see `well_formed`).
    """
    kept, replaced, distinct = 0, 0, Distinct()
    with row_writer(texts, TEXTS) as write, row_writer(prompts, PROMPTS) as write_prompts:
        for piece in pieces:
            written = [[each and well_formed(each) for each in (row.text, row.thoughts)] for row in piece]
            replaced += sum(each != [row.text, row.thoughts] for row, each in zip(piece, written, strict=True))
            kept += len(piece)
            hashes = {prompt: hash_of(prompt) for prompt in {row.prompt for row in piece}}
            rows = zip(piece, written, strict=True)
            values = [(round_number, row.participant, row.model, hashes[row.prompt], *each) for row, each in rows]
            write(_table(values, TEXTS))
            used = [(round_number, name, *map(well_formed, prompt[:2])) for prompt, name in hashes.items()]
            write_prompts(distinct(_table(used, PROMPTS)))
    return kept, replaced


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = [*zip(*rows, strict=True)] or [()] * len(schema)
    return pa.table([pa.array(values, each.type) for values, each in zip(columns, schema, strict=True)], schema=schema)
