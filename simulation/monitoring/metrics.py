"""Metrics of a run for Prometheus (--metrics), on this host only. They are computed at each scrape, from the results.

Nothing here blocks the run or acquires its locks.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
from loguru import logger
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from simulation.errors import SettingsError
from simulation.monitoring.dashboard_state import ANSWERS, STATES, state_of
from simulation.results.run_files import round_entry
from simulation.runs.console import ConsoleProgress

if TYPE_CHECKING:
    from simulation.runs.run import Run

ADDRESS = "127.0.0.1"


class Metrics(Collector):
    """A web server that runs until `close` and shows the metrics of one run after another.

    If `port` is 0, the system chooses a port. `watch` provides the progress. Raises SettingsError if the port is taken.
    """

    def __init__(self, port: int, watch: ConsoleProgress) -> None:
        registry = CollectorRegistry()
        try:
            self._server, self._thread = start_http_server(port, ADDRESS, registry)
        except OSError as error:
            problem = f"port {port} of {ADDRESS} is not available ({os.strerror(error.errno or 0)})"
            raise SettingsError(f"--metrics {port}: {problem}; give another one, or 0 for a free one") from None
        self._watch = watch
        self._run: Run | None = None  # the current run, or the last one
        registry.register(self)
        self.port = int(self._server.server_port)
        logger.info(f"metrics: http://{ADDRESS}:{self.port}/metrics")

    @contextmanager
    def observe(self, run: "Run") -> Iterator[None]:
        """Show the metrics of `run` from now on."""
        self._run = run
        yield

    def close(self) -> None:
        """Stop the web server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def describe(self) -> Iterable[Metric]:
        """Return [], so that the registry does not collect when this object is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics of the current run, or none before the first run."""
        if self._run is None:
            return
        run, results, stage = self._run, list(self._run.results), self._watch.stage
        simulation = run.simulation
        facts = {"run_id": run.run_id, "game": run.config.game, "label": run.spec.label}
        yield InfoMetricFamily("simulation_run", "The run that the other metrics describe.", facts)
        yield GaugeMetricFamily("simulation_participants", "Number of participants.", run.config.participant_num)
        yield CounterMetricFamily("simulation_rounds", "Finished rounds.", len(results))
        answers, failures = sum(result.tally.answered for result in results), Counter[str]()
        for result in results:
            failures.update(result.tally.failures)
        yield CounterMetricFamily("simulation_answers", "Answers in finished rounds.", answers)
        about = "Participants without an answer in finished rounds, by cause."
        yield _by(CounterMetricFamily, "simulation_failures", about, "cause", failures)
        asks = stage is not None and stage.name == ANSWERS and stage.began >= run.under_way[1]
        done = stage.done if stage is not None and asks and run.under_way[0] > len(results) else 0
        yield GaugeMetricFamily("simulation_round_outcomes", "Answers and failures so far in the current round.", done)
        average = round_entry(results[-1], run.game.scale)["average"] if results else None
        if average is not None:
            yield GaugeMetricFamily("simulation_average", "Average of the last finished round.", average)
        yield _by(CounterMetricFamily, "simulation_seconds", "Seconds by part of the run.", "part", run.seconds)
        if run.config.uses_models:
            usage = simulation.usage if simulation is not None else run.usage
            yield CounterMetricFamily("simulation_llm_requests", "Requests to language models.", usage.requests)
            tokens = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
            about = "Tokens of prompts and of completions."
            yield _by(CounterMetricFamily, "simulation_llm_tokens", about, "kind", tokens)
            yield CounterMetricFamily("simulation_llm_retries", "Repeated requests.", usage.retries)
        memory = {"main": psutil.Process().memory_info().rss}
        if simulation is not None:
            statuses = [*simulation.cluster.observe().values()]
            states = dict.fromkeys(STATES, 0) | Counter(state_of(each)[0] for each in statuses)
            yield _by(GaugeMetricFamily, "simulation_servers", "Agent servers by state.", "state", states)
            memory["servers"] = sum(int((each.reply.memory_mb or 0) * 2**20) for each in statuses if each.up)
        yield _by(GaugeMetricFamily, "simulation_memory_bytes", "Resident memory.", "process", memory)


def _by(kind: Any, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """Return a metric of this kind with a value for each value of `label`."""
    family = kind(name, text, labels=[label])
    for each, value in values.items():
        family.add_metric([each], value)
    return family
