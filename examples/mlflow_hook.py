"""A hook that logs runs to MLflow: settings as parameters, figures of each round as metrics, and the report.

    .venv/bin/python -m pip install -c constraints.txt mlflow-skinny
    MLFLOW_ALLOW_FILE_STORE=true ./run_simulation.sh 10 1000 --rounds 3 --hook examples/mlflow_hook.py

Without MLFLOW_TRACKING_URI, it writes to the folder mlruns.
"""

import os
from pathlib import Path
from typing import Any

import mlflow

from simulation.monitoring.hooks import Hook

FIGURES = ("average", "median", "std", "winning_number", "answered", "failed", "seconds")


class MLflowHook(Hook):
    """Logs each run of the simulation as a run of MLflow."""

    def __init__(self) -> None:
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", Path("mlruns").absolute().as_uri()))

    def run_started(self, summary: dict[str, Any], folder: Path) -> None:
        mlflow.start_run(run_name=summary["run_id"], tags={"folder": str(folder)})
        mlflow.log_params({name: value for name, value in summary["config"].items() if value is not None})
        for entry in summary["rounds"]:  # of a resumed run
            self._log_round(entry)

    def round_finished(self, summary: dict[str, Any], folder: Path) -> None:
        self._log_round(summary["rounds"][-1])

    def run_finished(self, summary: dict[str, Any], folder: Path) -> None:
        for name in ("summary.json", "report.html"):
            if (folder / name).exists():
                mlflow.log_artifact(str(folder / name))
        mlflow.end_run("FINISHED" if summary["status"] in ("complete", "partial") else "FAILED")

    def _log_round(self, entry: dict[str, Any]) -> None:
        figures = {name: float(entry[name]) for name in FIGURES if entry[name] is not None}
        mlflow.log_metrics(figures, step=entry["round"])
