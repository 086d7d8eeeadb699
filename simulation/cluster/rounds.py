"""The rounds of a game on the cluster: ask participants, average the answers, announce the result. Prints nothing."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
from agentscope.message import Msg

from simulation.agents.group import whole_tally
from simulation.agents.participant import Participant
from simulation.cluster.cluster import Cluster, Record, Replay
from simulation.cluster.membership import ProgressListener
from simulation.errors import AgentNotFound, Ended, RunAborted, SimulationError, UnusableAnswer
from simulation.game.answer_sheet import FAILED, Answers
from simulation.game.game import Game
from simulation.game.rules import Announcement, Question, question_for
from simulation.game.tally import INTERRUPTED, RoundResult, Tally, Times, Winners, announcement_of, merge, score
from simulation.llm.prompts import KeptText
from simulation.llm.responses import Usage
from simulation.rpc.client import SHORT_CALL_TIMEOUT_S, RemoteObject, reply_of
from simulation.rpc.endpoints import Endpoint, GroupAssignment
from simulation.settings import SimulationConfig

FETCHES_AT_ONCE = 4  # number of concurrent calls that fetch answers
NO_USAGE = Usage()


class Simulation:
    """A run on servers that are ready. On exit, its agents are deleted unless they are kept (see --keep-agents).

        with Simulation(config, game, run, watch) as simulation:
            simulation.create()
            for number in range(1, rounds + 1):
                result = simulation.play(number)

    Call `install_tls` first. If a server fails, other servers take over its participants, in the same round.
    """

    def __init__(
        self,
        config: SimulationConfig,
        game: Game,
        run: str,  # the prefix of all remote ids (see `remote_run`)
        watch: ProgressListener,
        record: Record | None = None,  # if None, recreated participants do not receive earlier answers
        played: tuple[Announcement, ...] = (),  # announcements of the rounds before a resume
        usage: Usage = NO_USAGE,  # usage of the rounds before a resume
        recorded: Mapping[str, Any] = MappingProxyType({}),  # for surrogates (see `read_recorded`)
        replay: Replay | None = None,  # recorded texts to take answers from
    ) -> None:
        assert config.seed is not None  # main generates a seed if the user gives none
        self.config, self.game, self.record = config, game, record
        self.cluster = Cluster(config, run, game, watch, record, recorded, replay)
        self._announcements, self._usage_before_resume = played, usage
        self._begin_round(0)

    def __enter__(self) -> "Simulation":
        self.cluster.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.cluster.__exit__(*error)

    def create(self) -> float:
        """Create moderators, groups and participants. Return the seconds taken. Raises RunAborted or Interrupted."""
        started = time.monotonic()
        self.cluster.retry_on_server_loss(lambda: self.cluster.reconcile(len(self._announcements)))
        return time.monotonic() - started

    def play(self, number: int) -> RoundResult:
        """Play and record one round. After an interruption, missing answers count as failed. Raises RunAborted."""
        self._begin_round(number)
        question = question_for(self.game, number, self._announcements)

        def ask_average_announce() -> RoundResult:  # a repeated call does only what is still missing
            result = score(self.game, number, self._ask(question))
            return self._record(self._announce(result))

        result = self.cluster.retry_on_server_loss(ask_average_announce)
        self._announcements += (announcement_of(result, self.game),)
        return result

    def ask_again(self, number: int, announcements: tuple[Announcement, ...]) -> Iterator[Answers]:
        """Ask a recorded round again, after the recorded `announcements` and answers. Yield the answers in order."""
        self._begin_round(number)
        self._announcements = announcements
        question = question_for(self.game, number, announcements)

        def ask() -> Tally:
            self.cluster.reconcile(number - 1)
            self.cluster.restore_memory(number - 1)
            return self._ask(question)

        self.cluster.retry_on_server_loss(ask)
        return self.answers()

    def change(self, config: SimulationConfig, paused: bool) -> None:
        """Change settings of the run in progress, from another thread. A token budget applies from the next round."""
        self.config = config
        self.cluster.change(config, paused)

    def _begin_round(self, number: int) -> None:
        self._started = time.monotonic()
        if number > 0:
            self.cluster.begin_round(number)
        self._assignments_then = set(self.cluster.assignments)  # at the start of the round
        self._used_then = dict(self.cluster.used)
        self._allowed: dict[str, float] = {}  # token budgets of all groups of this round, including lost groups

    def _ask(self, question: Question) -> Tally:
        """Create missing groups, ask all participants, wait for their answers, and return the tally of all answers."""
        self.cluster.reconcile(len(self._announcements))
        assignments, tokens_each = self.cluster.active_assignments, self._tokens_each()
        self.cluster.all(lambda moderator: moderator.begin(question, tokens_each))
        self.cluster.wait("answers in", question.round, assignments)
        tally = merge(self.cluster.all(whole_tally).values())
        missing = self.config.participant_num - sum(each.count for each in assignments)
        if missing:
            tally += Tally(missing, failures={INTERRUPTED: missing}, ended=Ended.INTERRUPTED)
        if tally.asked != self.config.participant_num:
            raise SimulationError(f"{tally.asked} of {self.config.participant_num} participants were counted")
        return tally

    def _announce(self, result: RoundResult) -> RoundResult:
        """Announce the result to all groups. Return the result, completed with the winners and the times."""
        announcement = announcement_of(result, self.game)
        won = self.cluster.all(lambda moderator: moderator.announce(announcement))
        seconds = round(time.monotonic() - self._started, 4)  # rounded as in summary.json, so that reports match
        winners, times = sum(won.values(), start=Winners(0, ())), self._times(seconds)
        return replace(result, winners=winners, seconds=seconds, times=times, reassigned=self.reassigned)

    def _record(self, result: RoundResult) -> RoundResult:
        """Record answers and texts of the round. Return the result, completed with the averages of teams, if any."""
        answers, sums = self.answers(), dict[str, tuple[int, int]]()
        if self.game.teams is not None:
            answers = count_teams(self.game, answers, sums)
        if self.record is not None:
            self.record.write_answers(result, answers, self.game)
            if self.game.llm is not None and self.game.llm.keep_texts != "none":
                result = replace(result, texts=self.record.write_texts(result.round, self.texts()))
        averages = {name: Fraction(total, count * self.game.scale) for name, (total, count) in sums.items() if count}
        return replace(result, teams=tuple((name, averages.get(name)) for name in sums))

    @property
    def moderator_num(self) -> int:
        """Return the number of moderators that have groups."""
        return len({assignment.moderator_server for assignment in self.cluster.active_assignments})

    @property
    def usage(self) -> Usage:
        """Return the usage of all rounds so far. Thread-safe."""
        now, before = sum([*self.cluster.used.values()], start=NO_USAGE), self._usage_before_resume
        answering_s, client_s = now.answering_s + before.answering_s, now.client_s + before.client_s
        return replace(now + before, answering_s=answering_s, client_s=client_s)

    @property
    def reassigned(self) -> int:
        """Return how many participants have moved to another server or moderator since the round began."""
        return sum(each.count for each in self.cluster.assignments if each not in self._assignments_then)

    def answers(self) -> Iterator[Answers]:
        """Yield the answers of the latest round in participant order, in pieces of bounded size."""

        def fetch(assignment: GroupAssignment, first: int, count: int) -> Answers:
            if assignment.server is None:
                return Answers(first, np.full(count, FAILED), [INTERRUPTED])
            answers: Answers = self.cluster.moderators[assignment.moderator_server].answers(first, count)
            return answers

        fetches: deque[Future[Answers]] = deque()
        with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
            for assignment in self.cluster.assignments:
                for first, count in assignment.chunks():
                    fetches.append(pool.submit(fetch, assignment, first, count))
                    if len(fetches) == FETCHES_AT_ONCE:
                        yield fetches.popleft().result()
            for each in fetches:
                yield each.result()

    def texts(self) -> Iterator[list[KeptText]]:
        """Yield the kept texts of the latest round in participant order, in pieces of bounded size."""
        for assignment in self.cluster.active_assignments:
            first, stop = assignment.first, assignment.first + assignment.count
            while first < stop:
                moderator = self.cluster.moderators[assignment.moderator_server]
                texts, first = moderator.texts(first, stop - first)
                yield texts

    def _times(self, seconds: float) -> Times | None:
        """Split the round's duration `seconds` by activity. Return None with --dispatch agent or without usage data."""
        used = self.cluster.used
        oids = [each.oid for each in self.cluster.active_assignments if each.oid in used]
        spent = [(used[oid], self._used_then.get(oid, NO_USAGE)) for oid in oids]
        times = [(now.answering_s - then.answering_s, now.client_s - then.client_s) for now, then in spent]
        if not times or self.config.dispatch == "agent":
            return None
        answering_s, client_s = np.mean(times, axis=0).tolist()
        slowest_s = max(answering for answering, _ in times)
        return Times(answering_s - client_s, client_s, slowest_s - answering_s, max(seconds - slowest_s, 0.0))

    def _tokens_each(self) -> float | None:
        """Return the token budget per participant that asks a model, for the groups that start the round now."""
        if self.config.max_tokens is None:
            return None
        asking = self.game.population.asking
        counts = {each.oid: asking(each.first, each.count) for each in self.cluster.active_assignments}
        spent: dict[str, float] = {oid: used.tokens for oid, used in self.cluster.used.items()}
        for oid in self._allowed.keys() & counts.keys():  # these groups may still spend their whole budget
            spent[oid] = self._used_then.get(oid, NO_USAGE).tokens + self._allowed[oid]
        left = max(self.config.max_tokens - self._usage_before_resume.tokens - sum(spent.values()), 0.0)
        new = {oid: count for oid, count in counts.items() if oid not in self._allowed}
        each = left / max(sum(new.values()), 1)
        self._allowed |= {oid: each * count for oid, count in new.items()}
        return each


def count_teams(game: Game, answers: Iterator[Answers], sums: dict[str, tuple[int, int]]) -> Iterator[Answers]:
    """Yield `answers` unchanged. Meanwhile, store the exact sum and the number of each team's answers in `sums`."""
    teams = next(each for each in game.population.groupings if each.topic == game.teams)
    sums.update(dict.fromkeys(teams.names, (0, 0)))
    for part in answers:
        indices = teams.name_indices(part.first, len(part.units))
        for number, name in enumerate(teams.names):
            units = part.units[(part.units >= 0) & (indices == number)]
            total = sum(units.tolist())  # exact: the sum may exceed 64 bits
            sums[name] = (sums[name][0] + total, sums[name][1] + len(units))
        yield part


def ask(server: Endpoint, oid: str, question: Question) -> str:
    """Ask a kept participant, `<group id>/<index>`, a question outside the game. Raises ClusterError or RunAborted."""
    message = Msg("user", question.text, "user", metadata=asdict(question))
    try:
        reply = reply_of(RemoteObject(Participant, oid, server, SHORT_CALL_TIMEOUT_S), message)
        return (reply.get_text_content() or "") if isinstance(reply, Msg) else str(reply)
    except AgentNotFound:
        until = "agents stay only after a run with --keep-agents, until the next run or the end of the servers"
        raise AgentNotFound(f"{oid} is no longer on {server}: {until}") from None
    except UnusableAnswer as error:
        raise RunAborted(f"participant {oid.rpartition('/')[2]} did not reply: {error}") from None
