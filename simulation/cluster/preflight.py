"""Preflight checks of the agent servers of a run, on all hosts concurrently. Each unready host gets an error line."""

import json
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial

from simulation.errors import ClusterError, SettingsError, SimulationError
from simulation.game.game import Game
from simulation.llm.model_configs import ModelConfig, asked_models, check_model_is_local
from simulation.llm.prompts import probe_of
from simulation.rpc.channels import NOBODY_LISTENS, UNTRUSTED, call_all, call_all_or_raise, handshake, identify
from simulation.rpc.endpoints import Endpoint, address_of, endpoints
from simulation.rpc.messages import CHECK_MODELS, OWN_VERSIONS, Handshake, layout_of
from simulation.settings import SimulationConfig

CHECKS_AT_ONCE = 1024  # maximum number of threads; each waits for one server

Identities = dict[Endpoint, Handshake]
Errors = dict[Endpoint, SimulationError]  # SettingsError if the host name is unknown


def identify_all(config: SimulationConfig) -> tuple[Identities, Errors]:
    """Return the handshakes of all servers that answer within connect_timeout, and the errors of the other servers."""
    deadline = time.monotonic() + config.connect_timeout
    addresses = {host: Future[str]() for host in config.hosts}

    def look_up(host: str) -> None:
        try:
            addresses[host].set_result(address_of(host))
        except SettingsError as error:
            addresses[host].set_exception(error)

    for host in addresses:  # in daemon threads, because name servers may be slow
        threading.Thread(target=look_up, args=(host,), daemon=True).start()

    def identify_one(server: Endpoint) -> Handshake:
        try:
            addresses[server.host].result(max(deadline - time.monotonic(), 0.0))
        except TimeoutError:
            name = f"this name after {config.connect_timeout:g} s"
            raise SettingsError(f"no address is known for {name}; check /etc/hosts or DNS") from None
        return identify(server, max(deadline - time.monotonic(), 0.0))

    servers = endpoints(config.hosts, config.base_port, config.server_per_host + config.moderator_per_host)
    return call_all({each: partial(identify_one, each) for each in servers}, CHECKS_AT_ONCE)


def check_cluster(config: SimulationConfig, game: Game) -> tuple[Identities, bool]:
    """Check all agent servers and models. Return the handshakes, and whether all models repeat seeded answers.

    Raises ClusterError, with a line for each unready host, or SettingsError if a model needs --allow-remote-model.
    """
    identities, errors = identify_all(config)
    problems = {host: _problem_of(host, config, identities, errors) for host in config.hosts}
    if lines := [f"{host}: {problem}" for host, problem in problems.items() if problem]:
        raise ClusterError("\nerror: ".join(lines))
    if config.offline or not config.uses_models:
        return identities, not config.uses_models
    check_models_known(config, identities)
    return identities, check_models(config, game, list(identities))


def _problem_of(host: str, config: SimulationConfig, identities: Identities, errors: Errors) -> str:
    """Return why a host is not ready and how to fix the problem, or an empty text if the host is ready."""
    ready = {endpoint: each for endpoint, each in identities.items() if endpoint.host == host}
    failed = [error for endpoint, error in errors.items() if endpoint.host == host]
    restart = f"restart them: ./stop_all_server.sh, then ./start_all_server.sh {config.server_per_host}"
    for endpoint, each in ready.items():
        versions = {name: (each.versions.get(name), here) for name, here in OWN_VERSIONS.items()}
        others = [f"{name} ({there} there, {here} here)" for name, (there, here) in versions.items() if there != here]
        if others:
            return f"{endpoint} runs another version of {', '.join(others)}; make the host like this one, and {restart}"
        if each.layout != layout_of(config):
            port, servers, moderators = each.layout
            there = f"{servers} participant and {moderators} moderator servers from port {port}"
            here = f"{config.server_per_host} and {config.moderator_per_host} from {config.base_port}"
            flags = f"give --server-per-host {servers} --moderator-per-host {moderators}, or "
            advice = (flags if len(config.hosts) == 1 else "") + restart
            return f"it has {there}; this run asks for {here}; {advice}"
    if not failed or isinstance(failed[0], SettingsError):
        return str(failed[0]) if failed else ""
    first, advice = str(failed[0]), restart
    if UNTRUSTED in first:
        advice = f"copy the folder of the cluster key there, and {restart}"
    elif not ready and NOBODY_LISTENS not in first:
        advice = f"see whether the host is up and in reach, or {restart}"
    return f"{len(ready)} of {len(ready) + len(failed)} agent servers are ready; {first}; {advice}"


def check_models_known(config: SimulationConfig, identities: Identities) -> None:
    """Raise ClusterError if a server lacks a requested model; SettingsError if a model needs --allow-remote-model."""
    names = asked_models(config)
    for endpoint, each in identities.items():
        if missing := [name for name in names if name not in each.models]:
            known = ", ".join(f"{name} at {url}" for name, url in list(each.models.items())[:3]) or "no model"
            known += ", ..." if len(each.models) > 3 else ""
            wanted = f"--model-per-host {config.model_per_host} asks for {names[0]} to {names[-1]}"
            if config.models is not None or config.players is not None:
                wanted = f"{'--models' if config.players is None else '--players'} asks for {', '.join(names)}"
            raise ClusterError(
                f"{endpoint} knows {known}, and {missing[0]} is not among them; {wanted}: see "
                "configs/model_configs.json, and start the agent servers again with it and the same MODEL_PER_HOST"
            )
        for name in names:
            check_model_is_local(config, name, each.models[name])


def check_models(config: SimulationConfig, game: Game, servers: list[Endpoint]) -> bool:
    """Let one server per host test all models. Return whether all repeat seeded answers. Raises ClusterError."""
    firsts = {each.host: each for each in reversed(servers)}.values()
    timeout_s = 3 * config.connect_timeout  # for a small request and two lists of models, which have half of it each
    names, repeatable = asked_models(config), True
    directives = {CHECK_MODELS: json.dumps([names, config.connect_timeout, probe_of(game)])}
    calls = {each: partial(handshake, each, timeout_s, directives=directives) for each in firsts}
    for endpoint, reply in call_all_or_raise(calls).items():
        for name, problem in reply.model_troubles.items():
            raise ClusterError(f"{endpoint.host}: {name} at {reply.models[name]} {problem}")
        repeatable &= {*names} <= {*reply.repeatable_models}
    return repeatable


def check_models_here(games: Iterable[tuple[Game, list[ModelConfig]]], timeout_s: float) -> None:
    """Check the models of games from this process, before agent servers exist. Raises ClusterError if a model fails."""
    distinct = {(model.base_url, model.model): (model, game) for game, models in games for model in models}
    if not distinct:
        return
    from simulation.llm import http_client  # noqa: PLC0415 - imports openai, which other runs do not need

    probes = {model: probe_of(game) for model, game in distinct.values()}
    for model, problem in http_client.check_models(probes, timeout_s).items():
        raise ClusterError(f"localhost: {model.name} at {model.base_url} {problem}")
