"""The model configurations file, in AgentScope's format; a single entry can be the template for model_1 .. model_N.

Reads and checks the file, and contacts no server.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from simulation.errors import SettingsError, near_file, nearest, reason
from simulation.files import is_there, read_text
from simulation.settings import SimulationConfig

MODEL_TYPE = "openai_chat"
OURS = ("model", "messages", "n", "seed", "stream", "structured_outputs", "response_format")
ELSEWHERE = {"http_client": "is this program's own"} | dict.fromkeys(
    ("api_key", "organization"), "stands beside client_args, not in it"
)
KNOWN = {"config_name", "model_type", "model_name", "api_key", "organization", "client_args", "generate_args"}


@dataclass(frozen=True)
class ModelConfig:
    """One model server.

    Attributes:
        name: Name that participants use, such as `model_1`.
        model: Name that the server uses.
        base_url: Base URL, including `/v1`.
        entry: The full configuration, in AgentScope's format.
    """

    name: str
    model: str
    base_url: str
    entry: dict[str, Any] = field(repr=False, hash=False)  # may hold an API key

    @property
    def generate_args(self) -> dict[str, Any]:
        """Return the fields of every request, such as temperature."""
        return dict(self.entry.get("generate_args") or {})

    @property
    def address(self) -> str:
        """Return host and port."""
        return urlsplit(self.base_url).netloc


def is_within(url: str, hosts: Sequence[str]) -> bool:
    """Return whether a URL points to this host or to one of `hosts`."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host in map(str.lower, hosts):  # urlsplit returns host names in lower case
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_model_is_local(config: SimulationConfig, name: str, url: str) -> None:
    """Raise SettingsError if a model is outside the cluster and --allow-remote-model is not set."""
    if not config.allow_remote_model and not is_within(url, config.hosts):
        raise SettingsError(
            f"{name} at {url} is outside this cluster's hosts ({' '.join(config.hosts)}) and may cost money; give "
            "--allow-remote-model if you mean it"
        )


def model_name(number: int) -> str:
    """Return the name of the model that participants number-1, number-1 + N, ... use."""
    return f"model_{number}"


def asked_models(config: SimulationConfig) -> list[str]:
    """Return the names of the models in use: those of the mixture (--models), or else model_1 .. model_N."""
    if config.models is None:
        return [model_name(number) for number in range(1, config.model_per_host + 1)]
    return [each.partition("=")[0].strip() for each in config.models.split(",")]


def model_of(participant: int, models: int) -> str:
    """Return the name of a participant's model; N models are assigned round-robin."""
    return model_name(participant % models + 1)


def has_models(config: SimulationConfig) -> bool:
    """Return whether there is a model file to read; only the default file may be missing."""
    return config.model_configs != SimulationConfig.model_configs or is_there(Path(config.model_configs))


def read_models(config: SimulationConfig) -> dict[str, ModelConfig]:
    """Return the models by name. Raises SettingsError with the file, the entry and the cause."""
    path = config.model_configs
    try:
        entries = json.loads(read_text(Path(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--model-configs {path}: cannot be read: {reason(error)}{near_file(path)}") from None
    except (ValueError, RecursionError) as error:  # the latter: nested too deep
        raise SettingsError(f"--model-configs {path}: is not JSON: {error}") from None
    entries = [entries] if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not entries:
        raise SettingsError(f"--model-configs {path}: must be a list of models, one at least")
    for number, entry in enumerate(entries, start=1):
        trouble = _trouble_with(entry)
        if trouble:
            raise SettingsError(f"--model-configs {path}, entry {number}: {trouble}")
    if len(entries) == 1 and urlsplit(_url_of(entries[0])).port is None and is_within(_url_of(entries[0]), ()):
        entries = [_counted_up(entries[0], config.vllm_base_port, each) for each in range(config.model_per_host)]
    models = [
        ModelConfig(str(entry["config_name"]), str(entry["model_name"]), _url_of(entry), entry) for entry in entries
    ]
    if len({each.name for each in models}) < len(models):
        raise SettingsError(f"--model-configs {path}: two entries have the same config_name")
    return {each.name: each for each in models}


def _trouble_with(entry: Any) -> str | None:
    """Return the first error in an entry, or None."""
    if not isinstance(entry, dict):
        return "must be an object with config_name, model_type, model_name and client_args"
    generate_args = entry.get("generate_args", {})
    troubles = {f"{name} is not known here; {nearest(name, sorted(KNOWN))}": name not in KNOWN for name in entry}
    for name in ("config_name", "model_name"):
        troubles[f"{name} is missing, or no text"] = not (isinstance(entry.get(name), str) and entry[name])
    for name in ("client_args", "generate_args"):
        troubles[f"{name} must be an object"] = not isinstance(entry.get(name, {}), dict)
    troubles[f"model_type must be {MODEL_TYPE}, the kind of server that vLLM is"] = (
        entry.get("model_type") != MODEL_TYPE
    )
    for name in OURS:
        there = isinstance(generate_args, dict) and name in generate_args
        troubles[f"generate_args holds {name}, which every request sets for itself"] = there
    for name in ("max_tokens", "max_completion_tokens"):
        limit = generate_args.get(name, 1) if isinstance(generate_args, dict) else 1
        troubles[f"generate_args: {name} must be a whole number from 1"] = type(limit) is not int or limit < 1
    client_args = entry["client_args"] if isinstance(entry.get("client_args"), dict) else {}
    for name, where in ELSEWHERE.items():
        troubles[f"client_args holds {name}, which {where}"] = name in client_args
    headers = client_args.get("default_headers") or {}
    troubles["client_args: default_headers must be an object"] = not isinstance(headers, dict)
    sent = {name: [entry.get(name) or ""] for name in ("api_key", "organization")}
    sent["client_args: default_headers"] = [*headers, *headers.values()] if isinstance(headers, dict) else []
    for name, texts in sent.items():
        troubles[f"{name} must hold printable ASCII characters only"] = not all(map(_fits_a_header, texts))
    url = "client_args needs a base_url such as http://localhost/v1, without blanks, ? or #"
    troubles[url] = not _is_address(entry)
    return next((trouble for trouble, there in troubles.items() if there), None)


def _fits_a_header(text: Any) -> bool:
    return isinstance(text, str) and text.isascii() and text.isprintable()


def _is_address(entry: dict[str, Any]) -> bool:
    try:
        text = _url_of(entry)
        url = urlsplit(text)
        plain = text.isprintable() and not set(text) & set(" ?#") and "@" not in url.netloc
        return plain and url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except (KeyError, AttributeError, ValueError, TypeError):
        return False


def _url_of(entry: dict[str, Any]) -> str:
    url: str = entry["client_args"]["base_url"].rstrip("/")
    return url


def _counted_up(template: dict[str, Any], base_port: int, place: int) -> dict[str, Any]:
    """Return the entry of the model at index `place` (from 0), from a template whose URL has no port."""
    url = urlsplit(_url_of(template))
    host = f"[{url.hostname}]" if ":" in str(url.hostname) else url.hostname
    placed = url._replace(netloc=f"{host}:{base_port + place}").geturl()
    client_args = {**template["client_args"], "base_url": placed}
    return {**template, "config_name": model_name(place + 1), "client_args": client_args}
