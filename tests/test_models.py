"""LLM participants in a group of this process, against a model server that misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import free_ports, until
from fake_model import ANSWER_TOKENS, PROMPT_TOKENS, WORDING, FakeModel

import main
from games.average import Average
from participant import LLMParticipant
from simulation.agents.group import ParticipantGroup, whole_tally
from simulation.agents.participant import message_of
from simulation.cluster.agent_class import serialize_agent_class
from simulation.cluster.preflight import check_models_known
from simulation.errors import ClusterError, Ended, UnusableAnswer
from simulation.game.answer_sheet import FAILED
from simulation.game.rules import question_for
from simulation.game.tally import INTERRUPTED, Tally, announcement_of, score
from simulation.llm.chat import Chat, TokenBudget, _models, load_models
from simulation.llm.concurrency_limit import RateLimit
from simulation.llm.http_client import START, ModelHttp, check_models, proxy_of
from simulation.llm.model_configs import ModelConfig
from simulation.llm.prompts import CHECK, Probe, Prompt
from simulation.llm.request_queue import ERRORS_WITH_N, NO_ANSWER, SampleRequest, model_thread
from simulation.llm.responses import NO_TEXT, OUT_OF_TOKENS, RequestError, pause_s
from simulation.rpc.endpoints import Endpoint
from simulation.settings import SimulationConfig

SAMPLING = SimulationConfig(attempt_timeout=60.0, reply_timeout=60.0)
TROUBLES = ["429", "429 for 1 s", "500", "503", "html", "garbage", "not an object", "no choices", "null choices"]
TROUBLES += ["an error with 200", "nested", "odd status line", "absurd usage", "reset", "breaks off", "null", "words"]
TROUBLES += ["out of range", "cut off"]


@pytest.fixture
def play(tmp_path):
    """Play rounds with LLM participants in this process; returns the group, with what it counted."""
    groups = []

    def make(fake, count, rounds=1, tokens_each=None, generate_args=None, first=0, seeds=False, more=None, **sampling):
        url = fake if isinstance(fake, str) else fake.url
        entry = {"config_name": "model_1", "model_type": "openai_chat", "model_name": "participant-model"}
        entry |= {"client_args": {"base_url": url}, "generate_args": {"temperature": 1.0, **(generate_args or {})}}
        for name, value in (more or {}).items():
            entry[name] = entry.get(name, {}) | value if isinstance(value, dict) else value
        (tmp_path / "models.json").write_text(json.dumps([entry]))
        load_models(SimulationConfig(model_configs=str(tmp_path / "models.json")))
        prompt = replace(WORDING, reasoning_tokens=sampling.pop("reasoning_tokens", None))
        game = Average(7, 100, 0, 0.0, replace(SAMPLING, **sampling), prompt=prompt, seeds_models=seeds)
        group = ParticipantGroup("run/group-0", first, count, game, serialize_agent_class(LLMParticipant), 4, 60.0)
        groups.append(group)
        until(lambda: group.progress(1.0).finished, 10, "built")
        announcements = ()
        for number in range(1, rounds + 1):
            group.begin(question_for(game, number, announcements), tokens_each)
            until(lambda: group.progress(1.0).finished, 60, "answered")
            tally = Tally(2, np.array([49, 50]), np.array([1, 1]))
            announcements += (announcement_of(score(game, number, tally), game),)
        return group

    yield make
    for group in groups:
        group.close()


@pytest.fixture
def fake_of():
    fakes = []

    def make(*habits, **options):
        fakes.append(FakeModel(habits, **options))
        return fakes[-1]

    yield make
    for fake in fakes:
        fake.close()


def troubles():
    """What is wrong with the models of this process, by name."""
    probes = dict.fromkeys(_models.values(), Probe("rules", f"question\n{CHECK}", 7, {}))
    return {model.name: cause for model, cause in check_models(probes, 5.0).items()}


def tally_of(group):
    tally = whole_tally(group)
    assert tally.asked == tally.answered + tally.failed == group.count
    return tally


def test_equal_prompts_share_requests_with_one_sample_each(play, fake_of):
    fake = fake_of()
    group = play(fake, 250)
    assert sorted(fake.samples) == [50, 100, 100]
    value_counts = dict(zip(tally_of(group).units.tolist(), tally_of(group).counts.tolist(), strict=True))
    assert value_counts == Counter(map(int, fake.texts))
    usage = group.usage()
    assert (usage.requests, usage.retries) == (3, 0)
    assert (usage.prompt_tokens, usage.completion_tokens) == (3 * PROMPT_TOKENS, 250 * ANSWER_TOKENS)


@pytest.mark.parametrize("setting", [{"samples_per_request": 1}, {"generate_args": {"temperature": 0}}])
def test_without_sharing_each_participant_has_one_request(play, fake_of, setting):
    fake = fake_of()
    assert tally_of(play(fake, 50, **setting)).answered == 50
    assert len(fake.bodies) == 50 and not any("n" in body for body in fake.bodies)


def seeds_of(fake):
    """The seed of every sample in the requests."""
    return [body["seed"] + sample for body in fake.bodies for sample in range(body.get("n", 1))]


@pytest.mark.parametrize("trouble", [(), ("429", "garbage"), ("words", "refuses n"), ("ignores n",)])
def test_seeded_answers_depend_on_neither_placement_nor_requests(play, fake_of, trouble):
    whole = play(fake := fake_of(), 250, rounds=3, seeds=True)
    assert sorted(fake.samples[:3]) == [50, 100, 100] and len({*seeds_of(fake)}) == 750
    expected = whole.answers(0, 250).units.tolist()
    assert len({*expected}) > 30
    parts, again = [], fake_of(*trouble)
    for first, count in ((0, 90), (90, 160)):
        part = play(again, count, rounds=3, first=first, seeds=True, samples_per_request=30)
        parts += part.answers(first, count).units.tolist()
    assert parts == expected


def test_only_neighbours_with_seeds_share_a_request(play, fake_of):
    play(fake := fake_of(), 300, rounds=2, seeds=True)
    later = fake.bodies[3:]
    assert sum(fake.samples[3:]) == 300 and len(later) > 250  # the numbers of neighbours, and so their prompts, differ
    play(fake := fake_of(), 300, rounds=2)
    assert len(fake.bodies[3:]) <= 101 and not any("seed" in body for body in fake.bodies)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_temporary_errors_are_retried(play, fake_of, trouble):
    fake = fake_of(trouble, trouble)
    group = play(fake, 150)
    assert tally_of(group).answered == 150
    assert group.usage().retries >= (trouble != "absurd usage")
    if trouble == "429 for 1 s":
        assert fake.times[-1] - fake.times[0] > 0.9


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ("html", "the reply is not JSON"),
        ("garbage", "the reply is not JSON"),
        ("nested", "the reply is not JSON"),
        ("odd status line", "the reply is not HTTP"),
        ("no choices", "no choices in the reply"),
        ("429", "HTTP 429"),
        ("500", "HTTP 500"),
        ("404", "HTTP 404: no such model"),
        ("reset", "connection lost"),
        ("breaks off", "the reply breaks off"),
        ("never", NO_ANSWER),
        ("null", NO_TEXT),
        ("words", "no number in the answer"),
        ("out of range", "number out of range"),
        ("cut off", "answer cut off after 7 tokens; raise max_tokens in generate_args"),
    ],
)
def test_a_lasting_error_is_a_failure_with_its_cause(play, fake_of, trouble, cause):
    fake = fake_of(for_ever=trouble)
    timeouts = {"reply_timeout": 1.5, "attempt_timeout": 0.5} if trouble == "never" else {"reply_timeout": 3.0}
    tally = tally_of(play(fake, 150, **timeouts))
    assert tally.answered == 0 and len(tally.failures) == 1
    assert cause in next(iter(tally.failures))


def test_an_unreachable_server_is_a_failure_within_the_timeout(play):
    tally = tally_of(play(f"http://127.0.0.1:{free_ports(1)}/v1", 1000, reply_timeout=1.0))
    assert tally.failures == {"model server: connection refused": 1000}


def test_queued_requests_fail_within_the_timeout(play, fake_of):
    fake = fake_of(for_ever="never")
    began = time.monotonic()
    tally = tally_of(play(fake, 500, samples_per_request=1, max_in_flight=2, reply_timeout=1.0, attempt_timeout=60.0))
    assert tally.failures == {NO_ANSWER: 500}
    assert time.monotonic() - began < 60  # one after the other they would take 250 s


def test_a_long_queue_is_no_failure_while_the_server_answers(play, fake_of):
    fake = fake_of(delay_s=0.2)
    tally = tally_of(play(fake, 60, samples_per_request=1, max_in_flight=2, reply_timeout=4.0))
    assert tally.answered == 60 and fake.most_at_once == 2


@pytest.mark.parametrize("habit", ["refuses n", "ignores n", "with n: 501", "with n: 404"])
def test_a_server_without_n_gets_single_requests(play, fake_of, habit):
    fake = fake_of(for_ever=habit)
    group = play(fake, 300)
    assert tally_of(group).answered == 300
    assert sum(samples > 1 for samples in fake.samples) <= 3


@pytest.mark.parametrize("trouble", ["500", "an error with 200", "no choices", "garbage", "reset", "breaks off"])
def test_a_server_that_fails_on_n_gets_single_requests(play, fake_of, trouble):
    fake = fake_of(for_ever=f"with n: {trouble}")
    group = play(fake, 300)
    assert tally_of(group).answered == 300
    assert sum(samples > 1 for samples in fake.samples) <= 3 * (ERRORS_WITH_N + 1)


@pytest.mark.parametrize("trouble", ["500", "garbage", "reset"])
def test_a_recovered_server_keeps_shared_requests(play, fake_of, trouble):
    fake = fake_of(*[trouble] * ERRORS_WITH_N)
    assert tally_of(play(fake, 100)).answered == 100
    assert fake.samples == [100] * ERRORS_WITH_N + [1, 99]


@pytest.mark.parametrize("trouble", ["429", "503"])
def test_a_busy_server_gets_requests_of_the_same_size_again(play, fake_of, trouble):
    fake = fake_of(*[trouble] * ERRORS_WITH_N)
    assert tally_of(play(fake, 100)).answered == 100
    assert fake.samples == [100] * (ERRORS_WITH_N + 1)


@pytest.mark.parametrize("trouble", ["429", "503", "reset"])
def test_a_burst_of_errors_counts_as_one(play, fake_of, monkeypatch, trouble):
    in_a_row = []

    def value_counts(troubles, *more):
        in_a_row.append(troubles)
        return pause_s(troubles, *more)

    monkeypatch.setattr("simulation.llm.request_queue.pause_s", value_counts)
    fake = fake_of(*[trouble] * 50, delay_s=0.2)
    assert tally_of(play(fake, 60, samples_per_request=1)).answered == 60
    assert len(in_a_row) == 50 and max(in_a_row) < 5  # more than 1 where pauses end meanwhile, on a busy machine


def test_an_internal_error_fails_the_participants_of_its_request(play, fake_of, monkeypatch):
    def commit(budget, request, usage=None, answered=False):
        if answered:
            raise OverflowError("too many")

    monkeypatch.setattr(TokenBudget, "commit", commit)
    assert tally_of(play(fake_of(), 50)).failures == {"OverflowError: too many": 50}


def test_missing_samples_of_a_short_response_are_requested_again(play, fake_of):
    fake = fake_of("gives one fewer", "gives one fewer")
    group = play(fake, 100)
    assert tally_of(group).answered == 100
    assert fake.samples == [100, 1] and group.usage().completion_tokens == 100 * ANSWER_TOKENS
    fake = fake_of("gives one more")
    assert tally_of(play(fake, 100)).answered == 100


def test_another_refusal_does_not_split_requests(play, fake_of):
    fake = fake_of(for_ever="404")
    tally = tally_of(play(fake, 1000))
    assert tally.failed == 1000 and tally.ended is Ended.MODEL_FAILED
    assert len(fake.bodies) <= 2 * 10  # each with n, and each with one, to see whether n is what it refuses


@pytest.mark.parametrize("words", ["talks", "a total"])
def test_free_text_is_parsed_strictly(play, fake_of, words):
    fake = fake_of(for_ever=words)
    assert tally_of(play(fake, 20, structured_output="none")).units.tolist() == [37]
    assert not {"structured_outputs", "response_format"} & fake.bodies[0].keys()


def test_both_fields_of_structured_output_work(play, fake_of):
    fake = fake_of()
    play(fake, 1)
    pattern = fake.bodies[0]["structured_outputs"]["regex"]
    assert re.fullmatch(pattern, "100") and not re.fullmatch(pattern, "101")
    fake = fake_of()
    play(fake, 1, structured_output="response_format")
    schema = fake.bodies[0]["response_format"]["json_schema"]["schema"]
    assert re.fullmatch(schema["properties"]["number"]["pattern"], "37")


def test_only_participants_with_unusable_answers_ask_again(play, fake_of):
    fake = fake_of("words", "well")
    group = play(fake, 150)
    assert tally_of(group).answered == 150
    assert sorted(fake.samples) == [50, 100, 100] or sorted(fake.samples) == [50, 50, 100]
    fake = fake_of(for_ever="words")
    group = play(fake, 50, max_attempts=2)
    assert fake.samples == [50, 50]
    said = group.answers(0, 50)
    assert said.causes == ["no number in the answer"] and said.units.tolist() == [FAILED] * 50
    assert len(said.examples) == 20 and all(each == {"text": "I will not say"} for each in said.examples.values())


def test_memory_is_the_participant_s_numbers_and_all_announcements(play, fake_of):
    fake = fake_of()
    group = play(fake, 300, rounds=2)
    later = [body["messages"][1]["content"] for body in fake.bodies if "Round 2" in body["messages"][1]["content"]]
    numbers = {group.participant(index).numbers[0] for index in range(300)}
    assert len(later) == len(numbers)
    assert all("the average was 49.5" in text for text in later)
    assert {re.search(r"so far: (\d+)", text)[1] for text in later} == {f"{number:.0f}" for number in numbers}
    assert not any(re.search(r"\bP\d+\b", json.dumps(body["messages"])) for body in fake.bodies)


def test_a_failed_answer_is_part_of_the_memory(play, fake_of):
    fake = fake_of("words", "words", "words")
    play(fake, 10, rounds=2)
    assert "Your numbers so far: none." in fake.bodies[-1]["messages"][1]["content"]


def test_a_budget_of_tokens_is_never_overspent(play, fake_of):
    fake = fake_of()
    group = play(fake, 400, tokens_each=3.0, samples_per_request=20)
    tally = tally_of(group)
    assert set(tally.failures) == {OUT_OF_TOKENS} and tally.answered > 0 and tally.ended is Ended.OUT_OF_TOKENS
    assert group.usage().tokens == len(fake.bodies) * PROMPT_TOKENS + tally.answered * ANSWER_TOKENS
    assert group.usage().tokens <= 1200 + PROMPT_TOKENS


def test_a_budget_holds_with_absurd_usage(play, fake_of):
    fake = fake_of(for_ever="absurd usage")
    group = play(fake, 400, tokens_each=3.0, samples_per_request=20)
    assert set(tally_of(group).failures) == {OUT_OF_TOKENS} and group.usage().tokens == 0


def test_an_api_key_that_is_no_valid_header_is_named(play, fake_of, monkeypatch):
    fake = fake_of()
    monkeypatch.setenv("OPENAI_ORG_ID", "two\nlines")
    group = play(fake, 3)
    assert "openai-organization" in next(iter(tally_of(group).failures)) and fake.bodies == []
    assert "cannot be asked with these settings" in troubles()["model_1"]


def test_a_budget_holds_without_reported_usage(play, fake_of):
    fake = fake_of(for_ever="keeps mum")
    group = play(fake, 400, tokens_each=3.0, samples_per_request=20)
    assert 0 < len(fake.bodies) < 20 and group.usage().tokens == 0


def test_tokens_spent_in_a_round_stay_spent(play, fake_of):
    """Whoever takes over from a moderator that was lost says again what a round may cost."""
    group = play(fake_of(), 2, rounds=0)
    for number, tokens_each, ended in ((1, (0.0, 1e9), Ended.OUT_OF_TOKENS), (2, (1e9, 0.0), Ended.COMPLETE)):
        question = question_for(group.game, number, ())
        for index in range(2):
            group.begin(question, tokens_each[index], one_by_one=True)
            group.participant(index).answer_round(message_of(question), index)
        assert tally_of(group).ended is ended
        assert tally_of(group).answered == (0 if ended else 2)


def test_halting_does_not_wait_for_models(play, fake_of):
    fake = fake_of(for_ever="never")
    group = play("http://127.0.0.1:9/v1", 50, reply_timeout=0.2)
    group = play(fake, 200, rounds=0)
    group.begin(question_for(group.game, 1, ()))
    until(lambda: fake.bodies, 5, "asked")
    group.halt()
    until(lambda: group.progress(0.1).finished, 5, "halted")
    assert tally_of(group).failures == {INTERRUPTED: 200} and tally_of(group).ended is Ended.INTERRUPTED
    group.close()
    until(lambda: fake.now == 0, 5, "the requests are given up")


def test_a_closed_group_retries_nothing(play, fake_of):
    fake = fake_of(for_ever="500")
    group = play(fake, 200, rounds=0)
    group.begin(question_for(group.game, 1, ()))
    until(lambda: len(fake.bodies) >= 4, 5, "asked again")
    group.close()
    until(lambda: fake.now == 0, 5, "the requests are given up")
    asked = len(fake.bodies)
    time.sleep(2)  # longer than the pauses after so few errors
    assert len(fake.bodies) == asked


def test_single_participants_with_and_without_a_group_can_be_asked(play, fake_of):
    fake = fake_of()
    group = play(fake, 3)
    assert group.participant(1).reply(None).get_text_content().isdecimal()
    assert "structured_outputs" not in fake.bodies[-1]
    assert LLMParticipant(0, group.game).reply(None).get_text_content().isdecimal()
    assert len(group.participant(1).numbers) == 1  # a talk is no round


def test_an_unknown_model_is_an_error(play, fake_of):
    tally = tally_of(play(fake_of(), 4, model_per_host=2))
    assert tally.failures == {"this agent server knows no model model_2": 2}


def test_an_unknown_model_error_lists_the_known_ones():
    config = SimulationConfig(agent_type="llm", model_per_host=2)
    for known, words in (
        ({"model": "http://node2/v1"}, "knows model at http://node2/v1, and model_1 is not among them"),
        ({f"m{number}": "u" for number in range(5)}, "knows m0 at u, m1 at u, m2 at u, ..., and model_1"),
        ({}, "knows no model, and model_1"),
    ):
        with pytest.raises(ClusterError, match=re.escape(words)):
            check_models_known(config, {Endpoint("localhost", 1): SimpleNamespace(models=known)})


def test_the_check_of_a_model_names_the_error(play, fake_of):
    fake = fake_of()
    play(fake, 1)
    assert troubles() == {}
    fake.model, fake.check_habit = "another", "404"
    assert troubles() == {"model_1": f"serves another, not participant-model; {START}"}
    fake.model = "\x1b[2Janother\n" + "x" * 500
    shown = troubles()["model_1"]
    assert shown.startswith("serves \\x1b[2Janother xxx") and len(shown) < 200
    fake.listed = lambda _: "[" * 100_000
    assert troubles() == {"model_1": f"answers with HTTP 404: no such model; {START}"}
    fake.close()
    assert "connection refused" in troubles()["model_1"]


@pytest.mark.parametrize(
    ("habit", "words"),
    [
        (
            "redirects",
            "HTTP 307: redirects to https://example.com/v1/chat/completions; correct base_url, which usually",
        ),
        ("no such path", "HTTP 404: Not Found; correct base_url, which usually ends with /v1"),
        ("no template", "; start it with --chat-template, or serve a model for chats"),
        ("too long", "exceed the context of 128 tokens; raise --max-model-len of the server, or play fewer rounds"),
        ("not that field", "Unknown field structured_outputs; try --structured-output response_format or none"),
        ("500 with words", f"answers with HTTP 500: out of memory; {START}"),
        ("html", "answers, but is no server of the OpenAI API (the reply is not JSON); correct base_url"),
    ],
)
def test_a_small_request_shows_what_is_wrong_and_what_helps(play, fake_of, habit, words):
    fake = fake_of()
    play(fake, 1)
    fake.check_habit = habit
    assert words in troubles()["model_1"]


def test_a_small_request_decides_whatever_the_list_of_models_says(play, fake_of):
    fake = fake_of()
    play(fake, 1)
    for fake.model, fake.listing in (("participant-model:latest", (200, "")), ("", (500, "Internal Server Error"))):
        assert troubles() == {}
    fake.check_habit = "over quota"  # the game warns of that, too, and repeats its requests
    assert troubles() == {}
    assert fake.checks[0]["max_tokens"] == 7 and len(fake.bodies) == 1


@pytest.mark.parametrize("refusal", ["no system", "500"])
def test_a_model_without_system_messages_gets_one_message(play, fake_of, refusal):
    fake = fake_of()
    fake.without_system = refusal
    group = play(fake, 250, rounds=2)  # nothing has checked the model before
    assert tally_of(group).answered == 250
    roles = [[message["role"] for message in body["messages"]] for body in fake.bodies]
    assert roles[-1] == ["user"] and roles.count(["system", "user"]) <= 9
    system, user = fake.bodies[0]["messages"]
    assert any(body["messages"][0]["content"] == f"{system['content']}\n\n{user['content']}" for body in fake.bodies)
    fake = fake_of()
    fake.without_system = refusal
    play(fake, 1, rounds=0)
    assert troubles() == {}
    assert tally_of(play(fake, 5)).answered == 5 and len(fake.bodies) == 1  # the check has found out


def test_a_temporary_error_is_no_refusal_of_system_messages(play, fake_of):
    fake = fake_of(*["500"] * (ERRORS_WITH_N + 1), for_ever="well")
    assert tally_of(play(fake, 60)).answered == 60
    assert [len(body["messages"]) for body in fake.bodies][-3:] == [1, 2, 2]  # one without, to see, and with it again


def test_a_prompt_longer_than_the_context_fails_with_one_cause_and_the_remedy(play, fake_of):
    fake = fake_of("too long", "longer", for_ever="too long")
    (cause,) = tally_of(play(fake, 50, samples_per_request=1, max_in_flight=1)).failures
    assert cause == (
        "model server: HTTP 400: prompt and answer exceed the context of 128 tokens; raise --max-model-len of the "
        "server, or play fewer rounds or use a shorter prompt"
    )


def test_a_lasting_error_is_reported_within_seconds(play, fake_of):
    fake = fake_of(for_ever="over quota")
    group = play(fake, 300, rounds=0, reply_timeout=8.0)
    began = time.monotonic()
    group.begin(question_for(group.game, 1, ()))
    until(lambda: group.progress(0.1).outages, 6, "reported")
    assert time.monotonic() - began < 5
    words = "HTTP 429: You exceeded your current quota"
    again = "requests are repeated for up to 8 s (--reply-timeout)"
    assert group.progress().outages == {"model_1": f"model_1 at {fake.url}: model server: {words}; {again}"}
    until(lambda: group.progress(1.0).finished, 30, "failed")
    assert tally_of(group).failures == {f"model server: {words}": 300}
    fake.for_ever("well")
    group.begin(question_for(group.game, 2, ()))
    until(lambda: group.progress(1.0).finished, 30, "answered")
    assert group.progress().outages == {}


def test_arguments_of_openai_s_client_have_their_effect(play, fake_of):
    fake = fake_of(for_ever="never")
    extra = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}, "max_completion_tokens": 9}}
    extra |= {"extra_headers": {"X-Own": "1", "X-Both": "2"}, "extra_query": {"b": 2}, "timeout": 0.3, "stream": False}
    client = {"default_headers": {"X-Default": "0", "X-Both": "1"}, "default_query": {"a": "1", "b": 1}, "timeout": 99}
    group = play(fake, 1, rounds=0, generate_args=extra, more={"client_args": client, "stream": False})
    group.begin(question_for(group.game, 1, ()))
    until(lambda: len(fake.bodies) > 1, 10, "asked again after its timeout")
    fake.for_ever("well")
    until(lambda: group.progress(1.0).finished, 10, "answered")
    (sent, request) = fake.bodies[-1], fake.requests[-1]
    assert sent.keys() - {"model", "messages"} == {
        *("temperature", "chat_template_kwargs", "max_completion_tokens", "structured_outputs")
    }
    assert sent["chat_template_kwargs"] == {"enable_thinking": False} and sent["max_completion_tokens"] == 9
    assert dict(request.query) == {"a": "1", "b": "2"}
    assert [request.headers[name] for name in ("X-Own", "X-Both", "X-Default")] == ["1", "2", "0"]


def test_text_parts_and_thoughts_apart_are_read(play, fake_of):
    for habit in ("parts", "thinks apart"):
        assert tally_of(play(fake_of(for_ever=habit), 3)).units.tolist() == [37]


@pytest.mark.parametrize("habit", ["only thinks", "opens a tag"])
def test_an_answer_cut_off_while_thinking_names_the_setting(play, fake_of, habit):
    group = play(fake_of(for_ever=habit), 3, generate_args={"max_completion_tokens": 9})
    words = "answer cut off after 9 tokens while thinking; raise max_completion_tokens in generate_args"
    assert tally_of(group).failures == {words: 3}


def test_thoughts_that_use_up_the_reasoning_tokens_name_the_setting(play, fake_of):
    fake = fake_of(for_ever="only thinks")
    group = play(fake, 3, reasoning_tokens=40, generate_args={"max_completion_tokens": 9})
    words = "answer cut off after 40 tokens while thinking; raise reasoning_tokens of the prompt"
    assert tally_of(group).failures == {words: 3}
    assert [body["max_completion_tokens"] for body in fake.bodies] == [40] * 3


def test_a_number_is_asked_for_after_thoughts_that_are_cut_off_between_tags(play, fake_of):
    fake = fake_of()
    fake.thoughts = ["<think>Others pick 50"]
    fake.cut_off = {*fake.thoughts}
    assert tally_of(play(fake, 3, reasoning_tokens=40)).answered == 3
    assert fake.bodies[-1]["messages"][2]["content"] == fake.thoughts[0]


def test_the_limits_per_minute_delay_requests_without_errors(play, fake_of, tmp_path, monkeypatch):
    monkeypatch.setattr("simulation.llm.request_queue.RateLimit", partial(RateLimit, folder=tmp_path))
    fake = fake_of()
    limits = {"requests_per_minute": 240, "tokens_per_minute": 10**6}  # 20 at once, then 220 per minute
    group = play(fake, 30, more=limits, samples_per_request=1, reply_timeout=0.5, max_in_flight=100)
    assert tally_of(group).answered == 30
    assert fake.times[-1] - fake.times[0] > 9 / (220 / 60) - 0.2
    fake = fake_of()
    began = time.monotonic()
    limits = {"tokens_per_minute": 2400}  # 200 at once: requests must not ask for 100 samples of 7 tokens
    assert tally_of(play(fake, 30, more=limits, reply_timeout=0.5)).answered == 30
    assert max(fake.samples) < 30 and time.monotonic() - began < 30


def test_hosts_share_the_limits_per_minute():
    config = ModelConfig("m", "m", "http://x/v1", {"requests_per_minute": 60})
    for participants, share in ((2, 30), (300, 20)):
        settings = SimulationConfig(hosts=("a", "b", "c"), participant_num=participants)
        request = SampleRequest(SimpleNamespace(settings=settings), config, Prompt("", ""), {}, deque(), 0.0)
        assert request.per_minute[0] == share and request.per_minute[1] > 10**12


def test_the_number_of_engines_raises_the_limit_in_flight(play, fake_of):
    fake = fake_of(delay_s=0.2)
    assert tally_of(play(fake, 60, samples_per_request=1, max_in_flight=2, more={"engines": 8})).answered == 60
    assert fake.most_at_once == 16


def test_one_client_for_all_groups_of_a_process(play, fake_of):
    fake = fake_of(delay_s=0.05)
    one, two = play(fake, 40, rounds=0), play(fake, 40, rounds=0, max_in_flight=3)
    for group in (one, two):
        group.begin(question_for(group.game, 1, ()))
    for group in (one, two):
        until(lambda group=group: group.progress(1.0).finished, 10, "answered")
        assert tally_of(group).answered == 40
    assert len([thread for thread in threading.enumerate() if thread.name == "models"]) == 1


def test_ask_raises_the_last_cause(play, fake_of):
    fake = fake_of(for_ever="out of range")
    group = play(fake, 1, rounds=0)
    with pytest.raises(UnusableAnswer, match="out of range") as caught:
        LLMParticipant(0, group.game)._run(LLMParticipant(0, group.game).answer(question_for(group.game, 1, ())))
    assert caught.value.text == "1000" and len(fake.bodies) == 3
    assert Chat(group.game).budget.used.requests == 0


def test_different_prompts_load_a_server_as_much_as_equal_ones(play, fake_of):
    fake = fake_of()
    fake.held = lambda words: "Round 2:" in words and fake.most_at_once <= 20  # until so many are under way at a time
    group = play(fake, 2000, rounds=2)
    assert tally_of(group).answered == 2000
    assert fake.most_at_once > 20  # in round 2 some 20 remember the same, so that requests are small


def test_a_cancelled_request_holds_no_slot(play, fake_of):
    fake = fake_of(delay_s=0.2)
    for _ in range(5):
        group = play(fake, 30, rounds=0, samples_per_request=1, max_in_flight=20)
        group.begin(question_for(group.game, 1, ()))
        group.close()
    assert tally_of(play(fake, 60, samples_per_request=1, max_in_flight=20)).answered == 60
    places = [client._semaphore for client in model_thread().clients.values() if fake.url in client._http.url]
    until(lambda: [each.held for each in places] == [0], 5, "all places are given back")


def test_an_exhausted_budget_delays_no_other_group(play, fake_of):
    fake = fake_of("never")
    poor, rich = play(fake, 5, rounds=0, samples_per_request=1), play(fake, 40, rounds=0)
    poor.begin(question_for(poor.game, 1, ()), tokens_each=25.0)
    until(lambda: fake.bodies, 5, "asked")
    rich.begin(question_for(rich.game, 1, ()))
    until(lambda: rich.progress(1.0).finished, 3, "answered")
    assert tally_of(rich).answered == 40 and not poor.progress(0.0).finished
    poor.halt()


def test_a_long_response_is_read_completely(play, fake_of):
    group = play(fake_of("well", for_ever="cut off"), 1)
    assert group.participant(0).reply(None).get_text_content() == "3 [cut off after 512 tokens]"


def test_the_limit_of_tokens_has_the_name_that_the_file_gives_it(play, fake_of):
    fake = fake_of()
    play(fake, 1, generate_args={"max_completion_tokens": 9}).participant(0).reply(None)
    assert [body["max_completion_tokens"] for body in fake.bodies] == [9, 512]
    assert not any("max_tokens" in body for body in fake.bodies)


def test_tokens_of_a_reply_without_answers_are_counted(play, fake_of):
    fake = fake_of("paid, but empty")
    assert play(fake, 10).usage().prompt_tokens == 2 * PROMPT_TOKENS


# --- Proxies and certificates of the environment ---------------------------------------------------------------------


@pytest.fixture
def proxy(monkeypatch) -> Iterator[str]:
    """The address of a proxy that refuses everything; the environment names none, and no certificates."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
            monkeypatch.delenv(name)

    class Refusing(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_error(407)

        do_GET = do_POST = do_CONNECT  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def asked(url: str) -> list[str]:
    """What a check of a model server brings, and what a request does."""

    async def ask() -> list[str]:
        config = ModelConfig("model_1", "m", url, {"client_args": {"base_url": url}, "api_key": "key"})
        try:
            http = ModelHttp(config)
        except ValueError as error:
            return [str(error)]
        causes = [str(await http.check(Probe("rules", "question", 7, {}), 60))]
        try:
            await http.post(b"{}", 60)
        except RequestError as trouble:
            causes.append(str(trouble))
        await http._client.aclose()
        return causes

    return asyncio.run(ask())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how openai's client gives aiohttp the password
def test_a_refusing_proxy_is_named(proxy, monkeypatch):
    for url, names in (
        ("http://node.invalid:8010/v1", ("http_proxy", "ALL_PROXY")),
        ("https://node.invalid/v1", ("https_proxy", "HTTPS_PROXY")),
    ):
        for name in names:
            for address in (f"http://me:secret@{proxy}", f"http://127.0.0.1:{free_ports(1)}"):
                monkeypatch.setenv(name, address)
                for told in asked(url):
                    assert f"through the proxy {address.replace('me:secret@', '')};" in told
                    assert "407" in told if "me" in address else "connection refused" in told
            monkeypatch.delenv(name)


def test_requests_to_cluster_hosts_bypass_the_proxy(proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://{proxy}")
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setitem(main.OTHER_ROLES, "participant", lambda _: 0)
    assert main.main(["--role", "participant", "--hosts", "n1.invalid", "N2", "--host-name", "n3"]) == 0
    for host in ("n1.invalid", "n2", "N2", "n3", "intranet", "localhost", "127.0.0.1", "[::1]"):
        assert proxy_of(f"http://{host}:8010/v1") is None, host
    assert proxy_of("http://n4:8010/v1") == f"http://{proxy}"
    assert all("no address is known for its host" in told for told in asked("http://n1.invalid:8010/v1"))


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_no_proxy_for_all_hosts_stays_so(proxy, monkeypatch, name):
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(other, "*" if other == name else "")
    monkeypatch.setenv("http_proxy", f"http://{proxy}")
    monkeypatch.setitem(main.OTHER_ROLES, "participant", lambda _: 0)
    assert main.main(["--role", "participant", "--hosts", "n1.invalid", "--host-name", "n3"]) == 0
    assert proxy_of("http://n4:8010/v1") is None


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_bad_certificates_name_their_variable(proxy, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, str(tmp_path / "none.pem"))
    url = f"http://127.0.0.2:{free_ports(1)}/v1"
    assert all("connection refused" in told for told in asked(url))  # which needs none
    if name == "SSL_CERT_FILE":
        assert f"{name}={tmp_path}/none.pem, cannot be read: FileNotFoundError" in asked("https://node.invalid/v1")[0]
