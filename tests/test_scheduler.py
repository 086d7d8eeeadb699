"""The scheduler: whatever a coroutine does, it fares as it would as a task of its own."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from weakref import WeakKeyDictionary

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from simulation.agents.scheduler import BATCH, Scheduler, Sleep

WHO = ContextVar("WHO", default=None)


def play(works, max_concurrent=None, halt_after=None, halt_when=None):
    """Run the coroutines that these functions make; returns what each place came to, and how often it was told."""
    outcomes, told = {}, dict.fromkeys(range(len(works)), 0)

    def answered(places, values):
        for place, value in zip(places, values, strict=True):
            outcomes[place] = value
            told[place] += 1

    def failed(place, error):
        outcomes[place] = type(error).__name__
        told[place] += 1

    async def run():
        loop = asyncio.get_running_loop()
        scheduler = Scheduler(loop, len(works), lambda place: works[place](place), answered, failed, max_concurrent)
        if halt_after is not None:
            loop.call_later(halt_after, scheduler.halt)

        def halt_then():
            scheduler.halt() if halt_when() else loop.call_later(0.01, halt_then)

        if halt_when is not None:
            loop.call_later(0.01, halt_then)
        await asyncio.wait_for(scheduler.run(), 100)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    assert set(told.values()) <= {1}, "somebody was told twice, or never"
    return [outcomes[place] for place in range(len(works))]


async def at_once(place):
    return place


async def pauses(place):
    await Sleep(0.01)
    await Sleep(0.01)
    return place


async def does_not_pause(place):
    await Sleep(0)
    await Sleep(-1)
    await Sleep(float("nan"))
    return place


async def sleeps(place):
    await asyncio.sleep(0.01)
    await Sleep(0.01)
    await asyncio.sleep(0)
    return place


async def sleeps_after_a_pause(place):
    await Sleep(0.01)
    return await asyncio.sleep(0.01, place)


async def raises(place):
    await Sleep(0.01)
    raise ValueError(place)


async def exits(place):
    raise SystemExit(place)


async def exits_as_a_task(place):
    await asyncio.sleep(0.01)
    raise KeyboardInterrupt


async def times_out(place):
    async with asyncio.timeout(0.01):
        await Sleep(5)


async def times_out_in_time(place):
    async with asyncio.timeout(5):
        await Sleep(0.01)
    return place


async def times_out_after_a_pause(place):
    await Sleep(0.01)
    async with asyncio.timeout(0.01):
        await Sleep(5)


async def waits_for(place):
    return await asyncio.wait_for(pauses(place), 5)


async def gathers(place):
    return sum(await asyncio.gather(pauses(place), sleeps(place), at_once(place))) // 3


async def groups(place):
    async with asyncio.TaskGroup() as group:
        group.create_task(pauses(place))
        failing = group.create_task(raises(place))
        await Sleep(5)
    return failing


async def gathers_pauses(place):
    await asyncio.gather(Sleep(0.01), Sleep(0.02))
    return place


SHARED = []  # what the coroutines of one test wait for together


async def awaits_a_shared_future(place):
    if not SHARED or SHARED[0].get_loop() is not asyncio.get_running_loop():
        SHARED[:] = [asyncio.ensure_future(asyncio.sleep(0.01, "loaded"))]
    assert await SHARED[0] == "loaded"
    await Sleep(0.01)
    return place


async def pauses_for_nothing_until_others_are_done(place):
    done = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.01, done.set_result, place)
    while not done.done():
        await Sleep(0)
    return done.result()


async def times_out_within_a_longer_time_out(place):
    async with asyncio.timeout(0.05):
        while True:
            try:
                async with asyncio.timeout(0.001):
                    time.sleep(0.0002)
                    await asyncio.sleep(5)
            except TimeoutError:
                continue


MOODS = WeakKeyDictionary()


async def keeps_a_mood_of_its_task(place):
    assert asyncio.current_task() not in MOODS
    MOODS[asyncio.current_task()] = place
    await Sleep(0.01)
    return MOODS[asyncio.current_task()]


async def has_its_end_told(place):
    told = asyncio.get_running_loop().create_future()
    asyncio.current_task().add_done_callback(told.set_result)
    await Sleep(0.01)
    assert not told.done()
    return place


async def changes_its_mind(place):
    asyncio.current_task().cancel()
    asyncio.current_task().uncancel()
    try:
        await Sleep(0.01)
    except asyncio.CancelledError:
        return place


async def is_cancelled_as_it_returns(place):
    await asyncio.sleep(0.001)
    asyncio.current_task().cancel()


async def cancels_itself(place):
    asyncio.current_task().cancel()
    await Sleep(5)


async def cancels_itself_later(place):
    task = asyncio.current_task()
    asyncio.get_running_loop().call_later(0.01, task.cancel)
    try:
        await Sleep(5)
    except asyncio.CancelledError:
        await Sleep(0.01)
        return place


async def keeps_a_variable(place):
    WHO.set(place)
    await Sleep(0.01)
    return WHO.get()


async def sees_no_variable(place):
    await Sleep(0.005)
    return place if WHO.get() is None else "somebody else's"


async def sets_a_variable_as_a_task(place):
    await asyncio.sleep(0.001)
    WHO.set(place)
    await Sleep(0.01)
    return WHO.get()


async def fails_at_what_it_awaits(place):
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_exception, KeyError(place))
    try:
        await future
    except KeyError:
        await Sleep(0.01)
        return place


def is_no_coroutine(place):
    raise LookupError(place)


def is_a_number(place):
    return place


def returns_an_awaitable(place):
    return Sleep(0.01)


WORKS = [
    at_once, pauses, does_not_pause, sleeps, sleeps_after_a_pause, raises, exits, exits_as_a_task, times_out,
    times_out_in_time, times_out_after_a_pause, waits_for, gathers, groups, gathers_pauses, cancels_itself,
    cancels_itself_later, keeps_a_variable, sees_no_variable, sets_a_variable_as_a_task, fails_at_what_it_awaits,
    is_no_coroutine, is_a_number, returns_an_awaitable, awaits_a_shared_future,
    pauses_for_nothing_until_others_are_done, times_out_within_a_longer_time_out, keeps_a_mood_of_its_task,
    has_its_end_told, changes_its_mind, is_cancelled_as_it_returns,
]  # fmt: skip
COME_TO = {
    raises: "ValueError", exits: "SystemExit", exits_as_a_task: "KeyboardInterrupt", times_out: "TimeoutError",
    times_out_after_a_pause: "TimeoutError", groups: "ExceptionGroup", cancels_itself: "CancelledError",
    is_no_coroutine: "LookupError", is_a_number: "TypeError", returns_an_awaitable: None,
    times_out_within_a_longer_time_out: "TimeoutError", is_cancelled_as_it_returns: "CancelledError",
}  # fmt: skip


@settings(max_examples=60)
@given(st.lists(st.sampled_from(WORKS), max_size=60), st.sampled_from([None, 2, 7]))
def test_every_participant_behaves_like_a_separate_task(works, most):
    assert play(works, most) == [COME_TO.get(work, place) for place, work in enumerate(works)]


@pytest.mark.parametrize("work", WORKS)
def test_many_equal_participants(work):
    assert play([work] * 300) == [COME_TO.get(work, place) for place in range(300)]


def test_think_times_are_exact_and_concurrent():
    began = time.monotonic()

    async def late(place):
        started = time.monotonic()
        await Sleep(0.05 + place % 7 / 100)
        return time.monotonic() - started - (0.05 + place % 7 / 100)

    over = play([late] * 5000)
    assert min(over) >= 0 and time.monotonic() - began < 100  # one after the other they would take 400 s


def test_concurrency_is_limited():
    under_way = most = 0

    async def value_counts(place):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await (asyncio.sleep(0.001) if place % 2 else Sleep(0.001))
        under_way -= 1
        return place

    assert play([value_counts] * 500, max_concurrent=40) == list(range(500))
    assert most == 40


def test_the_event_loop_is_not_blocked():
    """Between two batches others have their turn."""
    turns = 0

    async def run():
        nonlocal turns
        loop = asyncio.get_running_loop()

        async def other():
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        beside = loop.create_task(other())
        scheduler = Scheduler(loop, 20 * BATCH, at_once, lambda places, values: None, lambda place, error: None)
        await scheduler.run()
        beside.cancel()

    asyncio.run(run())
    assert turns >= 19


async def forever(place):
    await (asyncio.sleep(600) if place % 2 else Sleep(600))


ASKED = []  # whom one test has asked


async def answers_all_the_same(place):
    ASKED.append(place)
    try:
        await Sleep(600)
    except asyncio.CancelledError:
        await Sleep(0.01)
        return place


@pytest.mark.parametrize("halt_after", [0.0, 0.001, 0.01, 0.1])
@pytest.mark.parametrize("most", [None, 100])
def test_halting_ends_every_participant_once(halt_after, most):
    outcomes = play([forever] * 3000, most, halt_after)
    assert outcomes == ["CancelledError"] * 3000


def test_a_cancelled_participant_may_still_answer():
    ASKED.clear()
    assert play([answers_all_the_same] * 100, halt_when=lambda: len(ASKED) == 100) == list(range(100))


@pytest.mark.parametrize("work", [at_once, pauses, sleeps])
def test_an_error_in_the_recorder_is_raised(work):
    async def run():
        def answered(places, values):
            raise ZeroDivisionError

        scheduler = Scheduler(asyncio.get_running_loop(), 10, work, answered, lambda place, error: None)
        await asyncio.wait_for(scheduler.run(), 100)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())


def test_think_works_in_any_task():
    began = time.monotonic()
    asyncio.run(pauses(1))
    assert time.monotonic() - began >= 0.02
