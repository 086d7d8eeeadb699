"""The --dashboard web server: the live status of the runs, served to this host only from a separate thread.

It reads the state of the run objects and makes no blocking calls to them. Its only effect on a run is to request an
early stop, as Ctrl-C does. When the process ends, open pages can still fetch the final status.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from loguru import logger

from simulation.errors import Interrupted, SettingsError, one_line
from simulation.results.run_directory import REPORT
from simulation.runs.console import ConsoleProgress

if TYPE_CHECKING:
    from simulation.runs.dashboard_state import DashboardState
    from simulation.runs.run import Run

PAGE = Path(__file__).with_name("dashboard.html")
ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")  # accepted host names; others may belong to a foreign site (DNS rebinding)
LOOKING_S = 3.0  # a page counts as open for this long after its last request
END_S = 3.0  # how long `close` waits for open pages
STATE_S = 0.3  # minimum cache time of a state, so that several pages cost no more than one
SHARE = 0.01  # maximum share of time spent on building states (26 ms each for 4096 servers)
TICK_S = 0.1
PAGES_KNOWN = 64
RUNS_TOLD = 50
REPORT_BYTES = 64 * 2**20
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Dashboard:
    """Web server that runs until `close` and follows runs one after another (see `RunObserver`).

    Args:
        port: Port on 127.0.0.1; 0 picks a free one.
        watch: Provides stage progress and messages about servers, and accepts the stop request.

    Raises:
        SettingsError: The port is not available.
    """

    def __init__(self, port: int, watch: ConsoleProgress) -> None:
        try:
            self._socket = socket.create_server((ADDRESS, port))
        except OSError as error:
            raise SettingsError(
                f"--dashboard {port}: port {port} of {ADDRESS} cannot be had ({os.strerror(error.errno or 0)}); give "
                "another one, or 0 for any that is free"
            ) from None
        self.port: int = self._socket.getsockname()[1]
        self._watch = watch
        self._token = secrets.token_urlsafe(24)
        self._instance = secrets.token_hex(4)  # lets a page detect that another command now uses this port
        self._view: DashboardState | None = None
        self._running: str | None = None  # id of the current run
        self._ended: deque[dict[str, Any]] = deque(maxlen=RUNS_TOLD)
        self._over = False
        self._troubles: dict[str, str] = {}  # errors by the part of the page that cannot be shown
        self._told: tuple[float, dict[str, Any]] = (0.0, {})  # cached state, and when it expires
        self._pages: dict[str, float] = {}  # time of the last request, by page id
        self._heard = threading.Condition()  # guards _pages
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="dashboard", daemon=True)
        self._thread.start()
        logger.info(f"dashboard: http://{ADDRESS}:{self.port}/")

    # --- What main and runs call -------------------------------------------------------------------------------------

    @contextmanager
    def follow(self, run: Run) -> Iterator[None]:
        """Show this run, and its outcome after it ends."""
        from simulation.runs.dashboard_state import DashboardState  # noqa: PLC0415 - AgentScope, which the page need not wait for

        view = self._view = DashboardState(run)
        self._running = run.run_id
        ended: dict[str, Any] = {"run_id": run.run_id, "path": str(run.directory.path), "error": ""}
        try:
            yield
            ended["status"] = run.status or "complete"
        except BaseException as error:
            interrupted = isinstance(error, Interrupted)
            ended["status"] = "interrupted" if interrupted else "failed"
            ended["error"] = "" if interrupted else str(error)
            raise
        finally:
            view.end()
            ended["written"] = run.status is not None
            self._ended.append(ended)
            self._running = None

    def close(self) -> None:
        """Stop serving, after open pages have fetched the outcome (waits at most `END_S`)."""
        self._over = True
        with self._heard:
            self._heard.wait_for(lambda: not self._looking(), END_S)
        with suppress(RuntimeError):  # the thread has failed already, which was logged
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(END_S)

    # --- The thread --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve_until_stopped())
        except Exception as error:  # noqa: BLE001 - the edge of the thread: the game goes on without the page
            logger.error(f"the dashboard has ended: {one_line(error)}")

    async def _serve_until_stopped(self) -> None:
        app = web.Application(middlewares=[self._guarded])
        app.router.add_get("/", self._page)
        app.router.add_get("/state", self._state)
        app.router.add_get("/report", self._report)
        app.router.add_post("/stop", self._stop)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await runner.setup()
        await web.SockSite(runner, self._socket).start()
        looking = asyncio.create_task(self._look())
        await self._stopping.wait()
        looking.cancel()
        await runner.cleanup()

    async def _look(self) -> None:
        """Sample the groups at the allowed rate while a page is open."""
        looked = 0.0
        while True:
            await asyncio.sleep(TICK_S)
            view = self._view
            with self._heard:
                looking = bool(self._looking())
            if view is None or self._over or not looking or time.monotonic() < looked + view.sampler.pause_s:
                continue
            looked = time.monotonic()
            try:
                await asyncio.to_thread(view.look)
                self._troubles.pop("the servers' figures", None)
            except Exception as error:  # noqa: BLE001 - the page says what it cannot show
                self._troubles["the servers' figures"] = one_line(error)

    def _looking(self) -> list[str]:
        now = time.monotonic()
        return [page for page, asked in self._pages.items() if now - asked < LOOKING_S]

    # --- Requests ----------------------------------------------------------------------------------------------------

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Reject requests that come neither from our page nor from a user who opens it."""
        hosts = {f"{name}:{self.port}" for name in NAMES} | ({*NAMES} if self.port == 80 else set())
        own_origin = f"http://{request.host}"
        elsewhere = request.headers.get("Origin", own_origin) != own_origin
        site = request.headers.get("Sec-Fetch-Site", "none")
        if request.host not in hosts or elsewhere or (site not in ("none", "same-origin") and request.path != "/"):
            return web.Response(status=403, text="this page is for this host alone\n", headers=HEADERS)
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = web.Response(status=error.status, text=f"{error.reason}\n")
        response.headers.update(HEADERS)
        return response

    async def _page(self, _request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(16)
        text = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce).replace("{{token}}", self._token)
        policy = {"Content-Security-Policy": POLICY.format(nonce)}
        return web.Response(text=text, content_type="text/html", headers=policy)

    async def _state(self, request: web.Request) -> web.Response:
        self._hear(request.query.get("page", "")[:40], "done" in request.query)
        until, state = self._told
        if time.monotonic() > until or state["over"] != self._over:
            began = time.thread_time()
            state = self._state_now()
            self._told = (time.monotonic() + max(STATE_S, (time.thread_time() - began) / SHARE), state)
        return web.json_response(state)

    def _hear(self, page: str, done: bool) -> None:
        """Record that a page is open, or that it has fetched the final state (`done`)."""
        if not page:
            return
        with self._heard:
            self._pages.pop(page, None)
            if not done:
                self._pages[page] = time.monotonic()
            while len(self._pages) > PAGES_KNOWN:
                del self._pages[next(iter(self._pages))]
            self._heard.notify_all()

    def _state_now(self) -> dict[str, Any]:
        over, view, stage, running = self._over, self._view, self._watch.stage, self._running
        state: dict[str, Any] = {"instance": self._instance, "over": over, "running": running, "run": None}
        if view is not None:
            try:
                state["run"] = view.state(stage)
                self._troubles.pop("the run", None)
            except Exception as error:  # noqa: BLE001 - the page says what it cannot show
                self._troubles["the run"] = one_line(error)
        state["stage"] = None if stage is None or over else stage._asdict()
        state["stopping"] = self._watch.stop_signal is not None
        state["log"] = list(self._watch.told)
        state["ended"] = [{**each, "report": _report_of(each) is not None} for each in list(self._ended)]
        state["troubles"] = [f"{what}: {why}" for what, why in self._troubles.items()]
        return state

    async def _report(self, request: web.Request) -> web.Response:
        """Return the report of a finished run, as a download: it must not open as a page of our origin."""
        wanted = request.query.get("run")
        path = next((_report_of(each) for each in list(self._ended) if each["run_id"] == wanted), None)
        if path is None:
            raise web.HTTPNotFound
        try:
            body = await asyncio.to_thread(path.read_bytes)
        except OSError:
            raise web.HTTPNotFound from None
        headers = {"Content-Disposition": "attachment"}
        return web.Response(body=body, content_type="application/octet-stream", headers=headers)

    async def _stop(self, request: web.Request) -> web.Response:
        """Request an early stop, as one Ctrl-C does: end the current round and keep the results."""
        said = request.headers.get("X-Token", "").encode(errors="replace")
        if "Origin" not in request.headers or not secrets.compare_digest(said, self._token.encode()):
            raise web.HTTPForbidden
        if self._watch.stop_signal is None:
            logger.info("the dashboard's button asks for an early end")
            self._watch.stop(signal.SIGINT)
        return web.json_response({"stopping": True})


def _report_of(ended: dict[str, Any]) -> Path | None:
    """Return the path of a run's report; None if it is missing or larger than REPORT_BYTES."""
    path = Path(ended["path"]) / REPORT
    try:
        return path if path.stat().st_size <= REPORT_BYTES else None
    except OSError:
        return None
