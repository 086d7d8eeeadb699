"""AgentScope's RPC client with this program's channels, deadlines and errors. Only this module modifies that client.

`RpcClient._get_channel`, which creates every channel of the process, is replaced to use the cluster key. AgentScope's
calls wait 300 s or forever and hide the server's error, so `Client` sets deadlines and translates errors.
"""

from collections.abc import Callable
from typing import Any

import cloudpickle
import grpc
from agentscope.exception import AgentServerError
from agentscope.message import Msg
from agentscope.rpc import RpcClient, RpcObject
from agentscope.rpc.retry_strategy import RetryBase
from agentscope.rpc.rpc_agent_pb2 import CallFuncRequest, CreateAgentRequest, StringMsg
from agentscope.rpc.rpc_agent_pb2_grpc import RpcAgentStub

from simulation.errors import AgentNotFound, ClusterError, KnownCause
from simulation.rpc.channels import AGENT_GONE, await_call, channel_to, stub_of, translated_error
from simulation.rpc.endpoints import Endpoint

SHORT_CALL_TIMEOUT_S = 20.0  # deadline of calls that should return at once: a server that takes longer hangs
LONG_CALL_TIMEOUT_S = 3600.0  # deadline of calls that the failure detector cancels if heartbeats stop
SILENT_POLLS = 4  # polls of 5 s without an answer until a call fails; AgentScope alone waits at most 105 s in all

RpcClient._get_channel = classmethod(lambda _cls, url: channel_to(url))


class RemoteObject(RpcObject):
    """AgentScope's proxy of the remote object `oid`. A missing object is created with `kwargs` unless that is None."""

    def __init__(
        self, cls: type, oid: str, endpoint: Endpoint, deadline_s: float, kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__(cls, oid, endpoint.host, endpoint.port, connect_existing=True, retry_strategy=_UntilAnswered())
        self.oid = oid
        self.client = Client(endpoint, deadline_s)
        if kwargs is not None:
            self.client.create_agent({"args": (), "kwargs": kwargs, "class_name": cls.__name__}, oid)


def reply_of(proxy: RemoteObject, message: Msg, *more: Any, method: str = "reply") -> Msg:
    """Call `method` of an agent and return its reply. There is no deadline for the reply.

    Raises KnownCause if the agent raises an exception, and ClusterError if its server or the agent is lost.
    """
    try:
        return getattr(proxy, method)(message, *more).result()
    except AgentServerError as error:
        if isinstance(error.__cause__, grpc.RpcError):
            raise translated_error(error.__cause__, proxy.client.endpoint) from None
        cause = str(error.message).removeprefix("Failed to update placeholder: ")
        gone = AgentNotFound(f"{proxy.client.endpoint}: {cause}")
        raise (gone if cause == AGENT_GONE else KnownCause(cause)) from None


class Client(RpcClient):
    """AgentScope's client of a server. To delete an agent that does not exist does nothing."""

    def __init__(self, endpoint: Endpoint, deadline_s: float) -> None:
        super().__init__(endpoint.host, endpoint.port)
        self.endpoint, self.deadline_s = endpoint, deadline_s

    def call_agent_func(self, func_name: str, agent_id: str, value: bytes | None = None, timeout: int = 0) -> bytes:
        request = CallFuncRequest(target_func=func_name, value=value, agent_id=agent_id)
        return self._call("call_agent_func", request).value

    def create_agent(self, agent_configs: dict[str, Any], agent_id: str | None = None) -> bool:
        request = CreateAgentRequest(agent_id=agent_id, agent_init_args=cloudpickle.dumps(agent_configs))
        if not (status := self._call("create_agent", request)).ok:
            raise ClusterError(f"{self.endpoint}: {status.message}")
        return True

    def delete_agent(self, agent_id: str | None = None) -> bool:
        return self._call("delete_agent", StringMsg(value=agent_id)).ok

    def _call(self, method: str, request: Any) -> Any:
        send = getattr(stub_of(self.endpoint, RpcAgentStub), method)
        return await_call(self.endpoint, send.future(request, timeout=self.deadline_s))


class _UntilAnswered(RetryBase):
    """A retry strategy that polls while the agent is busy, and fails after SILENT_POLLS unanswered polls in a row."""

    def retry(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        silent = 0
        while True:
            try:
                return func(*args, **kwargs)
            except grpc.RpcError as error:
                silent = 0 if error.details() == "Timeout" else silent + 1  # set by AgentScope: the agent is busy
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or silent == SILENT_POLLS:
                    raise
