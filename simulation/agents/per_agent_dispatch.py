"""Dispatch of questions through one proxy per participant, as in AgentScope's examples.

It exists for comparison. Each answer needs two or more remote calls, and occupies a thread while the participant waits.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from simulation.agents.participant import Participant, message_of
from simulation.errors import one_line
from simulation.game.rules import Question
from simulation.rpc.client import RemoteObject, reply_of
from simulation.rpc.endpoints import GroupAssignment

THREADS = 32  # number of participants of a group that are asked at the same time


@dataclass(eq=False)
class PerAgentDispatch:
    """The threads that ask the participants of one group, one participant per call. The group records the answers."""

    assignment: GroupAssignment
    timeout_s: float
    stopped = False  # set to True to ask no further participants
    error = ""  # why a participant could not be asked
    round = 0

    def begin(self, question: Question) -> None:
        """Start threads that ask all participants. Do nothing if this round or a later round has already begun."""
        if question.round > self.round:
            self.round = question.round
            first, count = self.assignment.first, self.assignment.count
            indices = iter(range(first, first + count))
            for _ in range(min(THREADS, count)):
                threading.Thread(target=self._ask, args=(indices, question), daemon=True).start()

    def _ask(self, indices: Iterator[int], question: Question) -> None:
        """Ask participants until the iterator `indices`, which all threads share, is exhausted."""
        group = self.assignment
        assert group.server is not None  # a group without a server is assigned to no moderator
        try:
            for index in indices:
                if self.stopped or question.round != self.round:
                    return
                proxy = RemoteObject(Participant, f"{group.oid}/{index}", group.server, self.timeout_s)
                reply_of(proxy, message_of(question), index, method="answer_round")
        except Exception as error:  # noqa: BLE001 - top level of the thread: the moderator reports the error
            self.error = self.error or one_line(error)
