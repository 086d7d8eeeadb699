"""The moderator: one agent per moderator server, between main and its share of the groups.

It has the interface of a group: main starts a round on the moderators, and they start it on their groups and merge the
results on the way back. It holds no state that another moderator would need to take over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from agentscope.agents import AgentBase

from simulation.agents.group import TALLY_VALUES, ParticipantGroup
from simulation.agents.per_agent_dispatch import OneByOne, whole_tally
from simulation.agents.snapshot import with_histogram
from simulation.game.answer_sheet import Answers
from simulation.game.rules import Announcement, Question
from simulation.game.tally import Tally, Winners, merge
from simulation.rpc.channels import call_all_or_raise
from simulation.rpc.client import RemoteObject
from simulation.rpc.endpoints import GroupAssignment
from simulation.rpc.messages import Progress


class Moderator(AgentBase):
    """The agent that asks its groups and merges their tallies.

    Args:
        name: The agent's name.
        timeout_s: Deadline for a call to a group's server (seconds).
        lease_s: Seconds without contact after which the server deletes the moderator; None keeps it.
    """

    def __init__(self, name: str, timeout_s: float, lease_s: float | None) -> None:
        super().__init__(name=name, use_memory=False)
        self.lease_s = lease_s
        self._timeout_s = timeout_s
        self._groups: dict[GroupAssignment, Any] = {}
        self._tally = Tally(0)
        self._round = 0
        self._lock = threading.Lock()  # guards check-then-set updates: calls arrive on many threads

    def assign(self, assignments: list[GroupAssignment], one_by_one: bool) -> None:
        """Replace the groups to ask; these groups must already exist."""
        with self._lock:
            before = self._groups
            self._groups = {each: before.get(each) or self._group(each, one_by_one) for each in assignments}
        for assignment in before.keys() - self._groups:
            if isinstance(before[assignment], OneByOne):
                before[assignment].halt(immediately=True)

    def _group(self, assignment: GroupAssignment, one_by_one: bool) -> Any:
        assert assignment.server is not None  # a group without a server is assigned to no moderator
        group = RemoteObject(ParticipantGroup, assignment.oid, assignment.server, self._timeout_s)
        return OneByOne(group, assignment, self._timeout_s) if one_by_one else group

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        """Start the round on all groups, and return. `tokens_each` is the mean token budget per participant."""
        self._all(lambda group: group.begin(question, tokens_each))
        with self._lock:
            self._round = max(self._round, question.round)

    def progress(self, wait_s: float = 0.0, numbers: int = 0) -> Progress:
        """Return the progress of groups asked one by one, waiting up to `wait_s` seconds; heartbeats cover others.

        If `numbers`, the count of possible answers, is not 0, it includes a partial histogram.
        """
        number = self._round  # read first, so that a new round's number is never paired with old answers
        groups = [group for group in self._groups.values() if isinstance(group, OneByOne) and group.sheet]
        unfinished = next((group for group in groups if not group.progress().finished), None)
        if unfinished is not None:
            unfinished.progress(wait_s)
        each = [group.progress() for group in groups]
        error = next((progress.error for progress in each if progress.error), "")
        progress = Progress(sum(one.done for one in each), sum(one.total for one in each), number, error)
        sheets = [group.sheet for group in groups if group.sheet]
        return with_histogram(progress, sheets, numbers) if numbers and sheets else progress

    def halt(self, immediately: bool) -> None:
        """Stop the round: missing answers count as failed. With `immediately`, ignore participants that block."""
        self._all(lambda group: group.halt(immediately))

    def collect(self, part: int) -> tuple[Tally, int]:
        """Return one part of the round's merged tally, and the number of parts. Request part 0 first."""
        if part == 0:
            self._tally = merge(self._all(whole_tally))
        parts = self._tally.parts(TALLY_VALUES)
        return parts[part], len(parts)

    def announce(self, announcement: Announcement) -> Winners:
        """Send the result to all groups and return their winners."""
        return sum(self._all(lambda group: group.announce(announcement)), start=Winners(0, ()))

    def answers(self, first: int, count: int) -> Answers:
        """Return the answers of participants first .. first+count-1, all of one group."""
        groups = self._groups.items()
        group = next(group for each, group in groups if each.first <= first < each.first + each.count)
        answers: Answers = group.answers(first, count)
        return answers

    def close(self) -> None:
        """Drop all groups."""
        self.assign([], one_by_one=False)

    def _all(self, call: Callable[[Any], Any]) -> list[Any]:
        calls = {assignment: partial(call, group) for assignment, group in self._groups.items()}
        return list(call_all_or_raise(calls).values())
