"""One agent server: the servicer of AgentScope, extended by mutual TLS, handshakes, leases and an immediate end."""

import asyncio
import json
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from simulation.files import CODE
from simulation.llm.chat import load_models
from simulation.llm.model_configs import ModelConfig
from simulation.llm.prompts import Probe
from simulation.rpc import messages
from simulation.rpc.channels import AGENT_GONE, MESSAGE_BYTES, install_tls
from simulation.rpc.cluster_key import ClusterKey
from simulation.rpc.endpoints import address_of, run_of, same_run
from simulation.settings import SimulationConfig

RPC_THREADS = 1024  # maximum number of concurrent calls. Threads are created on demand. With per-agent dispatch, each
# waiting participant occupies a thread; heartbeats must still find a free thread.
REPLIES_AT_ONCE = 32  # participants that answer concurrently with per-agent dispatch
POLL_S = 2  # maximum time that a poll for a reply blocks; the client's deadline is 5 s
STOP_GRACE_S = 0.5
SWEEP_S = 1.0  # interval between checks of the leases
HISTOGRAM_SHARE = 0.005  # maximum share of a server's time for partial histograms
LOAD_S = 0.5  # minimum interval between measurements of the CPU load
REPLIES_KEPT = 4096  # number of fetched replies that are kept, so that a client can fetch a reply again
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # two servers must not share a port
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients send a keepalive ping every 20 s
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
)


class SimulationServicer(AgentServerServicer):
    """AgentScope's servicer, extended for groups and moderators. A `stop` call of a client sets the event `stop`."""

    def __init__(
        self, config: SimulationConfig, port: int, models: dict[str, ModelConfig], stop: threading.Event
    ) -> None:
        super().__init__(stop, config.host_name, port, str(port), capacity=REPLIES_AT_ONCE, max_timeout_seconds=POLL_S)
        self.result_pool = LocalPool(1, 1)
        self.result_pool.pool = {}  # AgentScope's pool would drop replies after two hours
        self._fetched: deque[int] = deque()  # task ids of fetched replies; the pool keeps the latest REPLIES_KEPT
        self._config, self._models = config, models
        self._incarnation, self._started = secrets.token_hex(8), time.time()
        self._renewed: dict[str, float] = {}  # time of the last call (time.monotonic) of each run
        self._changes: dict[str, dict[str, Any]] = {}  # by run: arguments of `ParticipantGroup.change`
        self._beginning = threading.Lock()
        self._creating: dict[str, threading.Lock] = defaultdict(threading.Lock)  # by remote id
        self._histogram_due = 0.0  # earliest time of the next partial histograms (time.monotonic)
        self._cpu = (time.monotonic(), time.process_time(), 0.0)  # last measurement: time, CPU time, load

    def heartbeat(self, request: bytes, context: Any) -> bytes:
        """Renew the lease of a run, and return the progress of its objects (see `heartbeat` in channels.py).

        If `numbers` is not 0, add the load and the memory of this process and, at intervals, partial histograms.
        """
        run, number, wait_s, numbers, changes = json.loads(request)
        self._begin_run(run)
        self._changes[run] = changes
        until, kinds = time.monotonic() + wait_s, (ParticipantGroup, Moderator)
        hosted = self._hosted().items()
        objects = {oid: agent for oid, agent in hosted if run_of(oid) == run and isinstance(agent, kinds)}
        for agent in objects.values():
            if changes and isinstance(agent, ParticipantGroup):
                agent.change(**changes)
            if agent.progress().round == number:
                agent.progress(max(until - time.monotonic(), 0.0))
        began, counted = time.thread_time(), numbers if time.monotonic() >= self._histogram_due else 0
        progress = {oid: agent.progress(numbers=counted) for oid, agent in objects.items()}
        if counted:
            self._histogram_due = time.monotonic() + (time.thread_time() - began) / HISTOGRAM_SHARE
        load = self._load() if numbers else (None, None)
        return messages.HeartbeatReply(self._incarnation, progress, *load).to_json().encode()

    def _load(self) -> tuple[float, float]:
        """Return the recent CPU load of this process as a share of one core, and the resident memory (MB)."""
        (since, used_before_s, _), now, used_s = self._cpu, time.monotonic(), time.process_time()
        if now - since >= LOAD_S:
            self._cpu = (now, used_s, (used_s - used_before_s) / (now - since))
        return self._cpu[2], round(psutil.Process().memory_info().rss / 2**20, 1)

    def handshake(self, request: bytes, context: Any) -> bytes:
        """Execute directives of the request, such as the end of a run. Return the identity and state of this server."""
        if not Path(__file__).exists():  # the code is gone: later imports would fail
            restart = "stop all agent servers of this host, and start them again"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"its checkout {CODE} was moved or removed; {restart}")
        directives = json.loads(request)
        for directive in directives.keys() & {messages.KEEP_RUN, messages.END_RUN}:
            self._end_run(directives[directive], keep=directive == messages.KEEP_RUN)
        memory_mb, model_troubles, repeatable = None, dict[str, str](), list[str]()
        if messages.MEMORY in directives:
            memory = psutil.Process().memory_full_info()
            # pss includes a share of the shared memory; some systems report only uss
            memory_mb = round((getattr(memory, "pss", 0) or memory.uss) / 2**20, 1)
        if messages.CHECK_MODELS in directives:
            from simulation.llm.http_client import check_models, repeatable_models  # noqa: PLC0415 - imports openai

            names, timeout_s, probe = json.loads(directives[messages.CHECK_MODELS])
            probes = {self._models[name]: Probe(*probe) for name in names if name in self._models}
            model_troubles = {model.name: cause for model, cause in check_models(probes, timeout_s).items()}
            repeatable = [model.name for model in repeatable_models(probes, timeout_s / 2)]
        layout, agents = messages.layout_of(self._config), self._hosted().values()
        count = sum(getattr(agent, "agents", 1) for agent in agents)
        urls = {name: model.base_url for name, model in self._models.items()}
        about = (self._incarnation, os.getpid(), layout, self._started, count, memory_mb)
        return messages.Handshake(*about, urls, model_troubles, repeatable).to_json().encode()

    def get_agent(self, agent_id: str) -> Any:
        self._renewed[run_of(agent_id)] = time.monotonic()
        group_id, _, index = agent_id.rpartition("/")  # participants have no entries in the pool
        agent, group = super().get_agent(agent_id), super().get_agent(group_id)
        is_participant = agent is None and isinstance(group, ParticipantGroup) and index.isdecimal()
        return group.participant(int(index)) if is_participant else agent

    def create_agent(self, request: Any, context: Any) -> GeneralResponse:
        run, is_ours, _ = request.agent_id.partition("/")
        if is_ours:
            self._begin_run(run)
        with self._creating[request.agent_id]:
            if self.get_agent(request.agent_id) is not None:
                return GeneralResponse(ok=True)  # AgentScope would create, and leak, a second object
            created = super().create_agent(request, context)
            group, changes = super().get_agent(request.agent_id), self._changes.get(run)
            if changes and isinstance(group, ParticipantGroup):
                group.change(**changes)
            return created

    def update_placeholder(self, request: Any, context: Any) -> CallFuncResponse:
        reply = super().update_placeholder(request, context)
        self._fetched.append(request.task_id)
        if len(self._fetched) > REPLIES_KEPT:
            self.result_pool.pool.pop(self._fetched.popleft(), None)
        return reply

    def delete_agent(self, request: Any, context: Any) -> GeneralResponse:
        return GeneralResponse(ok=self._drop(request.value))

    def delete_all_agents(self, request: Any, context: Any) -> GeneralResponse:
        for agent_id in self._hosted():
            self._drop(agent_id)
        return GeneralResponse(ok=True)

    def drop_expired(self) -> None:
        """Delete the objects of all runs whose lease has expired."""
        for oid, agent in self._hosted().items():
            lease_s = getattr(agent, "lease_s", None)  # None: the object has no lease
            if lease_s is not None and time.monotonic() - self._renewed.get(run_of(oid), math.inf) > lease_s:
                logger.warning(f"dropping {oid}: its run sent no heartbeat for {lease_s:g} s")
                self._drop(oid)

    def _begin_run(self, run: str) -> None:
        """Renew the lease of a run. First delete objects that other runs kept, or that earlier processes of it left."""
        if run not in self._renewed:
            with self._beginning:  # concurrent first calls wait until the objects are deleted
                for oid, agent in self._hosted().items():
                    kept = getattr(agent, "lease_s", 0) is None
                    if run_of(oid) != run and (kept or same_run(run_of(oid), run)):
                        self._drop(oid)
        self._renewed[run] = time.monotonic()

    def _end_run(self, run: str, keep: bool) -> None:
        """Delete the objects of a run. If `keep`, remove their lease instead: they then stay until the next run."""
        self._begin_run(run)  # in case this call arrives before the first heartbeat of the run
        for oid, agent in self._hosted().items():
            if run_of(oid) == run and keep:
                agent.lease_s = None
            elif run_of(oid) == run:
                self._drop(oid)

    def _hosted(self) -> dict[str, Any]:
        with self.agent_id_lock:
            return dict(self.agent_pool)

    def _drop(self, oid: str) -> bool:
        """Delete an object and close it. Return whether the object existed."""
        with self.agent_id_lock:
            agent = self.agent_pool.pop(oid, None)
        if agent is None:
            return False
        self._creating.pop(oid, None)
        if hasattr(agent, "close"):
            agent.close()
        # Break a reference cycle: AgentScope has stored a bound method in the instance
        agent.__dict__.pop("__reduce_ex__", None)
        return True

    def _process_task(self, task_id: int, agent_id: str, target_func: str, raw_args: bytes) -> None:
        try:
            agent = self.get_agent(agent_id)
            if agent is None:
                raise KnownCause(AGENT_GONE)
            vars(agent).pop("_rng", None)  # each question to a participant starts with a new random generator
            result = cloudpickle.dumps(getattr(agent, target_func)(*cloudpickle.loads(raw_args)["args"]))
        except BaseException as error:  # noqa: BLE001 - the code of users may raise any exception
            result = MAGIC_PREFIX + one_line(error).encode()
        self.result_pool.set(task_id, result)


async def serve(config: SimulationConfig, port: int, key: ClusterKey, ready: Callable[[], None]) -> None:
    """Run the server, call `ready`, and end the process at TERM, INT or a `stop` call. Raises SettingsError."""
    install_tls(key)  # moderators send requests to the servers of their groups
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    servicer = SimulationServicer(config, port, load_models(config), stop)
    server = grpc.aio.server(ThreadPoolExecutor(RPC_THREADS), options=SERVER_OPTIONS)
    add_RpcAgentServicer_to_server(servicer, server)
    calls = {messages.HANDSHAKE: servicer.handshake, messages.HEARTBEAT: servicer.heartbeat}
    handlers = {name: grpc.unary_unary_rpc_method_handler(call) for name, call in calls.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(messages.SERVICE, handlers),))
    address = f"{address_of(config.host_name)}:{port}"
    try:
        server.add_secure_port(address, key.server_credentials())
    except RuntimeError:
        raise SettingsError(f"cannot listen at {address}: is the port in use?") from None
    await server.start()
    logger.info(f"serving at {address}, pid {os.getpid()}")
    ready()
    while not await asyncio.to_thread(stop.wait, SWEEP_S):
        await asyncio.to_thread(servicer.drop_expired)
    logger.info("stopping")
    await server.stop(STOP_GRACE_S)
    logger.info("stopped")
    sys.stdout.flush()
    os._exit(0)  # do not wait for threads, because participants may be busy for hours
