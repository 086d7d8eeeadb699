"""The HTTP client of one model server. It uses only the aiohttp-based HTTP layer of openai's client.

A request takes 0.4 ms of CPU time. It would take 1.7 ms with openai's usual methods, which build an object for every
element of a reply, and 0.8 ms with openai's `post(..., cast_to=object)`.
"""

import asyncio
import itertools
import json
import os
import random
import re
import ssl
import time
import urllib.request
from collections.abc import Awaitable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import httpx2
import openai
from loguru import logger

from simulation.errors import one_line, printable
from simulation.llm.model_configs import REPEATABLE, ModelConfig, is_within
from simulation.llm.prompts import Probe, Prompt
from simulation.llm.responses import CORRECT_URL, NO_ANSWER, Reply, RequestError, pause_s, read_reply

V = TypeVar("V")
LOST = "connection lost"
MODELS_SHOWN, NAME_SHOWN = 5, 80  # in an error message: maximum number of models, and maximum length of a name
KEEP_ALIVE_S = 4.0  # vLLM closes an idle connection after 5 s
CHECKS = 3  # maximum number of requests of a check if the server reports temporary errors
START = "start it there with ./start_vllm.sh, or correct configs/model_configs.json"
_without_system: set[ModelConfig] = set()  # models that refuse the role "system", as far as this process knows


class ModelHttp:
    """The HTTP connections to one model server. An instance must be created and used on the same event loop.

    The constructor raises ValueError if a header, or the environment's certificates or proxy, cannot be used.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config, self._name = config, f"{config.name} at {config.base_url}"
        local = is_within(config.base_url, ())
        proxy = None if local else proxy_of(config.base_url)
        self._through = f" (through the proxy {proxy}; no_proxy names hosts to ask without it)" if proxy else ""
        tls = proxy is not None or config.base_url.startswith("https:")
        try:
            self._client = openai.DefaultAioHttpClient(
                # 0: no limit, because SharedSemaphore limits the requests
                limits=httpx2.Limits(max_connections=0, keepalive_expiry=KEEP_ALIVE_S),
                timeout=None,  # `_exchange` sets one timeout for the whole request
                verify=tls,  # reading the certificates takes 35 ms
                trust_env=tls and not local,  # no proxy for a model server on this host
                follow_redirects=False,
            )
        except OSError as error:
            cause = f"the certificates to trust{_certificates_from()} cannot be read: {one_line(error)}"
            raise ValueError(cause) from None
        except (ImportError, ValueError) as error:
            raise ValueError(f"the proxy cannot be used: {one_line(error)}{self._through}") from None
        # Replace localhost by 127.0.0.1: its address may be ::1, where another program may listen
        self.url = re.sub("//localhost(?=[:/]|$)", "//127.0.0.1", config.base_url, flags=re.IGNORECASE)
        settings = openai.AsyncOpenAI(
            api_key=config.entry.get("api_key") or ("EMPTY" if local else None),  # None: openai reads the environment
            organization=config.entry.get("organization"),
            http_client=self._client,
            **(config.entry["client_args"] | {"base_url": self.url}),
        )
        headers = {**settings.default_headers, **settings.auth_headers}
        self._headers = httpx2.Headers({name: value for name, value in headers.items() if isinstance(value, str)})
        self._headers.update(config.extra_headers)
        self._headers["content-type"] = "application/json"  # replaces openai's value; vLLM refuses a repeated header
        for name in (name for name, value in self._headers.items() if not value.isprintable()):
            raise ValueError(f"the header {name} holds characters that cannot be sent")
        urls = (httpx2.URL(f"{self.url}/{path}") for path in ("chat/completions", "models"))
        self._completions, self._models = (url.copy_merge_params(config.query) for url in urls)

    @property
    def takes_system(self) -> bool:
        """Return whether the model takes messages with the role "system", as far as this process knows."""
        return self._config not in _without_system

    def stop_using_system(self) -> None:
        """Put the system text into the user message from now on, in all requests of this process to the model."""
        if self.takes_system:
            _without_system.add(self._config)
            logger.warning(f"{self._name} refuses system messages: their text is put into the user message")

    def body(self, prompt: Prompt, fields: dict[str, Any], with_system: bool) -> bytes:
        """Return the body of a request. Unless `with_system`, the system text is in the user message."""
        messages = prompt.messages
        if not with_system:
            messages[:2] = [{"role": "user", "content": f"{prompt.system}\n\n{prompt.user}"}]
        return json.dumps({"model": self._config.model, "messages": messages, **fields}).encode()

    async def check(self, probe: Probe, timeout_s: float) -> str | None:
        """Send a small request. Return why the model is not usable, and what helps, or None if it is usable."""
        error = await self._try_out(probe, timeout_s)
        if error is None:
            return None
        # The list of models only serves to explain a failure: some servers have none, or list other names
        cause, served = error.cause.removeprefix("model server: "), await self._listed(timeout_s / 2)
        silent = error.cause == NO_ANSWER
        if (silent and served is not None) or cause.startswith("HTTP 429"):  # slow, or too many requests at the moment
            logger.warning(f"{self._name} has not answered a check: {cause}; the game goes on")
            return None
        if silent:
            problem = f"does not answer within {timeout_s:g} s{self._through}"
        elif not cause.startswith("HTTP "):
            odd = f"answers, but is no server of the OpenAI API ({cause}){self._through}; {CORRECT_URL}"
            return odd if not error.server_wide else f"does not answer: {cause}; {START}"
        elif served and self._config.model not in served and error.remedy in ("", CORRECT_URL):
            names = ", ".join(printable(name, NAME_SHOWN) for name in served[:MODELS_SHOWN])
            problem = f"serves {names}, not {self._config.model}"
        else:
            problem = f"answers with {cause}"
        return problem if error.remedy and error.remedy in problem else f"{problem}; {START}"

    async def _try_out(self, probe: Probe, timeout_s: float) -> RequestError | None:
        """Send a small request, also without the role "system" if that may help. Return the error, or None."""
        prompt, fields = Prompt(probe.system, probe.user), self._config.fields(probe.tokens, probe.structured)
        end = time.monotonic() + timeout_s

        async def send(with_system: bool) -> RequestError | None:
            try:
                await self.post(self.body(prompt, fields, with_system), end - time.monotonic())
            except RequestError as error:
                return error
            return None

        for number in range(1, CHECKS + 1):
            error = await send(self.takes_system)
            if error is None or not error.retryable or "HTTP" not in error.cause or number == CHECKS:
                break
            wait_s = pause_s(number, error.retry_after_s, random.random())
            if time.monotonic() + wait_s > end:
                break
            await asyncio.sleep(wait_s)
        if error is None or error.no_system is False or not self.takes_system or await send(False) is not None:
            return error
        if error.no_system or await send(True) is not None:  # otherwise, the error was temporary
            self.stop_using_system()
        return None

    async def _listed(self, timeout_s: float) -> list[str] | None:
        """Return the names of the models that the server lists ([]: none). Return None if it does not answer."""
        try:
            response = await self._exchange(httpx2.Request("GET", self._models, headers=self._headers), timeout_s)
            return [each["id"] for each in response.json()["data"] if isinstance(each["id"], str)]
        except RequestError:
            return None
        except (KeyError, TypeError, ValueError, RecursionError):  # the reply is no list of models
            return []

    async def post(self, body: bytes, timeout_s: float) -> Reply:
        """Send one completion request and return the reply. Raises RequestError if the request fails."""
        request = httpx2.Request("POST", self._completions, headers=self._headers, content=body)
        try:
            response = await self._exchange(request, timeout_s)
        except ValueError:
            raise RequestError("model server: the reply is not HTTP") from None
        try:
            return read_reply(response.status_code, response.headers, response.content, time.time())
        except RequestError as error:
            if response.status_code != 200:  # the reply may come from the proxy itself
                error.cause += self._through
            raise

    async def _exchange(self, request: httpx2.Request, timeout_s: float) -> httpx2.Response:
        """Send a request and return the whole reply. Raises ValueError if the reply is not valid HTTP.

        Raises RequestError if the connection fails, or with the cause NO_ANSWER if the reply takes over `timeout_s`.
        """
        response = None
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.send(request, stream=True)
                await response.aread()
                return response
        except TimeoutError:
            raise RequestError(NO_ANSWER) from None
        except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            if response is not None:
                raise RequestError("model server: the reply breaks off") from None
            cause = _connection_cause(error)
            text = f"model server: {cause}{self._through}"
            raise RequestError(text, server_wide=True, maybe_unsupported_n=cause == LOST) from None


def check_models(probes: Mapping[ModelConfig, Probe], timeout_s: float) -> dict[ModelConfig, str]:
    """Send each model its probe, concurrently. Return why models are not usable, and what helps, by model."""

    async def check(config: ModelConfig, probe: Probe) -> str | None:
        try:
            http = ModelHttp(config)
        except Exception as error:  # noqa: BLE001 - any setting of the client may be wrong
            return f"cannot be asked with these settings: {one_line(error)}; {START}"
        async with http._client:
            return await http.check(probe, timeout_s)

    causes = zip(probes, _run_all(itertools.starmap(check, probes.items())), strict=True)
    return {model: cause for model, cause in causes if cause is not None}


def repeatable_models(models: Collection[ModelConfig], timeout_s: float) -> list[ModelConfig]:
    """Return those of the models that their servers list as models whose seeded answers repeat."""

    async def repeats(config: ModelConfig) -> bool:
        http = ModelHttp(config)
        async with http._client:
            return config.model + REPEATABLE in (await http._listed(timeout_s) or ())

    return list(itertools.compress(models, _run_all(map(repeats, models))))


def _run_all(works: Iterable[Awaitable[V]]) -> list[V]:
    async def gather() -> list[V]:
        return await asyncio.gather(*works)

    with ThreadPoolExecutor(1) as pool:  # this thread may have a running event loop, as in a notebook
        return pool.submit(lambda: asyncio.run(gather())).result()


def proxy_of(url: str) -> str | None:
    """Return the proxy that the environment specifies for a URL, without user name and password, or None."""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None
    return re.sub(r"^(\w+://)?.*@", r"\1", proxy)


def _certificates_from() -> str:
    """Return a phrase for error messages that names the environment variable for certificates, or "" if none is set."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if os.environ.get(name):
            return f", of {name}={os.environ[name]},"
    other = "REQUESTS_CA_BUNDLE"  # an environment variable that other programs read
    return f" (SSL_CERT_FILE names others; {other} is not used)" if other in os.environ else ""


def _connection_cause(error: BaseException | None) -> str:
    """Return why a connection failed or was lost, in fixed wording, because failures are counted by this text."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return "connection refused"
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return "no address is known for its host"
        if isinstance(error, aiohttp.ClientHttpProxyError):
            return f"the proxy refuses with HTTP {error.status}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is not one of those to trust{_certificates_from()}"
        error = error.__cause__ or error.__context__ or getattr(error, "os_error", None)
    return LOST
