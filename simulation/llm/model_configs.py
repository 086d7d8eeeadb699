"""The model configurations file, in AgentScope's format. A single entry can be the template for model_1 .. model_N.

This module reads and checks the file. It does not contact any model server.
"""

import hashlib
import json
import math
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
REPEATABLE = "-repeatable"  # a server with seeded answers that repeat lists its model a second time, with this suffix
COUNTS = ("engines", "requests_per_minute", "tokens_per_minute")
KNOWN = (
    *("api_key", "client_args", "config_name", "generate_args", "model_name", "model_type", "organization", "stream"),
    *COUNTS,
)
CLIENT_ARGS = ("base_url", "default_headers", "default_query", "project", "timeout")
LIMITS = ("max_tokens", "max_completion_tokens")
# In generate_args, but not fields of the request (as in openai's client)
NO_FIELDS = ("extra_body", "extra_headers", "extra_query", "stream", "timeout")
OURS = ("model", "messages", "n", "seed", "structured_outputs", "response_format")
SECRET = re.compile(r"auth|key|token|secret|cookie", re.IGNORECASE)  # in the names of headers
BESIDE = "stands beside client_args, not in it"
ELSEWHERE = {"http_client": "is this program's own", "api_key": BESIDE, "organization": BESIDE}
ELSEWHERE |= {"max_retries": "has no effect: requests are retried until --reply-timeout"}


@dataclass(frozen=True)
class ModelConfig:
    """One model on one model server, as configured by one entry of the models file (--model-configs)."""

    name: str  # name in this program, such as `model_1`
    model: str  # name on the model server
    base_url: str  # including `/v1`
    entry: dict[str, Any] = field(repr=False, hash=False)  # in AgentScope's format; may contain an API key

    def _arg(self, name: str, default: Any) -> Any:
        return self.entry.get("generate_args", {}).get(name, default)

    @property
    def generate_args(self) -> dict[str, Any]:
        """Return the request fields that the entry sets, such as temperature, including those in `extra_body`."""
        args = self.entry.get("generate_args", {})
        return {name: args[name] for name in args if name not in NO_FIELDS} | args.get("extra_body", {})

    @property
    def extra_headers(self) -> dict[str, str]:
        return dict(self._arg("extra_headers", {}))

    @property
    def query(self) -> dict[str, Any]:  # in the URL of a request
        return dict(self.entry["client_args"].get("default_query") or {}) | self._arg("extra_query", {})

    @property
    def timeout_s(self) -> Any:  # of one request (None: not set)
        return self._arg("timeout", self.entry["client_args"].get("timeout"))

    @property
    def per_minute(self) -> tuple[int | None, int | None]:
        """Return the maximum number of requests, and of tokens, per minute (None: no limit)."""
        return self.entry.get("requests_per_minute"), self.entry.get("tokens_per_minute")

    @property
    def limit_name(self) -> str:
        """Return the name of the field with the token limit of an answer; all requests of the model use this name."""
        return "max_completion_tokens" if "max_completion_tokens" in self.generate_args else "max_tokens"

    def fields(self, tokens: int, structured: dict[str, Any] | None) -> dict[str, Any]:
        """Return the fields of a request other than model, messages, n and seed. `tokens` is the token limit.

        For a number, the limit in the entry replaces it, and `structured` constrains the answer (None: a free text).
        """
        args, limit = self.generate_args, self.limit_name
        return args | {limit: tokens} if structured is None else {limit: tokens, **args, **structured}


def is_within(url: str, hosts: Sequence[str]) -> bool:
    """Return whether the host of a URL is this host or one of `hosts`."""
    host = urlsplit(url).hostname or ""  # in lower case
    return re.fullmatch(r"localhost|127(\.\d+){3}|::1", host) is not None or host in map(str.lower, hosts)


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
        numbers = range(1, config.model_per_host + 1)
        entries = [_at_port(entries[0], config.vllm_base_port + each - 1, f"model_{each}") for each in numbers]
    rows = [(each["config_name"], each["model_name"], each["client_args"]["base_url"].rstrip("/")) for each in entries]
    models = {row[0]: ModelConfig(*row, entry) for row, entry in zip(rows, entries, strict=True)}
    if len(models) < len(entries):
        raise SettingsError(f"--model-configs {path}: two entries have the same config_name")
    return models


def settings_hash(models: Sequence[ModelConfig], named: bool) -> str | None:
    """Return the SHA-256 of what determines the models' answers, without addresses and secrets. None without models.

    Names in this program count only if `named`; otherwise, the number of equal models does not count, either.
    """
    parts = set()
    for model in models:
        headers = {**(model.entry["client_args"].get("default_headers") or {}), **model.extra_headers}
        beside_body = [model.query, {name: text for name, text in headers.items() if not SECRET.search(name)}]
        entry = [model.model, model.generate_args, model.name if named else None]
        parts.add(json.dumps([*entry, *(beside_body if any(beside_body) else [])], sort_keys=True))
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest() if models else None


def _at_port(template: dict[str, Any], port: int, name: str) -> dict[str, Any]:
    url = urlsplit(template["client_args"]["base_url"])
    address = url._replace(netloc=f"{url.netloc.rstrip(':')}:{port}").geturl()
    return template | {"config_name": name, "client_args": template["client_args"] | {"base_url": address}}


def _problems_with(entry: Any) -> Iterator[str]:
    """Yield the errors in an entry. Only the first is reliable, because each check assumes that earlier ones passed."""
    if not isinstance(entry, dict):
        yield "must be an object with config_name, model_type, model_name and client_args"
    yield from (f"{name} is not known here; {nearest(name, KNOWN)}" for name in entry if name not in KNOWN)
    wrong = (name for name in ("config_name", "model_name") if not (isinstance(entry.get(name), str) and entry[name]))
    yield from (f"{name} is missing, or no text" for name in wrong)
    counts = {name: entry[name] for name in COUNTS if name in entry}
    args, client_args = entry.get("generate_args", {}), entry.get("client_args", {})
    parts = {"client_args": client_args, "generate_args": args}
    yield from (f"{name} must be an object" for name, part in parts.items() if not isinstance(part, dict))
    if entry.get("model_type") != MODEL_TYPE:
        yield f"model_type must be {MODEL_TYPE}, the kind of server that vLLM is"
    inner = {f"client_args: {name}": client_args.get(name) or {} for name in ("default_headers", "default_query")}
    inner |= {f"generate_args: {name}": args.get(name, {}) for name in ("extra_body", "extra_headers", "extra_query")}
    yield from (f"{name} must be an object" for name, part in inner.items() if not isinstance(part, dict))
    body = args | args.get("extra_body", {})
    yield from (f"generate_args holds {name}, which every request sets for itself" for name in OURS if name in body)
    if any(part.get("stream") not in (None, False) for part in (entry, body)):
        yield "stream must be false: every answer is read as a whole"
    limits = {f"generate_args: {name}": body[name] for name in LIMITS if name in body}
    wrong = (name for name, count in (counts | limits).items() if type(count) is not int or count < 1)
    yield from (f"{name} must be a whole number from 1" for name in wrong)
    if len(limits) > 1:
        yield f"generate_args holds both {' and '.join(LIMITS)}; a model has one of them"
    times = {name: part["timeout"] for name, part in parts.items() if "timeout" in part}
    wrong = (name for name, each in times.items() if type(each) not in (int, float) or not 0 < each < math.inf)
    yield from (f"{name}: timeout must be a number of seconds above 0" for name in wrong)
    yield from (f"client_args holds {name}, which {why}" for name, why in ELSEWHERE.items() if name in client_args)
    unknown = (name for name in client_args if name not in CLIENT_ARGS)
    yield from (f"client_args holds {name}, which has no effect; {nearest(name, CLIENT_ARGS)}" for name in unknown)
    headers = {name: [entry.get(name) or ""] for name in ("api_key", "organization")}
    headers["client_args: project"] = [client_args.get("project") or ""]
    headers |= {name: [*part, *part.values()] for name, part in inner.items() if name.endswith("headers")}
    wrong = (name for name, texts in headers.items() if not all(map(_is_sendable, texts)))
    yield from (f"{name} must hold printable ASCII characters only" for name in wrong)
    queries = {name: part.values() for name, part in inner.items() if name.endswith("query")}
    wrong = (name for name, part in queries.items() if not all(isinstance(value, str | int | float) for value in part))
    yield from (f"{name} must hold texts and numbers only" for name in wrong)
    if not _is_address(client_args.get("base_url")):
        yield "client_args needs a base_url such as http://localhost/v1, without blanks, ? or #"


def _is_sendable(text: Any) -> bool:
    return isinstance(text, str) and text.isascii() and text.isprintable()


def _is_address(text: Any) -> bool:
    if not isinstance(text, str) or not text.isprintable() or set(text) & set(" ?#"):
        return False
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and "@" not in url.netloc and url.port != 0
    except ValueError:
        return False
