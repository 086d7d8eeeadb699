"""The moderator: one agent per moderator server, between main and a share of the groups.

A moderator has the interface of a group. Main starts a round on the moderators; each moderator starts the round on its
groups and merges their results. A moderator stores nothing that its successor would need.
"""

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
    """An agent that asks its groups and merges their tallies.

    Args:
        name: The agent's name.
        timeout_s: Deadline for a call to the server of a group (seconds).
        lease_s: Seconds without contact after which the server deletes the moderator (None: never).
    """

    def __init__(self, name: str, timeout_s: float, lease_s: float | None) -> None:
        super().__init__(name=name, use_memory=False)
        self.lease_s = lease_s
        self._timeout_s = timeout_s
        self._groups: dict[GroupAssignment, Any] = {}
        self._tally = Tally(0)
        self._round = 0
        self._lock = threading.Lock()  # guards check-then-set updates, as many threads call this moderator

    def assign(self, assignments: list[GroupAssignment], one_by_one: bool) -> None:
        """Replace the groups that this moderator asks. These must exist. Halt per-agent dispatch to removed groups."""
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
        """Start the round on all groups and return. `tokens_each` is the mean token budget per participant."""
        self._all(lambda group: group.begin(question, tokens_each))
        with self._lock:
            self._round = max(self._round, question.round)

    def progress(self, wait_s: float = 0.0, numbers: int = 0) -> Progress:
        """Wait up to `wait_s` seconds, then return the progress of the groups that are asked one by one.

        Participant servers report other groups themselves. The progress contains a partial histogram unless `numbers`,
        the number of possible answers, is 0.
        """
        number = self._round  # read first, as a round may begin meanwhile
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
        """Stop the round: missing answers count as failed. With `immediately`, do not wait for blocked participants."""
        self._all(lambda group: group.halt(immediately))

    def collect(self, part: int) -> tuple[Tally, int]:
        """Return part number `part` of the merged tally, and the number of parts. Callers must fetch part 0 first."""
        if part == 0:
            self._tally = merge(self._all(whole_tally))
        parts = self._tally.parts(TALLY_VALUES)
        return parts[part], len(parts)

    def announce(self, announcement: Announcement) -> Winners:
        """Announce the result to all groups, and return the winners."""
        return sum(self._all(lambda group: group.announce(announcement)), start=Winners(0, ()))

    def answers(self, first: int, count: int) -> Answers:
        """Return the answers of participants first .. first+count-1, who must belong to one group."""
        groups = self._groups.items()
        group = next(group for each, group in groups if each.first <= first < each.first + each.count)
        answers: Answers = group.answers(first, count)
        return answers

    def close(self) -> None:
        """Release all groups."""
        self.assign([], one_by_one=False)

    def _all(self, call: Callable[[Any], Any]) -> list[Any]:
        calls = {assignment: partial(call, group) for assignment, group in self._groups.items()}
        return list(call_all_or_raise(calls).values())
