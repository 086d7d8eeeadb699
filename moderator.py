"""The moderator: one agent per moderator server, between main and its share of the groups.

It has the same face as a group: main begins a round on its moderators, they on their groups, and what comes back up is
merged on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from agentscope.agents import AgentBase

from participant import Participant, message_of
from simulation.errors import UnusableAnswer, one_line
from simulation.game import Announcement, Answers, AnswerSheet, Game, Question, Tally, Winners, merge
from simulation.group import INTERRUPTED, TALLY_VALUES, ParticipantGroup, Progress
from simulation.model import Usage
from simulation.placement import Endpoint
from simulation.remote import GROUP_DEADLINE_S, RemoteObject, all_of, fan_out, remove, reply_of

V = TypeVar("V")

ASKED_AT_ONCE = 32  # participants of one group that are asked at the same time when each is asked alone


@dataclass(frozen=True)
class Seating:
    """Where one group is to sit: its remote id, its server, and its participants."""

    oid: str
    server: Endpoint
    first: int
    count: int


class Moderator(AgentBase):
    """Asks its groups, and merges what they answer.

    Args:
        name: Its name.
        lease_s: Seconds of silence after which the server drops it; None keeps it.
    """

    def __init__(self, name: str, lease_s: float | None) -> None:
        super().__init__(name=name, use_memory=False)
        self.lease_s = lease_s
        self._groups: dict[int, Any] = {}  # by the index of the first participant
        self._remote: dict[int, RemoteObject] = {}
        self._tally = Tally(0)

    def open(
        self, seatings: list[Seating], game: Game, participant_class: bytes, reply_threads: int, one_by_one: bool
    ) -> None:
        """Create the groups; they build their participants in the background (see `progress`)."""

        def create(seating: Seating) -> RemoteObject:
            kwargs = {
                "oid": seating.oid,
                "first": seating.first,
                "count": seating.count,
                "game": game,
                "participant_class": participant_class,
                "reply_threads": reply_threads,
                "lease_s": self.lease_s,
            }
            return RemoteObject(ParticipantGroup, seating.oid, seating.server, GROUP_DEADLINE_S, kwargs)

        self._remote, errors = fan_out({seating.first: partial(create, seating) for seating in seatings})
        for error in errors.values():
            raise error
        self._groups = dict(self._remote)
        if one_by_one:
            self._groups = {seating.first: OneByOne(self._remote[seating.first], seating) for seating in seatings}

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        """Start the round on all groups; returns at once. `tokens_each` is what each participant may cost."""
        self._all(lambda group: group.begin(question, tokens_each))

    def progress(self, wait_s: float = 0.0) -> Progress:
        """How far all groups are together. Waits on one unfinished group at most, so as to hold one thread there."""
        each = self._all(lambda group: group.progress(0.0))
        waiting = next((first for first, progress in each.items() if not progress.finished), None)
        if waiting is not None and wait_s > 0:
            each[waiting] = self._groups[waiting].progress(wait_s)
        return sum(each.values(), start=Progress(0, 0))

    def usage(self) -> Usage:
        """What all groups together have cost so far."""
        return sum(self._all(lambda group: group.usage()).values(), start=Usage())

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
        """The answers of those of participants first .. first+count-1 that are asked by this moderator."""
        parts = [part for part in self._all(lambda group: group.answers(first, count)).values() if len(part.units)]
        failures = {index: cause for part in parts for index, cause in part.failures.items()}
        texts = {index: text for part in parts for index, text in part.texts.items()}
        units = [part.units for part in parts] or [np.empty(0, np.int64)]
        return Answers(parts[0].first if parts else first, np.concatenate(units), failures, texts)

    def keep(self) -> None:
        """Stay with all groups when the run is over, until the next run or the end of the servers."""
        self._all(lambda group: group.keep())
        self.lease_s = None

    def close(self) -> None:
        """Delete all groups on their servers; those that cannot be reached drop them when their lease is over."""
        groups, self._remote, self._groups = self._remote, {}, {}
        fan_out({first: partial(remove, group) for first, group in groups.items()})

    def _all(self, call: Callable[[Any], V]) -> dict[int, V]:
        return all_of({first: partial(call, group) for first, group in self._groups.items()})


def whole_tally(group: Any) -> Tally:
    """The tally of a group or a moderator, fetched part by part."""
    first_part, parts = group.collect(0)
    return merge([first_part, *(group.collect(part)[0] for part in range(1, parts))])


class OneByOne:
    """The way AgentScope's own examples ask: each participant through its own proxy. The same face as a group.

    It is here for comparison: each answer costs three calls and a thread, whatever the participant does.
    """

    def __init__(self, group: RemoteObject, seating: Seating) -> None:
        self._group = group
        self._seating = seating
        self._sheet: AnswerSheet | None = None
        self._halted = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.keep = group.keep
        self.usage = group.usage

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        self._group.allow(tokens_each)
        self._halted = False
        self._sheet = AnswerSheet(self._seating.first, self._seating.count)
        threading.Thread(target=self._ask_all, args=(question, self._sheet), daemon=True).start()

    def progress(self, wait_s: float = 0.0) -> Progress:
        alive: Progress = self._group.progress(0.0)  # the heartbeat
        sheet = self._sheet
        if sheet is None:
            return alive
        with self._changed:
            self._changed.wait_for(lambda: sheet.done == sheet.count or self._error is not None, timeout=wait_s)
        if self._error is not None:
            raise self._error
        return Progress(sheet.done, sheet.count)

    def halt(self, at_once: bool) -> None:
        self._halted = True
        if at_once and self._sheet is not None:
            self._sheet = self._sheet.closed(INTERRUPTED)

    def collect(self, part: int) -> tuple[Tally, int]:
        parts = self._filled().tally().parts(TALLY_VALUES)
        return parts[part], len(parts)

    def announce(self, announcement: Announcement) -> Winners:
        return self._filled().winners(announcement.winning_units)

    def answers(self, first: int, count: int) -> Answers:
        return self._filled().answers(first, count)

    def _filled(self) -> AnswerSheet:
        if self._sheet is None or self._sheet.done < self._sheet.count:
            raise RuntimeError(f"group {self._seating.oid} has no finished round")
        return self._sheet

    def _ask_all(self, question: Question, sheet: AnswerSheet) -> None:
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            for place in range(sheet.count):
                pool.submit(self._ask_into, sheet, place, question)

    def _ask_into(self, sheet: AnswerSheet, place: int, question: Question) -> None:
        try:
            outcome = self._ask(place, question)
        except Exception as error:  # noqa: BLE001 - the edge of the thread: raised to whoever asks next
            self._error = error
        else:
            with self._changed:
                if "units" in outcome:
                    sheet.put(place, outcome["units"])
                else:
                    sheet.fail(place, outcome["cause"], outcome["text"])
        with self._changed:
            if sheet.done == sheet.count or self._error is not None:
                self._changed.notify_all()

    def _ask(self, place: int, question: Question) -> dict[str, Any]:
        """What one participant says: its answer in `units`, or the `cause` of its failure and its `text`."""
        if self._halted:
            return {"cause": INTERRUPTED, "text": None}
        index = self._seating.first + place
        proxy = RemoteObject(Participant, f"{self._seating.oid}/{index}", self._seating.server, GROUP_DEADLINE_S)
        try:
            said: dict[str, Any] = reply_of(proxy, message_of(question), "play").metadata
            return said
        except UnusableAnswer as error:  # raised by whatever else its code does
            return {"cause": one_line(error), "text": None}
