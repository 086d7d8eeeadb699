"""Query a run's answers with DuckDB, a database in a Python package. Print figures of each round.

.venv/bin/python -m pip install duckdb
.venv/bin/python examples/read_answers.py [PATH]

PATH is the folder or the answers file of a run, or the folder of an experiment. In an experiment's folder, the last run
is read. The default is runs/latest.
"""

import sys
from pathlib import Path

import duckdb

given = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/latest")
files = [given] if given.is_file() else [*given.glob("answers.parquet"), *given.glob("*/answers.parquet")]
if not files:
    sys.exit(f"error: there are no answers in {given}: give the folder of a run, one of those in runs/")
answers = str(max(files, key=lambda file: file.stat().st_mtime))
print(answers)
columns = "round, count(value) AS answers, avg(value) AS average, median(value) AS median, count(failure) AS failures"
print(duckdb.sql(f"SELECT {columns} FROM read_parquet(?) GROUP BY round ORDER BY round", params=[answers]))
