"""Count the calls of agent servers. Python imports this file at startup if PYTHONPATH contains its folder.

An interceptor of each gRPC server counts the calls of each method and the bytes of the messages. A call of METHOD
returns the counts so far as JSON: {method: [calls, bytes received, bytes sent]}.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as in main.py, before grpc is imported
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")

import grpc

METHOD = "/benchmark/served"


class CallCounter(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """An interceptor that counts the calls of one server by method."""

    def __init__(self) -> None:
        self._served: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if details.method == METHOD:
            return grpc.unary_unary_rpc_method_handler(lambda *_: json.dumps(self._served).encode())
        handler = await continuation(details)
        if handler is None:
            return None

        def counted(request: Any, context: Any) -> Any:
            reply = handler.unary_unary(request, context)
            name = getattr(request, "target_func", None) or details.method.rpartition("/")[2]
            with self._lock:
                calls, received, sent = self._served.get(name, (0, 0, 0))
                self._served[name] = (calls + 1, received + size_of(request), sent + size_of(reply))
            return reply

        return grpc.unary_unary_rpc_method_handler(counted, handler.request_deserializer, handler.response_serializer)


def size_of(message: Any) -> int:
    """Return the size in bytes of a message, which is bytes or a protobuf message."""
    return len(message) if isinstance(message, bytes) else message.ByteSize()


make_server = grpc.aio.server
grpc.aio.server = lambda pool, options: make_server(pool, interceptors=[CallCounter()], options=options)
