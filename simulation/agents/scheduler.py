"""A scheduler that runs many coroutines on one event loop without a task for each. It does not depend on agents.

One task steps (starts or resumes) all coroutines that only pause. A paused coroutine waits in a timer wheel. This takes
a quarter of the memory of a task, a future and a timer. The first coroutine that does more than pause keeps the task,
and a new task steps the other coroutines. Therefore, a coroutine cannot detect that it has shared its task with others.
"""

import asyncio
import gc
import sys
import threading
import time
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain
from types import CoroutineType, coroutine
from typing import Any

BATCH = 1000  # number of coroutines stepped before the event loop runs other callbacks
TICKS_A_SECOND = 1000
LONGEST_S = 1e9  # longest pause that the timer wheel handles

Pair = tuple[int, Coroutine[Any, Any, Any]]  # an index and its coroutine


class Sleep(float):
    """A pause in seconds. `await Sleep(1.5)` works in any coroutine; in those that a `Scheduler` runs, it is cheap."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        if _here.stepping and 0 < self < LONGEST_S:
            # an iterator in C takes less memory than a generator during the pause
            return iter((self,))  # type: ignore[return-value]
        return asyncio.sleep(max(0.0, self)).__await__()  # zero yields to the event loop once


class _Here(threading.local):
    stepping = False  # whether a scheduler is stepping a coroutine in the thread; current_task() needs a system call


_here = _Here()


class SharedTask(asyncio.Task[Any]):
    """A task that steps many coroutines. `touched`: whether one used it in a way that its refcount does not show."""

    touched = False


def _touching(method: Callable[..., Any]) -> Any:
    def touch(task: SharedTask, *args: Any, **kwargs: Any) -> Any:
        task.touched = True
        return method(task, *args, **kwargs)

    return touch


for _name in ("__hash__", "cancel", "add_done_callback", "set_name"):  # a weak key is hashed
    setattr(SharedTask, _name, _touching(getattr(asyncio.Task, _name)))


@dataclass(eq=False)
class Scheduler:
    """A runner of `count` coroutines, one for each index 0 .. count-1."""

    loop: asyncio.AbstractEventLoop  # the event loop on which `run` is awaited
    count: int
    begin: Callable[[int], Coroutine[Any, Any, Any]]  # creates the coroutine of an index; its errors go to `failed`
    answered: Callable[[list[int], list[Any]], None]  # called with indices and the return values of their coroutines
    failed: Callable[[int, BaseException], None]  # called with an index and the exception of its coroutine
    # Maximum number of coroutines at a time (None: no limit). Set a limit if coroutines do more than pause: each then
    # has its own task. When half of the limit is free, new coroutines start, all in one pass of the event loop.
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        self._begun = self._ended = 0
        self._stepping = self._halted = False
        self._indices: list[int] = []  # indices of coroutines whose return values are not yet reported
        self._values: list[Any] = []  # the return values of these coroutines
        self._buckets: dict[int, tuple[array[int], list[Any]]] = {}  # paused coroutines by the tick of their resumption
        self._ticks: list[int] = []  # a heap of the keys of `_buckets`
        self._tasks: dict[asyncio.Task[Any], int] = {}  # for each task with one coroutine: the coroutine's index
        self._timer: asyncio.Handle | None = None  # starts the next pass
        self._all_ended: asyncio.Future[None] = self.loop.create_future()

    async def run(self) -> None:
        """Run all coroutines until the last one has ended. Raises any exception of the callback `answered`."""
        self._start_pass()
        await self._all_ended

    def halt(self) -> None:
        """Start no more coroutines, and raise CancelledError in those that run or are paused."""
        if not self._halted:
            self._halted = True
            for task in self._tasks:
                self.loop.call_soon(task.cancel)  # not at once: the task must start first, to await its coroutine
            self._start_pass()

    def _start_pass(self) -> None:
        """Step paused coroutines that are due, then new ones."""
        if not self._stepping and not self._all_ended.done():
            self._stepping = True
            if self._timer is not None:
                self._timer.cancel()
            self._step_in_new_task(chain(chain.from_iterable(self._over()), self._new()))

    def _end_pass(self) -> None:
        """Report the return values of coroutines, and schedule the next pass."""
        indices, values = self._indices, self._values
        if indices:
            self._indices, self._values = [], []
            self.answered(indices, values)
            self._ended += len(indices)
        if self._ended == self.count:
            self._all_ended.set_result(None)
        elif self._startable() > 0 or (self._halted and self._ticks):
            self._start_pass()
        elif self._ticks:
            wait_s = self._ticks[0] / TICKS_A_SECOND - time.monotonic()
            self._timer = self.loop.call_later(max(wait_s, 0.0), self._start_pass)

    def _over(self) -> Iterator[Iterator[Pair]]:
        now, count = time.monotonic() * TICKS_A_SECOND, 0
        while self._ticks and count < BATCH and (self._halted or self._ticks[0] <= now):
            indices, coroutines = self._buckets.pop(heappop(self._ticks))
            count += len(coroutines)
            yield zip(indices, coroutines, strict=True)

    def _new(self) -> Iterator[Pair]:
        for _ in range(min(self._startable(), self.max_concurrent or BATCH)):
            index = self._begun
            self._begun += 1
            try:
                if self._halted:
                    raise asyncio.CancelledError
                work = self.begin(index)
            except BaseException as error:  # noqa: BLE001 - raised by a user-defined method that is not async
                self._fail(index, error)
                continue
            if self.max_concurrent is None and not self._tasks and type(work) is CoroutineType:
                yield index, work
            else:  # if one coroutine needs its own task, others probably do, too
                self._watch(self.loop.create_task(outcome_of(work)), index)

    def _startable(self) -> int:
        """Return how many coroutines may start now: none until half of the limit is free."""
        left, limit = self.count - self._begun, self.max_concurrent or self.count
        room = limit - (self._begun - self._ended)
        return min(left, room) if room >= min(left, limit // 2) else 0

    def _step_in_new_task(self, pairs: Iterator[Pair]) -> None:
        context = Context()
        SharedTask(self._step(pairs, context), loop=self.loop, context=context)

    async def _step(self, pairs: Iterator[Pair], context: Context) -> Any:
        _here.stepping = True
        try:
            with gc_paused():
                rest = self._step_shared(pairs, context)
        except BaseException as error:  # noqa: BLE001 - a defect of this program; `run` raises it
            if not self._all_ended.done():
                self._all_ended.set_exception(error)
            return None
        finally:
            _here.stepping = False
        return rest and await outcome_of(rest)

    def _step_shared(self, pairs: Iterator[Pair], context: Context) -> Awaitable[Any] | None:
        """Step the coroutines in `pairs` until one of them needs the current task. Then leave the others to a new task.

        Return the remaining work of the coroutine that needs the task, or None if nothing remains.
        """
        task: Any = asyncio.current_task()
        task.touched = False  # asyncio has set this flag when it registered the task
        references, now, halted = sys.getrefcount, time.monotonic, self._halted
        indices, values, buckets = self._indices, self._values, self._buckets
        unshared = references(task)
        for index, work in pairs:
            rest = None
            try:
                awaited = work.throw(asyncio.CancelledError()) if halted else work.send(None)
            except StopIteration as stop:
                indices.append(index)
                values.append(stop.value)
            except BaseException as error:  # noqa: BLE001 - user code may raise anything; only this index fails
                self._fail(index, error)
            else:
                if type(awaited) is Sleep and references(task) == unshared and not (context or task.touched or halted):
                    tick = int((now() + awaited) * TICKS_A_SECOND) + 1
                    bucket = buckets.get(tick)
                    if bucket is None:
                        bucket = buckets[tick] = (array("I"), [])
                        heappush(self._ticks, tick)
                    bucket[0].append(index)
                    bucket[1].append(work)
                    continue
                self._watch(task, index)
                rest = _rest(work, awaited)
            if rest is not None or references(task) != unshared or context or task.touched:
                self._step_in_new_task(pairs)
                return rest
        self._stepping = False
        self._end_pass()
        gc.collect(1)
        return None

    def _watch(self, task: asyncio.Task[Any], index: int) -> None:
        self._tasks[task] = index
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        index = self._tasks.pop(task)
        outcome = asyncio.CancelledError() if task.cancelled() else task.result()
        if isinstance(outcome, BaseException):
            self._fail(index, outcome)
        else:
            self._indices.append(index)
            self._values.append(outcome)
        self._start_pass()

    def _fail(self, index: int, error: BaseException) -> None:
        self.failed(index, error)
        self._ended += 1


@coroutine
def _rest(work: Coroutine[Any, Any, Any], awaited: Any) -> Generator[Any, Any, Any]:
    """Run the remaining steps of a coroutine that waits for `awaited`."""
    try:
        while True:
            try:
                if type(awaited) is Sleep:
                    yield from asyncio.sleep(awaited).__await__()
                else:
                    yield awaited
            except BaseException as error:  # noqa: BLE001 - passed to the coroutine: a cancellation or a failed wait
                awaited = work.throw(error)
            else:
                awaited = work.send(None)
    except StopIteration as stop:
        return stop.value


async def outcome_of(work: Awaitable[Any]) -> Any:
    """Await `work`. Return its value, or its exception, because a raised SystemExit would stop the event loop."""
    try:
        return await work
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        return error


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection in a `with` block. A block that creates many objects should end with `gc.collect(1)`.

    Without a pause, the collector scans all objects again whenever their number has grown by a quarter. These scans
    take up half of the time spent creating 500,000 agents, and a quarter of the time spent asking them.
    """
    was_enabled = gc.isenabled()  # another thread may have paused the collector, and will enable it
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
