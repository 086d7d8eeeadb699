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
COUNTERS = {  # sums over the runs of a command: the help text and the label of each
    "rounds": ("Finished rounds.", ""),
    "answers": ("Answers in finished rounds.", ""),
    "failures": ("Participants without an answer in finished rounds, by cause.", "cause"),
    "seconds": ("Seconds by part of the runs.", "part"),
    "llm_requests": ("Requests to language models.", ""),
    "llm_tokens": ("Tokens of prompts and of completions.", "kind"),
    "llm_retries": ("Repeated requests.", ""),
}


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
        # The sums of the counters of earlier runs of this command, and the current run, or the last one
        self._shown: tuple[Counter[tuple[str, str]], Run | None] = (Counter(), None)
        registry.register(self)
        self.port = int(self._server.server_port)
        logger.info(f"metrics: http://{ADDRESS}:{self.port}/metrics")

    @contextmanager
    def observe(self, run: "Run") -> Iterator[None]:
        """Show the metrics of `run` from now on."""
        before, last = self._shown
        sums = before.copy()
        if last is not None:
            sums.update(_counts(last))
        self._shown = (sums, run)
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
        sums, run = self._shown
        if run is None:
            return
        results, stage, counts = list(run.results), self._watch.stage, sums.copy()
        counts.update(_counts(run))
        simulation = run.simulation
        facts = {"run_id": run.run_id, "game": run.config.game, "label": run.spec.label}
        yield InfoMetricFamily("simulation_run", "The run that the other metrics describe.", facts)
        yield GaugeMetricFamily("simulation_participants", "Number of participants.", run.config.participant_num)
        for name, (about, label) in COUNTERS.items():
            values = {each: value for (counter, each), value in counts.items() if counter == name}
            if label:
                yield _by(CounterMetricFamily, f"simulation_{name}", about, label, values)
            elif values:
                yield CounterMetricFamily(f"simulation_{name}", about, values[""])
        asks = stage is not None and stage.name == ANSWERS and stage.began >= run.under_way[1]
        done = stage.done if stage is not None and asks and run.under_way[0] > len(results) else 0
        yield GaugeMetricFamily("simulation_round_outcomes", "Answers and failures so far in the current round.", done)
        average = round_entry(results[-1], run.game.scale)["average"] if results else None
        if average is not None:
            yield GaugeMetricFamily("simulation_average", "Average of the last finished round.", average)
        memory = {"main": psutil.Process().memory_info().rss}
        if simulation is not None:
            statuses = [*simulation.cluster.observe().values()]
            states = dict.fromkeys(STATES, 0) | Counter(state_of(each)[0] for each in statuses)
            yield _by(GaugeMetricFamily, "simulation_servers", "Agent servers by state.", "state", states)
            memory["servers"] = sum(int((each.reply.memory_mb or 0) * 2**20) for each in statuses if each.up)
        yield _by(GaugeMetricFamily, "simulation_memory_bytes", "Resident memory.", "process", memory)


def _counts(run: "Run") -> Counter[tuple[str, str]]:
    """Return the counters of a run so far, by the name of the counter and the value of its label."""
    results, simulation = list(run.results), run.simulation
    counts = Counter({("rounds", ""): len(results), ("answers", ""): sum(each.tally.answered for each in results)})
    for result in results:
        counts.update({("failures", cause): count for cause, count in result.tally.failures.items()})
    seconds: Counter[Any] = Counter({("seconds", part): value for part, value in run.seconds.items()})
    counts.update(seconds)
    if run.config.uses_models:
        usage = simulation.usage if simulation is not None else run.usage
        counts.update({("llm_requests", ""): usage.requests, ("llm_retries", ""): usage.retries})
        counts.update({("llm_tokens", "prompt"): usage.prompt_tokens})
        counts.update({("llm_tokens", "completion"): usage.completion_tokens})
    return counts


def _by(kind: Any, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """Return a metric of this kind with a value for each value of `label`."""
    family = kind(name, text, labels=[label])
    for each, value in values.items():
        family.add_metric([each], value)
    return family
