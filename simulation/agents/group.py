"""A group: the participants on one server that one moderator asks. One call creates them, and one call asks all."""

import math
from dataclasses import astuple, replace
from typing import Any

import numpy as np
from agentscope.rpc import RpcMeta
from numpy.typing import NDArray

from simulation.agents.hosted_participants import HostedParticipants
from simulation.game.answer_sheet import Answers, AnswerSheet
from simulation.game.game import Game
from simulation.game.rules import Announcement, Question
from simulation.game.tally import Tally, Winners, merge
from simulation.llm.chat import served_name
from simulation.llm.prompts import KeptText, Prompt, RecordedText
from simulation.llm.responses import Usage
from simulation.rpc.client import RemoteObject
from simulation.rpc.endpoints import TEXTS_PER_MESSAGE, GroupAssignment
from simulation.rpc.messages import Progress

TALLY_VALUES = 500_000  # maximum number of distinct values in one message
TEXT_CHARACTERS = 4_000_000  # a message of texts ends when it has as many, or TEXTS_PER_MESSAGE texts


class ParticipantGroup(HostedParticipants, metaclass=RpcMeta):
    """The participants first .. first+count-1, the current round and its answer sheet. All methods are thread-safe.

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
        super().__init__(oid, first, count, game, participant_class, reply_threads)
        self.lease_s = lease_s
        self._round = 0
        self._texts: dict[int, KeptText] = {}  # of the current round, by offset
        self._prompts: dict[Prompt, Prompt] = {}  # the distinct prompts of `_texts`
        self._unasked: set[int] = set()  # offsets of participants that still wait for a call of `ask_one`
        self._panel: NDArray[np.bool_] | None = None  # of which participants texts are kept; None if of none
        if game.llm is not None:
            self._panel = game.population.panel(game.llm.keep_texts, game.llm.rounds, first, count)
        self._thread.start()
        self._run(self._build())

    # --- Called by main and moderators -------------------------------------------------------------------------------

    def begin(self, question: Question, tokens_each: float | None = None, one_by_one: bool = False) -> None:
        """Start a round and return at once. Do nothing if it or a later one has started, so that a retry is safe.

        `tokens_each` is the mean token budget per participant that asks a model (None: no limit). If `one_by_one`, ask
        a participant only when its `answer_round` is called. Raises RuntimeError if the group is closed or busy.
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
                self._run(self._ask_all(question, self._sheet))

    def ask_one(self, index: int, question: Question) -> None:
        """Ask participant `index` in a round that was started with `one_by_one`. Return after its outcome is recorded.

        Do nothing if the round is over, or if another moderator, which has failed, has asked the participant before.
        """
        offset = index - self.first
        with self._changed:
            sheet = self._sheet
            if sheet is None or question.round != self._round or offset not in self._unasked:
                return
            self._unasked.remove(offset)
        self._ask_in_thread(iter((offset,)), question, sheet)

    def progress(self, wait_s: float = 0.0, numbers: int = 0) -> Progress:
        """Wait up to `wait_s` seconds for all participants to finish, then return the progress.

        If `numbers`, the number of possible answers, is not 0, include a partial histogram of the answers.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done() == self.count or self._error, timeout=wait_s)
        number, done, sheet = self._round, self._done(), self._sheet  # read in this order: a round may begin now
        histogram = sheet.partial_histogram(self.game) if numbers and sheet is not None else ()
        outages = dict(self.chat.outages) if self.chat is not None else {}
        return Progress(done, self.count, number, self._error, [*astuple(self.usage())], outages, *histogram)

    def usage(self) -> Usage:
        """Return the usage of all rounds so far, including the current round."""
        used = Usage() if self.chat is None else self.chat.budget.used
        answering_s, client_s = self._seconds()
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
        self._call(self._halt_schedulers)

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
        """Return the kept texts of participants first .. first+count-1 that fit in one message, and what to ask next.

        That is the index of the first participant left, or first+count. Equal prompts are one object, sent once.
        """
        self._finished_sheet()
        kept, found, prompts, size = self._texts, list[KeptText](), set[Prompt](), 0
        for offset in sorted(each for each in [*kept] if first <= self.first + each < first + count):
            if len(found) == TEXTS_PER_MESSAGE or size >= TEXT_CHARACTERS:
                return found, self.first + offset
            text = kept[offset]
            found.append(text._replace(model=served_name(text.model)))
            new = () if text.prompt in prompts else (text.prompt.system, text.prompt.user)
            size += sum(len(each or "") for each in (text.text, text.thoughts, *new))
            prompts.add(text.prompt)
        return found, first + count

    def remember(self, first: int, values: NDArray[np.float64]) -> None:
        """Pass answers of earlier rounds to the recreated participants first, first + 1, ...

        `values` has the shape (rounds, participants); NaN stands for no answer. Raises RuntimeError during creation.
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

    # --- Called by the server and by participants --------------------------------------------------------------------

    @property
    def current_round(self) -> int:
        """Return the number of the round that is being played, or 0 between rounds."""
        return self._round if self._done() < self.count and self._sheet is not None else 0

    def has_answered(self, index: int, round_number: int) -> bool:
        """Return whether a participant answered in the round; True if that is not the latest round of this group."""
        sheet = self._sheet  # read once, because `close` may clear this attribute
        return sheet is None or round_number != self._round or bool(sheet.answers(index, 1).units[0] >= 0)

    def keep_text(self, round_number: int, text: KeptText) -> None:
        """Keep what a model wrote in this round if the participant is in the panel (see `Population.panel`)."""
        offset = text.participant - self.first
        if self._panel is None or not 0 <= offset < self.count or not self._panel[offset]:
            return
        if round_number == self._round and (text.text, text.thoughts) != (None, None):
            self._texts[offset] = text._replace(prompt=self._prompts.setdefault(text.prompt, text.prompt))

    def _done(self) -> int:
        sheet = self._sheet  # read once, because `close` may clear this attribute
        return sheet.done if sheet is not None else len(self._agents)

    def _finished_sheet(self) -> AnswerSheet:
        sheet = self._sheet
        if sheet is None or sheet.done < self.count:
            raise RuntimeError(f"group {self.oid} has no finished round")
        return sheet


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
