"""Playing the runs of one command, on agent servers that are running or on temporary ones of this host.

main.py and the Python interface (api.py) both call `play`.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulation.errors import Interrupted, SettingsError
from simulation.settings import SimulationConfig

if TYPE_CHECKING:
    from simulation.monitoring.control import Control
    from simulation.monitoring.hooks import Hook
    from simulation.runs.console import ConsoleProgress
    from simulation.runs.run import Run
    from simulation.runs.session import Observe, Session


def plan(config: SimulationConfig, given: dict[str, Any]) -> str:
    """Return a text that describes what the settings would play and cost. Raises SettingsError."""
    from simulation.runs.session import session_of

    with ExitStack() as cleanup:
        return "\n".join(session_of(config, given, cleanup).plan_lines())


def play(
    config: SimulationConfig,
    given: dict[str, Any],
    console: "ConsoleProgress",
    ready: Callable[[], None] = lambda: None,
    private: ExitStack | None = None,
    hook: "Hook | None" = None,
) -> tuple["Session", int]:
    """Check the settings, start servers if none are running, play, and clean up. Return the runs and the exit status.

    `given` are the settings that the user has set. `ready` is called when the settings have been checked. If `private`,
    always start servers, on free ports, and stop them when `private` closes. Raises SimulationError.
    """
    from simulation.cluster.preflight import check_models_here
    from simulation.monitoring.control import Control
    from simulation.rpc.channels import install_tls
    from simulation.rpc.cluster_key import load, load_or_make
    from simulation.runs.session import session_of

    with ExitStack() as cleanup:
        session = session_of(config, given, cleanup, console.explain)
        folder = session.config.cluster_key_dir
        # If only the resumed run names this key folder, make no key in it: a new key would not match its servers
        named = folder in (config.cluster_key_dir, SimulationConfig.cluster_key_dir)
        install_tls((load_or_make if named else load)(Path(folder)))
        ready()
        control = cleanup.enter_context(closing(Control(console)))
        observe = _observers_of(config, control, hook, cleanup)  # of this command, not of the resumed run
        cleanup.callback(session.close)
        cleanup.callback(console.close)
        needs_servers = bool(session.unfinished) and (private is not None or has_no_servers(session.config))
        if needs_servers and private is None and "keep_agents" in given:
            raise SettingsError("--keep-agents: needs servers that stay up; run ./start_all_server.sh first")
        if needs_servers:
            games = [(spec.game, spec.asked_models) for spec in session.unfinished if not spec.config.offline]
            check_models_here(games, session.config.connect_timeout)
        session.open()
        cleanup.enter_context(control.announce(session.folder))
        if needs_servers and private is not None:
            session.use_port(start_servers(session.config, console, private, private=True))
        elif needs_servers:
            start_servers(session.config, console, cleanup)
        cleanup.callback(console.close)  # called before all other cleanup, to remove the progress bar
        return session, session.play_runs(console, observe)


def _observers_of(config: SimulationConfig, control: "Control", hook: "Hook | None", cleanup: ExitStack) -> "Observe":
    """Start what observes runs. Return a function that returns a context in which all of it observes a run."""
    observers: list[Observe] = [control.observe]
    if config.dashboard is not None:
        from simulation.monitoring.dashboard import Dashboard

        observers.append(cleanup.enter_context(closing(Dashboard(config.dashboard, control))).observe)
    if config.metrics is not None:
        from simulation.monitoring.metrics import Metrics

        observers.append(cleanup.enter_context(closing(Metrics(config.metrics, control.console))).observe)
    if config.hook is not None or hook is not None:
        from simulation.monitoring.hooks import HookCaller, load_hook

        observers.append(HookCaller(load_hook(str(config.hook)) if hook is None else hook, control.console).observe)

    @contextmanager
    def observe(run: "Run") -> Iterator[None]:
        with ExitStack() as stack:
            for each in observers:
                stack.enter_context(each(run))
            yield

    return observe


def has_no_servers(config: SimulationConfig) -> bool:
    """Return whether the only host is localhost and has no servers. Raises ClusterError if another run owns servers."""
    from simulation.hosts.pid_files import any_port_in_use, check_not_owned

    if config.hosts != ("localhost",):
        return False
    check_not_owned()
    if not any_port_in_use(config.ports):
        return True  # the usual case on a laptop, decided without importing AgentScope
    from simulation.cluster.preflight import identify_all

    return not identify_all(config)[0]


def start_servers(
    config: SimulationConfig, console: "ConsoleProgress", cleanup: ExitStack, private: bool = False
) -> int:
    """Start agent servers on this host, and stop them when `cleanup` closes. Return their first port.

    If `private`, use free ports instead of those in `config`. Raises Interrupted on a stop signal, and ClusterError.
    """
    from loguru import logger

    from simulation.hosts import local_cluster

    def show_ready(done: int, total: int) -> None:
        console.progress("agent servers ready", done, total)
        if console.stop_signal is not None:
            raise Interrupted(console.stop_signal)

    def import_meanwhile() -> None:
        from simulation.rpc.lean_import import import_agentscope

        import_agentscope()
        import simulation.runs.run  # noqa: F401

    logger.info(
        f"no agent servers of this cluster run here: starting {config.server_per_host} for participants and "
        f"{config.moderator_per_host} for moderators, for this run"
    )
    started, base_port = time.monotonic(), config.base_port
    stop: Callable[[], None] | None
    if private:
        base_port, stop = local_cluster.start_private(config, show_ready, import_meanwhile)
    else:
        stop = local_cluster.start(config, True, show_ready, import_meanwhile)
    if stop is not None:
        cleanup.callback(lambda: logger.info(f"stopped the {len(config.ports)} agent servers of this run"))
        cleanup.callback(stop)
    logger.info(f"{len(config.ports)} agent servers are ready [takes {time.monotonic() - started:.2f} s]")
    return base_port


def ask(path: Path, participant: int | None, text: str, key_folder: str | None = None) -> str:
    """Send a message to a participant (None: the first winner) of a run that kept its agents. Return its answer.

    Raises SettingsError, or ClusterError if the participant is gone.
    """
    from simulation.game.rules import Question, plain_number
    from simulation.game.tally import announcement_of
    from simulation.results.reader import first_winner, read_agents, read_run
    from simulation.rpc.channels import install_tls
    from simulation.rpc.cluster_key import load
    from simulation.rpc.lean_import import import_agentscope

    run = read_run(path)
    played = run.config
    participant = first_winner(run) if participant is None else participant
    if not 0 <= participant < played.participant_num:
        raise SettingsError(f"--participant {participant}: the run has participants 0 to {played.participant_num - 1}")
    install_tls(load(Path(key_folder or played.cluster_key_dir)))
    import_agentscope()
    from simulation.cluster.rounds import ask as ask_participant

    announcements = tuple(announcement_of(each, run.game) for each in run.results)
    question = Question(0, text, int(run.game.high), announcements, played.decimals, int(run.game.low))
    answer = ask_participant(*read_agents(path, participant), question)
    if re.fullmatch(r"-?[0-9]+\.[0-9]+", answer):  # the participant replied with a number
        answer = plain_number(float(answer), played.decimals)
    return answer
