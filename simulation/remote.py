"""The only door to AgentScope's RPC client: secure channels, deadlines, liveness, and errors in our own words.

AgentScope's client is touched here in three places, each for a reason:
- every channel of the process comes from `RpcClient._get_channel`, so that is where the cluster key goes in;
- its calls wait 300 s or for ever and hide the server's words, so `_Client` sets deadlines, translates errors, and lets
  go of calls to a server that was given up on;
- its wait for an asynchronous reply ends after 105 s whatever happens, so `_UntilAnswered` waits on.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import cloudpickle
import grpc
from agentscope import __version__ as agentscope_version
from agentscope.exception import AgentServerError
from agentscope.message import Msg
from agentscope.rpc import RpcClient, RpcObject
from agentscope.rpc.retry_strategy import RetryBase
from agentscope.rpc.rpc_agent_pb2 import CallFuncRequest, CreateAgentRequest, StringMsg
from agentscope.rpc.rpc_agent_pb2_grpc import RpcAgentStub
from google.protobuf.empty_pb2 import Empty

from simulation import errors
from simulation.config import ROOT
from simulation.errors import (
    AgentGone,
    ClusterError,
    ServerLost,
    ServerUnreachable,
    SimulationError,
    Stranger,
    UnusableAnswer,
)
from simulation.placement import Endpoint
from simulation.security import CLUSTER_NAME, ClusterKey

K = TypeVar("K")
V = TypeVar("V")

MESSAGE_BYTES = 256 * 2**20  # the largest message either side takes
GROUP_DEADLINE_S = 20.0  # calls are short: a server that takes longer hangs
PATIENT_S = 3600.0  # the deadline of calls that end when heartbeats do
CALLS_AT_ONCE = 32
SILENT_POLLS = 4  # of AgentScope's 5 s each
# What may stand in a handshake's metadata, of a run or about the server
NEW_RUN, KEEP_RUN, END_RUN, HEARTBEAT = "new-run", "keep-run", "end-run", "heartbeat"
MEMORY, SERVED, CHECK_MODELS = "memory", "served", "check-models"
NOBODY_LISTENS = "no server listens there"
STRANGER = "what listens there does not hold this cluster's key"
CUT_OFF = ("reset", "Socket closed", "End of TCP")  # what becomes of a first call that shows the wrong key
CHANNEL_OPTIONS = (
    ("grpc.ssl_target_name_override", CLUSTER_NAME),
    ("grpc.enable_http_proxy", 0),  # a proxy of the environment has no business between our hosts
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 20_000),  # where a link was down meanwhile, so that the connection is made anew
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
)


def _code_version() -> str:
    """A fingerprint of the program as this process imported it; a person's own files are not part of it."""
    digest = hashlib.sha256()
    top = (ROOT / name for name in ("main.py", "moderator.py", "participant.py"))
    for path in (*top, *sorted(ROOT.glob("simulation/*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


CODE_VERSION = _code_version()


@dataclass(frozen=True)
class Handshake:
    """Who an agent server is. Two sides work together if `versions` are equal."""

    incarnation: str  # random, per process: another one means that all agents of the former are gone
    pid: int
    role: str  # participant or moderator
    base_port: int
    server_per_host: int
    moderator_per_host: int
    started: float  # seconds since the epoch
    agents: int
    memory_mb: float | None  # told only to those who ask for it, as it takes 5 ms to find out
    models: dict[str, str]  # the models it knows: name, and address
    model_troubles: dict[str, str]  # by name, why a model that it was asked to check does not answer
    # By what was called, if asked for: how often so far, and the bytes of what was said and answered
    served: dict[str, tuple[int, int, int]]
    code: str = CODE_VERSION
    python: str = platform.python_version()
    agentscope: str = agentscope_version

    @property
    def versions(self) -> tuple[str, str, str]:
        return (self.code, self.python, self.agentscope)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


OWN_VERSIONS = (CODE_VERSION, platform.python_version(), agentscope_version)


def use_key(key: ClusterKey) -> None:
    """Make every channel of this process, AgentScope's own included, one between holders of the key."""
    credentials = key.channel_credentials()
    channels: dict[str, grpc.Channel] = {}

    def secure_channel(_cls: type, url: str) -> grpc.Channel:
        # localhost may resolve to ::1 first, where somebody else may listen
        target = url.replace("localhost:", "127.0.0.1:")
        if target not in channels:
            channels[target] = grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        return channels[target]

    RpcClient._get_channel = classmethod(secure_channel)


def handshake(
    endpoint: Endpoint, timeout_s: float, starting: bool = False, told: Mapping[str, str] | None = None
) -> Handshake:
    """Ask a server who it is, and tell it something by the way.

    Args:
        endpoint: Its address.
        timeout_s: How long it may take.
        starting: Whether to wait so long even where none listens yet.
        told: NEW_RUN: the run that begins, for which it drops what others kept. KEEP_RUN: the run whose agents stay.
            END_RUN: the run whose agents go. MEMORY: tell how large it is. SERVED: tell what it was called for so far.
            CHECK_MODELS: "[names, T]": ask the servers of these models whether they answer, for T seconds.

    Raises:
        ServerUnreachable: None listens, or it does not answer in time.
        ClusterError: It is a stranger.
    """
    try:
        # gRPC works on a broken connection only while a call waits for it, hence no loop of quick calls
        metadata = list((told or {}).items())
        reply = _stub(endpoint).get_server_info(Empty(), timeout=timeout_s, wait_for_ready=starting, metadata=metadata)
    except grpc.RpcError as error:
        translated = _translated(error, endpoint)
        if any(sign in (error.details() or "") for sign in CUT_OFF):
            translated = Stranger(f"{endpoint}: {STRANGER}")
        raise translated from None
    try:
        return Handshake(**json.loads(reply.message))
    except (ValueError, TypeError):
        raise ClusterError(f"{endpoint} is an agent server, but of another program or version") from None


def heartbeat(
    endpoint: Endpoint,
    run: str,
    number: int,
    wait_s: float,
    timeout_s: float,
    done: Callable[[str | SimulationError], None],
) -> None:
    """Ask a server for a sign of life, and for what the objects of a run are at, after up to `wait_s` of this round.

    Returns at once; `done` is called in a thread of gRPC's, with the server's words or with the error.
    """
    metadata = [(HEARTBEAT, f"{run} {number} {wait_s}")]
    call = _stub(endpoint).get_server_info.future(Empty(), timeout=timeout_s, metadata=metadata)

    def heard(call: Any) -> None:
        error = call.exception()
        done(call.result().message if error is None else _translated(error, endpoint))

    call.add_done_callback(heard)


_calls: dict[Endpoint, set[grpc.Future]] = defaultdict(set)  # under way, by where they go
_given_up: set[Endpoint] = set()
_calls_lock = threading.Lock()


def let_go_of_calls(endpoint: Endpoint) -> None:
    """End all calls to a server, and those to come until `allow_calls`: they raise ServerUnreachable."""
    with _calls_lock:
        _given_up.add(endpoint)
        under_way = list(_calls[endpoint])
    for call in under_way:
        call.cancel()


def allow_calls(endpoint: Endpoint) -> None:
    """Let calls go to a server again."""
    with _calls_lock:
        _given_up.discard(endpoint)


def fan_out(
    calls: Mapping[K, Callable[[], V]], at_once: int = CALLS_AT_ONCE
) -> tuple[dict[K, V], dict[K, SimulationError]]:
    """Make all calls, so many at a time, and return results and errors by key, in the order of the calls."""
    results: dict[K, V] = {}
    failed: dict[K, SimulationError] = {}
    with ThreadPoolExecutor(min(at_once, max(len(calls), 1))) as pool:
        futures = {key: pool.submit(call) for key, call in calls.items()}
        for key, future in futures.items():
            try:
                results[key] = future.result()
            except SimulationError as error:
                failed[key] = error
    return results, failed


def all_of(calls: Mapping[K, Callable[[], V]]) -> dict[K, V]:
    """Make all calls and return their results by key; raises the first error there is."""
    results, failed = fan_out(calls)
    for error in failed.values():
        raise error
    return results


class RemoteObject(RpcObject):
    """AgentScope's proxy, with our deadlines and errors, at an id that the caller chose.

    With `kwargs` the object is created there, within the deadline; without, it is expected to exist.
    """

    def __init__(
        self, cls: type, oid: str, endpoint: Endpoint, deadline_s: float, kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__(cls, oid, endpoint.host, endpoint.port, connect_existing=True, retry_strategy=_UntilAnswered())
        self.client = _Client(endpoint, deadline_s)
        if kwargs is not None:
            self.client.create_agent({"args": (), "kwargs": kwargs, "class_name": cls.__name__}, oid)


def remove(proxy: RemoteObject) -> None:
    """Close the remote object and delete it; it is no error if it is gone already."""
    proxy.client.delete_agent(proxy._oid)


def reply_of(proxy: RemoteObject, message: Msg, method: str = "reply") -> Msg:
    """Ask one agent through AgentScope's own asynchronous call, and wait for as long as it takes.

    Raises UnusableAnswer with the agent's own words if its `reply` raises, ClusterError if the server does not answer.
    """
    try:
        return getattr(proxy, method)(message).result()
    except AgentServerError as error:
        cause = error.__cause__
        if isinstance(cause, grpc.RpcError):
            raise _translated(cause, proxy.client.endpoint) from None
        raise UnusableAnswer(str(error.message).removeprefix("Failed to update placeholder: ")) from None


class _Client(RpcClient):
    def __init__(self, endpoint: Endpoint, deadline_s: float) -> None:
        super().__init__(endpoint.host, endpoint.port)
        self.endpoint = endpoint
        self.deadline_s = deadline_s

    def call_agent_func(
        self, func_name: str, agent_id: str, value: bytes | None = None, timeout: float | None = None
    ) -> bytes:
        request = CallFuncRequest(target_func=func_name, value=value, agent_id=agent_id)
        return self._call("call_agent_func", request, timeout).value

    def create_agent(self, agent_configs: dict[str, Any], agent_id: str | None = None) -> bool:
        request = CreateAgentRequest(agent_id=agent_id, agent_init_args=cloudpickle.dumps(agent_configs))
        status = self._call("create_agent", request)
        if not status.ok:
            raise ClusterError(f"{self.endpoint}: {status.message}")
        return True

    def delete_agent(self, agent_id: str | None = None) -> bool:
        return self._call("delete_agent", StringMsg(value=agent_id)).ok

    def _call(self, method: str, request: Any, timeout: float | None = None) -> Any:
        call = getattr(_stub(self.endpoint), method).future(request, timeout=timeout or self.deadline_s)
        with _calls_lock:
            _calls[self.endpoint].add(call)
            if self.endpoint in _given_up:
                call.cancel()
        try:
            return call.result()
        except grpc.FutureCancelledError:
            raise ServerUnreachable(f"{self.endpoint}: was given up on") from None
        except grpc.RpcError as error:
            raise _translated(error, self.endpoint) from None
        finally:
            with _calls_lock:
                _calls[self.endpoint].discard(call)


class _UntilAnswered(RetryBase):
    """Polls on while the agent thinks, for as long as the server says so; SILENT_POLLS without a word are its end."""

    def retry(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        silent = 0
        while True:
            try:
                return func(*args, **kwargs)
            except grpc.RpcError as error:
                still_thinking = error.details() == "Timeout"  # the servicer's own word
                silent = 0 if still_thinking else silent + 1
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or silent == SILENT_POLLS:
                    raise


_stubs: WeakKeyDictionary[grpc.Channel, RpcAgentStub] = WeakKeyDictionary()


def _stub(endpoint: Endpoint) -> RpcAgentStub:
    """The calls of a server; made once for each channel, as making them takes a sixth of a heartbeat."""
    channel = RpcClient._get_channel(str(endpoint))
    stub = _stubs.get(channel)
    if stub is None:
        stub = _stubs[channel] = RpcAgentStub(channel)
    return stub


def _translated(error: grpc.RpcError, endpoint: Endpoint) -> SimulationError:
    """One of our errors for one of gRPC's."""
    code, details = error.code(), error.details() or ""
    last = (details.strip().splitlines() or [code.name])[-1]
    if code is grpc.StatusCode.UNAVAILABLE:
        if "andshake" in details or "SSL" in details:
            return Stranger(f"{endpoint}: {STRANGER}")
        cause = f"cannot be reached ({last.rpartition(': ')[2]})"
        if "refused" in details:
            cause = NOBODY_LISTENS
        elif "DNS resolution failed" in details:
            cause = "no address is known for this name; check /etc/hosts or DNS"
        return ServerUnreachable(f"{endpoint}: {cause}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServerUnreachable(f"{endpoint}: does not answer in time")
    if "not exists" in details:
        return AgentGone(f"{endpoint}: the agent is gone")
    return told_error(last) or SimulationError(f"{endpoint}: {last}")


def told_error(text: str) -> ServerLost | None:
    """What a moderator says of a server that it has lost, as the error that it was; None if it is something else."""
    name, _, message = text.removeprefix(f"{errors.__name__}.").partition(": ")
    kind = getattr(errors, name, None)
    return kind(message) if isinstance(kind, type) and issubclass(kind, ServerLost) else None
