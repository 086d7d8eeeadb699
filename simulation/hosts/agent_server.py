"""One agent server: AgentScope's servicer behind mutual TLS, with handshake, leases and immediate shutdown.

It changes AgentScope's servicer as follows:
- Participants are found in their group by arithmetic, so that its pool does not need a million entries.
- Creating an object again, because the first reply was lost, returns the same object.
- Deleting an object closes it first, which releases its event loop and its participants.
- AgentScope's pool drops replies after two hours or 8192 newer ones, even of agents that still think; ours does not.
- The exception of an agent is always returned, as one line instead of a traceback.
- A call to an object, or a heartbeat, renews the lease of its run. Objects of a run whose lease expires are dropped.
- Calls and their bytes are counted, so that the servers can report the network traffic of a round.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import grpc
import psutil
from agentscope.rpc.rpc_agent_pb2 import CallFuncResponse, GeneralResponse
from agentscope.rpc.rpc_agent_pb2_grpc import add_RpcAgentServicer_to_server
from agentscope.server.async_result_pool import LocalPool
from agentscope.server.servicer import MAGIC_PREFIX, AgentServerServicer
from loguru import logger

from moderator import Moderator
from simulation.agents.group import ParticipantGroup
from simulation.errors import KnownCause, SettingsError, one_line
from simulation.files import ROOT
from simulation.llm.chat import check_models, load_models
from simulation.llm.model_configs import ModelConfig, has_models
from simulation.rpc.channels import MESSAGE_BYTES, install_tls
from simulation.rpc.cluster_key import ClusterKey
from simulation.rpc.endpoints import address_of, run_of, same_run
from simulation.rpc.messages import (
    CHECK_MODELS,
    END_RUN,
    HANDSHAKE,
    HEARTBEAT,
    KEEP_RUN,
    MEMORY,
    NEW_RUN,
    SERVED,
    SERVICE,
    Handshake,
    HeartbeatReply,
)
from simulation.settings import SimulationConfig

RPC_THREADS = 1024  # concurrent calls, with threads created on demand; most are short, but per-agent dispatch holds
# a thread for each participant, and a heartbeat must never wait for one
REPLIES_AT_ONCE = 32  # participants asked individually that think concurrently
POLL_S = 2  # how long a poll for one participant's reply blocks; the client's deadline is 5 s
STOP_GRACE_S = 0.5
SWEEP_S = 1.0  # interval between checks of the leases
FORGET_S = 3600.0  # how long a run without agents is remembered
REPLIES_KEPT = 4096  # fetched replies that are kept, in case one is lost in transit
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # otherwise two servers could share a port unnoticed
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients send a keepalive ping every 20 s
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
)


class SimulationServicer(AgentServerServicer):
    """AgentScope's servicer for groups and moderators.

    Args:
        config: Settings that this host's servers were started with.
        port: Port of this server.
        models: Models that its participants may use.
        stop: Called when a client requests a stop.
    """

    def __init__(
        self, config: SimulationConfig, port: int, models: dict[str, ModelConfig], stop: Callable[[], None]
    ) -> None:
        super().__init__(
            stop_event=None,
            host=config.host_name,
            port=port,
            server_id=str(port),
            capacity=REPLIES_AT_ONCE,
            max_timeout_seconds=POLL_S,
        )
        self.result_pool = _Results()
        self._config = config
        self._models = models
        self._stop = stop
        self._incarnation = secrets.token_hex(8)
        self._started = time.time()
        self._heard: dict[str, float] = {}  # run id -> time.monotonic() of the last call
        self._heard_lock = threading.Lock()
        self._being_created: set[str] = set()
        self._creating = threading.Condition()
        self._served: dict[str, tuple[int, int, int]] = {}  # see Handshake
        self._served_lock = threading.Lock()

    def stop(self, request: Any, context: Any) -> GeneralResponse:
        self._stop()
        return GeneralResponse(ok=True)

    def heartbeat(self, request: bytes, context: Any) -> bytes:
        beat = self._beat(*json.loads(request)).to_json().encode()
        self._note_served(HEARTBEAT, len(request), len(beat))
        return beat

    def handshake(self, request: bytes, context: Any) -> bytes:
        if not Path(__file__).exists():  # later imports would fail, too
            restart = "stop all agent servers of this host, and start them again"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"its checkout {ROOT} was moved or removed; {restart}")
        asked = json.loads(request)
        self._begin_or_end_runs(asked)
        first_moderator = self._config.base_port + self._config.server_per_host
        hosted = self._hosted()
        shake = Handshake(
            incarnation=self._incarnation,
            pid=os.getpid(),
            role="participant" if self.port < first_moderator else "moderator",
            base_port=self._config.base_port,
            server_per_host=self._config.server_per_host,
            moderator_per_host=self._config.moderator_per_host,
            started=self._started,
            agents=sum(getattr(agent, "agents", 1) for agent in hosted.values()),
            memory_mb=_memory_mb() if MEMORY in asked else None,
            models={name: model.base_url for name, model in self._models.items()},
            model_troubles=self._model_troubles(asked.get(CHECK_MODELS, "")),
            served=dict(self._served) if SERVED in asked else {},
        )
        return shake.to_json().encode()

    def get_agent(self, agent_id: str) -> Any:
        self._hear(agent_id)
        agent = super().get_agent(agent_id)
        if agent is None:
            group, _, index = agent_id.rpartition("/")
            found = super().get_agent(group)
            if isinstance(found, ParticipantGroup) and index.isdecimal():
                return found.participant(int(index))
        return agent

    def create_agent(self, request: Any, context: Any) -> GeneralResponse:
        self._hear(request.agent_id)
        self._note_served("create", len(request.agent_init_args), 0)
        with self._creating:
            self._creating.wait_for(lambda: request.agent_id not in self._being_created)
            if super().get_agent(request.agent_id) is not None:
                return GeneralResponse(ok=True)  # AgentScope would create another object first, and leak it
            self._being_created.add(request.agent_id)
        try:
            return super().create_agent(request, context)
        finally:
            with self._creating:
                self._being_created.remove(request.agent_id)
                self._creating.notify_all()

    def call_agent_func(self, request: Any, context: Any) -> CallFuncResponse:
        reply = super().call_agent_func(request, context)
        self._note_served(request.target_func, len(request.value), len(reply.value))
        return reply

    def update_placeholder(self, request: Any, context: Any) -> CallFuncResponse:
        reply = super().update_placeholder(request, context)
        self._note_served("poll", 0, len(reply.value))
        return reply

    def delete_agent(self, request: Any, context: Any) -> GeneralResponse:
        self._note_served("delete", 0, 0)
        return GeneralResponse(ok=self._drop(request.value))

    def delete_all_agents(self, request: Any, context: Any) -> GeneralResponse:
        for agent_id in self._hosted():
            self._drop(agent_id)
        return GeneralResponse(ok=True)

    def drop_silent(self) -> None:
        """Drop the agents of runs whose lease has expired."""
        now = time.monotonic()
        hosted = self._hosted()
        runs = {run_of(agent_id) for agent_id in hosted}
        with self._heard_lock:
            self._heard = {run: heard for run, heard in self._heard.items() if run in runs or now - heard < FORGET_S}
        for agent_id, agent in hosted.items():
            lease_s = getattr(agent, "lease_s", None)
            if self._drop(agent_id, unless=partial(self._is_leased, run_of(agent_id))):
                logger.warning(f"dropping {agent_id}: its run sent no heartbeat for {lease_s:g} s")

    def _is_leased(self, run: str, agent: Any) -> bool:
        """Return whether an object stays: it has no lease, or the lease of its run has not expired."""
        lease_s, heard = getattr(agent, "lease_s", None), self._heard.get(run)
        return lease_s is None or heard is None or time.monotonic() - heard <= lease_s

    def _model_troubles(self, asked: str) -> dict[str, str]:
        """Return the problems of requested models that this server knows; `asked` is JSON: names and a timeout (s)."""
        if not asked:
            return {}
        names, timeout_s = json.loads(asked)
        return check_models([name for name in names if name in self._models], float(timeout_s))

    def _beat(self, run: str, number: int, wait_s: float) -> HeartbeatReply:
        """Return the progress of the run's objects, after waiting up to `wait_s` for those in round `number`."""
        self._renew_lease(run)
        until = time.monotonic() + wait_s
        playing = {
            oid: agent
            for oid, agent in self._hosted().items()
            if run_of(oid) == run and isinstance(agent, (ParticipantGroup, Moderator))
        }
        for agent in playing.values():
            if agent.progress().round == number:
                agent.progress(max(until - time.monotonic(), 0.0))
        return HeartbeatReply(self._incarnation, {oid: agent.progress() for oid, agent in playing.items()})

    def _begin_or_end_runs(self, asked: dict[str, str]) -> None:
        """Keep or drop the objects of runs, as a handshake requests."""
        for oid, agent in self._hosted().items():
            run, kept = run_of(oid), getattr(agent, "lease_s", 0) is None
            if run == asked.get(KEEP_RUN):
                with self.agent_id_lock:  # `drop_silent` may be about to drop it
                    agent.lease_s = None
            elif run == asked.get(END_RUN):
                self._drop(oid)
            elif NEW_RUN in asked and run != asked[NEW_RUN] and (kept or same_run(run, asked[NEW_RUN])):
                self._drop(oid)  # kept until the next run, or left by an earlier part of this run

    def _hear(self, agent_id: str) -> None:
        """Renew the lease of the run that an id belongs to, if the id names a run."""
        run, ours, _ = agent_id.partition("/")
        if ours:
            self._renew_lease(run)

    def _renew_lease(self, run: str) -> None:
        with self._heard_lock:
            self._heard[run] = time.monotonic()

    def _note_served(self, name: str, said: int, answered: int) -> None:
        """Count a call and its bytes in each direction: takes 1 us, while gRPC takes hundreds."""
        with self._served_lock:
            calls, all_said, all_answered = self._served.get(name, (0, 0, 0))
            self._served[name] = (calls + 1, all_said + said, all_answered + answered)

    def _hosted(self) -> dict[str, Any]:
        with self.agent_id_lock:
            return dict(self.agent_pool)

    def _drop(self, agent_id: str, unless: Callable[[Any], bool] | None = None) -> bool:
        """Remove and close an object, if it exists and `unless` is false for it; return whether it was dropped."""
        with self.agent_id_lock:
            agent = self.agent_pool.get(agent_id)
            if agent is None or (unless is not None and unless(agent)):
                return False
            del self.agent_pool[agent_id]
        if hasattr(agent, "close"):
            agent.close()
        # AgentScope has set a bound method on the instance: a cycle that only the collector would free
        agent.__dict__.pop("__reduce_ex__", None)
        return True

    def _process_task(self, task_id: int, agent_id: str, target_func: str, raw_args: bytes) -> None:
        try:
            agent = self.get_agent(agent_id)
            if agent is None:
                raise KnownCause("the agent is gone")
            result = cloudpickle.dumps(getattr(agent, target_func)(*cloudpickle.loads(raw_args)["args"]))
        except BaseException as error:  # noqa: BLE001 - a person's own reply may raise anything; it must come back
            result = MAGIC_PREFIX + one_line(error).encode()
        self.result_pool.set(task_id, result)


class _Results(LocalPool):
    """Replies of participants asked individually: each stays until REPLIES_KEPT others were fetched after it."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.pool: dict[int, Any] = {}  # in place of one whose entries expire
        self._fetched: deque[int] = deque()

    def get(self, key: int, timeout: int = POLL_S) -> Any:
        value = super().get(key, timeout)
        self._fetched.append(key)
        if len(self._fetched) > REPLIES_KEPT:
            self.pool.pop(self._fetched.popleft(), None)
        return value


def serve(config: SimulationConfig, port: int, key: ClusterKey, ready: Callable[[], None]) -> None:
    """Serve until TERM, INT or a `stop` call, then end this process immediately, even if participants are busy.

    Args:
        config: Settings that this host's servers were started with.
        port: Port of this server.
        key: The cluster key.
        ready: Called when the server accepts calls.
    """
    try:
        asyncio.run(_serve(config, port, key, ready))
    except SettingsError as error:
        _end(str(error), error.exit_status)


async def _serve(config: SimulationConfig, port: int, key: ClusterKey, ready: Callable[[], None]) -> None:
    install_tls(key)  # a moderator is a client of its groups' servers
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)

    def stop() -> None:
        loop.call_soon_threadsafe(stopping.set)

    models = load_models(config) if has_models(config) else {}
    servicer = SimulationServicer(config, port, models, stop)
    server = grpc.aio.server(ThreadPoolExecutor(RPC_THREADS), options=SERVER_OPTIONS)
    add_RpcAgentServicer_to_server(servicer, server)
    calls = {HANDSHAKE: servicer.handshake, HEARTBEAT: servicer.heartbeat}  # from bytes to bytes
    handlers = {name: grpc.unary_unary_rpc_method_handler(call) for name, call in calls.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    address = f"{address_of(config.host_name)}:{port}"
    try:
        server.add_secure_port(address, key.server_credentials())
    except RuntimeError:
        raise SettingsError(f"cannot listen at {address}: is the port in use?") from None
    await server.start()
    logger.info(f"serving at {address}, pid {os.getpid()}")
    ready()
    sweeping = asyncio.create_task(_sweep(servicer))
    await asyncio.wait([sweeping, asyncio.create_task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
    if sweeping.done():
        sweeping.result()  # an error is a defect: it goes to the log and ends the process
    logger.info("stopping")
    await server.stop(STOP_GRACE_S)
    _end("stopped", 0)


async def _sweep(servicer: SimulationServicer) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        await asyncio.to_thread(servicer.drop_silent)


def _end(message: str, status: int) -> None:
    """End the process without waiting for threads: participants may think for hours."""
    logger.log("INFO" if status == 0 else "ERROR", message)
    logger.complete()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _memory_mb() -> float:
    """Return the memory of this process (MB); if the system reports it, with its share of the shared memory."""
    info = psutil.Process().memory_full_info()
    return round(float(getattr(info, "pss", 0) or info.uss) / 2**20, 1)
