"""TLS channels to agent servers, and two plain gRPC calls that do not need AgentScope: handshake and heartbeat."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from simulation import errors
from simulation.errors import ServerUnreachable, SimulationError
from simulation.rpc.cluster_key import CLUSTER_NAME, ClusterKey
from simulation.rpc.endpoints import Endpoint
from simulation.rpc.messages import HANDSHAKE, HEARTBEAT, SERVICE, Handshake, HeartbeatReply

K = TypeVar("K")
V = TypeVar("V")

MESSAGE_BYTES = 256 * 2**20  # maximum size of a message
CALLS_AT_ONCE = 32
GIVEN_UP_POLL_S = 0.1
ANOTHER_VERSION = "is an agent server, but of another program or version"
NOBODY_LISTENS = "no server listens there"
AGENT_GONE = "the agent is gone"
UNTRUSTED = "what listens there does not hold this cluster's key"
CUT_OFF = ("reset", "Socket closed", "End of TCP")  # in the error details of a first call with the wrong key
CHANNEL_OPTIONS = (
    ("grpc.ssl_target_name_override", CLUSTER_NAME),
    ("grpc.enable_http_proxy", 0),  # connect to hosts directly, not through a proxy set in the environment
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 20_000),  # detects connections lost by a broken link, so that gRPC reconnects
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
)

_credentials: list[grpc.ChannelCredentials] = []  # empty before `install_tls`, one element after it
identities: dict[Endpoint, Handshake] = {}  # cache of `identify`; each run clears it, because servers may be replaced
given_up: set[Endpoint] = set()  # servers that are marked down: all calls to them are cancelled


def install_tls(key: ClusterKey) -> None:
    """Use mutual TLS with this key for all channels from now on. Discard earlier channels."""
    _credentials[:] = [key.channel_credentials()]
    identities.clear()
    channel_to.cache_clear()
    stub_of.cache_clear()


@functools.cache
def channel_to(url: str) -> grpc.Channel:
    """Return the channel of this process to a server. Create the channel on first use. `url` is `host:port`."""
    target = re.sub(r"\Alocalhost:", "127.0.0.1:", url)  # otherwise ::1, where another program may listen
    return grpc.secure_channel(target, _credentials[0], options=CHANNEL_OPTIONS)


@functools.cache
def stub_of(endpoint: Endpoint, kind: Callable[[grpc.Channel], Any]) -> Any:
    """Return the gRPC stub that `kind` creates for a server. Cache the stub: its creation takes longer than a call."""
    return kind(channel_to(str(endpoint)))


def _own_calls(channel: grpc.Channel) -> dict[str, Any]:
    """Return the functions that send a handshake or a heartbeat over a channel, keyed by name. They exchange bytes."""
    return {name: channel.unary_unary(f"/{SERVICE}/{name}") for name in (HANDSHAKE, HEARTBEAT)}


def handshake(
    endpoint: Endpoint, timeout_s: float, starting: bool = False, directives: Mapping[str, str] | None = None
) -> Handshake:
    """Request the identity and state of a server; `directives` are further requests (see messages.py).

    If `starting`, wait for a server to listen. Raises ClusterError, or ServerUnreachable if no server answers in time.
    """
    try:
        # One long call, because gRPC reconnects only while a call waits for the connection
        request = json.dumps(dict(directives or {})).encode()
        reply = stub_of(endpoint, _own_calls)[HANDSHAKE](request, timeout=timeout_s, wait_for_ready=starting)
        return Handshake(**json.loads(reply))
    except grpc.RpcError as error:
        if any(sign in (error.details() or "") for sign in CUT_OFF):
            raise errors.UntrustedServer(f"{endpoint}: {UNTRUSTED}") from None
        raise translated_error(error, endpoint) from None
    except (ValueError, TypeError):
        raise errors.ClusterError(f"{endpoint} {ANOTHER_VERSION}") from None


def identify(endpoint: Endpoint, timeout_s: float, starting: bool = False) -> Handshake:
    """Return the handshake of a server, requested once per run and then cached. Raises the errors of `handshake`."""
    if endpoint not in identities:
        identities[endpoint] = handshake(endpoint, timeout_s, starting)
    return identities[endpoint]


def heartbeat(
    endpoint: Endpoint, request: list[Any], timeout_s: float, done: Callable[[HeartbeatReply | SimulationError], None]
) -> None:
    """Send a heartbeat request and return immediately. A gRPC thread calls `done` with the reply or the error.

    The request is [run, number, wait_s, numbers, changes]. The server replies when its groups finish round `number`, or
    after `wait_s` seconds. It adds partial histograms unless `numbers`, the count of possible answers, is 0. `changes`
    are arguments of `ParticipantGroup.change`.
    """

    def finish(call: Any) -> None:
        if (error := call.exception()) is not None:
            return done(translated_error(error, endpoint))
        unknown = errors.ClusterError(f"{endpoint}: sends replies that this program does not understand")
        return done(HeartbeatReply.from_json(call.result()) or unknown)

    send = stub_of(endpoint, _own_calls)[HEARTBEAT]
    send.future(json.dumps(request).encode(), timeout=timeout_s).add_done_callback(finish)


def await_call(endpoint: Endpoint, call: grpc.Future) -> Any:
    """Return the result of a call. Raises SimulationError if the call fails or its server is added to `given_up`."""
    while True:
        if endpoint in given_up:
            call.cancel()
        try:
            return call.result(GIVEN_UP_POLL_S)
        except grpc.FutureTimeoutError:
            continue
        except grpc.FutureCancelledError:
            raise ServerUnreachable(f"{endpoint}: was given up on") from None
        except grpc.RpcError as error:
            raise translated_error(error, endpoint) from None


def call_all(
    calls: Mapping[K, Callable[[], V]], at_once: int = CALLS_AT_ONCE
) -> tuple[dict[K, V], dict[K, SimulationError]]:
    """Make all calls, up to `at_once` concurrently. Return results and errors by key, in the order of `calls`."""
    results: dict[K, V] = {}
    failed: dict[K, SimulationError] = {}
    with ThreadPoolExecutor(min(at_once, max(len(calls), 1))) as pool:
        for key, future in [(key, pool.submit(call)) for key, call in calls.items()]:
            try:
                results[key] = future.result()
            except SimulationError as error:
                failed[key] = error
    return results, failed


def call_all_or_raise(calls: Mapping[K, Callable[[], V]]) -> dict[K, V]:
    """Make all calls concurrently and return their results by key. If calls fail, raise the first error."""
    results, failed = call_all(calls)
    for error in failed.values():
        raise error
    return results


def translated_error(error: grpc.RpcError, endpoint: Endpoint) -> SimulationError:
    """Return the SimulationError that corresponds to a gRPC error."""
    code, details = error.code(), error.details() or ""
    last = (details.strip().splitlines() or [code.name])[-1]
    if code is grpc.StatusCode.UNAVAILABLE:
        if "andshake" in details or "SSL" in details:
            return errors.UntrustedServer(f"{endpoint}: {UNTRUSTED}")
        cause = NOBODY_LISTENS if "refused" in details else f"cannot be reached ({last.rpartition(': ')[2]})"
        if "DNS resolution failed" in details:
            cause = "no address is known for this name; check /etc/hosts or DNS"
        return ServerUnreachable(f"{endpoint}: {cause}")
    if "not exists" in details:
        return errors.AgentNotFound(f"{endpoint}: {AGENT_GONE}")
    by_code = {
        grpc.StatusCode.DEADLINE_EXCEEDED: ServerUnreachable(f"{endpoint}: does not answer in time"),
        grpc.StatusCode.CANCELLED: ServerUnreachable(f"{endpoint}: was stopped during a call"),  # not by this process
        grpc.StatusCode.UNIMPLEMENTED: errors.ClusterError(f"{endpoint} {ANOTHER_VERSION}"),
        grpc.StatusCode.FAILED_PRECONDITION: errors.ClusterError(f"{endpoint}: {last}"),
    }
    return by_code.get(code) or parse_remote_error(last) or SimulationError(f"{endpoint}: {last}")


def parse_remote_error(text: str) -> errors.ServerLost | None:
    """Return the ServerLost error that a moderator reported as text, or None if the text reports another error."""
    name, _, message = text.removeprefix(f"{errors.__name__}.").partition(": ")
    kind = getattr(errors, name, None)
    return kind(message) if isinstance(kind, type) and issubclass(kind, errors.ServerLost) else None
