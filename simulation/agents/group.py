"""A group: participants on one server that one moderator asks, created by one call and asked together.

Its methods are short and thread-safe; the participants run on the event loop of the group's thread. The group bypasses
AgentScope's construction of agents, because it costs more than the agent: see `_build`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import uvloop
from agentscope.rpc import RpcMeta
from loguru import logger
from numpy.typing import NDArray

from simulation.agents.agent_class import deserialize_agent_class
from simulation.agents.participant import Home, Participant, answer_in, answers_many, message_of
from simulation.agents.scheduler import Scheduler, collect_young, gc_paused
from simulation.agents.snapshot import with_histogram
from simulation.errors import KnownCause, failure_of, one_line
from simulation.game.answer_sheet import CUT_SHORT, Answers, AnswerSheet
from simulation.game.rules import Announcement, Game, Question, to_units
from simulation.game.tally import Tally, Winners
from simulation.llm.chat import Chat
from simulation.llm.usage import Usage
from simulation.rpc.endpoints import run_of
from simulation.rpc.messages import Progress

TURN = 32_768  # participants of a group that wait for a model concurrently
BUILT_AT_ONCE = 2000  # participants created before the event loop runs other callbacks
TALLY_VALUES = 500_000  # maximum number of distinct values in one message


class ParticipantGroup(metaclass=RpcMeta):
    """A group of participants with the indices first .. first+count-1.

    Args:
        oid: Remote id of the group; its participants are `<oid>/<index>`.
        first: Index of the first participant.
        count: Number of participants.
        game: Settings shared by all participants.
        participant_class: The pickled class (see `serialize_agent_class`).
        reply_threads: Number of threads for blocking `reply` methods, shared by the run's groups on this server.
        lease_s: Seconds without calls and heartbeats of the run until the server drops the group; None keeps it.
    """

    def __init__(
        self,
        oid: str,
        first: int,
        count: int,
        game: Game,
        participant_class: bytes,
        reply_threads: int,
        lease_s: float | None,
    ) -> None:
        self.oid = oid
        self.first = first
        self.count = count
        self.game = game
        self.lease_s = lease_s
        self._class = deserialize_agent_class(participant_class, run_of(oid))
        self._many = answers_many(self._class)
        self._reply_threads = reply_threads
        self._agents: list[Participant | str] = []  # an agent, or the reason why it could not be created
        self._round = 0
        self._allowed = 0  # the last round with a token budget
        self._sheet: AnswerSheet | None = None
        self._scheduler: Scheduler | None = None  # of the current round
        self._halted = self._closing = False
        self._chat = Chat(game) if game.sampling is not None else None
        # Seconds and CPU seconds of the finished rounds, and both clocks at the start of the current round
        self._spent: tuple[float, float, tuple[float, float] | None] = (0.0, 0.0, None)
        self._error = ""
        self._changed = threading.Condition()  # guards check-then-set sequences: calls arrive in many threads
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()  # takes half of asyncio's time per participant
        self._thread = threading.Thread(target=self._serve, name=oid, daemon=True)
        self._home = Home(oid, self._loop, self._chat)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._guarded(self._build()), self._loop)

    # --- What moderators call ----------------------------------------------------------------------------------------

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        """Start a round and return immediately; `tokens_each` is the token budget per participant (see `allow`).

        Does nothing if the round has started or is over, so a retry is safe. Raises RuntimeError if closed or busy.
        """
        with self._changed:
            if question.round <= self._round:  # a retry, or the late call of a moderator that had hung
                return
            if self._closing:
                raise RuntimeError(f"group {self.oid} is closed")
            if self._done() < self.count:
                raise RuntimeError(f"group {self.oid} is still busy")
            self._halted = False
            self.allow(question.round, tokens_each)
            self._sheet = AnswerSheet(self.first, self.count)
            self._round = question.round
            asyncio.run_coroutine_threadsafe(self._guarded(self._ask_all(question, self._sheet)), self._loop)

    def allow(self, number: int, tokens_each: float | None) -> None:
        """Set the token budget of a round, as an average per participant; None is no limit.

        Does nothing if this round or a later one has a budget: a retry must not restore spent tokens.
        """
        with self._changed:
            if self._chat is not None and number > self._allowed:
                self._allowed = number
                self._chat.allow(None if tokens_each is None else tokens_each * self.count)

    def usage(self) -> Usage:
        """Return the cost of all rounds so far."""
        spent = Usage() if self._chat is None else self._chat.usage()
        answering_s, client_s = self._time_spent()
        return replace(spent, answering_s=answering_s, client_s=client_s)

    def progress(self, wait_s: float = 0.0, numbers: int = 0) -> Progress:
        """Return the progress after waiting up to `wait_s` seconds for completion; heartbeats carry it.

        If `numbers`, the count of possible answers, is not 0, it includes a partial histogram.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done() == self.count or self._error, timeout=wait_s)
        number = self._round  # read first, so that a new round's number is never paired with old answers
        progress, sheet = Progress(self._done(), self.count, number, self._error, astuple(self.usage())), self._sheet
        return with_histogram(progress, [sheet], numbers) if numbers and sheet is not None else progress

    def remember(self, first: int, values: NDArray[np.float64]) -> None:
        """Pass recreated participants their answers of earlier rounds. Raises RuntimeError while the group is built.

        Args:
            first: Index of the first participant.
            values: Their answers, of shape (rounds, participants); NaN where there is none.
        """
        agents = self._agents  # read once: `close` may clear it concurrently
        if self._done() < self.count or len(agents) < self.count:
            raise RuntimeError(f"group {self.oid} is still being built")
        for offset, numbers in enumerate(values.T.tolist()):
            place = first - self.first + offset
            agent = agents[place]
            if not isinstance(agent, str):
                try:
                    agent.recall(tuple(None if math.isnan(number) else number for number in numbers))
                except BaseException as error:  # noqa: BLE001 - a person's own recall may raise anything
                    agents[place] = one_line(error)

    def halt(self, at_once: bool) -> None:
        """Stop the round: participants without an answer fail as interrupted.

        `at_once` is for participants that block and cannot be stopped: it ignores their later answers.
        """
        if not at_once:
            with contextlib.suppress(RuntimeError):  # the group is closed
                self._loop.call_soon_threadsafe(self._halt)
            return
        with self._changed:
            if self._sheet is not None:
                self._sheet = self._sheet.with_missing_failed()
            self._changed.notify_all()

    def collect(self, part: int) -> tuple[Tally, int]:
        """Return one part of the round's tally, and the number of parts."""
        parts = self._finished_sheet().tally().parts(TALLY_VALUES)
        return parts[part], len(parts)

    def announce(self, announcement: Announcement) -> Winners:
        """Return the winners of this group, given the result of the round."""
        return self._finished_sheet().winners(announcement.winning_units)

    def answers(self, first: int, count: int) -> Answers:
        """Return the answers of those participants first .. first+count-1 that are in this group."""
        return self._finished_sheet().answers(first, count)

    # --- What the server calls ---------------------------------------------------------------------------------------

    @property
    def agents(self) -> int:
        """Return the number of agents in this group."""
        return len(self._agents)

    def participant(self, index: int) -> Participant | FailedParticipant | None:
        """Return the agent with this index among all participants; None if it is not in this group."""
        place, agents = index - self.first, self._agents  # read once: `close` may clear it concurrently
        agent = agents[place] if 0 <= place < len(agents) else None
        return FailedParticipant(agent) if isinstance(agent, str) else agent

    def close(self) -> None:
        """Stop all work and release all participants; does nothing the second time."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        if self._chat is not None:
            self._chat.close()
        with contextlib.suppress(RuntimeError):  # its thread closed the loop without running it
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=1)  # a participant that blocks the event loop holds up only this thread
        with self._changed:
            self._agents = []
            self._scheduler = None
            self._sheet = None
        _release_threads(self.oid)

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _done(self) -> int:
        sheet = self._sheet  # read once: `close` may clear it concurrently
        return sheet.done if sheet is not None else len(self._agents)

    def _finished_sheet(self) -> AnswerSheet:
        sheet = self._sheet
        if sheet is None or sheet.done < self.count:
            raise RuntimeError(f"group {self.oid} has no finished round")
        return sheet

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._closing:
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:  # from a task that a user-defined participant created
                logger.error(f"{self.oid}: a participant's own task raised {one_line(error)}")
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _guarded(self, work: Any) -> None:
        """Await `work` and notify waiting calls; an error is a defect of this program, which `progress` reports."""
        try:
            await work
        except BaseException as error:  # noqa: BLE001 - the edge of the thread: heartbeats tell it
            self._error = f"group {self.oid}: {one_line(error)}"
        with self._changed:
            self._changed.notify_all()

    async def _build(self) -> None:
        """Create all participants.

        AgentScope's metaclass draws a random id and keeps the arguments of every agent, and the garbage collector
        walks all agents repeatedly. 64,000 agents take 1.23 s this way, 0.55 s without the collector, and 0.08 s with
        plain construction as well, which omits nothing that a hosted agent uses.
        """
        for start in range(0, self.count, BUILT_AT_ONCE):
            with gc_paused():
                for index in range(self.first + start, self.first + min(start + BUILT_AT_ONCE, self.count)):
                    self._agents.append(self._built(index))
                collect_young()
            await asyncio.sleep(0)

    def _built(self, index: int) -> Participant | str:
        try:
            agent: Participant = type.__call__(self._class, index, self.game)
            agent._home = self._home
        except BaseException as error:  # noqa: BLE001 - a person's own __init__ may raise anything
            return one_line(error)
        return agent

    async def _ask_all(self, question: Question, sheet: AnswerSheet) -> None:
        """Ask all participants, and return when each has answered or failed."""
        self._spent = (*self._spent[:2], (time.monotonic(), time.process_time()))
        if self._many:
            await self._schedule(question, sheet)
        else:
            await self._ask_in_threads(question, sheet)
        self._spent = (*self._time_spent(), None)

    def _time_spent(self) -> tuple[float, float]:
        """Return the seconds and the CPU seconds of all rounds, including the current one."""
        answering_s, client_s, began = self._spent  # read once: the loop's thread may end a round concurrently
        if began is None:
            return answering_s, client_s
        took_s = time.monotonic() - began[0]
        return answering_s + took_s, client_s + min(time.process_time() - began[1], took_s)

    async def _schedule(self, question: Question, sheet: AnswerSheet) -> None:
        """Ask all participants concurrently; an error of one is recorded as its failure, with the cause.

        The number of participants that wait for a model is limited, as each takes 2 KB. The next batch starts when
        half of the limit is free, so that the model never idles. Batches are large, so that equal prompts are merged.
        """
        if question.round > 1:  # frees cycles of earlier rounds: the scheduler prevents automatic collection
            gc.collect()
        agents = self._agents

        def answer(place: int) -> Any:
            agent = agents[place]
            if isinstance(agent, str):
                raise KnownCause(agent)
            return agent.answer(question)

        def answered(places: list[int], answers: list[Any]) -> None:
            sheet.record_many(places, answers, self.game)

        def failed(place: int, error: BaseException) -> None:
            self._fail(sheet, place, error)

        at_once = None if self._chat is None else max(TURN, 2 * self._chat.sampling.samples_per_request)
        self._scheduler = Scheduler(self._loop, self.count, answer, answered, failed, at_once)
        if self._halted:
            self._scheduler.halt()
        await self._scheduler.run()
        self._scheduler = None

    async def _ask_in_threads(self, question: Question, sheet: AnswerSheet) -> None:
        """Ask participants whose `reply` may block, in this run's threads on this server."""
        places = iter(range(self.count))  # shared by all threads: each takes the next one
        lock = threading.Lock()

        def ask() -> None:
            for place in places:
                try:
                    units = to_units(self._reply(place, question), self.game)
                    with lock:
                        sheet.record(place, units)
                except BaseException as error:  # noqa: BLE001 - a person's own reply may raise anything, and fails alone
                    with lock:
                        self._fail(sheet, place, error)

        pool = _threads(self.oid, self._reply_threads)
        asking = [self._loop.run_in_executor(pool, ask) for _ in range(min(self._reply_threads, self.count))]
        await asyncio.gather(*asking)

    def _reply(self, place: int, question: Question) -> Any:
        agent = self._agents[place]
        if self._halted:
            raise KnownCause(*CUT_SHORT)
        if isinstance(agent, str):
            raise KnownCause(agent)
        return answer_in(agent.reply(message_of(question)))

    def _fail(self, sheet: AnswerSheet, place: int, error: BaseException) -> None:
        failure = failure_of(error)
        sheet.fail(place, *(CUT_SHORT._replace(text=failure.text) if self._halted else failure))

    def _halt(self) -> None:
        with self._changed:
            self._halted = True
            if self._scheduler is not None:
                self._scheduler.halt()
            elif self._sheet is not None and not self._many:  # later answers of blocking participants are ignored
                self._sheet = self._sheet.with_missing_failed()
                self._changed.notify_all()


class FailedParticipant:
    """A stand-in for a participant that could not be created: asking it fails with the cause, as in the group."""

    _info = Participant._info  # AgentScope's servicer reads it before it calls a method

    def __init__(self, cause: str) -> None:
        self.cause = cause

    def reply(self, *_: Any) -> None:
        raise KnownCause(self.cause)

    play = reply


_pools: dict[str, tuple[ThreadPoolExecutor, set[str]]] = {}  # by run: its thread pool, and the groups that use it
_pools_lock = threading.Lock()


def _threads(group: str, count: int) -> ThreadPoolExecutor:
    """Return the thread pool for blocking replies that the groups of one run share on this server."""
    with _pools_lock:
        if run_of(group) not in _pools:
            _pools[run_of(group)] = (ThreadPoolExecutor(count, thread_name_prefix="reply"), set())
        pool, groups = _pools[run_of(group)]
        groups.add(group)
        return pool


def _release_threads(group: str) -> None:
    """Shut down a run's thread pool with its last group; a thread that is blocked in a reply ends with the reply."""
    with _pools_lock:
        pool, groups = _pools.get(run_of(group), (None, set()))
        groups.discard(group)
        if pool is not None and not groups:
            pool.shutdown(wait=False, cancel_futures=True)
            del _pools[run_of(group)]
