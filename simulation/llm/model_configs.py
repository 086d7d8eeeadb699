"""The model configurations file, in AgentScope's format. A single entry can be the template for model_1 .. model_N.

This module reads and checks the file. It does not contact any model server.
"""

import ipaddress
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from simulation.errors import SettingsError, near_file, nearest, reason
from simulation.files import is_there, read_text
from simulation.settings import SimulationConfig

MODEL_TYPE = "openai_chat"
OURS = ("model", "messages", "n", "seed", "stream", "structured_outputs", "response_format")
BESIDE = "stands beside client_args, not in it"
ELSEWHERE = {"http_client": "is this program's own", "api_key": BESIDE, "organization": BESIDE}
KNOWN = {"config_name", "model_type", "model_name", "api_key", "organization", "client_args", "generate_args"}


@dataclass(frozen=True)
class ModelConfig:
    """One model on one model server, as configured by an entry of the file."""

    name: str  # name in this program, such as `model_1`
    model: str  # name on the model server
    base_url: str  # including `/v1`
    entry: dict[str, Any] = field(repr=False, hash=False)  # in AgentScope's format; may contain an API key

    @property
    def generate_args(self) -> dict[str, Any]:
        """Return a copy of the request fields that the entry sets, such as temperature."""
        return dict(self.entry.get("generate_args") or {})

    @property
    def address(self) -> str:
        """Return host and port of the model server."""
        return urlsplit(self.base_url).netloc


def is_within(url: str, hosts: Sequence[str]) -> bool:
    """Return whether the host of a URL is this host or one of `hosts`."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host in map(str.lower, hosts):  # urlsplit returns host names in lower case
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_model_is_local(config: SimulationConfig, name: str, url: str) -> None:
    """Raise SettingsError if a model server is outside the cluster and --allow-remote-model is not set."""
    if not config.allow_remote_model and not is_within(url, config.hosts):
        raise SettingsError(
            f"{name} at {url} is outside this cluster's hosts ({' '.join(config.hosts)}) and may cost money; give "
            "--allow-remote-model if you mean it"
        )


def asked_models(config: SimulationConfig) -> list[str]:
    """Return the names of the models in use: those of the mixture (--models) if given, otherwise model_1 .. model_N."""
    if config.models is None:
        return [f"model_{number}" for number in range(1, config.model_per_host + 1)]
    return [each.partition("=")[0].strip() for each in config.models.split(",")]


def model_of(participant: int, models: int) -> str:
    """Return the name of a participant's model. model_1 .. model_N, with N = `models`, are assigned round-robin."""
    return f"model_{participant % models + 1}"


def has_models(config: SimulationConfig) -> bool:
    """Return whether to read the model file: not if --model-configs has its default value and the file is missing."""
    return config.model_configs != SimulationConfig.model_configs or is_there(Path(config.model_configs))


def read_models(config: SimulationConfig) -> dict[str, ModelConfig]:
    """Read the model file. Return its models by name. Raises SettingsError if the file cannot be read or is invalid."""
    path = config.model_configs
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
        problem = next(_problems_with(entry), None)
        if problem:
            raise SettingsError(f"--model-configs {path}, entry {number}: {problem}")
    models = [_model_of(entry) for entry in entries]
    if len(models) == 1 and urlsplit(models[0].base_url).port is None and is_within(models[0].base_url, ()):
        models = [_at_port(models[0], config.vllm_base_port, index) for index in range(config.model_per_host)]
    by_name = {model.name: model for model in models}
    if len(by_name) < len(models):
        raise SettingsError(f"--model-configs {path}: two entries have the same config_name")
    return by_name


def _problems_with(entry: Any) -> Iterator[str]:
    """Yield the errors in an entry. A check may assume that the earlier ones passed, so only the first error counts."""
    if not isinstance(entry, dict):
        yield "must be an object with config_name, model_type, model_name and client_args"
    yield from (f"{name} is not known here; {nearest(name, sorted(KNOWN))}" for name in entry if name not in KNOWN)
    for name in ("config_name", "model_name"):
        if not (isinstance(entry.get(name), str) and entry[name]):
            yield f"{name} is missing, or no text"
    for name in ("client_args", "generate_args"):
        if not isinstance(entry.get(name, {}), dict):
            yield f"{name} must be an object"
    if entry.get("model_type") != MODEL_TYPE:
        yield f"model_type must be {MODEL_TYPE}, the kind of server that vLLM is"
    client_args, generate_args = entry.get("client_args", {}), entry.get("generate_args", {})
    yield from (
        f"generate_args holds {name}, which every request sets for itself" for name in OURS if name in generate_args
    )
    for name in ("max_tokens", "max_completion_tokens"):
        limit = generate_args.get(name, 1)
        if type(limit) is not int or limit < 1:
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


def _model_of(entry: dict[str, Any]) -> ModelConfig:
    return ModelConfig(entry["config_name"], entry["model_name"], entry["client_args"]["base_url"].rstrip("/"), entry)


def _at_port(template: ModelConfig, base_port: int, index: int) -> ModelConfig:
    """Return model number `index` (from 0) of a template whose URL has no port. Its port is base_port + index."""
    url = urlsplit(template.base_url)
    host = f"[{url.hostname}]" if ":" in str(url.hostname) else url.hostname
    client_args = template.entry["client_args"] | {
        "base_url": url._replace(netloc=f"{host}:{base_port + index}").geturl()
    }
    return _model_of(template.entry | {"config_name": f"model_{index + 1}", "client_args": client_args})
