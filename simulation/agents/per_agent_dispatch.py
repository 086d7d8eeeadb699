"""Dispatch of questions through one proxy per participant, as in AgentScope's examples."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from simulation.agents.group import TALLY_VALUES
from simulation.agents.participant import Participant, message_of
from simulation.errors import UnusableAnswer, failure_of, one_line
from simulation.game.answer_sheet import CUT_SHORT, Answers, AnswerSheet
from simulation.game.rules import Announcement, Question
from simulation.game.tally import Tally, Winners, merge
from simulation.rpc.client import RemoteObject, reply_of
from simulation.rpc.endpoints import GroupAssignment
from simulation.rpc.messages import Progress

ASKED_AT_ONCE = 32  # participants of one group that are asked concurrently when each is asked individually


def whole_tally(group: Any) -> Tally:
    """Fetch the tally of a group or a moderator part by part, and merge it."""
    first_part, parts = group.collect(0)
    return merge([first_part, *(group.collect(part)[0] for part in range(1, parts))])


class OneByOne:
    """A group that is asked as in AgentScope's examples, each participant through a proxy; same interface as a group.

    It exists for comparison: each answer costs three calls and a thread, whatever the participant does.
    """

    def __init__(self, group: RemoteObject, assignment: GroupAssignment, timeout_s: float) -> None:
        self._group = group
        self._seat = assignment
        self._timeout_s = timeout_s
        self._round = 0
        self.sheet: AnswerSheet | None = None
        self._halted = False
        self._error = ""
        self._changed = threading.Condition()  # guards all of this state

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        self._group.allow(question.round, tokens_each)  # outside the lock: idempotent, and waits for the server
        with self._changed:
            if question.round <= self._round:
                return
            self._halted = False
            self.sheet = AnswerSheet(self._seat.first, self._seat.count)
            self._round = question.round
            threading.Thread(target=self._ask_all, args=(question, self.sheet), daemon=True).start()

    def progress(self, wait_s: float = 0.0) -> Progress:
        number, sheet = self._round, self.sheet  # in this order: a new round's number is never paired with old answers
        if sheet is None:
            return Progress(0, 0)
        with self._changed:
            self._changed.wait_for(lambda: sheet.done == sheet.count or self._error, timeout=wait_s)
        return Progress(sheet.done, sheet.count, number, self._error)

    def halt(self, at_once: bool) -> None:
        with self._changed:
            self._halted = True
            if at_once and self.sheet is not None:
                self.sheet = self.sheet.with_missing_failed()
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
                    sheet.record(place, outcome["units"])
                else:
                    sheet.fail(place, *outcome["failure"])
                if sheet.done == sheet.count:
                    self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 - the edge of the thread: reported by the next call
            with self._changed:
                self._error = one_line(error)
                self._changed.notify_all()

    def _ask(self, place: int, question: Question) -> dict[str, Any]:
        """Return the outcome of one participant: its answer in `units`, or its `failure`."""
        if self._halted:
            return {"failure": CUT_SHORT}
        assert self._seat.server is not None
        index = self._seat.first + place
        proxy = RemoteObject(Participant, f"{self._seat.oid}/{index}", self._seat.server, self._timeout_s)
        try:
            said: dict[str, Any] = reply_of(proxy, message_of(question), "play").metadata
            return said
        except UnusableAnswer as error:  # raised on the server outside of `play`, or by a FailedParticipant
            return {"failure": failure_of(error)}
