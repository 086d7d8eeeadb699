"""Hooks: classes of the user's that receive the data of summary.json while runs are played."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulation.errors import SettingsError, one_line, printable
from simulation.runs.console import ConsoleProgress
from simulation.user_code import find_class

if TYPE_CHECKING:
    from simulation.runs.run import Run


class Hook:
    """The base class of hooks. Override the methods that you need.

    `summary` is the content of summary.json at that time, and `folder` the folder of the run. The next round starts
    when the method returns. An exception of a hook is logged, and the run goes on.
    """

    def run_started(self, summary: dict[str, Any], folder: Path) -> None:
        """Called before the first round. A resumed run has finished rounds already."""

    def round_finished(self, summary: dict[str, Any], folder: Path) -> None:
        """Called after each round, the last in `summary["rounds"]`. Its `ended` says whether it was interrupted."""

    def run_finished(self, summary: dict[str, Any], folder: Path) -> None:
        """Called at the end of a run, also of an interrupted or failed one. The report is written."""


def load_hook(spec: str) -> Hook:
    """Return an instance of the class that `spec` names. Raises SettingsError if the class is unusable."""
    return as_hook(find_class("--hook", spec, Hook))


def as_hook(hook: Any) -> Hook:
    """Return a hook, or an instance of its class. Raises SettingsError if it is neither, or cannot be created."""
    if not isinstance(hook, type):
        if not isinstance(hook, Hook):
            raise SettingsError(f"--hook {printable(repr(hook), 60)}: must be a Hook, or a class derived from Hook")
        return hook
    if not issubclass(hook, Hook):
        raise SettingsError(f"--hook {hook.__name__}: must be derived from simulation.Hook")
    try:
        return hook()
    except BaseException as error:  # noqa: BLE001 - code of the user's may raise anything
        raise SettingsError(f"--hook {hook.__name__}: {hook.__name__}() fails: {one_line(error)}") from None


class HookCaller:
    """Calls a hook at the events of each run that it observes."""

    def __init__(self, hook: Hook, console: ConsoleProgress) -> None:
        self._hook, self._console = hook, console

    @contextmanager
    def observe(self, run: "Run") -> Iterator[None]:
        """Call the hook at the events of `run` within the `with` block, and at its end."""
        written = list[dict[str, Any]]()  # the latest summary

        def on_summary(summary: dict[str, Any]) -> None:
            before, written[:] = written[:], [summary]
            if not before:
                self._call("run_started", run)
            elif len(summary["rounds"]) > len(before[0]["rounds"]):
                self._call("round_finished", run)

        run.on_summary.append(on_summary)
        try:
            yield
        finally:
            if written:
                self._call("run_finished", run)

    def _call(self, event: str, run: "Run") -> None:
        try:
            summary = json.loads(json.dumps(run.summary))  # a copy, which the hook may change
            getattr(self._hook, event)(summary, run.directory.path)
        except BaseException as error:  # noqa: BLE001 - code of the user's may raise anything
            self._console.warn(f"--hook: {type(self._hook).__name__}.{event} fails: {one_line(error)}")
