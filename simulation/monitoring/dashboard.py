"""The web server of --dashboard. A separate thread serves the live status of the runs, to this host only.

Its address contains a token, so that other users of this host cannot open the page. The thread reads the run objects
and sends no requests to agent servers. Its only effects on a run are the commands of the page's buttons.
"""

import asyncio
import os
import secrets
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

from simulation.errors import Interrupted, SettingsError
from simulation.files import PACKAGE, SOURCE, is_there
from simulation.monitoring.control import Control
from simulation.monitoring.dashboard_state import DashboardState
from simulation.provenance import EXPERIMENT
from simulation.results.run_directory import REPORT, resume_command, script_command

if TYPE_CHECKING:
    from simulation.runs.run import Run

PAGE = PACKAGE / "results/pages/dashboard.html"
ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")  # accepted host names; other names may belong to a foreign site (DNS rebinding)
OPEN_S = 3.0  # a page counts as open until this time after its last request
STATE_S = 0.3  # minimum cache time of a state; several pages share a cached state
SHARE = 0.01  # maximum share of its time that the thread spends on states (26 ms per state for 4096 servers)
RUNS_LISTED = 50
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
    """A web server that runs until `close` and shows one run after another. If `port` is 0, the system chooses a port.

    `control` executes the commands of the page's buttons. The constructor raises SettingsError if the port is not
    available.
    """

    def __init__(self, port: int, control: Control) -> None:
        try:
            self._socket = socket.create_server((ADDRESS, port))
        except OSError as error:
            problem = f"port {port} of {ADDRESS} is not available ({os.strerror(error.errno or 0)})"
            raise SettingsError(f"--dashboard {port}: {problem}; give another one, or 0 for a free one") from None
        self.port: int = self._socket.getsockname()[1]
        self._control, self._watch = control, control.console
        self._token = secrets.token_urlsafe(24)
        self.path = f"/{self._token}/"  # of the page
        self._run: DashboardState | None = None  # the current run, or the last one if no run is in progress
        self._ended: deque[dict[str, Any]] = deque(maxlen=RUNS_LISTED)
        self._over = False
        self._all_fetched = threading.Event()  # set when no page has to fetch the final state
        self._cached: tuple[float, dict[str, Any]] = (0.0, {})  # the time when the cached state expires, and this state
        self._pages: dict[str, float] = {}  # time.monotonic of each page's last request; replaced, never changed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="dashboard", daemon=True)
        self._thread.start()
        logger.info(f"dashboard: http://{ADDRESS}:{self.port}{self.path}")

    @contextmanager
    def observe(self, run: "Run") -> Iterator[None]:
        """Show a run during the `with` block, and its outcome afterwards."""
        state = self._run = DashboardState(run)
        path, ended = run.directory.path, {"run_id": run.run_id, "error": ""}
        try:
            yield
        except Interrupted:
            ended["status"] = "interrupted"
            raise
        except BaseException as error:
            ended |= {"status": "failed", "error": str(error)}
            raise
        finally:
            written = {"written": run.status is not None, "report": os.access(path / REPORT, os.R_OK)}
            script = path / SOURCE / EXPERIMENT
            commands = {
                "repeat": script_command("--experiment", script) if is_there(script) else "",
                "resume": resume_command(path) if run.rounds_left and run.status is not None else "",
            }
            self._ended.append({"status": run.status, "path": str(path), **written, **commands, **ended})
            state.over = True

    def close(self) -> None:
        """Wait at most OPEN_S until all open pages have fetched the final state, then stop the web server."""
        self._over = True
        if time.monotonic() < max(self._pages.values(), default=0.0) + OPEN_S:
            self._all_fetched.wait(OPEN_S)
        with suppress(RuntimeError):  # the loop is closed because the thread has failed
            self._loop.call_soon_threadsafe(_exit)
        self._thread.join(OPEN_S)

    def _serve(self) -> None:
        app = web.Application(middlewares=[self._guarded])
        pages = {"": self._page, "state": self._state, "report": self._report}
        app.add_routes([web.get(f"/{{token}}/{name}", page) for name, page in pages.items()])
        app.add_routes([web.post(f"/{{token}}/{name}", self._command) for name in ("pause", "continue", "stop")])
        quiet: dict[str, Any] = {"handle_signals": False, "print": None, "access_log": None}
        web.run_app(app, sock=self._socket, loop=self._loop, shutdown_timeout=0.5, **quiet)

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Handle a request from our page or from the user who opens the page. Reject other requests with status 403."""
        hosts = {f"{name}:{self.port}" for name in NAMES} | ({*NAMES} if self.port == 80 else set())
        own_origin = f"http://{request.host}"
        elsewhere = request.headers.get("Origin", own_origin) != own_origin
        site, token = request.headers.get("Sec-Fetch-Site", "none"), request.match_info.get("token", "")
        foreign = site not in ("none", "same-origin") and request.path != self.path
        known = secrets.compare_digest(token.encode(errors="replace"), self._token.encode())
        if request.host not in hosts or elsewhere or foreign or not known:
            raise web.HTTPForbidden(text="open the address that the run has printed, on its host\n")
        response = await handler(request)
        response.headers.update(HEADERS)
        return response

    async def _page(self, _request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(16)
        text = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        policy = {"Content-Security-Policy": POLICY.format(nonce)}
        return web.Response(text=text, content_type="text/html", headers=policy)

    async def _state(self, request: web.Request) -> web.Response:
        page, now = request.query.get("page", "")[:40], time.monotonic()
        others = {each: at for each, at in self._pages.items() if each != page and now - at < OPEN_S}
        has_more_to_fetch = page and "done" not in request.query
        self._pages = {**others, page: now} if has_more_to_fetch else others
        if self._over and not self._pages:
            self._all_fetched.set()
        until, state = self._cached
        if now > until or state["over"] != self._over:
            began, over, run, stage = time.thread_time(), self._over, self._run, self._watch.stage
            state = {
                "over": over,
                "running": run is not None and not run.over,
                "run": None if run is None else run.state(stage),
                "stage": None if stage is None or over else stage._asdict(),
                "paused": self._watch.paused,
                "stopping": self._watch.stop_signal is not None,
                "log": list(self._watch.warnings),
                "ended": list(self._ended),
            }
            self._cached = (time.monotonic() + max(STATE_S, (time.thread_time() - began) / SHARE), state)
        return web.json_response(state)

    async def _report(self, request: web.Request) -> web.FileResponse:
        """Return the report of a finished run as a download, so that it does not open as a page of our origin."""
        paths = {each["run_id"]: Path(each["path"], REPORT) for each in list(self._ended)}
        if (path := paths.get(request.query.get("run"))) is None:
            raise web.HTTPNotFound
        return web.FileResponse(path, headers={"Content-Disposition": "attachment"})

    async def _command(self, request: web.Request) -> web.Response:
        """Execute the command that the path names. To stop has the same effect as Ctrl-C: the results are kept."""
        if "Origin" not in request.headers:
            raise web.HTTPForbidden
        self._control.execute([request.path.rpartition("/")[2]])
        return web.json_response({})


def _exit() -> None:
    raise web.GracefulExit
