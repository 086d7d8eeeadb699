"""The model configurations file, in AgentScope's format. A single entry can be the template for model_1 .. model_N.

This module reads and checks the file. It does not contact any model server.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from simulation.errors import SettingsError, near_file, nearest, reason
from simulation.files import is_there, read_text
from simulation.settings import SimulationConfig

MODEL_TYPE = "openai_chat"
KNOWN = ("api_key", "client_args", "config_name", "generate_args", "model_name", "model_type", "organization")
OURS = ("model", "messages", "n", "seed", "stream", "structured_outputs", "response_format")
BESIDE = "stands beside client_args, not in it"
ELSEWHERE = {"http_client": "is this program's own", "api_key": BESIDE, "organization": BESIDE}


@dataclass(frozen=True)
class ModelConfig:
    """One model on one model server, as configured by one entry of the models file (--model-configs)."""

    name: str  # name in this program, such as `model_1`
    model: str  # name on the model server
    base_url: str  # including `/v1`
    entry: dict[str, Any] = field(repr=False, hash=False)  # in AgentScope's format; may contain an API key

    @property
    def generate_args(self) -> dict[str, Any]:
        """Return a copy of the request fields that the entry sets, such as temperature."""
        return dict(self.entry.get("generate_args", {}))


def is_within(url: str, hosts: Sequence[str]) -> bool:
    """Return whether the host of a URL is this host or one of `hosts`."""
    host = urlsplit(url).hostname or ""
    this_host = re.fullmatch(r"localhost|127(\.\d+){3}|::1", host)
    return this_host is not None or host in map(str.lower, hosts)  # urlsplit returns host names in lower case


def check_model_is_local(config: SimulationConfig, name: str, url: str) -> None:
    """Raise SettingsError if a model server is outside the cluster and --allow-remote-model is not set."""
    if not config.allow_remote_model and not is_within(url, config.hosts):
        raise SettingsError(
            f"{name} at {url} is outside this cluster's hosts ({' '.join(config.hosts)}) and may cost money; give "
            "--allow-remote-model if you mean it"
        )


def asked_models(config: SimulationConfig) -> list[str]:
    """Return the names of the models that the participants ask."""
    return [*dict.fromkeys([*(kind.model for kind in config.kinds if kind.model), *unnamed_models(config)])]


def unnamed_models(config: SimulationConfig) -> list[str]:
    """Return the models of players whose kind names none: those of --models if given, otherwise model_1 .. model_N."""
    if not any(kind.asks_models and kind.model is None for kind in config.kinds):
        return []
    if config.models is None:
        return [f"model_{number}" for number in range(1, config.model_per_host + 1)]
    return [each.partition("=")[0].strip() for each in config.models.split(",")]


def read_models(config: SimulationConfig, required: bool = True) -> dict[str, ModelConfig]:
    """Read the model file. Return its models by name. Raises SettingsError if the file cannot be read or is invalid.

    Unless `required`, return no models if --model-configs has its default value and the file is missing.
    """
    path = config.model_configs
    if not required and path == SimulationConfig.model_configs and not is_there(Path(path)):
        return {}
    try:
        entries = json.loads(read_text(Path(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--model-configs {path}: cannot be read: {reason(error)}{near_file(path)}") from None
    except (ValueError, RecursionError) as error:  # RecursionError: JSON nested too deep
        raise SettingsError(f"--model-configs {path}: is not JSON: {error}") from None
    entries = [entries] if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not entries:
        raise SettingsError(f"--model-configs {path}: must be a list of models, one at least")
    for number, entry in enumerate(entries, start=1):
        for problem in _problems_with(entry):
            raise SettingsError(f"--model-configs {path}, entry {number}: {problem}")
    first_url = entries[0]["client_args"]["base_url"]
    if len(entries) == 1 and urlsplit(first_url).port is None and is_within(first_url, ()):
        ports = range(config.vllm_base_port, config.vllm_base_port + config.model_per_host)
        entries = [_at_port(entries[0], port, f"model_{number}") for number, port in enumerate(ports, start=1)]
    models = {}
    for entry in entries:
        name, url = entry["config_name"], entry["client_args"]["base_url"].rstrip("/")
        models[name] = ModelConfig(name, entry["model_name"], url, entry)
    if len(models) < len(entries):
        raise SettingsError(f"--model-configs {path}: two entries have the same config_name")
    return models


def settings_hash(models: Sequence[ModelConfig], named: bool) -> str | None:
    """Return the SHA-256 of what determines the models' answers, without addresses and keys. None without models.

    Names in this program count only if `named`; otherwise, the number of equal models does not count, either.
    """
    entries = [[each.model, each.generate_args, each.name if named else None] for each in models]
    parts = {json.dumps(entry, sort_keys=True) for entry in entries}
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest() if models else None


def _at_port(template: dict[str, Any], port: int, name: str) -> dict[str, Any]:
    """Return a copy of the entry `template` with the given name, and with the port added to its URL."""
    url = urlsplit(template["client_args"]["base_url"])
    address = url._replace(netloc=f"{url.netloc.rstrip(':')}:{port}").geturl()
    return template | {"config_name": name, "client_args": template["client_args"] | {"base_url": address}}


def _problems_with(entry: Any) -> Iterator[str]:
    """Yield the errors in an entry. Only the first is reliable, because each check assumes that earlier ones passed."""
    if not isinstance(entry, dict):
        yield "must be an object with config_name, model_type, model_name and client_args"
    yield from (f"{name} is not known here; {nearest(name, KNOWN)}" for name in entry if name not in KNOWN)
    for name in ("config_name", "model_name"):
        if not (isinstance(entry.get(name), str) and entry[name]):
            yield f"{name} is missing, or no text"
    for name in ("client_args", "generate_args"):
        if not isinstance(entry.get(name, {}), dict):
            yield f"{name} must be an object"
    if entry.get("model_type") != MODEL_TYPE:
        yield f"model_type must be {MODEL_TYPE}, the kind of server that vLLM is"
    client_args, fields = entry.get("client_args", {}), entry.get("generate_args", {})
    yield from (f"generate_args holds {name}, which every request sets for itself" for name in OURS if name in fields)
    for name in ("max_tokens", "max_completion_tokens"):
        if type(fields.get(name, 1)) is not int or fields.get(name, 1) < 1:
            yield f"generate_args: {name} must be a whole number from 1"
    yield from (f"client_args holds {name}, which {why}" for name, why in ELSEWHERE.items() if name in client_args)
    headers = client_args.get("default_headers") or {}
    if not isinstance(headers, dict):
        yield "client_args: default_headers must be an object"
    sent = {name: [entry.get(name) or ""] for name in ("api_key", "organization")}
    for name, texts in (sent | {"client_args: default_headers": [*headers, *headers.values()]}).items():
        if not all(isinstance(text, str) and text.isascii() and text.isprintable() for text in texts):
            yield f"{name} must hold printable ASCII characters only"
    if not _is_address(client_args.get("base_url")):
        yield "client_args needs a base_url such as http://localhost/v1, without blanks, ? or #"


def _is_address(text: Any) -> bool:
    if not isinstance(text, str) or not text.isprintable() or set(text) & set(" ?#"):
        return False
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and "@" not in url.netloc and url.port != 0
    except ValueError:
        return False
