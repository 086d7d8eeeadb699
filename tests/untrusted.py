"""Whoever does not hold the cluster key, sending a server all that could do harm; as a script, from another host.

python -m tests.untrusted <file to write> <folder of a key of their own> <certificate of the cluster> <host:port> ...
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import grpc
from agentscope.rpc.rpc_agent_pb2 import CreateAgentRequest, StringMsg
from agentscope.rpc.rpc_agent_pb2_grpc import RpcAgentStub
from google.protobuf.empty_pb2 import Empty

from simulation.rpc.channels import CHANNEL_OPTIONS
from simulation.rpc.cluster_key import ClusterKey, load_or_make


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def attack(target: str, certificate: bytes, other: ClusterKey, written: Path) -> dict[str, str]:
    """Try all calls in all ways of an untrusted client. Return the outcome of each: a gRPC code, or "let in".

    Args:
        target: Host and port of a server.
        certificate: The cluster's, which the server shows to everyone.
        other: The key of the untrusted client.
        written: The file that is there if a server unpickled what it was sent.
    """
    no_certificate = grpc.ssl_channel_credentials(certificate)
    own = grpc.ssl_channel_credentials(certificate, other.private_key, other.certificate)
    ways = {
        "plaintext": lambda: grpc.insecure_channel(target),
        "no certificate": lambda: grpc.secure_channel(target, no_certificate, options=CHANNEL_OPTIONS),
        "another certificate": lambda: grpc.secure_channel(target, own, options=CHANNEL_OPTIONS),
    }
    create = CreateAgentRequest(agent_id="x", agent_init_args=pickle.dumps(Payload(written)))
    became = {}
    for way, channel_of in ways.items():
        with channel_of() as channel:
            stub = RpcAgentStub(channel)
            calls = {  # what is refused, is refused at once, long before these time-outs
                "is_alive": lambda stub=stub: stub.is_alive(Empty(), timeout=60),
                "create_agent": lambda stub=stub: stub.create_agent(create, timeout=60),
                "stop": lambda stub=stub: stub.stop(Empty(), timeout=60),
                "delete_all_agents": lambda stub=stub: stub.delete_all_agents(Empty(), timeout=60),
                "download_file": lambda stub=stub: list(stub.download_file(StringMsg(value="/etc/passwd"), timeout=60)),
            }
            for name, call in calls.items():
                try:
                    call()
                    became[f"{way}: {name}"] = "let in"
                except grpc.RpcError as error:
                    became[f"{way}: {name}"] = error.code().name
    return became


def main(written: str, own_key: str, certificate: str, *targets: str) -> None:
    """Attack all targets, and print what became of it as JSON."""
    known, other = Path(certificate).read_bytes(), load_or_make(Path(own_key))
    print(json.dumps({target: attack(target, known, other, Path(written)) for target in targets}))


if __name__ == "__main__":
    main(*sys.argv[1:])
