"""A group in this process: halting, closing, and participants that misbehave towards their event loop."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import weakref
from dataclasses import asdict, replace
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
from agentscope.agents import AgentBase
from agentscope.message import Msg
from agentscope.rpc import RpcMeta
from conftest import until

from games.average import Average
from participant import RandomParticipant
from simulation.agents import hosted_participants, per_agent_dispatch
from simulation.agents.group import ParticipantGroup, whole_tally
from simulation.agents.participant import Participant, message_of
from simulation.agents.per_agent_dispatch import PerAgentDispatch
from simulation.cluster.agent_class import serialize_agent_class
from simulation.game.answer_sheet import AnswerSheet
from simulation.game.rules import Announcement, Question, draw, question_for
from simulation.game.tally import INTERRUPTED
from simulation.hosts.agent_server import SimulationServicer
from simulation.rpc.endpoints import Endpoint, GroupAssignment
from simulation.settings import SimulationConfig

GAME = Average(7, 100, 0, 0.0)
ANNOUNCED = tuple(Announcement(number, 50.0, 50.0, (50,)) for number in (1, 2))
ASSIGNMENT = GroupAssignment("run/group-0", 0, 4, Endpoint("localhost", 1), Endpoint("localhost", 2))


class Sleeper(Participant):
    async def answer(self, question):
        await asyncio.sleep(600)


class Unruly(Participant):
    """Leaves a task behind that ends the event loop, if nobody sees to it."""

    async def answer(self, question):
        async def leave():
            raise SystemExit(1)

        self.task = asyncio.get_running_loop().create_task(leave())
        await asyncio.sleep(0.05)
        return 5


@pytest.fixture
def group_of():
    groups = []

    def make(cls, count, game=GAME):
        groups.append(ParticipantGroup("run/group-0", 0, count, game, serialize_agent_class(cls), 4, 60.0))
        until(lambda: groups[-1].progress(1.0).finished, 10, "built")
        return groups[-1]

    yield make
    for group in groups:
        group.close()
    until(lambda: "run/group-0" not in [thread.name for thread in threading.enumerate()], 10, "ended")


def test_participants_are_agents_with_their_own_proxies(group_of):
    group = group_of(RandomParticipant, 10)
    agent = group.participant(3)
    assert agent.agent_id == "run/group-0/3" and agent.name == "P3" and agent.memory is None
    asked = Msg("user", "Which number?", "user", metadata=asdict(Question(0, "?", 100, ANNOUNCED)))
    assert agent.reply(asked).metadata == {"answer": draw(GAME, 2, 3)}
    assert group.participant(10) is None


class Plan:
    """Part of a cycle."""

    def __init__(self):
        self.itself = self


class Planning(Participant):
    """Has a new plan each round."""

    async def answer(self, question):
        self.plan = Plan()
        await self.think(0.01)
        return 1


class Stuck(Participant):
    def reply(self, x):
        time.sleep(4)
        return Msg(self.name, "1", "assistant")


class Slow(Participant):
    def reply(self, x):
        sys.modules["test_group"].REPLYING.append(self.index)
        time.sleep(0.02)
        return Msg(self.name, "1", "assistant")


REPLYING = []  # the participants of one test whose reply has begun


class Named(Participant):
    """Sets itself what AgentBase would set, and is part of a cycle."""

    def __init__(self, index, game):
        super().__init__(index, game)
        self.name = f"Ms. {index}"
        self.itself = self

    async def answer(self, question):
        await self.think(0.01)
        return self.index


TOGETHER = threading.Barrier(4)


class Blocking(Participant):
    def reply(self, x=None):
        sys.modules["test_group"].TOGETHER.wait(60)  # by name, as the class travels with all that it names itself
        if self.index == 3:
            raise SystemExit(3)
        return Msg(self.name, f"Not {x.metadata['round']}: my number is {self.index}", "assistant")


def test_agent_attributes_are_created_on_first_use(group_of):
    group = group_of(Named, 10)
    agent = group.participant(3)
    assert isinstance(agent, AgentBase) and set(vars(agent)) == {"index", "game", "name", "itself", "_home"}
    seen = []
    agent.register_hook("pre_reply", "seen", lambda self, args, kwargs: seen.append(args))
    assert agent.reply(None).name == agent.name == "Ms. 3" and seen == [(None,)]
    assert agent.memory is None and agent.sys_prompt is None and agent._audience is None
    with pytest.raises(AttributeError, match="'Named' object has no attribute 'model'"):
        _ = agent.model
    assert set(vars(group.participant(4))) == {"index", "game", "name", "itself", "_home"}


class Shy(Participant):
    """Has what AgentBase would set, in the ways a class may have it."""

    sys_prompt = "You are shy."

    @property
    def memory(self):
        return f"of {self.index}"

    async def answer(self, question):
        return len(self.sys_prompt) + len(self.memory)


def test_attributes_of_a_custom_class_are_kept(group_of):
    agent = group_of(Shy, 10).participant(3)
    assert agent._audience is None and agent.name == "P3"  # AgentBase's own, made now
    assert (agent.sys_prompt, agent.memory) == ("You are shy.", "of 3")
    assert agent.reply(None).get_text_content() == "16"


def test_participants_in_reference_cycles_are_freed(group_of):
    group = group_of(Named, 10)
    group.begin(question_for(GAME, 1, ()))
    until(lambda: group.progress(1.0).finished, 10, "answered")
    agents = [weakref.ref(group.participant(index)) for index in range(10)]
    group.close()
    gc.collect()
    assert [agent() for agent in agents] == [None] * 10


def test_blocking_replies_run_in_threads_and_fail_separately(group_of):
    group = group_of(Blocking, 40)
    group.begin(question_for(GAME, 1, ()))
    until(lambda: group.progress(1.0).finished, 10, "answered")
    tally = whole_tally(group)
    assert tally.answered == 39 and tally.failures == {"SystemExit: 3": 1}
    assert group.answers(0, 40).units.tolist() == [*range(3), -2, *range(4, 40)]


def test_reference_cycles_of_earlier_rounds_are_freed(group_of):
    group = group_of(Planning, 100)
    for number in range(1, 6):
        group.begin(question_for(GAME, number, ()))
        until(lambda: group.progress(1.0).finished, 10, "answered")
    assert sum(type(each).__name__ == "Plan" for each in gc.get_objects()) <= 200  # of this round, and the last one


def test_halting_does_not_wait_for_blocking_participants(group_of):
    group = group_of(Stuck, 10)
    group.begin(question_for(GAME, 1, ()))
    group.halt()
    assert group.progress().finished and whole_tally(group).failures == {INTERRUPTED: 10}


def test_no_other_participant_is_asked_after_a_halt(group_of):
    group = group_of(Slow, 1000)
    group.begin(question_for(GAME, 1, ()))
    until(lambda: REPLYING, 10, "begun")
    group.halt()
    asked = len(REPLYING)
    assert group.progress().finished and whole_tally(group).failures[INTERRUPTED] >= 1000 - asked
    time.sleep(0.2)
    assert len(REPLYING) <= asked + 4  # the threads may each have taken another one by then


def test_a_participant_without_a_group_can_be_asked():
    asked = message_of(question_for(GAME, 1, ()))
    assert RandomParticipant(3, GAME).reply(asked).get_text_content() == str(float(draw(GAME, 1, 3)))


def test_a_question_outside_the_game_draws_no_new_number(group_of):
    alone, group = RandomParticipant(3, GAME), group_of(RandomParticipant, 10, replace(GAME, sleep_time_s=600.0))
    for announced in range(3):
        asked = message_of(Question(0, "?", 100, ANNOUNCED[:announced]))
        expected = str(float(draw(GAME, announced, 3))) if announced else "no number yet"
        assert alone.reply(asked).get_text_content() == expected
    group.begin(question_for(GAME, 1, ANNOUNCED[:1]))
    group.halt()
    assert group.participant(3).reply(message_of(Question(0, "?", 100, ANNOUNCED[:1]))).content == "no number yet"
    group.begin(question_for(GAME, 2, ANNOUNCED[:1]))
    group.halt()
    assert group.participant(3).reply(message_of(Question(0, "?", 100, ANNOUNCED))).content == str(draw(GAME, 1, 3) / 1)


def expected_draws(round_number, index, count=3, seed=GAME.seed):
    """What `rng.integers(10**9)` gives: the documented key and counter of the Philox."""
    key, counter = seed | round_number << 64, index << 192
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).integers(10**9, size=count).tolist()


class Drawing(Participant):
    """Draws in each way it can be asked, several times in an answer."""

    def __init__(self, index, game):
        super().__init__(index, game)
        self.drawn = [self.rng.integers(10**9)]
        self.drawn += [self.rng.integers(10**9)]
        if index == 2:
            raise ValueError("after it has drawn")

    def recall(self, numbers):
        self.recalled = self.rng.integers(10**9)

    async def answer(self, question):
        drawn = [self.rng.integers(10**9)]
        await self.think(0.01)
        drawn += [self.rng.integers(10**9)]
        await asyncio.sleep(0.01)
        drawn += [await asyncio.get_running_loop().create_task(self.late())]
        self.drawn = drawn
        return 50

    async def late(self):
        return self.rng.integers(10**9)


class Blocked(Participant):
    def reply(self, x=None):
        first = [self.rng.integers(10**9)]
        time.sleep(0.001)
        self.drawn = first + self.rng.integers(10**9, size=2).tolist()
        return Msg(self.name, "50", "assistant")


@pytest.mark.parametrize("cls", [Drawing, Blocked])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_random_numbers_depend_on_seed_round_and_index_alone(group_of, cls, one_by_one):
    group = group_of(cls, 50)
    agents = [group.participant(index) for index in range(50) if index != 2]
    if cls is Drawing:
        assert [agent.drawn for agent in agents] == [expected_draws(0, agent.index, 2) for agent in agents]
        group.remember(0, np.zeros((1, 50)))
        assert agents[7].recalled == expected_draws(0, agents[7].index)[0]
    for number in (1, 2):
        question = question_for(GAME, number, ())
        group.begin(question, one_by_one=one_by_one)
        for index in range(50) if one_by_one else ():
            group.participant(index).answer_round(message_of(question), index)
        until(lambda: group.progress(1.0).finished, 10, "answered")
        assert [agent.drawn for agent in agents] == [expected_draws(number, agent.index) for agent in agents]
        assert not any("_rng" in vars(agent) for agent in agents)  # all are dropped
        agents[7].reply(None)  # outside the game
        assert agents[7].drawn == expected_draws(0, agents[7].index)
        vars(agents[7]).pop("_rng")  # as the server does before each call


def test_random_numbers_without_a_group_are_those_of_round_0():
    agent = Blocked(3, replace(GAME, seed=2**64 - 1))
    assert [agent.rng.integers(10**9) for _ in range(3)] == expected_draws(0, 3, seed=2**64 - 1)


def test_a_class_may_have_its_own_rng(group_of):
    class Own(Participant):
        def __init__(self, index, game):
            super().__init__(index, game)
            self.rng = range(index, 100)

        async def answer(self, question):
            return self.rng[0]

    group = group_of(Own, 10)
    group.begin(question_for(GAME, 1, ()))
    until(lambda: group.progress(1.0).finished, 10, "answered")
    assert group.answers(0, 10).units.tolist() == list(range(10))


class Sometimes(Participant):
    async def answer(self, question):
        if self.index % 2:
            raise ValueError("no")
        return 5


@pytest.mark.parametrize("cls", [Sometimes, Blocking])
def test_outcomes_are_recorded_one_at_a_time(group_of, monkeypatch, cls):
    """Threads and the event loop record at the same time: without the lock, a count would be lost at times."""
    group, owned = group_of(cls, 8), []
    for name in ("record", "record_many", "fail"):
        whole = getattr(AnswerSheet, name)

        def note(sheet, *arguments, whole=whole):
            owned.append(group._changed._is_owned())
            return whole(sheet, *arguments)

        monkeypatch.setattr(AnswerSheet, name, note)
    group.begin(question_for(GAME, 1, ()))
    until(lambda: group.progress(1.0).finished, 10, "answered")
    assert owned and all(owned)


@pytest.mark.parametrize("attempt", range(10))
def test_halting_at_any_moment_loses_no_participant(group_of, attempt):
    group = group_of(Sleeper, 2000)
    group.begin(question_for(GAME, 1, ()))
    threading.Event().wait(attempt * 0.002)
    group.halt()
    assert group.progress().finished and group.collect(0)[0].failures == {INTERRUPTED: 2000}
    group.begin(question_for(GAME, 2, ()))  # and it can go on
    group.halt()
    assert group.progress().finished


def test_sys_exit_in_a_task_does_not_end_the_server(group_of):
    group = group_of(Unruly, 20)
    group.begin(question_for(GAME, 1, ()))
    until(lambda: group.progress(1.0).finished, 10, "answered")
    assert group.collect(0)[0].answered == 20


class Meanwhile:
    """Makes something; while it makes the first one, the same call is made in another thread.

    That thread has to wait, which no test can wait for: where nothing holds it up, it ends within a moment.
    """

    def __init__(self, make, call):
        self.made = 0
        self._make = make
        self._thread = threading.Thread(target=call)

    def __call__(self, *arguments):
        self.made += 1
        if self.made == 1:
            self._thread.start()
            self._thread.join(0.3)
        return self._make(*arguments)

    def end(self):
        self._thread.join()
        return self.made


def test_concurrent_begins_start_a_round_once(group_of, monkeypatch):
    group = group_of(RandomParticipant, 1000)
    meanwhile = Meanwhile(AnswerSheet, lambda: group.begin(question_for(GAME, 1, ())))
    monkeypatch.setattr("simulation.agents.group.AnswerSheet", meanwhile)
    group.begin(question_for(GAME, 1, ()))
    assert meanwhile.end() == 1
    until(lambda: group.progress(1.0).finished, 10, "answered")
    group.begin(question_for(GAME, 1, ()))  # once more, when it is over
    assert group.progress().finished and whole_tally(group).answered == 1000 and meanwhile.made == 1


class Asked(Participant):
    """Counts how often it is asked, and calls itself what others do, too."""

    def __init__(self, index, game):
        super().__init__(index, game)
        self.place, self.index, self.asked = index, 0, 0

    async def answer(self, question):
        self.asked += 1
        while question.round == 1 and not sys.modules["test_group"].OPEN.is_set():
            await self.think(0.01)
        if self.place == 3:
            raise OverflowError(f"at {self.asked}")
        return self.place + self.asked


OPEN = threading.Event()


@pytest.fixture
def dispatch_to(monkeypatch):
    """Make the dispatch of a moderator, whose proxies lead to the participants of a group in this process."""

    def make(group):
        agent_of = lambda cls, oid, server, timeout_s: group.participant(int(oid.rpartition("/")[2]))  # noqa: E731
        monkeypatch.setattr(per_agent_dispatch, "RemoteObject", agent_of)
        call = lambda agent, message, index, method: getattr(agent, method)(message, index)  # noqa: E731
        monkeypatch.setattr(per_agent_dispatch, "reply_of", call)
        return PerAgentDispatch(ASSIGNMENT, 1.0)

    return make


class Bare(Participant):
    """Calls no __init__ of its base, so that it has neither index nor game."""

    def __init__(self, *_):
        self.mine = 3

    async def answer(self, question):
        return self.mine


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_participant_without_the_attributes_of_its_base_answers(group_of, one_by_one):
    group, question = group_of(Bare, 2), question_for(GAME, 1, ())
    group.begin(question, one_by_one=one_by_one)
    for index in range(2 if one_by_one else 0):
        group.participant(index).answer_round(message_of(question), index)
    until(lambda: group.progress(1.0).finished, 10, "answered")
    assert group.collect(0)[0].answered == 2


def test_participants_asked_one_by_one_are_asked_once_in_each_round(group_of, dispatch_to):
    group = group_of(Asked, 4)
    for number in (1, 2):
        question = question_for(GAME, number, ())
        moderators = [dispatch_to(group) for _ in range(2)]  # the second one as the successor of a lost one
        for moderator in moderators * 2:
            group.begin(question, one_by_one=True)
            moderator.begin(question)
        until(lambda: all(group.participant(index).asked == number for index in range(4)), 10, "asked")  # noqa: B023
        OPEN.set()
        until(lambda: group.progress(1.0).finished, 10, "answered")
        said = group.answers(0, 4)
        assert said.units.tolist() == [number, 1 + number, 2 + number, -2]
        assert said.causes == [f"OverflowError: at {number}"]
        for index in range(4):
            group.participant(index).answer_round(message_of(question), index)  # when it is over, too
            group.participant(index).answer_round(message_of(question_for(GAME, 1, ())), index)
        assert [group.participant(index).asked for index in range(4)] == [number] * 4
        assert not any(moderator.error for moderator in moderators)


def test_a_stopped_dispatch_asks_no_other_participant(group_of, dispatch_to):
    OPEN.clear()
    group = group_of(Asked, 4)
    question, dispatch = question_for(GAME, 1, ()), dispatch_to(group)
    group.begin(question, one_by_one=True)
    dispatch.stopped = True
    dispatch.begin(question)
    group.halt()
    group.participant(0).answer_round(message_of(question), 0)
    assert whole_tally(group).failures == {INTERRUPTED: 4} and group.participant(0).asked == 0


def test_a_failure_that_cannot_be_recorded_is_reported(group_of, dispatch_to, monkeypatch):
    monkeypatch.setattr(hosted_participants, "ask_in_thread", lambda participant, question, game: -5)
    group, question = group_of(Slow, 4), question_for(GAME, 1, ())
    group.begin(question)
    error = until(lambda: group.progress(1.0).error, 10, "reported")
    assert error == "group run/group-0: ValueError: an answer of -5 units"
    group = group_of(Slow, 4)
    group.begin(question, one_by_one=True)
    dispatch = dispatch_to(group)
    dispatch.begin(question)
    assert until(lambda: dispatch.error, 10, "reported") == "ValueError: an answer of -5 units"


def test_a_closed_group_begins_no_round(group_of):
    group = group_of(RandomParticipant, 10)
    group.close()
    with pytest.raises(RuntimeError, match="is closed"):
        group.begin(question_for(GAME, 1, ()))
    group.halt()
    assert group.progress().done == 0 and group.participant(3) is None


def test_concurrent_creation_makes_one_object():
    servicer = SimulationServicer(SimulationConfig(), 1, {}, threading.Event())
    request = SimpleNamespace(agent_id="run/twice", agent_init_args=b"")
    request.agent_init_args = cloudpickle.dumps({"class_name": "Hosted", "args": (), "kwargs": {}})
    said = []

    def create():
        said.append(servicer.create_agent(request, None).ok)

    class Hosted(metaclass=RpcMeta):
        made = Meanwhile(object, create)

        def __init__(self):
            Hosted.made()

    create()
    assert Hosted.made.end() == 1
    create()  # as when the answer was lost
    assert Hosted.made.made == 1 and said == [True] * 3 and servicer.get_agent("run/twice") is not None


def test_a_busy_group_refuses_a_second_question(group_of):
    group = group_of(Sleeper, 3)
    group.begin(question_for(GAME, 1, ()))
    with pytest.raises(RuntimeError, match="still busy"):
        group.begin(question_for(GAME, 2, ()))
    with pytest.raises(RuntimeError, match="no finished round"):
        group.collect(0)
    group.close()
    group.close()
