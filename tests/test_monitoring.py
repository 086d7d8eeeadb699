"""What observes a run in progress besides the live page: metrics for Prometheus, and hooks of the user's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from conftest import ROOT, free_ports, one_line, until
from prometheus_client.parser import text_string_to_metric_families

from simulation.monitoring.metrics import COUNTERS

FLAGS = ("--sleep-time", "0", "--seed", "7")
HOOK = """
import json
from pathlib import Path

from simulation.monitoring.hooks import Hook


class Mine(Hook):
    def log(self, event, summary, folder):
        same = summary == json.loads((folder / "summary.json").read_text())
        entry = [event, len(summary["rounds"]), summary["status"], same, (folder / "report.html").exists()]
        with (Path(__file__).parent / "log").open("a") as file:
            file.write(json.dumps(entry) + "\\n")

    def run_started(self, summary, folder):
        self.log("started", summary, folder)

    def round_finished(self, summary, folder):
        self.log("round", summary, folder)

    def run_finished(self, summary, folder):
        self.log("finished", summary, folder)
"""


def scraped(port):
    """Return the samples that Prometheus would store, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    assert all(family.documentation for family in families)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def test_the_metrics_of_a_run_are_those_of_its_summary(cluster, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from participant import Participant\n\n\nclass Mine(Participant):\n"
        "    async def answer(self, question):\n"
        "        if question.round == 3:\n            await self.think(3600)\n"
        "        return 20 if self.index % 4 else 'none'\n"
    )
    port = free_ports(1)
    flags = ("--agent-class", str(tmp_path / "mine.py"), "--rounds", "3", "--metrics", str(port))
    run = cluster.start("run_simulation.sh", "3", "40", *flags)

    def finished():
        with_rounds = run.poll() is None and try_to(scraped, port).get(("simulation_rounds_total",))
        return with_rounds == 2

    until(finished, 60, "two rounds are finished")
    until(lambda: scraped(port)["simulation_memory_bytes", "servers"] > 10**7, 10, "servers report their memory")
    found = scraped(port)
    summary = cluster.summary()
    assert found["simulation_answers_total",] == 60 and found["simulation_participants",] == 40
    (cause,) = summary["rounds"][0]["failures"]
    assert found["simulation_failures_total", cause] == 20
    assert found["simulation_average",] == summary["rounds"][1]["average"] == 20
    assert found["simulation_round_outcomes",] == 0
    assert found["simulation_servers", "plays"] == 7 and found["simulation_servers", "lost"] == 0
    assert found["simulation_seconds_total", "create"] == pytest.approx(summary["seconds"]["create"], abs=1e-3)
    assert found["simulation_memory_bytes", "main"] > 10**7
    assert not any(name.startswith("simulation_llm") for name, *_ in found)
    run.send_signal(signal.SIGINT)
    run.communicate()
    assert run.returncode == 130


def test_counters_are_sums_over_the_runs_of_a_command(cluster, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from participant import Participant\n\n\nclass Mine(Participant):\n    waits: int = 0\n\n"
        "    async def answer(self, question):\n"
        "        await self.think(3600 * self.waits)\n        return 20\n"
    )
    (tmp_path / "two.yaml").write_text(
        f"agent_class: {tmp_path / 'mine.py'}\nparticipant_num: 40\nset: {{waits: [0, 1]}}\n"
    )
    port = free_ports(1)
    flags = ("--experiment", str(tmp_path / "two.yaml"), "--metrics", str(port), "--server-per-host", "3")
    run = cluster.start("main.py", *flags, "--base-port", str(cluster.base_port))
    until(lambda: "waits 1" in str([*try_to(scraped, port)]), 60, "the second run plays")
    found = scraped(port)
    assert found["simulation_rounds_total",] == 1 and found["simulation_answers_total",] == 40
    run.send_signal(signal.SIGINT)
    run.communicate()
    assert run.returncode == 130


def try_to(call, *arguments):
    try:
        return call(*arguments)
    except OSError:  # no server listens there yet
        return {}


def test_the_metrics_of_language_models_are_counted(cluster, fake):
    port = free_ports(1)
    fake.held = lambda text: "Round 2" in text
    flags = ("--agent-type", "llm", "--rounds", "2", "--metrics", str(port), *FLAGS)
    run = cluster.start("run_simulation.sh", "3", "30", *flags)
    until(lambda: try_to(scraped, port).get(("simulation_rounds_total",)) == 1, 60, "a round is finished")
    found, usage = scraped(port), cluster.summary()["llm"]
    fake.held = None
    run.communicate()
    assert run.returncode == 0
    for name in ("prompt", "completion"):
        assert found["simulation_llm_tokens_total", name] == usage[f"{name}_tokens"] > 0
    assert found["simulation_llm_requests_total",] == usage["requests"] > 0
    assert found["simulation_llm_retries_total",] == 0


def test_the_dashboard_of_grafana_names_only_metrics_that_exist():
    source = (ROOT / "simulation/monitoring/metrics.py").read_text()
    counters = {f"simulation_{name}_total" for name in COUNTERS}
    gauges = {*re.findall(r'GaugeMetricFamily(?:\(|, )"(\w+)"', source)}
    panels = json.loads((ROOT / "examples/grafana.json").read_text())["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert {*re.findall(r"simulation_\w+", queries)} == counters | gauges


def test_a_taken_port_is_one_line(cluster):
    done = cluster.run("run_simulation.sh", "3", "10", *FLAGS, "--metrics", str(cluster.base_port))
    problem = f"--metrics {cluster.base_port}: port {cluster.base_port} of 127.0.0.1 is not available"
    assert done.returncode == 2 and problem in one_line(done.stderr)


def test_a_hook_receives_each_event_with_the_summary(cluster, tmp_path):
    (tmp_path / "mine.py").write_text(HOOK)
    cluster.play("3", "10", *FLAGS, "--rounds", "2", "--hook", str(tmp_path / "mine.py"))
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert events == [
        ["started", 0, "interrupted", True, False],
        ["round", 1, "interrupted", True, False],
        ["round", 2, "interrupted", True, False],
        ["finished", 2, "complete", True, True],
    ]
    (tmp_path / "log").unlink()
    resumed = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "3")  # a hook is not inherited
    assert resumed.returncode == 0 and not (tmp_path / "log").exists()
    flags = (*FLAGS, "--repeats", "2", "--hook", f"{tmp_path / 'mine.py'}:Mine")
    assert cluster.run("run_simulation.sh", "3", "10", *flags).returncode == 0
    events = [json.loads(line)[:2] for line in (tmp_path / "log").read_text().splitlines()]
    assert events == [["started", 0], ["round", 1], ["finished", 1]] * 2


def test_a_hook_that_raises_never_ends_a_run(cluster, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import sys\n\nfrom simulation.monitoring.hooks import Hook\n\n\nclass Mine(Hook):\n"
        "    def round_finished(self, summary, folder):\n        sys.exit(7)\n\n"
        "    def run_finished(self, summary, folder):\n        raise ValueError('no room')\n"
    )
    done = cluster.run("run_simulation.sh", "3", "10", *FLAGS, "--hook", str(tmp_path / "mine.py"))
    assert done.returncode == 0 and cluster.summary()["status"] == "complete"
    assert "--hook: Mine.round_finished fails: SystemExit: 7 (mine.py, line 8)" in done.stderr
    assert "--hook: Mine.run_finished fails: ValueError: no room (mine.py, line 11)" in done.stderr


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\n", "has no class derived from Hook"),
        (
            "from simulation.monitoring.hooks import Hook\n\n\nclass A(Hook):\n    def __init__(self, x): ...\n",
            "A() fails",
        ),
        ("import nothing_here\n", "cannot be imported"),
    ],
)
def test_an_unusable_hook_is_one_line(cluster, tmp_path, text, problem):
    (tmp_path / "mine.py").write_text(text)
    done = cluster.run("run_simulation.sh", "3", "10", *FLAGS, "--hook", str(tmp_path / "mine.py"))
    assert done.returncode == 2 and problem in one_line(done.stderr)


def test_the_hook_of_the_examples_logs_runs_to_mlflow(cluster):
    env = {"MLFLOW_ALLOW_FILE_STORE": "true"}
    flags = (*FLAGS, "--rounds", "2", "--hook", str(ROOT / "examples/mlflow_hook.py"))
    done = cluster.run("run_simulation.sh", "3", "50", *flags, env=env)
    assert done.returncode == 0 and "--hook" not in done.stderr, done.stderr
    env |= {"MLFLOW_TRACKING_URI": (cluster.path / "mlruns").as_uri()}
    reader = (
        "import json, mlflow, sys\n"
        "(run,) = mlflow.search_runs(output_format='list')\n"
        "client = mlflow.MlflowClient()\n"
        "averages = [each.value for each in client.get_metric_history(run.info.run_id, 'average')]\n"
        "files = [each.path for each in client.list_artifacts(run.info.run_id)]\n"
        "print(json.dumps([run.info.run_name, run.info.status, run.data.params['seed'], averages, files]))\n"
    )
    read = subprocess.run(
        [sys.executable, "-c", reader], env=os.environ | env, capture_output=True, text=True, check=True
    )
    summary = cluster.summary()
    averages = [entry["average"] for entry in summary["rounds"]]
    files = ["report.html", "summary.json"]
    assert json.loads(read.stdout) == [summary["run_id"], "FINISHED", "7", averages, files]
