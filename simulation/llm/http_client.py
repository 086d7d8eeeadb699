"""The HTTP client of one model server. It uses only the aiohttp-based HTTP layer of openai's client.

A request takes 0.4 ms of CPU time. It would take 1.7 ms with openai's usual methods, which build an object for every
element of a reply, and 0.8 ms with openai's `post(..., cast_to=object)`.
"""

import asyncio
import os
import re
import ssl
import time
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp
import httpx2
import openai

from simulation.errors import one_line, printable
from simulation.llm.model_configs import ModelConfig, is_within
from simulation.llm.responses import NO_ANSWER, Reply, RequestError, read_reply

LOST = "connection lost"
MODELS_SHOWN, NAME_SHOWN = 5, 80  # in an error message: maximum number of models, and maximum length of a name
KEEP_ALIVE_S = 4.0  # vLLM closes an idle connection after 5 s


class ModelHttp:
    """The HTTP connections to one model server. An instance must be created and used on the same event loop.

    The constructor raises ValueError if a header, or the environment's certificates or proxy, cannot be used.
    """

    def __init__(self, config: ModelConfig) -> None:
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
        self._headers["content-type"] = "application/json"  # replaces openai's value; vLLM refuses a repeated header
        for name, value in self._headers.items():
            if not value.isprintable():
                raise ValueError(f"the header {name} holds characters that cannot be sent")
        self._completions = httpx2.URL(self.url + "/chat/completions")

    async def check(self, model: str, timeout_s: float) -> str | None:
        """Return why the server cannot answer requests for this model, or None if it can."""
        request = httpx2.Request("GET", self.url + "/models", headers=self._headers)
        try:
            response = await self._exchange(request, timeout_s)
            if response.status_code in (401, 403, 407) or response.status_code >= 500:
                return f"answers with HTTP {response.status_code}{self._through}"
            listed = response.json()["data"] if response.status_code == 200 else []
            served = [each["id"] for each in listed if isinstance(each["id"], str)]
        except RequestError as error:
            if error.cause == NO_ANSWER:
                return f"does not answer within {timeout_s:g} s{self._through}"
            return f"does not answer: {error.cause.removeprefix('model server: ')}"
        except (KeyError, TypeError):  # the reply contains no list of models
            served = []
        except (ValueError, RecursionError):  # the reply is not HTTP, not JSON, or nested too deep
            return f"answers, but is no server of the OpenAI API{self._through}"
        if not served or model in served:
            return None
        return f"serves {', '.join(printable(name, NAME_SHOWN) for name in served[:MODELS_SHOWN])}, not {model}"

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


def check_models(models: Sequence[ModelConfig], timeout_s: float) -> dict[ModelConfig, str]:
    """Check concurrently whether the servers of `models` can answer. Return the cause of each failure, by model."""

    async def check(config: ModelConfig) -> str | None:
        try:
            http = ModelHttp(config)
        except Exception as error:  # noqa: BLE001 - any setting of the client may be wrong
            return f"cannot be asked with these settings: {one_line(error)}"
        async with http._client:
            return await http.check(config.model, timeout_s)

    async def check_all() -> list[str | None]:
        return await asyncio.gather(*map(check, models))

    causes = asyncio.run(check_all())
    return {model: cause for model, cause in zip(models, causes, strict=True) if cause is not None}


def proxy_of(url: str) -> str | None:
    """Return the proxy that the environment specifies for a URL, without user name and password, or None."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
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
