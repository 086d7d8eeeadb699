"""A scheduler for many coroutines on one event loop, at the cost of a coroutine each; knows nothing of agents.

A coroutine that only pauses waits in a timer wheel, without a task, a future and a timer, which are four times its
size. One that awaits anything else continues as an asyncio task from there, and cannot detect the difference.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from array import array
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import Context
from heapq import heappop, heappush
from itertools import chain
from types import CoroutineType, coroutine
from typing import Any

BATCH = 1000  # coroutines stepped before the event loop runs other callbacks
TICKS_A_SECOND = 1000
LONGEST_S = 1e9  # the longest pause in the wheel
CANCELLED = object()  # in place of the awaited object, for a coroutine that is to be cancelled

Pair = tuple[int, Coroutine[Any, Any, Any]]  # an index, and its coroutine


class Sleep(float):
    """A pause in seconds: `await Sleep(1.5)` works anywhere, and is cheap where a `Scheduler` steps the coroutine."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        if not 0 < self < LONGEST_S:
            return asyncio.sleep(max(0.0, self)).__await__()  # zero yields to the event loop once
        if _here.stepping:
            # an iterator in C instead of a generator, as it exists for the whole pause
            return iter((self,))  # type: ignore[return-value]
        return asyncio.sleep(self).__await__()


class _Here(threading.local):
    """A thread-local flag: whether a scheduler is stepping a coroutine in this thread."""

    stepping = False


_here = _Here()


class StandInTask(asyncio.Task[Any]):
    """The task that coroutines are stepped under; `touched` records uses that leave no reference."""

    __slots__ = ("touched",)

    def __init__(self, work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop, context: Context) -> None:
        super().__init__(work, loop=loop, context=context)
        self.touched = False

    def __hash__(self) -> int:  # called when it becomes a weak key
        self.touched = True
        return super().__hash__()

    def cancel(self, msg: Any = None) -> bool:
        self.touched = True
        return super().cancel(msg)

    def add_done_callback(self, call: Any, /, *, context: Context | None = None) -> None:
        self.touched = True
        super().add_done_callback(call, context=context)

    def set_name(self, name: object, /) -> None:
        self.touched = True
        super().set_name(name)


class Raised:
    """The exception of a coroutine, in place of its value."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Scheduler:
    """A runner of one coroutine for each of the indices 0 .. count-1.

    Coroutines are stepped under a stand-in task and in its context. As long as no code keeps or modifies that task, or
    sets a variable of that context, no coroutine can detect whether its next step has the same task. So one stand-in
    serves all coroutines that only pause, and becomes the task of the first one that does more.

    Args:
        loop: The event loop of this thread.
        count: Number of coroutines.
        begin: Creates the coroutine of an index; if it raises, that index fails with the exception.
        answered: Called with a list of indices and the list of values that their coroutines returned.
        failed: Called with an index and the exception of its coroutine.
        at_once: Maximum number of concurrent coroutines. When half of them have ended, others start, all in one pass
            of the event loop. None has no maximum, and starts BATCH per pass.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        count: int,
        begin: Callable[[int], Coroutine[Any, Any, Any]],
        answered: Callable[[list[int], list[Any]], None],
        failed: Callable[[int, BaseException], None],
        at_once: int | None = None,
    ) -> None:
        self._loop = loop
        self._count = count
        self._begin = begin
        self._answered = answered
        self._failed_at = failed
        self._at_once = at_once or count
        self._batch = at_once or BATCH
        self._begun = self._ended = 0
        self._halted = False
        self._places: list[int] = []  # coroutines that have returned since the last `_tell`
        self._values: list[Any] = []
        self._buckets: dict[int, tuple[array[int], list[Any]]] = {}  # paused coroutines, by the tick when they resume
        self._due: list[tuple[int, int, array[int], list[Any]]] = []  # a heap of the same buckets, and of full ones
        self._buckets_made = 0
        self._to_cancel: list[tuple[array[int], list[Any]]] = []
        self._tasks: dict[asyncio.Task[Any], Pair] = {}  # coroutines that have a task
        self._next_pass: asyncio.Handle | None = None
        self._is_soon = False  # whether that pass is in the next iteration
        self._everyone_ended: asyncio.Future[None] = loop.create_future()

    async def run(self) -> None:
        """Run all coroutines, and return when the last one has ended. Raises what `answered` and `failed` raise."""
        self._pass_at_once()
        await self._everyone_ended

    def halt(self) -> None:
        """Start no more coroutines, and cancel the running ones as asyncio cancels a task."""
        self._halted = True
        self._to_cancel += [(places, coroutines) for _, _, places, coroutines in self._due]
        self._due.clear()
        self._buckets.clear()
        for task in list(self._tasks):
            task.cancel()
        self._pass_at_once()

    # --- One pass of the event loop ----------------------------------------------------------------------------------

    def _pass_at_once(self) -> None:
        if not self._is_soon:
            if self._next_pass is not None:
                self._next_pass.cancel()
            self._next_pass = self._loop.call_soon(self._pass)
            self._is_soon = True

    def _pass(self) -> None:
        """Step the coroutines whose pause is over, then start more."""
        self._next_pass, self._is_soon = None, False
        if self._everyone_ended.done():
            return
        try:
            with gc_paused():
                if self._to_cancel:
                    self._step_all(zip(*self._to_cancel.pop(), strict=True), cancel=True)
                self._step_all(self._whose_pause_is_over())
                begun = self._begun
                self._step_all(self._who_can_begin())
                self._tell()
                if self._begun > begun:
                    collect_young()
        except BaseException as error:  # noqa: BLE001 - a bug in this program: raised where run() is awaited
            self._everyone_ended.set_exception(error)
        else:
            self._plan_next()

    def _tell(self) -> None:
        places, values = self._places, self._values
        if places:
            self._places, self._values = [], []
            self._answered(places, values)
            self._ended += len(places)

    def _failed(self, place: int, error: BaseException) -> None:
        self._failed_at(place, error)
        self._ended += 1

    def _plan_next(self) -> None:
        if self._ended == self._count:
            self._everyone_ended.set_result(None)
        elif self._to_cancel or self._may_begin() > 0:
            self._pass_at_once()
        elif self._due and not self._is_soon:
            wait_s = self._due[0][0] / TICKS_A_SECOND - time.monotonic()
            self._next_pass = self._loop.call_later(max(wait_s, 0.0), self._pass)

    def _may_begin(self) -> int:
        """Return how many coroutines may start now."""
        left = self._count - self._begun
        room = self._at_once - (self._begun - self._ended)
        return min(left, room) if room >= min(left, self._at_once // 2) else 0

    def _who_can_begin(self) -> Iterator[Pair]:
        for _ in range(min(self._may_begin(), self._batch)):
            place = self._begun
            self._begun += 1
            if self._halted:
                self._failed(place, asyncio.CancelledError())
                continue
            try:
                work = self._begin(place)
            except BaseException as error:  # noqa: BLE001 - of a person's own method, if it is no coroutine
                self._failed(place, error)
                continue
            yield place, work if type(work) is CoroutineType else _awaiting(work)

    def _whose_pause_is_over(self) -> Iterator[Pair]:
        now, count = time.monotonic() * TICKS_A_SECOND, 0
        over: list[Iterator[Pair]] = []
        while self._due and count < BATCH and self._due[0][0] <= now:
            tick, _, places, works = heappop(self._due)
            self._buckets.pop(tick, None)
            count += len(places)
            over.append(zip(places, works, strict=True))
        return chain.from_iterable(over)

    # --- Steps -------------------------------------------------------------------------------------------------------

    def _step_all(self, pairs: Iterator[Pair], cancel: bool = False) -> None:
        """Step each coroutine until it waits or ends; with `cancel`, throw a CancelledError into it."""
        for first in pairs:  # the first one that the next stand-in serves
            context = Context()
            adopted: list[tuple[Pair, Any]] = []
            standby = self._standby(adopted, context)
            asyncio.tasks._enter_task(self._loop, standby)  # asyncio's documented hook for schedulers
            _here.stepping = True
            try:
                last = context.run(self._step_until_known, context, standby, first, pairs, cancel)
            finally:
                _here.stepping = False
                asyncio.tasks._leave_task(self._loop, standby)
            if last is not None:
                if asyncio.isfuture(last[1]):  # only the awaiting task may see this flag set
                    last[1]._asyncio_future_blocking = False
                adopted.append(last)
                self._adopt(standby, last[0])

    def _step_until_known(
        self, context: Context, standby: StandInTask, first: Pair, others: Iterator[Pair], cancel: bool
    ) -> tuple[Pair, Any] | None:
        """Step coroutines until one may know the stand-in; return the one that needs it and what it awaits, or None."""
        references, buckets, now = sys.getrefcount, self._buckets, time.monotonic
        places, values = self._places, self._values
        unknown = references(standby)
        for place, work in chain((first,), others):
            try:
                awaited = work.throw(asyncio.CancelledError()) if cancel else work.send(None)
            except StopIteration as stop:
                places.append(place)
                values.append(stop.value)
            except BaseException as error:  # noqa: BLE001 - a person's own code may raise anything, and fails alone
                self._failed(place, error)
            else:
                if type(awaited) is Sleep and references(standby) == unknown and not (context or standby.touched):
                    tick = int((now() + awaited) * TICKS_A_SECOND) + 1
                    bucket = buckets.get(tick)
                    if bucket is None or len(bucket[1]) == BATCH:
                        bucket = self._new_bucket(tick)
                    bucket[0].append(place)
                    bucket[1].append(work)
                    continue
                return (place, work), awaited
            if references(standby) != unknown or context or standby.touched:
                return None
        return None

    def _new_bucket(self, tick: int) -> tuple[array[int], list[Any]]:
        bucket: tuple[array[int], list[Any]] = (array("I"), [])
        self._buckets[tick] = bucket
        self._buckets_made += 1
        heappush(self._due, (tick, self._buckets_made, *bucket))
        return bucket

    # --- Those who need a task ---------------------------------------------------------------------------------------

    def _adopt(self, task: asyncio.Task[Any], pair: Pair) -> None:
        self._tasks[task] = pair
        task.add_done_callback(self._task_ended)

    def _standby(self, adopted: list[tuple[Pair, Any]], context: Context) -> StandInTask:
        work = self._go_on(adopted)
        work.send(None)  # up to _is_cancelled: a coroutine that has not started cannot catch a cancellation
        standby = StandInTask(work, self._loop, context)
        standby.touched = False  # asyncio itself has set it
        return standby

    async def _go_on(self, adopted: list[tuple[Pair, Any]]) -> Any:
        """Continue the adopted coroutine, if there is one: the body of a stand-in."""
        cancelled = await _is_cancelled()
        if not adopted:
            return None
        (_, work), awaited = adopted.pop()
        if asyncio.isfuture(awaited):
            awaited._asyncio_future_blocking = True
        if cancelled and not (asyncio.isfuture(awaited) and awaited.cancel()):  # as a task cancels what it waits for
            awaited = CANCELLED
        try:
            return await _rest(work, awaited)
        except BaseException as error:  # noqa: BLE001 - a sys.exit() that left the task would end the event loop of all
            return Raised(error)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        pair = self._tasks.pop(task)
        outcome = Raised(asyncio.CancelledError()) if task.cancelled() else task.result()  # by itself, as it returned
        if isinstance(outcome, Raised):
            self._failed(pair[0], outcome.error)
        else:
            self._places.append(pair[0])
            self._values.append(outcome)
        self._pass_at_once()


@coroutine
def _is_cancelled() -> Generator[Any, Any, bool]:
    """Return whether the task is cancelled before its first step; a coroutine that waits here has started."""
    try:
        yield
    except asyncio.CancelledError:
        return True
    return False


@coroutine
def _rest(work: Coroutine[Any, Any, Any], awaited: Any) -> Generator[Any, Any, Any]:
    """Run the rest of a coroutine that waits for `awaited`."""
    while True:
        try:
            if awaited is CANCELLED:
                raise asyncio.CancelledError
            if type(awaited) is Sleep:
                yield from asyncio.sleep(awaited).__await__()
            else:
                yield awaited
        except GeneratorExit:
            work.close()
            raise
        except BaseException as error:  # noqa: BLE001 - it is the coroutine's: cancelled, or what it waited for failed
            try:
                awaited = work.throw(error)
            except StopIteration as stop:
                return stop.value
        else:
            return (yield from work)


async def _awaiting(awaitable: Any) -> Any:
    """Wrap an awaitable that is no coroutine in one; raises TypeError if it cannot be awaited."""
    return await awaitable


# --- The collector ---------------------------------------------------------------------------------------------------

_paused = 0
_paused_lock = threading.Lock()


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection in this process; several threads may enter this context concurrently."""
    global _paused  # noqa: PLW0603 - the collector is global, too
    with _paused_lock:
        _paused += 1
        gc.disable()
    try:
        yield
    finally:
        with _paused_lock:
            _paused -= 1
            if _paused == 0:
                gc.enable()


def collect_young() -> None:
    """Run the garbage collector on new objects, once; call it regularly while many objects are created.

    Otherwise the collector walks all objects again whenever their number has grown by a quarter, which takes half of
    the time to build 500,000 agents, and a quarter of the time to ask them.
    """
    gc.collect(1)
