"""A group: the participants on one server that one moderator asks. One call creates them, and one call asks all.

All methods are thread-safe. The participants run on the event loop of the group's thread. The group creates agents
without calling AgentScope's metaclass, because that call takes longer than the rest of the creation (see `_build`).
"""

import asyncio
import contextlib
import gc
import math
import threading
import time
from array import array
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import uvloop
from agentscope.rpc import RpcMeta
from loguru import logger
from numpy.typing import NDArray

from simulation.agents.agent_class import unpack
from simulation.agents.participant import Participant, answers_many, ask_in_thread
from simulation.agents.scheduler import Scheduler, gc_paused, outcome_of
from simulation.errors import failure_of, one_line, traceback_of
from simulation.game.answer_sheet import KEPT, Answers, AnswerSheet
from simulation.game.game import Game
from simulation.game.rules import Announcement, Question
from simulation.game.tally import Tally, Winners, merge
from simulation.llm.chat import Chat, served_name
from simulation.llm.prompts import KeptText, Prompt, RecordedText
from simulation.llm.responses import Usage
from simulation.rpc.client import RemoteObject
from simulation.rpc.endpoints import TEXTS_PER_MESSAGE, GroupAssignment, run_of
from simulation.rpc.messages import Progress

TURN = 32_768  # maximum number of participants of a group that wait for a model at the same time
BUILD_BATCH = 2000  # number of participants created before the event loop runs other callbacks
TALLY_VALUES = 500_000  # maximum number of distinct values in one message
TEXT_CHARACTERS = 4_000_000  # a message of texts ends when it has as many, or TEXTS_PER_MESSAGE texts


class ParticipantGroup(metaclass=RpcMeta):
    """The participants first .. first+count-1, the current round and its answer sheet.

    The remote id of a participant is `<oid>/<index>`.

    Args:
        participant_class: The pickled classes, one per kind of player (see `serialize_agent_class`).
        reply_threads: Number of threads for blocking `reply` methods. All groups of a run on this server share them.
        lease_s: Seconds without a call or heartbeat of the run after which the server drops the group (None: never).
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
        self.chat = Chat(game) if game.llm is not None else None
        self._unpacked = unpack(participant_class, run_of(oid))
        self._kinds = game.population.kind_indices(first, count).astype(np.uint8).tobytes()  # of the participants
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()  # needs half of asyncio's time per participant
        self._to_schedule, self._to_block = self._by_way_of_asking()
        self._reply_threads = min(reply_threads, len(self._to_block))
        with _pools_lock:
            new_pool = ThreadPoolExecutor(reply_threads, thread_name_prefix="reply")
            self._pool: ThreadPoolExecutor | None = _pools.setdefault(run_of(oid), new_pool)
        self._agents: list[Participant] = []  # the participants created so far
        self.uses_rng = False  # whether any participant has used `rng`
        self._tracebacks_left = KEPT  # number of further failed creations whose traceback is kept
        self._round = 0
        self._sheet: AnswerSheet | None = None  # None before the first round
        self._panel: NDArray[np.bool_] | None = None  # of which participants texts are kept; None if of none
        self._texts: dict[int, KeptText] = {}  # of the current round, by offset
        self._prompts: dict[Prompt, Prompt] = {}  # the distinct prompts of `_texts`
        self._unasked: set[int] = set()  # offsets of participants that still wait for a call of `ask_one`
        self._schedulers: tuple[Scheduler, ...] = ()  # run the current round
        self._error = ""
        self._closing = False
        # Elapsed and CPU seconds of all finished rounds, and both clocks' readings at the start of the current round
        self._spent: tuple[float, float, tuple[float, float] | None] = (0.0, 0.0, None)
        self._changed = threading.Condition()  # guards check-then-set sequences, because many threads call this group
        self._thread = threading.Thread(target=self._serve, name=oid, daemon=True)
        self._thread.start()
        self._run_in_loop(self._build())

    # --- Called by main and moderators -------------------------------------------------------------------------------

    def begin(self, question: Question, tokens_each: float | None = None, one_by_one: bool = False) -> None:
        """Start a round and return at once.

        `tokens_each` is the mean token budget per participant that asks a model (None: no limit).
        If `one_by_one`, ask a participant only when its `answer_round` is called. Do nothing if this round or a later
        round has started, so that a retry is safe. Raises RuntimeError if the group is closed, or still busy with the
        previous round or with the creation of participants.
        """
        with self._changed:
            if question.round <= self._round:  # a retry, or a late call from a suspended moderator
                return
            if self._closing:
                raise RuntimeError(f"group {self.oid} is closed")
            if self._done() < self.count:
                raise RuntimeError(f"group {self.oid} is still busy")
            if self.chat is not None:
                asking = 0 if tokens_each is None else self.game.population.asking(self.first, self.count)
                self.chat.budget.left = math.inf if tokens_each is None else tokens_each * asking
            self._sheet = AnswerSheet(self.first, self.count)
            self._texts, self._prompts = {}, {}
            self._round = question.round
            if one_by_one:
                self._unasked = set(range(self.count))
            else:
                self._run_in_loop(self._ask_all(question, self._sheet))

    def ask_one(self, index: int, question: Question) -> None:
        """Ask participant `index` in a round that was started with `one_by_one`. Return after its outcome is recorded.

        Do nothing if the round is over, or if the participant was already asked in this round, for example by a
        moderator that has failed since.
        """
        offset = index - self.first
        with self._changed:
            sheet = self._sheet
            if sheet is None or question.round != self._round or offset not in self._unasked:
                return
            self._unasked.remove(offset)
        self._ask_in_thread(iter((offset,)), question, sheet)

    def progress(self, wait_s: float = 0.0, numbers: int = 0) -> Progress:
        """Wait up to `wait_s` seconds for all participants to finish, then return the progress, including the usage.

        `numbers` is the number of possible answers; if it is not 0, also return a partial histogram of the answers.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done() == self.count or self._error, timeout=wait_s)
        number, done, sheet = self._round, self._done(), self._sheet  # read in this order: a round may begin now
        histogram = sheet.partial_histogram(self.game) if numbers and sheet is not None else ()
        outages = dict(self.chat.outages) if self.chat is not None else {}
        return Progress(done, self.count, number, self._error, [*astuple(self.usage())], outages, *histogram)

    def usage(self) -> Usage:
        """Return the usage of all rounds so far, including the current round."""
        answering_s, client_s, began = self._spent  # read once, because the group's thread may now end a round
        if began is not None:
            took_s = time.monotonic() - began[0]
            answering_s, client_s = answering_s + took_s, client_s + min(time.process_time() - began[1], took_s)
        used = Usage() if self.chat is None else self.chat.budget.used
        return replace(used, answering_s=answering_s, client_s=client_s)

    def change(self, paused: bool, max_in_flight: int | None) -> None:
        """Change settings of the run in progress. While it is paused, the group sends no requests to models."""
        if self.chat is not None:
            self.chat.paused = paused
            if max_in_flight != self.chat.settings.max_in_flight:
                self.chat.settings = replace(self.chat.settings, max_in_flight=max_in_flight)

    def halt(self) -> None:
        """Stop the round. Count missing answers as failures with the cause "interrupted", and ignore later answers."""
        with self._changed:
            self._unasked.clear()
            if self._sheet is not None:
                self._sheet = self._sheet.with_missing_failed()
            self._changed.notify_all()
        with contextlib.suppress(RuntimeError):  # raised if the group is closed
            self.loop.call_soon_threadsafe(self._halt_schedulers)

    def collect(self, part: int) -> tuple[Tally, int]:
        """Return part `part` (0, 1, ...) of the finished round's tally, and the number of parts."""
        parts = self._finished_sheet().tally().parts(TALLY_VALUES)
        return parts[part], len(parts)

    def announce(self, announcement: Announcement) -> Winners:
        """Return the winners in this group: the participants who gave one of the announced winning answers."""
        return self._finished_sheet().winners(announcement.winning_units)

    def answers(self, first: int, count: int) -> Answers:
        """Return the answers of participants first .. first+count-1, ignoring participants of other groups."""
        return self._finished_sheet().answers(first, count)

    def texts(self, first: int, count: int) -> tuple[list[KeptText], int]:
        """Return the kept texts of participants first .. first+count-1, as many as fit in one message.

        Also return the index of the first participant that is left, or first+count. Equal prompts are one object, which
        is sent once.
        """
        self._finished_sheet()
        kept, found, prompts, size = self._texts, list[KeptText](), set[Prompt](), 0
        for offset in sorted(each for each in [*kept] if first <= self.first + each < first + count):
            if len(found) == TEXTS_PER_MESSAGE or size >= TEXT_CHARACTERS:
                return found, self.first + offset
            text = kept[offset]
            found.append(text._replace(model=served_name(text.model)))
            new = [] if text.prompt in prompts else [text.prompt.system, text.prompt.user]
            size += sum(len(each or "") for each in (text.text, text.thoughts, *new))
            prompts.add(text.prompt)
        return found, first + count

    def remember(self, first: int, values: NDArray[np.float64]) -> None:
        """Pass answers of earlier rounds to recreated participants, starting with the participant with index `first`.

        `values` has the shape (rounds, participants); NaN stands for no answer. Raises RuntimeError if not all
        participants of the group have been created.
        """
        agents = self._agents  # read once, because `close` may clear this attribute
        if self._done() < self.count or len(agents) < self.count:
            raise RuntimeError(f"group {self.oid} is still being built")
        answers = values.astype(object)
        answers[np.isnan(values)] = None
        for offset, numbers in enumerate(answers.T.tolist(), start=first - self.first):
            try:
                agents[offset].recall(tuple(numbers))
            except BaseException as error:  # noqa: BLE001 - a user-defined recall may raise anything
                agents[offset] = self._failed(offset, error)
            self._drop_rng(agents[offset])

    def record(self, texts: list[RecordedText]) -> None:
        """Take answers from these texts of a recorded run where model and prompt are the same (see --replay)."""
        if self.chat is not None:
            self.chat.record(texts)

    # --- Called by the server ----------------------------------------------------------------------------------------

    @property
    def agents(self) -> int:
        """Return the number of agents in this group."""
        return len(self._agents)

    def participant(self, index: int) -> Participant | None:
        """Return the participant with this index; None if this group has no such participant."""
        offset, agents = index - self.first, self._agents  # read once, because `close` may clear this attribute
        return agents[offset] if 0 <= offset < len(agents) else None

    def has_answered(self, index: int, round_number: int) -> bool:
        """Return whether a participant answered in the round; True if that is not the latest round of this group."""
        sheet = self._sheet  # read once, because `close` may clear this attribute
        return sheet is None or round_number != self._round or bool(sheet.answers(index, 1).units[0] >= 0)

    def close(self) -> None:
        """Stop all work and release all participants. A second call does nothing."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        if self.chat is not None:
            self.chat.close()
        with contextlib.suppress(RuntimeError):  # raised if the group's thread has closed the loop
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=1)  # not longer, because a participant may block the event loop
        with self._changed:
            self._agents, self._schedulers = [], ()
            self._texts, self._prompts = {}, {}
            self._sheet = self._pool = None

    # --- Called by participants --------------------------------------------------------------------------------------

    def keep_text(self, round_number: int, text: KeptText) -> None:
        """Keep what a model wrote in this round if the participant is in the panel (see `Population.panel`)."""
        offset = text.participant - self.first
        if self._panel is None or not 0 <= offset < self.count or not self._panel[offset]:
            return
        if round_number == self._round and (text.text, text.thoughts) != (None, None):
            self._texts[offset] = text._replace(prompt=self._prompts.setdefault(text.prompt, text.prompt))

    # --- Internal ----------------------------------------------------------------------------------------------------

    @property
    def current_round(self) -> int:
        """Return the number of the round that is being played, or 0 between rounds."""
        return self._round if self._done() < self.count and self._sheet is not None else 0

    def _drop_rng(self, agent: Participant) -> None:
        """Delete a participant's random generator, so that the next question starts with a new one."""
        if self.uses_rng:
            agent.__dict__.pop("_rng", None)

    def _done(self) -> int:
        sheet = self._sheet  # read once, because `close` may clear this attribute
        return sheet.done if sheet is not None else len(self._agents)

    def _finished_sheet(self) -> AnswerSheet:
        sheet = self._sheet
        if sheet is None or sheet.done < self.count:
            raise RuntimeError(f"group {self.oid} has no finished round")
        return sheet

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

    def _run_in_loop(self, work: Awaitable[None]) -> None:
        """Start `work` on the event loop. When it ends, notify waiting calls, and keep any exception for `progress`."""

        async def run() -> None:
            error = await outcome_of(work)
            with self._changed:
                if error is not None:
                    self._error = f"group {self.oid}: {one_line(error)}"
                self._changed.notify_all()

        asyncio.run_coroutine_threadsafe(run(), self.loop)

    async def _build(self) -> None:
        """Create all participants.

        AgentScope's metaclass generates a random id for every agent and keeps the agent's arguments, and the garbage
        collector scans all agents repeatedly. The creation of 64,000 agents takes 1.23 s with both, 0.55 s without
        the collector, and 0.08 s without either. A hosted agent uses neither the id nor the arguments.
        """
        if self.chat is not None:
            keep, rounds = self.chat.settings.keep_texts, self.chat.settings.rounds
            self._panel = self.game.population.panel(keep, rounds, self.first, self.count)
        classes = map(self._unpacked.classes.__getitem__, self._kinds)
        for start in range(0, self.count, BUILD_BATCH):
            with gc_paused():
                for offset, cls in zip(range(start, min(start + BUILD_BATCH, self.count)), classes, strict=False):
                    try:
                        agent: Participant = cls.__new__(cls)
                        agent._home = self
                        agent.__init__(self.first + offset, self.game)  # type: ignore[misc]
                    except BaseException as error:  # noqa: BLE001 - a user-defined __init__ may raise anything
                        agent = self._failed(offset, error)
                    self._drop_rng(agent)
                    self._agents.append(agent)
                gc.collect(1)
            await asyncio.sleep(0)

    def _failed(self, offset: int, error: BaseException) -> Participant:
        agent: Participant = type.__call__(Participant, self.first + offset, self.game)
        agent._home, agent._creation_error = self, one_line(error)
        if self._tracebacks_left > 0:
            self._tracebacks_left -= 1
            agent._creation_traceback = traceback_of(error)
        return agent

    def _by_way_of_asking(self) -> tuple[dict[bool, Sequence[int]], Sequence[int]]:
        """Return the offsets of participants with `answer`, by whether they ask a model, and of those with `reply`."""
        asking = [bool(each.models) for each in self.game.population.players] or [self.chat is not None]
        ways = [asks if answers_many(cls) else None for cls, asks in zip(self._unpacked.classes, asking, strict=True)]
        if len({*ways}) == 1:
            everyone = range(self.count)
            return ({}, everyone) if ways[0] is None else ({ways[0]: everyone}, ())
        kinds = np.frombuffer(self._kinds, np.uint8)
        found = {way: np.isin(kinds, [kind for kind, each in enumerate(ways) if each is way]) for way in ways}
        offsets = {way: array("I", np.flatnonzero(each).astype(np.uint32).tobytes()) for way, each in found.items()}
        blocking = offsets.pop(None, array("I"))
        return {way: offsets[way] for way in (True, False) if offsets.get(way)}, blocking  # models are asked first

    async def _ask_all(self, question: Question, sheet: AnswerSheet) -> None:
        self._spent = (*self._spent[:2], (time.monotonic(), time.process_time()))
        if question.round > 1:  # free reference cycles of earlier rounds: the scheduler pauses the collector
            gc.collect()
        self._schedulers = tuple(self._scheduler(question, sheet, *each) for each in self._to_schedule.items())
        if sheet is not self._sheet:  # the round was halted
            self._halt_schedulers()
        ask = partial(self._ask_in_thread, iter(self._to_block), question, sheet)
        replies = [self.loop.run_in_executor(self._pool, ask) for _ in range(self._reply_threads)]
        await asyncio.gather(*(each.run() for each in self._schedulers), *replies)
        used = self.usage()
        self._spent = (used.answering_s, used.client_s, None)

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

    def _scheduler(self, question: Question, sheet: AnswerSheet, ask_models: bool, offsets: Sequence[int]) -> Scheduler:
        """Return what asks the participants at `offsets` concurrently. An exception of one of them is its failure.

        The number of participants that wait for a model is limited, because each takes 2 KB. New ones start when half
        of the limit is free, so the model never idles. They start in one large batch, so that more participants with
        equal prompts share a request.
        """
        agents, everyone = self._agents, len(offsets) == self.count
        if not everyone:
            agents = [agents[offset] for offset in offsets]

        def answered(indices: list[int], answers: list[Any]) -> None:
            for index in indices if self.uses_rng else ():
                self._drop_rng(agents[index])
            sheet.record_many(indices if everyone else [offsets[index] for index in indices], answers, self.game)

        def failed(index: int, error: BaseException) -> None:
            self._drop_rng(agents[index])
            sheet.fail(offsets[index], failure_of(error), error)

        limit = max(TURN, 2 * self.chat.settings.samples_per_request) if ask_models and self.chat is not None else None
        return Scheduler(
            self.loop,
            len(offsets),
            begin=lambda index: agents[index].answer(question),
            answered=answered,
            failed=failed,
            max_concurrent=limit,
        )

    def _halt_schedulers(self) -> None:
        for scheduler in self._schedulers:
            scheduler.halt()


def group_proxy(assignment: GroupAssignment, timeout_s: float, kwargs: dict[str, Any] | None = None) -> RemoteObject:
    """Return a proxy of an assigned group. If `kwargs` is not None, create a missing group with these arguments."""
    assert assignment.server is not None
    if kwargs is not None:
        kwargs = {"oid": assignment.oid, "first": assignment.first, "count": assignment.count, **kwargs}
    return RemoteObject(ParticipantGroup, assignment.oid, assignment.server, timeout_s, kwargs)


def whole_tally(group: Any) -> Tally:
    """Fetch the tally of a group or moderator part by part, and return it as a whole."""
    first_part, parts = group.collect(0)
    return merge([first_part, *(group.collect(part)[0] for part in range(1, parts))])


# One thread pool per run, for blocking `reply` methods. It ends when the run's groups are closed and no `reply` runs.
_pools: WeakValueDictionary[str, ThreadPoolExecutor] = WeakValueDictionary()
_pools_lock = threading.Lock()
