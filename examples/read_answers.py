"""Read the answers of a run with DuckDB, a database in a Python package: count, average, median, failures per round.

.venv/bin/python -m pip install duckdb
.venv/bin/python examples/read_answers.py [runs/latest/answers.parquet]
"""

import sys

import duckdb

answers = sys.argv[1] if len(sys.argv) > 1 else "runs/latest/answers.parquet"
told = "round, count(value) AS answers, avg(value) AS average, median(value) AS median, count(failure) AS failures"
print(duckdb.sql(f"SELECT {told} FROM read_parquet(?) GROUP BY round ORDER BY round", params=[answers]))
