"""The rounds of a game on the cluster: create, ask, collect, announce. Returns results and prints nothing.

with Simulation(config, run, key, watch) as simulation:
    simulation.create()
    result = simulation.play(1)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

import numpy as np
from agentscope.message import Msg

from simulation.agents.participant import Participant
from simulation.agents.per_agent_dispatch import whole_tally
from simulation.cluster.agent_class import load_agent_class
from simulation.cluster.cluster import Cluster, Record
from simulation.cluster.membership import ProgressListener
from simulation.errors import AgentNotFound, Ended, RunAborted, SimulationError, UnusableAnswer
from simulation.game.answer_sheet import FAILED, Answers
from simulation.game.rules import Announcement, Game, Question, question_for
from simulation.game.tally import (
    INTERRUPTED,
    RoundResult,
    Tally,
    Times,
    Units,
    Winners,
    announcement_of,
    merge,
    value_counts,
)
from simulation.llm.usage import Usage
from simulation.rpc.channels import install_tls
from simulation.rpc.client import GROUP_DEADLINE_S, RemoteObject, reply_of
from simulation.rpc.cluster_key import ClusterKey
from simulation.rpc.endpoints import Endpoint, GroupAssignment
from simulation.settings import SimulationConfig

FETCHED_AT_ONCE = 250_000  # answers per message
FETCHES_AT_ONCE = 4  # concurrent messages
NOTHING_USED = Usage()


class Simulation:
    """A run on servers that are ready; a context manager that deletes its agents on exit, unless they are kept.

    If a server fails, its participants are recreated on other servers and asked again before the round ends.

    Args:
        config: The settings, with a seed.
        game: The game to play.
        run: The prefix of all remote ids of this run (see `remote_run`).
        key: The cluster key.
        watch: Receives progress and warnings.
        record: Storage for answers; without it, recreated participants start without memory.
        played: Announcements of the rounds played before a resume.
        usage: Usage of those rounds.
    """

    def __init__(
        self,
        config: SimulationConfig,
        game: Game,
        run: str,
        key: ClusterKey,
        watch: ProgressListener,
        record: Record | None = None,
        played: tuple[Announcement, ...] = (),
        usage: Usage = NOTHING_USED,
    ) -> None:
        assert config.seed is not None  # main draws one if none is given
        install_tls(key)
        self.config = config
        self.record = record
        self.game = game
        self.participant_class = load_agent_class(config.agent_class, config.agent_type)
        self.cluster = Cluster(config, run, self.game, self.participant_class, watch, record)
        self._announcements = played
        self._assignments_before: set[GroupAssignment] = set()  # at the start of the round
        self._used_before = usage
        self._used_then: dict[str, Usage] = {}  # usage of each group at the start of the round

    def __enter__(self) -> Simulation:
        self.cluster.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.cluster.__exit__(*error)

    # --- The steps of a game -----------------------------------------------------------------------------------------

    def create(self) -> float:
        """Create moderators, groups and participants; return the seconds taken. Raises RunAborted, Interrupted."""
        started = time.monotonic()
        self.cluster.retry_on_server_loss(lambda: self.cluster.reconcile(len(self._announcements)))
        return time.monotonic() - started

    def play(self, number: int) -> RoundResult:
        """Play and record one round: ask, average, announce. After an interruption, missing answers count as failed.

        Raises RunAborted if too few servers are left, and any error of the record.
        """
        started = time.monotonic()
        self.cluster.begin_round(number)
        self._assignments_before = set(self.cluster.assignments)
        self._used_then = dict(self.cluster.used)
        question = question_for(self.game, number, self._announcements)
        allowed: dict[str, float] = {}

        def ask_average_announce() -> RoundResult:
            tally = self._ask(question, allowed)
            result = self._score(number, tally)
            winners = self._announce(result)
            seconds = round(time.monotonic() - started, 4)  # rounded as in summary.json, so that reports match
            times, reassigned = self._times(seconds), self.reassigned
            result = replace(result, winners=winners, seconds=seconds, times=times, reassigned=reassigned)
            return replace(result, teams=self._record(number))

        result = self.cluster.retry_on_server_loss(ask_average_announce)  # each step does only what is missing
        self._announcements += (announcement_of(result, self.game.scale),)
        return result

    def _ask(self, question: Question, allowed: dict[str, float]) -> Tally:
        """Create what is missing, ask all participants, wait for their answers, and return the tally of all."""
        self.cluster.reconcile(len(self._announcements))
        tokens_each = self._tokens_each(allowed)
        self.cluster.all(lambda moderator: moderator.begin(question, tokens_each))
        self.cluster.wait("answers in", question.round, self.cluster.active_assignments)
        if self.config.dispatch == "agent" and self.game.sampling is not None:
            # moderators end the round; a second wait gets its usage from the groups
            self.cluster.wait("answers in", question.round, self.cluster.active_assignments)
        tally = merge(self.cluster.all(whole_tally).values())
        missing = self.config.participant_num - sum(each.count for each in self.cluster.active_assignments)
        if missing:
            tally += Tally(missing, failures={INTERRUPTED: missing}, ended=Ended.INTERRUPTED)
        if tally.asked != self.config.participant_num:
            raise SimulationError(f"{tally.asked} of {self.config.participant_num} participants were counted")
        return tally

    def _score(self, number: int, tally: Tally) -> RoundResult:
        """Return the average, the winning number and the closest answers; winners and times are still missing."""
        average = tally.average()
        winning_number = self.game.winning_number(average) if average is not None else None
        closest = tally.closest(winning_number) if winning_number is not None else ()
        return RoundResult(number, tally, average, winning_number, closest, Winners(0, ()), 0.0)

    def _announce(self, result: RoundResult) -> Winners:
        """Announce the result to all participants, and return the winners among them."""
        announcement = announcement_of(result, self.game.scale)
        won = self.cluster.all(lambda moderator: moderator.announce(announcement))
        return sum(won.values(), start=Winners(0, ()))

    def _record(self, number: int) -> tuple[tuple[str, Fraction | None], ...]:
        """Record every answer of the round, and return the averages of the teams, if the game has any."""
        teams = Teams(self.game) if self.game.teams is not None else None
        answers = self.answers() if teams is None else teams.watch(self.answers())
        if self.record is not None:
            self.record.write_answers(number, answers, self.game.scale)
        elif teams is not None:
            deque(answers, maxlen=0)  # consume them, to count the teams
        return () if teams is None else teams.averages()

    # --- What the steps need ----------------------------------------------------------------------------------------

    @property
    def moderator_num(self) -> int:
        """Return the number of moderators that have groups."""
        return len({assignment.moderator_server for assignment in self.cluster.assignments})

    @property
    def usage(self) -> Usage:
        """Return the usage of all rounds so far."""
        used = [*self.cluster.used.values()]  # a copy: observers read it from other threads
        now, before = sum(used, start=NOTHING_USED), self._used_before
        answering_s, client_s = now.answering_s + before.answering_s, now.client_s + before.client_s
        return replace(now + before, answering_s=answering_s, client_s=client_s)

    @property
    def reassigned(self) -> int:
        """Return how many participants moved to another server or moderator in this round so far."""
        return sum(
            assignment.count for assignment in self.cluster.assignments if assignment not in self._assignments_before
        )

    def answers(self) -> Iterator[Answers]:
        """Yield the answers of the round just played, in participant order, a bounded number at a time."""
        under_way: deque[Future[Answers]] = deque()
        with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
            for assignment in self.cluster.assignments:
                for first in range(assignment.first, assignment.first + assignment.count, FETCHED_AT_ONCE):
                    count = min(FETCHED_AT_ONCE, assignment.first + assignment.count - first)
                    under_way.append(pool.submit(self._fetch, assignment, first, count))
                    if len(under_way) == FETCHES_AT_ONCE:
                        yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()

    def _fetch(self, assignment: GroupAssignment, first: int, count: int) -> Answers:
        if assignment.server is None:
            return Answers(first, np.full(count, FAILED), [INTERRUPTED])
        answers: Answers = self.cluster.moderator_of(assignment).answers(first, count)
        return answers

    def _times(self, seconds: float) -> Times | None:
        """Return the time breakdown of this round; None with per-agent dispatch or without usage data."""
        used = [
            (self.cluster.used.get(assignment.oid), self._used_then.get(assignment.oid))
            for assignment in self.cluster.active_assignments
        ]
        each = [
            (now.answering_s - (then or NOTHING_USED).answering_s, now.client_s - (then or NOTHING_USED).client_s)
            for now, then in used
            if now is not None
        ]
        if not each or self.config.dispatch == "agent":
            return None
        answering_s, client_s = (sum(part) / len(each) for part in zip(*each, strict=True))
        slowest_s = max(answering for answering, _ in each)
        return Times(answering_s - client_s, client_s, slowest_s - answering_s, max(seconds - slowest_s, 0.0))

    def _tokens_each(self, allowed: dict[str, float]) -> float | None:
        """Return the token budget per participant of the groups that start now; None means no limit.

        Args:
            allowed: Token budgets of the groups that started this round, including lost ones; the new groups are added.
        """
        if self.config.max_tokens is None:
            return None
        living = {assignment.oid: assignment.count for assignment in self.cluster.active_assignments}
        before = self._used_before.tokens + sum(used.tokens for used in self._used_then.values())
        promised = sum(tokens for oid, tokens in allowed.items() if oid in living)
        lost = sum(self._used_now(oid) for oid in allowed if oid not in living)
        left = max(self.config.max_tokens - before - promised - lost, 0.0)
        new = {oid: count for oid, count in living.items() if oid not in allowed}
        each = left / max(sum(new.values()), 1)
        allowed |= {oid: each * count for oid, count in new.items()}
        return each

    def _used_now(self, oid: str) -> int:
        """Return the tokens a group has used in this round."""
        return self.cluster.used.get(oid, NOTHING_USED).tokens - self._used_then.get(oid, NOTHING_USED).tokens


class Teams:
    """Running averages of the teams of a game, counted as the answers stream through."""

    def __init__(self, game: Game) -> None:
        assert game.cast is not None
        self._cast = game.cast
        self._parts = next(parts for parts in game.cast.groupings if parts.topic == game.teams)
        self._tallies = [Tally(0)] * len(self._parts.names)

    def watch(self, answers: Iterable[Answers]) -> Iterator[Answers]:
        """Yield the same answers, and count them."""
        waiting: list[tuple[Units, Units]] = []
        for part in answers:
            waiting.append((self._cast.part_indices(self._parts, part.first, len(part.units)), part.units))
            if sum(len(units) for _, units in waiting) >= FETCHED_AT_ONCE:
                self._count(waiting)
            yield part
        self._count(waiting)

    def _count(self, waiting: list[tuple[Units, Units]]) -> None:
        """Count the waiting parts in one batch."""
        if not waiting:
            return
        places, units = (np.concatenate(each) for each in zip(*waiting, strict=True))
        for team in range(len(self._tallies)):
            answered = units[(units >= 0) & (places == team)]
            self._tallies[team] += Tally(len(answered), *value_counts(answered))
        waiting.clear()

    def averages(self) -> tuple[tuple[str, Fraction | None], ...]:
        """Return each team with its average in units; None for a team without answers."""
        return tuple((name, tally.average()) for name, tally in zip(self._parts.names, self._tallies, strict=True))


def ask(server: Endpoint, oid: str, key: ClusterKey, question: Question) -> str:
    """Ask one participant of a run with kept agents a question outside the game, and return its reply.

    Args:
        server: The participant's server.
        oid: Its remote id, `<group id>/<index>`.
        key: The cluster key.
        question: The question (round 0), with the announcements of the game.

    Raises:
        ClusterError: The server does not answer or no longer holds the participant.
        RunAborted: The participant failed to reply.
    """
    install_tls(key)
    message = Msg("user", question.text, "user", metadata=asdict(question))
    try:
        reply = reply_of(RemoteObject(Participant, oid, server, GROUP_DEADLINE_S), message)
        return (reply.get_text_content() or "") if isinstance(reply, Msg) else str(reply)
    except AgentNotFound:
        raise AgentNotFound(
            f"{oid} is no longer on {server}: agents stay only after a run with --keep-agents, until the next run or "
            "the end of the servers"
        ) from None
    except UnusableAnswer as error:
        raise RunAborted(f"participant {oid.rpartition('/')[2]} did not reply: {error}") from None
