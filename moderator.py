"""The moderator: one agent per moderator server, between main and its share of the groups.

It has the same face as a group: main begins a round on its moderators, they on their groups, and what comes back up is
merged on the way. It remembers nothing that another moderator could not do without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from agentscope.agents import AgentBase

from simulation.agents.group import TALLY_VALUES, ParticipantGroup
from simulation.agents.per_agent_dispatch import OneByOne, whole_tally
from simulation.agents.snapshot import RoundSnapshot, take_snapshot
from simulation.game.answer_sheet import Answers
from simulation.game.rules import Announcement, Question
from simulation.game.tally import Tally, Winners, merge
from simulation.rpc.channels import call_all_or_raise
from simulation.rpc.client import RemoteObject
from simulation.rpc.endpoints import GroupAssignment
from simulation.rpc.messages import Progress

V = TypeVar("V")


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
        self._groups: dict[GroupAssignment, Any] = {}
        self._tally = Tally(0)
        self._round = 0
        self._lock = threading.Lock()  # guards what is looked at before it is set: calls come in many threads

    def assign(self, assignments: list[GroupAssignment], one_by_one: bool) -> None:
        """Ask these groups from now on, which are there already, and no others."""
        with self._lock:
            before = self._groups
            self._groups = {
                assignment: before.get(assignment) or self._group(assignment, one_by_one) for assignment in assignments
            }
        for assignment in before.keys() - set(assignments):
            if isinstance(before[assignment], OneByOne):
                before[assignment].halt(at_once=True)

    def _group(self, assignment: GroupAssignment, one_by_one: bool) -> Any:
        assert assignment.server is not None  # those whom nobody asks are seated with no moderator
        group = RemoteObject(ParticipantGroup, assignment.oid, assignment.server, self._timeout_s)
        return OneByOne(group, assignment, self._timeout_s) if one_by_one else group

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

    def snapshot(self, numbers: int) -> RoundSnapshot:
        """The same as a group's, of those whom it asks one by one; see ParticipantGroup."""
        number = self._round
        alone = [group for group in list(self._groups.values()) if isinstance(group, OneByOne)]
        return take_snapshot(number, [group.sheet for group in alone if group.sheet is not None], numbers)

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
        assignment = next(
            assignment for assignment in self._groups if assignment.first <= first < assignment.first + assignment.count
        )
        answers: Answers = self._groups[assignment].answers(first, count)
        return answers

    def close(self) -> None:
        """Ask nobody any more."""
        self.assign([], one_by_one=False)

    def _all(self, call: Callable[[Any], V]) -> dict[GroupAssignment, V]:
        return call_all_or_raise({assignment: partial(call, group) for assignment, group in self._groups.items()})
