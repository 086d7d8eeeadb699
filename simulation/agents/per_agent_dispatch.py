"""Dispatch of questions through one proxy per participant, as in AgentScope's examples."""

import threading
from typing import Any

from simulation.agents.group import AskedGroup
from simulation.agents.participant import Outcome, Participant, message_of
from simulation.errors import UnusableAnswer, failure_of
from simulation.game.answer_sheet import AnswerSheet
from simulation.game.rules import Question
from simulation.game.tally import Tally, merge
from simulation.rpc.client import RemoteObject, reply_of
from simulation.rpc.endpoints import GroupAssignment

THREADS = 32  # number of participants of a group that are asked at the same time


def whole_tally(group: Any) -> Tally:
    """Fetch the tally of a group or moderator part by part. Return the merged tally."""
    first_part, parts = group.collect(0)
    return merge([first_part, *(group.collect(part)[0] for part in range(1, parts))])


class OneByOne(AskedGroup):
    """A group whose participants are asked one by one, each through its own proxy, as in AgentScope's examples.

    This class exists for comparison: each answer costs three calls and a thread, whatever the participant does.
    """

    def __init__(self, group: RemoteObject, assignment: GroupAssignment, timeout_s: float) -> None:
        super().__init__(assignment.oid, assignment.first, assignment.count)
        self._group = group
        self._assignment = assignment
        self._timeout_s = timeout_s

    def begin(self, question: Question, tokens_each: float | None = None) -> None:
        self._group.allow(question.round, tokens_each)  # outside the lock, as this call waits for the server
        super().begin(question)

    def _ask_all(self, question: Question, sheet: AnswerSheet) -> None:
        arguments = (iter(range(self.count)), question, sheet)
        for _ in range(min(THREADS, self.count)):
            threading.Thread(target=self._ask_in_thread, args=arguments, daemon=True).start()

    def _ask(self, offset: int, question: Question) -> Outcome:
        assert self._assignment.server is not None
        agent_id = f"{self.oid}/{self.first + offset}"
        proxy = RemoteObject(Participant, agent_id, self._assignment.server, self._timeout_s)
        try:
            outcome: Outcome = reply_of(proxy, message_of(question), "play").metadata
            return outcome
        except UnusableAnswer as error:  # raised on the server outside of `play`
            return {"failure": failure_of(error)}
