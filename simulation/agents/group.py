"""A group: the participants of one server that one moderator asks, built by one call and asked together.

Its methods are short and may be called from any thread; the participants live on the event loop of a thread of the
group's own. AgentScope's construction is touched here, because it costs more than the agent: see `_build`.
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
from simulation.agents.snapshot import RoundSnapshot, take_snapshot
from simulation.errors import KnownCause, failure_of, one_line
from simulation.game.answer_sheet import CUT_SHORT, Answers, AnswerSheet
from simulation.game.rules import Announcement, Game, Question, to_units
from simulation.game.tally import Tally, Winners
from simulation.llm.chat import Chat
from simulation.llm.usage import Usage
from simulation.rpc.endpoints import run_of
from simulation.rpc.messages import Progress

TURN = 32_768  # participants of a group that wait for a model at the same time
BUILT_AT_ONCE = 2000  # participants between two looks at what else the event loop has to do
TALLY_VALUES = 500_000  # distinct values in one message


class ParticipantGroup(metaclass=RpcMeta):
    """Participants first .. first+count-1.

    Args:
        oid: Its remote id; its participants are `<oid>/<index>`.
        first: Index of the first participant.
        count: How many there are.
        game: What is the same for all of them.
        participant_class: The pickled class (see `pack_class`).
        reply_threads: Threads of this server for participants with a blocking `reply`, shared by its groups.
        lease_s: Seconds of silence after which the server drops the group; None keeps it.
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
        self._agents: list[Participant | str] = []  # an agent, or why it could not be built
        self._round = 0
        self._allowed = 0  # the last round whose costs were told
        self._sheet: AnswerSheet | None = None
        self._scheduler: Scheduler | None = None  # of the round that is under way
        self._halted = self._closing = False
        self._chat = Chat(game) if game.sampling is not None else None
        # Seconds, and of these of CPU, of the rounds so far; and where both clocks stood when the one under way began
        self._spent: tuple[float, float, tuple[float, float] | None] = (0.0, 0.0, None)
        self._error = ""
        self._changed = threading.Condition()  # guards what is looked at before it is set: calls come in many threads
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()  # half of asyncio's own time per participant
        self._thread = threading.Thread(target=self._serve, name=oid, daemon=True)
        self._home = Home(oid, self._loop, self._chat)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._guarded(self._build()), self._loop)

    # --- What moderators call ----------------------------------------------------------------------------------------

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        """Start asking; returns at once. `tokens_each` is what each participant may cost in this round.

        Does nothing if this round has begun, or is over: whoever is not sure whether it was heard says it again.
        """
        with self._changed:
            if question.round <= self._round:  # or it was said by a moderator that had hung meanwhile
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
        """What each participant may cost in a round, on average, in tokens; None is no limit.

        Does nothing if that was said of this round, or of a later one: what is spent stays spent.
        """
        with self._changed:
            if self._chat is not None and number > self._allowed:
                self._allowed = number
                self._chat.allow(None if tokens_each is None else tokens_each * self.count)

    def usage(self) -> Usage:
        """What all rounds have cost so far."""
        spent = Usage() if self._chat is None else self._chat.usage()
        answering_s, client_s = self._time_spent()
        return replace(spent, answering_s=answering_s, client_s=client_s)

    def progress(self, wait_s: float = 0.0) -> Progress:
        """How far it is, after waiting up to `wait_s` seconds for the end; heartbeats carry this."""
        with self._changed:
            self._changed.wait_for(lambda: self._done() == self.count or self._error, timeout=wait_s)
        number, done = self._round, self._done()  # in this order: a new round's number never goes with old answers
        return Progress(done, self.count, number, self._error, astuple(self.usage()))

    def snapshot(self, numbers: int) -> RoundSnapshot:
        """What is in of the round under way, where there are so many different answers, and what this process costs."""
        number, sheet = self._round, self._sheet  # in this order, as above
        return take_snapshot(number, [] if sheet is None else [sheet], numbers)

    def remember(self, first: int, values: NDArray[np.float64]) -> None:
        """Tell participants who were made anew what they answered in the rounds so far.

        Args:
            first: The first of them.
            values: Their answers, of shape (rounds, participants); not a number where there is none.
        """
        agents = self._agents  # once, as `close` may take them away meanwhile
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
        """Stop asking: whoever has not answered counts as failed, interrupted.

        `at_once` is for participants that cannot be stopped, as they block: what they still answer is not heard.
        """
        if not at_once:
            with contextlib.suppress(RuntimeError):  # the group is closed
                self._loop.call_soon_threadsafe(self._halt)
            return
        with self._changed:
            if self._sheet is not None:
                self._sheet = self._sheet.closed()
            self._changed.notify_all()

    def collect(self, part: int) -> tuple[Tally, int]:
        """One part of the round's tally, and how many parts there are."""
        parts = self._finished_sheet().tally().parts(TALLY_VALUES)
        return parts[part], len(parts)

    def announce(self, announcement: Announcement) -> Winners:
        """Hear the result, and say who of this group won."""
        return self._finished_sheet().winners(announcement.winning_units)

    def answers(self, first: int, count: int) -> Answers:
        """The answers of those of participants first .. first+count-1 that are here."""
        return self._finished_sheet().answers(first, count)

    # --- What the server calls ---------------------------------------------------------------------------------------

    @property
    def agents(self) -> int:
        """How many agents live here."""
        return len(self._agents)

    def participant(self, index: int) -> Participant | FailedParticipant | None:
        """The agent with this index among all participants; None if it is not here."""
        place, agents = index - self.first, self._agents  # once, as `close` may take them away meanwhile
        agent = agents[place] if 0 <= place < len(agents) else None
        return FailedParticipant(agent) if isinstance(agent, str) else agent

    def close(self) -> None:
        """Stop whatever runs, and let go of all participants; does nothing the second time."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        if self._chat is not None:
            self._chat.close()
        with contextlib.suppress(RuntimeError):  # its thread has not begun to run it, and closed it already
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=1)  # a participant that blocks the event loop keeps only its own thread
        with self._changed:
            self._agents = []
            self._scheduler = None
            self._sheet = None
        _release_threads(self.oid)

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _done(self) -> int:
        sheet = self._sheet  # once, as `close` may take it away meanwhile
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
            except (SystemExit, KeyboardInterrupt) as error:  # of a task that a person's participant made
                logger.error(f"{self.oid}: a participant's own task raised {one_line(error)}")
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _guarded(self, work: Any) -> None:
        """Do the work and tell whoever waits; an error in it is ours, and told to whoever asks next."""
        try:
            await work
        except BaseException as error:  # noqa: BLE001 - the edge of the thread: heartbeats tell it
            self._error = f"group {self.oid}: {one_line(error)}"
        with self._changed:
            self._changed.notify_all()

    async def _build(self) -> None:
        """Build all participants.

        AgentScope's metaclass draws a random id and keeps the arguments of every agent, and the garbage collector
        walks all agents again and again meanwhile: 64,000 agents took 1.23 s so, 0.55 s without the collector, and
        0.08 s with plain construction as well, which leaves nothing out that a hosted agent uses.
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
        """Ask everyone, and return when everyone has answered or failed."""
        self._spent = (*self._spent[:2], (time.monotonic(), time.process_time()))
        if self._many:
            await self._schedule(question, sheet)
        else:
            await self._ask_in_threads(question, sheet)
        self._spent = (*self._time_spent(), None)

    def _time_spent(self) -> tuple[float, float]:
        """The seconds of all rounds, and of these of CPU, up to now: a round counts while it plays."""
        answering_s, client_s, began = self._spent  # at one stroke, as the loop's thread may end a round meanwhile
        if began is None:
            return answering_s, client_s
        took_s = time.monotonic() - began[0]
        return answering_s + took_s, client_s + min(time.process_time() - began[1], took_s)

    async def _schedule(self, question: Question, sheet: AnswerSheet) -> None:
        """Ask all of them together; whatever one does wrong is its own failure, with its cause.

        Those who wait for a model wait in turns, as each takes 2 KB meanwhile; the next turn begins when half of one
        has gone, so that the model never waits, and is large, so that equal prompts still meet.
        """
        if question.round > 1:  # as the scheduler keeps it from coming up by itself: cycles that rounds left behind
            gc.collect()
        agents = self._agents

        def answer(place: int) -> Any:
            agent = agents[place]
            if isinstance(agent, str):
                raise KnownCause(agent)
            return agent.answer(question)

        def answered(places: list[int], answers: list[Any]) -> None:
            sheet.put_all(places, answers, self.game)

        def failed(place: int, error: BaseException) -> None:
            self._fail(sheet, place, error)

        at_once = None if self._chat is None else max(TURN, 2 * self._chat.sampling.samples_per_request)
        self._scheduler = Scheduler(self._loop, self.count, answer, answered, failed, at_once)
        if self._halted:
            self._scheduler.halt()
        await self._scheduler.run()
        self._scheduler = None

    async def _ask_in_threads(self, question: Question, sheet: AnswerSheet) -> None:
        """Ask those whose `reply` may block, in this run's threads on this server."""
        places = iter(range(self.count))  # of all threads: each takes the next one
        lock = threading.Lock()

        def ask() -> None:
            for place in places:
                try:
                    units = to_units(self._reply(place, question), self.game)
                    with lock:
                        sheet.put(place, units)
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
            elif self._sheet is not None and not self._many:  # whoever blocks is not heard any more
                self._sheet = self._sheet.closed()
                self._changed.notify_all()


class FailedParticipant:
    """Stands where a participant could not be built: to ask it alone fails with the cause, as in the group."""

    _info = Participant._info  # what AgentScope's servicer asks before it calls a method

    def __init__(self, cause: str) -> None:
        self.cause = cause

    def reply(self, *_: Any) -> None:
        raise KnownCause(self.cause)

    play = reply


_pools: dict[str, tuple[ThreadPoolExecutor, set[str]]] = {}  # by run: its threads, and the groups that use them
_pools_lock = threading.Lock()


def _threads(group: str, count: int) -> ThreadPoolExecutor:
    """The threads for blocking replies that the groups of one run share on this server."""
    with _pools_lock:
        if run_of(group) not in _pools:
            _pools[run_of(group)] = (ThreadPoolExecutor(count, thread_name_prefix="reply"), set())
        pool, groups = _pools[run_of(group)]
        groups.add(group)
        return pool


def _release_threads(group: str) -> None:
    """Let go of a run's threads with its last group; one that is stuck in a reply ends with the reply."""
    with _pools_lock:
        pool, groups = _pools.get(run_of(group), (None, set()))
        groups.discard(group)
        if pool is not None and not groups:
            pool.shutdown(wait=False, cancel_futures=True)
            del _pools[run_of(group)]
