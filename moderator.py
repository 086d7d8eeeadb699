"""The moderator: one agent per moderator server, between main and a share of the groups.

A moderator has the interface of a group. Main starts a round on the moderators; each moderator starts the round on its
groups and merges their results. A moderator stores nothing that must survive the loss of its server.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from agentscope.agents import AgentBase

from simulation.agents.group import TALLY_VALUES, group_proxy, whole_tally
from simulation.agents.per_agent_dispatch import PerAgentDispatch
from simulation.game.answer_sheet import Answers
from simulation.game.rules import Announcement, Question
from simulation.game.tally import Tally, Winners, merge
from simulation.llm.prompts import KeptText
from simulation.rpc.channels import call_all_or_raise
from simulation.rpc.client import RemoteObject
from simulation.rpc.endpoints import GroupAssignment
from simulation.rpc.messages import Progress


class Moderator(AgentBase):
    """An agent that asks its groups and merges their tallies.

    Args:
        name: The agent's name.
        timeout_s: Deadline of each call to a group (seconds).
        lease_s: Seconds without a call or heartbeat of the run after which the server drops the agent (None: never).
        one_by_one: Whether to ask each participant separately (--dispatch agent) instead of each group in one call.
    """

    def __init__(self, name: str, timeout_s: float, lease_s: float | None, one_by_one: bool) -> None:
        super().__init__(name=name, use_memory=False)
        self.lease_s = lease_s
        self._timeout_s = timeout_s
        self._one_by_one = one_by_one
        self._groups: dict[GroupAssignment, RemoteObject] = {}
        self._dispatches: dict[GroupAssignment, PerAgentDispatch] = {}  # empty unless `one_by_one`
        self._tally = Tally(0)

    def assign(self, assignments: list[GroupAssignment]) -> None:
        """Replace the groups that this moderator asks with those in `assignments`, which must already exist."""
        self._groups = {each: group_proxy(each, self._timeout_s) for each in assignments}
        before, asked = self._dispatches, assignments if self._one_by_one else []
        self._dispatches = {each: before.get(each) or PerAgentDispatch(each, self._timeout_s) for each in asked}
        for removed in before.keys() - self._groups.keys():
            before[removed].stopped = True

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        """Start a round on all groups. `tokens_each` is the token budget per participant that asks a model, if any."""
        self._all(lambda group: group.begin(question, tokens_each, self._one_by_one))
        for dispatch in self._dispatches.values():
            dispatch.begin(question)

    def progress(self, wait_s: float = 0.0, numbers: int = 0) -> Progress:
        """Report why asking one by one failed, if it did. The groups report how many participants have answered."""
        return Progress(0, 0, error=next((each.error for each in self._dispatches.values() if each.error), ""))

    def halt(self) -> None:
        """Stop the round: missing answers count as failed."""
        for dispatch in self._dispatches.values():
            dispatch.stopped = True
        self._all(lambda group: group.halt())

    def collect(self, part: int) -> tuple[Tally, int]:
        """Return part `part` (0, 1, ...) of the merged tally, and the number of parts. Part 0 must be fetched first."""
        if part == 0:
            self._tally = merge(self._all(whole_tally))
        parts = self._tally.parts(TALLY_VALUES)
        return parts[part], len(parts)

    def announce(self, announcement: Announcement) -> Winners:
        """Announce the result to all groups, and return the winners."""
        return sum(self._all(lambda group: group.announce(announcement)), start=Winners(0, ()))

    def answers(self, first: int, count: int) -> Answers:
        """Return the answers of participants first .. first+count-1, who must belong to one group."""
        answers: Answers = self._group_of(first).answers(first, count)
        return answers

    def texts(self, first: int, count: int) -> tuple[list[KeptText], int]:
        """Return texts of participants first .. first+count-1, who must belong to one group (see its `texts`)."""
        texts: tuple[list[KeptText], int] = self._group_of(first).texts(first, count)
        return texts

    def close(self) -> None:
        """Release all groups."""
        self.assign([])

    def _group_of(self, participant: int) -> RemoteObject:
        groups = self._groups.items()
        return next(group for each, group in groups if each.first <= participant < each.first + each.count)

    def _all(self, call: Callable[[Any], Any]) -> list[Any]:
        calls = {assignment: partial(call, group) for assignment, group in self._groups.items()}
        return list(call_all_or_raise(calls).values())
