"""Dispatch of questions through one proxy per participant, as in AgentScope's examples.

It exists for comparison. Each answer needs two or more remote calls, and occupies a thread while the participant waits.
"""

import threading
from collections.abc import Iterator

from simulation.agents.participant import Participant, message_of
from simulation.errors import one_line
from simulation.game.rules import Question
from simulation.rpc.client import RemoteObject, reply_of
from simulation.rpc.endpoints import GroupAssignment

THREADS = 32  # number of participants of a group that are asked at the same time


class PerAgentDispatch:
    """The threads that ask the participants of one group, one participant per call. The group records the answers."""

    def __init__(self, assignment: GroupAssignment, timeout_s: float) -> None:
        self.stopped = False  # set to True to ask no further participants
        self.error = ""  # why a participant could not be asked
        self._assignment = assignment
        self._timeout_s = timeout_s
        self._round = 0

    def begin(self, question: Question) -> None:
        """Start threads that ask all participants. Do nothing if this round or a later round has already begun."""
        if question.round > self._round:
            self._round = question.round
            first, count = self._assignment.first, self._assignment.count
            arguments = (iter(range(first, first + count)), question)
            for _ in range(min(THREADS, count)):
                threading.Thread(target=self._ask, args=arguments, daemon=True).start()

    def _ask(self, indices: Iterator[int], question: Question) -> None:
        """Ask participants until the iterator `indices`, which all threads share, is exhausted."""
        assert self._assignment.server is not None  # a group without a server is assigned to no moderator
        try:
            for index in indices:
                if self.stopped or question.round != self._round:
                    return
                agent_id = f"{self._assignment.oid}/{index}"
                proxy = RemoteObject(Participant, agent_id, self._assignment.server, self._timeout_s)
                reply_of(proxy, message_of(question), index, method="answer_round")
        except Exception as error:  # noqa: BLE001 - top level of the thread: the moderator reports the error
            self.error = self.error or one_line(error)
