"""The participants of a group, on an event loop in a thread of their own: their creation, and how they are asked."""

import asyncio
import contextlib
import gc
import threading
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import uvloop
from loguru import logger

from simulation.agents.agent_class import Shared, unpack
from simulation.agents.participant import Participant, answers_many, ask_in_thread
from simulation.agents.scheduler import Scheduler, gc_paused, outcome_of
from simulation.errors import failure_of, one_line, traceback_of
from simulation.game.answer_sheet import KEPT, AnswerSheet
from simulation.game.game import Game
from simulation.game.rules import Question
from simulation.llm.chat import Chat
from simulation.rpc.endpoints import run_of

TURN = 32_768  # maximum number of participants of a group that wait for a model at the same time
BUILD_BATCH = 2000  # number of participants created before the event loop runs other callbacks
MODEL, LOOP, THREAD = "model", "loop", "thread"  # what a participant waits for: a model, only pauses, or its `reply`


class HostedParticipants:
    """The base class of `ParticipantGroup`, which describes the arguments. `_create` starts the creation of agents."""

    uses_rng = False  # whether any participant has used `rng`
    _error = ""  # why the group cannot continue
    _closing = False

    def __init__(self, oid: str, first: int, count: int, game: Game, packed: bytes, reply_threads: int) -> None:
        self.oid, self.first, self.count, self.game = oid, first, count, game
        self.chat = Chat(game) if game.llm is not None else None
        self._shared: Shared | None = unpack(packed, run_of(oid), reply_threads)
        self._classes = self._shared.classes
        self._kinds = game.population.kind_indices(first, count).astype(np.uint8)  # of the participants
        self._to_ask = self._offsets_by_way()
        self._reply_threads = min(reply_threads, len(self._to_ask[THREAD]))
        self._agents: list[Participant] = []  # the participants created so far
        self._tracebacks_left = KEPT  # number of further failed creations whose traceback is kept
        self._sheet: AnswerSheet | None = None  # None before the first round
        self._schedulers: list[Scheduler] = []  # run the current round
        # Elapsed and CPU seconds of all finished rounds, and both clocks' readings at the start of the current round
        self._spent: tuple[float, float, tuple[float, float] | None] = (0.0, 0.0, None)
        self._changed = threading.Condition()  # guards check-then-set sequences, because many threads call this group
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()  # needs half of asyncio's time per participant
        self._thread = threading.Thread(target=self._serve, name=oid, daemon=True)

    @property
    def agents(self) -> int:
        """Return the number of agents in this group."""
        return len(self._agents)

    def participant(self, index: int) -> Participant | None:
        """Return the participant with this index; None if this group has no such participant."""
        offset, agents = index - self.first, self._agents  # read once, because `close` may clear this attribute
        return agents[offset] if 0 <= offset < len(agents) else None

    def close(self) -> None:
        """Stop all work and release all participants. A second call does nothing."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        if self.chat is not None:
            self.chat.close()
        self._call(self.loop.stop)
        self._thread.join(timeout=1)  # not longer, because a participant may block the event loop
        with self._changed:
            self._agents, self._schedulers = [], []
            self._sheet = self._shared = None

    # --- The event loop ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self._closing:
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:  # from a task that a user-defined participant created
                logger.error(f"{self.oid}: a participant's own task raised {one_line(error)}")
        self._halt_schedulers()
        self.loop.run_until_complete(asyncio.sleep(0))  # let all coroutines start before they are cancelled
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    def _run(self, work: Awaitable[None]) -> None:
        """Start `work` on the event loop. When it ends, notify waiting calls, and keep any exception for `progress`."""

        async def run() -> None:
            error = await outcome_of(work)
            with self._changed:
                if error is not None:
                    self._error = f"group {self.oid}: {one_line(error)}"
                self._changed.notify_all()

        asyncio.run_coroutine_threadsafe(run(), self.loop)

    def _call(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # raised if the group's thread has closed the loop
            self.loop.call_soon_threadsafe(callback)

    # --- Creation ----------------------------------------------------------------------------------------------------

    async def _build(self) -> None:
        """Create all participants without AgentScope's metaclass, which gives each agent a random id and its arguments.

        64,000 agents take 1.23 s with the metaclass and the garbage collector, 0.55 s without the collector, and 0.08 s
        without either.
        """
        classes = map(self._classes.__getitem__, self._kinds.tobytes())
        for start in range(0, self.count, BUILD_BATCH):
            with gc_paused():
                for offset, cls in zip(range(start, min(start + BUILD_BATCH, self.count)), classes, strict=False):
                    try:
                        agent: Participant = cls.__new__(cls)
                        agent._home = self  # type: ignore[assignment]  # a ParticipantGroup
                        agent.__init__(self.first + offset, self.game)  # type: ignore[misc]
                    except BaseException as error:  # noqa: BLE001 - a user-defined __init__ may raise anything
                        agent = self._failed(offset, error)
                    self._drop_rng(agent)
                    self._agents.append(agent)
                gc.collect(1)
            await asyncio.sleep(0)

    def _failed(self, offset: int, error: BaseException) -> Participant:
        agent: Participant = type.__call__(Participant, self.first + offset, self.game)
        agent._home, agent._creation_error = self, one_line(error)  # type: ignore[assignment]  # as above
        if self._tracebacks_left > 0:
            self._tracebacks_left -= 1
            agent._creation_traceback = traceback_of(error)
        return agent

    def _drop_rng(self, agent: Participant) -> None:
        if self.uses_rng:  # the next question starts with a new generator
            agent.__dict__.pop("_rng", None)

    # --- Asking ------------------------------------------------------------------------------------------------------

    def _offsets_by_way(self) -> dict[str, Sequence[int]]:
        asking = [bool(each.models) for each in self.game.population.players] or [self.chat is not None]
        classes = zip(self._classes, asking, strict=True)
        ways = np.array([THREAD if not answers_many(cls) else MODEL if asks else LOOP for cls, asks in classes])
        found = {way: np.isin(self._kinds, np.flatnonzero(ways == way)) for way in (MODEL, LOOP, THREAD)}
        return {way: array("I", np.flatnonzero(each).astype(np.uint32).tobytes()) for way, each in found.items()}

    async def _ask_all(self, question: Question, sheet: AnswerSheet) -> None:
        self._spent = (*self._spent[:2], (time.monotonic(), time.process_time()))
        if question.round > 1:  # free reference cycles of earlier rounds: the scheduler pauses the collector
            gc.collect()
        # Models are asked first
        self._schedulers = [self._scheduler(question, sheet, way) for way in (MODEL, LOOP) if self._to_ask[way]]
        if sheet is not self._sheet:  # the round was halted
            self._halt_schedulers()
        ask = partial(self._ask_in_thread, iter(self._to_ask[THREAD]), question, sheet)
        pool = self._shared.pool if self._shared is not None else None
        replies = [self.loop.run_in_executor(pool, ask) for _ in range(self._reply_threads)]
        await asyncio.gather(*(each.run() for each in self._schedulers), *replies)
        self._spent = (*self._seconds(), None)

    def _seconds(self) -> tuple[float, float]:
        """Return the elapsed and the CPU seconds of all rounds so far, including the current round."""
        answering_s, client_s, began = self._spent  # read once, because the group's thread may now end a round
        took_s = 0.0 if began is None else time.monotonic() - began[0]
        return answering_s + took_s, client_s + min(time.process_time() - began[1], took_s) if began else client_s

    def _ask_in_thread(self, offsets: Iterator[int], question: Question, sheet: AnswerSheet) -> None:
        """Ask participants until the iterator `offsets`, which several threads may share, is exhausted."""
        for offset in offsets:
            if sheet is not self._sheet or self._closing:  # the round was halted, or the group closed
                return
            agent = self._agents[offset]
            try:
                record = partial(sheet.record, offset, ask_in_thread(agent, question, self.game))
            except BaseException as error:  # noqa: BLE001 - user code may raise anything; only this participant fails
                record = partial(sheet.fail, offset, failure_of(error), error)
            self._drop_rng(agent)
            with self._changed:
                record()
                if sheet.done == sheet.count:
                    self._changed.notify_all()

    def _scheduler(self, question: Question, sheet: AnswerSheet, way: str) -> Scheduler:
        """Return what asks the participants of this way concurrently. An exception of one of them is its failure.

        The number of participants that wait for a model is limited, because each takes 2 KB. New ones start in one
        large batch when half of the limit is free, so the model never idles, and equal prompts share a request.
        """
        agents, offsets = self._agents, self._to_ask[way]
        everyone = len(offsets) == self.count
        if not everyone:
            agents = [agents[offset] for offset in offsets]

        def begin(index: int) -> Any:
            return agents[index].answer(question)

        def answered(indices: list[int], answers: list[Any]) -> None:
            for index in indices if self.uses_rng else ():
                self._drop_rng(agents[index])
            with self._changed:  # threads record, too, in a mixture of kinds: no count must be lost
                sheet.record_many(indices if everyone else [offsets[index] for index in indices], answers, self.game)

        def failed(index: int, error: BaseException) -> None:
            self._drop_rng(agents[index])
            with self._changed:
                sheet.fail(offsets[index], failure_of(error), error)

        chat = self.chat if way == MODEL else None
        limit = None if chat is None else max(TURN, 2 * chat.settings.samples_per_request)
        return Scheduler(self.loop, len(offsets), begin, answered, failed, limit)

    def _halt_schedulers(self) -> None:
        for scheduler in self._schedulers:
            scheduler.halt()
