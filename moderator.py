"""The moderator: one agent per moderator server, between main and its share of the groups.

It has the same face as a group: main begins a round on its moderators, they on their groups, and what comes back up is
merged on the way. It remembers nothing that another moderator could not do without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from agentscope.agents import AgentBase

from participant import Participant, message_of
from simulation.channels import all_of
from simulation.errors import UnusableAnswer, failure_of, one_line
from simulation.game import Announcement, Question, Tally, Winners, merge
from simulation.glance import Glance, glance_at
from simulation.group import TALLY_VALUES, ParticipantGroup
from simulation.heartbeat import Progress
from simulation.remote import RemoteObject, reply_of
from simulation.seating import Seat
from simulation.sheet import CUT_SHORT, Answers, AnswerSheet

V = TypeVar("V")

ASKED_AT_ONCE = 32  # participants of one group that are asked at the same time when each is asked alone


class Moderator(AgentBase):
    """Asks its groups, and merges what they answer.

    Args:
        name: Its name.
        timeout_s: How long a group's server may take to answer a call.
        lease_s: Seconds of silence after which the server drops it; None keeps it.
    """

    def __init__(self, name: str, timeout_s: float, lease_s: float | None) -> None:
        super().__init__(name=name, use_memory=False)
        self.lease_s = lease_s
        self._timeout_s = timeout_s
        self._groups: dict[Seat, Any] = {}
        self._tally = Tally(0)
        self._round = 0
        self._lock = threading.Lock()  # guards what is looked at before it is set: calls come in many threads

    def seat(self, seats: list[Seat], one_by_one: bool) -> None:
        """Ask these groups from now on, which are there already, and no others."""
        with self._lock:
            before = self._groups
            self._groups = {seat: before.get(seat) or self._group(seat, one_by_one) for seat in seats}
        for seat in before.keys() - set(seats):
            if isinstance(before[seat], OneByOne):
                before[seat].halt(at_once=True)

    def _group(self, seat: Seat, one_by_one: bool) -> Any:
        assert seat.server is not None  # those whom nobody asks are seated with no moderator
        group = RemoteObject(ParticipantGroup, seat.oid, seat.server, self._timeout_s)
        return OneByOne(group, seat, self._timeout_s) if one_by_one else group

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        """Start the round on all groups; returns at once. `tokens_each` is what each participant may cost."""
        self._all(lambda group: group.begin(question, tokens_each))
        with self._lock:
            self._round = max(self._round, question.round)

    def progress(self, wait_s: float = 0.0) -> Progress:
        """How far those are whom it asks one by one; groups that ask together are heard of from their own servers."""
        number = self._round  # first: a new round's number never goes with old answers
        alone = [group for group in self._groups.values() if isinstance(group, OneByOne)]
        waiting = next((group for group in alone if not group.progress().finished), None)
        if waiting is not None:
            waiting.progress(wait_s)
        each = [group.progress() for group in alone]
        error = next((progress.error for progress in each if progress.error), "")
        done, total = sum(progress.done for progress in each), sum(progress.total for progress in each)
        return Progress(done, total, number, error)

    def glance(self, numbers: int) -> Glance:
        """The same as a group's, of those whom it asks one by one; see ParticipantGroup."""
        number = self._round
        alone = [group for group in list(self._groups.values()) if isinstance(group, OneByOne)]
        return glance_at(number, [group.sheet for group in alone if group.sheet is not None], numbers)

    def halt(self, at_once: bool) -> None:
        """Stop the round: whoever has not answered counts as failed; `at_once` waits for nobody."""
        self._all(lambda group: group.halt(at_once))

    def collect(self, part: int) -> tuple[Tally, int]:
        """One part of the round's tally, merged over the groups, and how many parts there are."""
        if part == 0:
            self._tally = merge(self._all(whole_tally).values())
        parts = self._tally.parts(TALLY_VALUES)
        return parts[part], len(parts)

    def announce(self, announcement: Announcement) -> Winners:
        """Tell all groups the result, and say who of them won."""
        return sum(self._all(lambda group: group.announce(announcement)).values(), start=Winners(0, ()))

    def answers(self, first: int, count: int) -> Answers:
        """The answers of participants first .. first+count-1, all of one group."""
        seat = next(seat for seat in self._groups if seat.first <= first < seat.first + seat.count)
        answers: Answers = self._groups[seat].answers(first, count)
        return answers

    def close(self) -> None:
        """Ask nobody any more."""
        self.seat([], one_by_one=False)

    def _all(self, call: Callable[[Any], V]) -> dict[Seat, V]:
        return all_of({seat: partial(call, group) for seat, group in self._groups.items()})


def whole_tally(group: Any) -> Tally:
    """The tally of a group or a moderator, fetched part by part."""
    first_part, parts = group.collect(0)
    return merge([first_part, *(group.collect(part)[0] for part in range(1, parts))])


class OneByOne:
    """The way AgentScope's own examples ask: each participant through its own proxy. The same face as a group.

    It is here for comparison: each answer costs three calls and a thread, whatever the participant does.
    """

    def __init__(self, group: RemoteObject, seat: Seat, timeout_s: float) -> None:
        self._group = group
        self._seat = seat
        self._timeout_s = timeout_s
        self._round = 0
        self.sheet: AnswerSheet | None = None
        self._halted = False
        self._error = ""
        self._changed = threading.Condition()  # guards all of this

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        self._group.allow(question.round, tokens_each)  # may be said twice, and takes as long as its server does
        with self._changed:
            if question.round <= self._round:
                return
            self._halted = False
            self.sheet = AnswerSheet(self._seat.first, self._seat.count)
            self._round = question.round
            threading.Thread(target=self._ask_all, args=(question, self.sheet), daemon=True).start()

    def progress(self, wait_s: float = 0.0) -> Progress:
        number, sheet = self._round, self.sheet  # in this order: a new round's number never goes with old answers
        if sheet is None:
            return Progress(0, 0)
        with self._changed:
            self._changed.wait_for(lambda: sheet.done == sheet.count or self._error, timeout=wait_s)
        return Progress(sheet.done, sheet.count, number, self._error)

    def halt(self, at_once: bool) -> None:
        with self._changed:
            self._halted = True
            if at_once and self.sheet is not None:
                self.sheet = self.sheet.closed()
            self._changed.notify_all()

    def collect(self, part: int) -> tuple[Tally, int]:
        parts = self._filled().tally().parts(TALLY_VALUES)
        return parts[part], len(parts)

    def announce(self, announcement: Announcement) -> Winners:
        return self._filled().winners(announcement.winning_units)

    def answers(self, first: int, count: int) -> Answers:
        return self._filled().answers(first, count)

    def _filled(self) -> AnswerSheet:
        sheet = self.sheet
        if sheet is None or sheet.done < sheet.count:
            raise RuntimeError(f"group {self._seat.oid} has no finished round")
        return sheet

    def _ask_all(self, question: Question, sheet: AnswerSheet) -> None:
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            for place in range(sheet.count):
                pool.submit(self._ask_into, sheet, place, question)

    def _ask_into(self, sheet: AnswerSheet, place: int, question: Question) -> None:
        try:
            outcome = self._ask(place, question)
            with self._changed:
                if "units" in outcome:
                    sheet.put(place, outcome["units"])
                else:
                    sheet.fail(place, *outcome["failure"])
                if sheet.done == sheet.count:
                    self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 - the edge of the thread: told to whoever asks next
            with self._changed:
                self._error = one_line(error)
                self._changed.notify_all()

    def _ask(self, place: int, question: Question) -> dict[str, Any]:
        """What one participant says: its answer in `units`, or its `failure`."""
        if self._halted:
            return {"failure": CUT_SHORT}
        assert self._seat.server is not None
        index = self._seat.first + place
        proxy = RemoteObject(Participant, f"{self._seat.oid}/{index}", self._seat.server, self._timeout_s)
        try:
            said: dict[str, Any] = reply_of(proxy, message_of(question), "play").metadata
            return said
        except UnusableAnswer as error:  # raised by whatever else its code does
            return {"failure": failure_of(error)}
