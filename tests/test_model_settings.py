"""What LLM participants are made of, apart: prompts, replies, the models' settings, the common limit, the estimate."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import estimate_of, until
from fake_model import WORDING
from hypothesis import given
from hypothesis import strategies as st
from places import use_places

from games.average import Average
from simulation.errors import SettingsError
from simulation.game.rules import question_for
from simulation.game.tally import RoundResult, Tally, announcement_of, score
from simulation.llm import concurrency_limit as in_flight
from simulation.llm.concurrency_limit import RateLimit, SharedSemaphore
from simulation.llm.model_configs import check_model_is_local, is_within, read_models, settings_hash
from simulation.llm.prompts import answer_tokens, number_pattern, prompt_for, rules, structured_fields
from simulation.llm.responses import (
    CUT_OFF,
    CUT_WHILE_THINKING,
    LONGEST_PAUSE_S,
    NO_TEXT,
    RequestError,
    pause_s,
    read_reply,
    retry_after,
)
from simulation.settings import SimulationConfig

ENTRY = {
    "config_name": "model",
    "model_type": "openai_chat",
    "model_name": "m",
    "client_args": {"base_url": "http://localhost/v1"},
}
URL = ENTRY["client_args"]


# --- Prompts ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**9), st.integers(0, 2 * 10**9))
def test_the_pattern_matches_exactly_the_numbers_in_range(max_value, number):
    assert bool(re.fullmatch(number_pattern(max_value, 0), str(number))) == (number <= max_value)


@given(st.integers(1, 10**6), st.integers(1, 6), st.decimals(0, 2 * 10**6, places=6))
def test_the_pattern_supports_decimals(max_value, decimals, number):
    text = f"{number:f}"[: len(str(int(number))) + 1 + decimals]
    assert bool(re.fullmatch(number_pattern(max_value, decimals), text)) == (float(text) <= max_value)
    assert not re.fullmatch(number_pattern(max_value, decimals), text + "0" * 7)


@pytest.mark.parametrize("text", ["", "-1", "007", "1.", ".5", "5 ", "1e2", "٣"])
def test_the_pattern_matches_no_other_text(text):
    assert not re.fullmatch(number_pattern(100, 2), text)


def test_participants_with_equal_memory_have_equal_prompts():
    game = Average(1, 100, 0, 0.0, prompt=WORDING)
    tally = Tally(1000, np.array([49, 50]), np.array([439, 561]))
    results = (score(game, 1, tally), RoundResult(2, Tally(0)))
    announcements = tuple(announcement_of(each, game) for each in results)
    prompt = prompt_for(rules(game), question_for(game, 3, announcements), (12.0, None))
    assert prompt is prompt_for(rules(game), question_for(game, 3, announcements), (12.0, None))
    assert prompt.user.splitlines()[:3] == [
        "Round 1: the average was 49.561; 0 won with 50.",
        "Round 2: nobody answered.",
        "Your numbers so far: 12, none.",
    ]
    assert "0 to 100" in prompt.system and prompt.tokens > 50


def test_structured_output_limits_answers_to_numbers_and_length():
    game = Average(1, 100, 2, 0.0)
    assert structured_fields("none", game) == {}
    assert answer_tokens("structured_outputs", game) >= len("100.00")
    assert answer_tokens("response_format", game) > answer_tokens("structured_outputs", game)


# --- Replies ---------------------------------------------------------------------------------------------------------


def test_a_reply_is_read_choice_by_choice():
    choices = [
        {"message": {"content": "37"}, "finish_reason": "stop"},
        {"message": {"content": None}},
        {"message": {"content": "3"}, "finish_reason": "length"},
        {"message": None},
        "?",
    ]
    texts, usage = read_reply(200, {}, json.dumps({"choices": choices, "usage": {"prompt_tokens": 5}}).encode(), 0.0)
    assert [cause is None for _, cause, _ in texts] == [True, False, False, False, False]
    assert texts[0][0] == "37" and usage is None  # half of the usage is none


def test_thoughts_are_read_apart_from_the_text():
    thinking = [{"type": "thinking", "thinking": [{"type": "text", "text": "lo"}, {"type": "text", "text": "w"}]}]
    words = [{"type": "text", "text": "3"}, {"type": "image_url"}, {"type": "text", "text": "7"}, "8"]
    for message, finish, read in (
        ({"content": "37", "reasoning_content": "low"}, "stop", ("37", None, "low")),
        ({"content": "37", "reasoning": "low"}, "stop", ("37", None, "low")),
        ({"content": "37", "reasoning": {"text": "low"}}, "stop", ("37", None, None)),
        ({"content": thinking + words}, "stop", ("37", None, "low")),
        ({"content": [], "reasoning": ""}, "stop", (None, NO_TEXT, "")),
        ({"content": "", "reasoning_content": "low"}, "length", (None, CUT_WHILE_THINKING, "low")),
        ({"content": "3", "reasoning_content": "low"}, "length", ("3", CUT_OFF["length"], "low")),
        ({"content": "<think>a</think>3"}, "length", ("<think>a</think>3", CUT_OFF["length"], None)),
        ({"content": "<think>a"}, "length", ("<think>a", CUT_WHILE_THINKING, None)),
    ):
        reply = {"choices": [{"message": message, "finish_reason": finish}]}
        assert read_reply(200, {}, json.dumps(reply).encode(), 0.0)[0] == [read], message


@pytest.mark.parametrize(
    ("status", "body", "words", "no_system"),
    [
        (429, '{"error": {"message": "quota"}}', "HTTP 429: quota", False),
        (429, '[{"error": {"message": "quota"}}]', "HTTP 429: quota", False),
        (503, '{"detail": "loading"}', "HTTP 503: loading", False),
        (500, "Internal Server Error", "HTTP 500: Internal Server Error", None),
        (500, "<html>500</html>", "HTTP 500", None),
        (500, '{"error": "System role not supported"}', "System role not supported", True),
        (400, '{"message": "Conversation roles must alternate user/assistant/user"}', "must alternate", True),
        (400, '{"error": {"message": "\'messages[0].role\' does not support \'system\'"}}', "does not support", True),
        (400, '{"error": {"message": "Only user and assistant roles are supported!"}}', "Only user", True),
        (400, '{"error": {"message": "bad temperature"}}', "bad temperature", None),
        (400, '{"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}', "raise --max-model-len", False),
        (400, '{"error": {"message": "exceeds the available context size (128 tokens)"}}', "context of 128 tok", False),
        (400, '{"error": {"message": "Use \'max_completion_tokens\' instead"}}', "put max_completion_tokens in", False),
    ],
)
def test_a_refusal_has_the_server_s_words_and_what_helps(status, body, words, no_system):
    with pytest.raises(RequestError) as caught:
        read_reply(status, {}, body.encode(), 0.0)
    assert words in caught.value.cause and len(caught.value.cause) < 200
    assert caught.value.no_system is no_system


@pytest.mark.parametrize("count", [pytest.param(10**400, id="401 digits"), 10**12 + 1, -1, True, 5.0, "5", None, [5]])
def test_an_absurd_usage_is_none(count):
    reply = {"choices": [{"message": {"content": "37"}}], "usage": {"prompt_tokens": 5, "completion_tokens": count}}
    assert read_reply(200, {}, json.dumps(reply).encode(), 0.0)[1] is None


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_deeply_nested_response_is_an_error(status):
    for body in (b"[" * 100_000, b'{"error":' * 100_000, b'{"choices":[' * 100_000):
        with pytest.raises(RequestError) as caught:
            read_reply(status, {}, body, 0.0)
        assert ("not JSON" in caught.value.cause) == (status == 200)


def test_text_of_a_server_cannot_control_the_terminal():
    with pytest.raises(RequestError) as caught:
        read_reply(404, {}, json.dumps({"error": {"message": "\x1b[2Jno\n" + "x" * 500}}).encode(), 0.0)
    assert str(caught.value).startswith("model server: HTTP 404: \\x1b[2Jno xxx") and len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("status", "body", "again", "endpoint"),
    [
        (200, b"", True, False),
        (200, b"[]", True, False),
        (200, b"\xff\xfe", True, False),
        (429, b"", True, True),
        (503, b"", True, True),
        (500, b"<html>", True, False),
        (408, b"", True, False),
        (301, b"", False, False),
        (400, b'{"error": {"message": "n"}}', False, False),
        (401, b'{"error": "key"}', False, False),
        (403, b"", False, False),
        (404, b"", False, False),
        (501, b"", False, False),
        (502, b"", True, False),
    ],
)
def test_every_malformed_response_is_an_error(status, body, again, endpoint):
    with pytest.raises(RequestError) as caught:
        read_reply(status, {}, body, 0.0)
    trouble = caught.value
    assert (trouble.retryable, trouble.server_wide) == (again, endpoint)
    assert str(trouble).startswith("model server: ")
    assert trouble.maybe_unsupported_n == (status not in (401, 403, 429, 503))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("7", 7),
        ("0.5", 0.5),
        ("-3", 0),
        ("nan", 0),
        ("soon", 0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0),
        ("Thu, 01 Jan 99999999999 00:00:01 GMT", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    assert retry_after(value, now=10.0) == seconds


def test_backoff_grows_with_jitter_to_a_limit_and_honours_retry_after():
    assert [pause_s(troubles, 0.0, 1.0) for troubles in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert pause_s(3, 0.0, 0.0) == 0.5 and pause_s(1000, 0.0, 1.0) == LONGEST_PAUSE_S
    assert pause_s(1, 30.0, 0.5) == 30.0


# --- The models' settings --------------------------------------------------------------------------------------------


def config_with(tmp_path, entries, **settings):
    path = tmp_path / "models.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return SimulationConfig(model_configs=str(path), **settings)


def test_one_entry_without_a_port_is_the_template(tmp_path):
    models = read_models(config_with(tmp_path, [ENTRY], model_per_host=3, vllm_base_port=9000))
    assert {name: model.base_url for name, model in models.items()} == {
        f"model_{number}": f"http://localhost:{8999 + number}/v1" for number in (1, 2, 3)
    }
    assert {model.model for model in models.values()} == {"m"}


def test_explicit_entries_keep_their_addresses(tmp_path):
    urls = ["http://localhost:1234/v1", "https://[::1]:99/v1/"]
    entries = [
        ENTRY | {"config_name": f"model_{number + 1}", "client_args": {"base_url": url}}
        for number, url in enumerate(urls)
    ]
    models = read_models(config_with(tmp_path, entries, model_per_host=2))
    assert [model.base_url for model in models.values()] == ["http://localhost:1234/v1", "https://[::1]:99/v1"]
    assert next(iter(read_models(config_with(tmp_path, [entries[0]])).values())).base_url == urls[0]


@pytest.mark.parametrize(
    ("entries", "trouble"),
    [
        ("{", "is not JSON"),
        ([], "one at least"),
        ("37", "one at least"),
        ([5], "entry 1: must be an object"),
        ([ENTRY | {"model_type": "dashscope_chat"}], "model_type must be openai_chat"),
        ([ENTRY | {"model_name": ""}], "model_name is missing"),
        ([ENTRY | {"client_args": {}}], "needs a base_url"),
        ([ENTRY | {"client_args": {"base_url": "localhost:8010"}}], "needs a base_url"),
        ([ENTRY | {"client_args": {"base_url": "http://localhost:x/v1"}}], "needs a base_url"),
        ([ENTRY | {"client_args": {"base_url": "http://me:secret@localhost/v1"}}], "needs a base_url"),
        ([ENTRY | {"client_args": {"base_url": "http:// localhost/v1"}}], "needs a base_url"),
        ([ENTRY | {"client_args": {"base_url": "http://localhost/v1 "}}], "needs a base_url"),
        ([ENTRY | {"client_args": {"base_url": "http://local\thost/v1"}}], "needs a base_url"),
        ([ENTRY | {"client_args": {"base_url": "http://localhost/v1?a=b"}}], "without blanks, ? or #"),
        ([ENTRY | {"client_args": {"base_url": "http://localhost/v1#a"}}], "needs a base_url"),
        ([ENTRY | {"client_args": URL | {"api_key": "secret"}}], "client_args holds api_key, which stands beside"),
        ([ENTRY | {"client_args": URL | {"http_client": None}}], "client_args holds http_client"),
        ([ENTRY | {"client_args": URL | {"default_headers": {"X": "a\nb"}}}], "default_headers must hold printable"),
        ([ENTRY | {"client_args": URL | {"default_headers": ["X"]}}], "default_headers must be an object"),
        ([ENTRY | {"api_key": "secret\r\nX: y"}], "api_key must hold printable ASCII"),
        ([ENTRY | {"api_key": "schlüssel"}], "api_key must hold printable ASCII"),
        ([ENTRY | {"organization": 5}], "organization must hold printable ASCII"),
        ("[" * 100_000, "is not JSON"),
        ('[{"a":' * 100_000, "is not JSON"),
        ([ENTRY | {"generate_args": {"max_tokens": None}}], "max_tokens must be a whole number"),
        ([ENTRY | {"client_args": "x"}], "client_args must be an object"),
        ([ENTRY | {"generate_args": {"n": 3}}], "generate_args holds n"),
        ([ENTRY | {"generate_args": {"seed": 3}}], "generate_args holds seed"),
        ([ENTRY | {"modelname": "m"}], "modelname is not known"),
        ([ENTRY | {"engines": 0}], "engines must be a whole number from 1"),
        ([ENTRY | {"requests_per_minute": 1.5}], "requests_per_minute must be a whole number from 1"),
        ([ENTRY | {"tokens_per_minute": True}], "tokens_per_minute must be a whole number from 1"),
        ([ENTRY | {"stream": True}], "stream must be false"),
        ([ENTRY | {"generate_args": {"stream": True}}], "stream must be false"),
        ([ENTRY | {"generate_args": {"extra_body": {"n": 3}}}], "generate_args holds n"),
        ([ENTRY | {"generate_args": {"extra_body": 3}}], "generate_args: extra_body must be an object"),
        ([ENTRY | {"generate_args": {"extra_body": {"max_tokens": 0}}}], "max_tokens must be a whole number"),
        ([ENTRY | {"generate_args": {"max_tokens": 1, "max_completion_tokens": 1}}], "holds both max_tokens and max_c"),
        ([ENTRY | {"generate_args": {"extra_headers": {"X": "a\nb"}}}], "extra_headers must hold printable"),
        ([ENTRY | {"generate_args": {"extra_query": {"x": []}}}], "extra_query must hold texts and numbers"),
        ([ENTRY | {"generate_args": {"timeout": 0}}], "generate_args: timeout must be a number of seconds"),
        ([ENTRY | {"client_args": URL | {"timeout": "5"}}], "client_args: timeout must be a number of seconds"),
        (
            [ENTRY | {"client_args": URL | {"max_retries": 3}}],
            "client_args holds max_retries, which has no effect: req",
        ),
        ([ENTRY | {"client_args": URL | {"time_out": 3}}], "client_args holds time_out, which has no effect; did you"),
        ([ENTRY | {"client_args": URL | {"default_query": "x"}}], "default_query must be an object"),
        ([ENTRY, ENTRY], "same config_name"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, entries, trouble):
    with pytest.raises(SettingsError, match=r"models\.json") as caught:
        read_models(config_with(tmp_path, entries))
    assert trouble in str(caught.value) and "secret" not in str(caught.value)


def test_the_hash_covers_what_changes_answers(tmp_path):
    def hash_of(**parts):
        entry = ENTRY | {"client_args": URL | parts.pop("client_args", {})} | parts
        return settings_hash([*read_models(config_with(tmp_path, [entry])).values()], named=False)

    bare = hash_of()
    secret = {"extra_headers": {"X-API-Key": "secret"}}
    for same in ({"engines": 8}, {"generate_args": {"timeout": 5}}, {"generate_args": secret}, {"stream": False}):
        assert hash_of(**same) == bare
    changed = [{"extra_body": {"top_k": 5}}, {"extra_headers": {"X": "1"}}, {"extra_query": {"api-version": "1"}}]
    hashes = [hash_of(generate_args=each) for each in changed] + [hash_of(client_args={"default_query": {"v": 1}})]
    assert len({bare, *hashes}) == 5
    assert hash_of(generate_args={"extra_body": {"top_k": 5}}) == hash_of(generate_args={"top_k": 5})


def test_an_api_key_is_shown_nowhere(tmp_path):
    models = read_models(config_with(tmp_path, [ENTRY | {"api_key": "secret"}]))
    assert "secret" not in repr(models)


@pytest.mark.parametrize(
    ("url", "within"),
    [
        ("http://localhost:1/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://[::1]:1/v1", True),
        ("http://node2:8010/v1", True),
        ("http://NODE1:8010/v1", True),
        ("http://node3/v1", False),
        ("https://api.example.com/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://localhost@example.com/v1", False),
    ],
)
def test_models_outside_the_cluster_are_refused(url, within):
    assert is_within(url, ["Node1", "node2"]) == within
    config = SimulationConfig(hosts=("Node1", "node2"))
    if not within:
        with pytest.raises(SettingsError, match="--allow-remote-model"):
            check_model_is_local(config, "model_1", url)
    check_model_is_local(SimulationConfig(allow_remote_model=True), "model_1", url)


# --- The estimate ----------------------------------------------------------------------------------------------------


def test_the_estimate_counts_requests_by_groups_models_and_memories(tmp_path):
    config = config_with(
        tmp_path,
        [ENTRY],
        agent_type="llm",
        participant_num=1000,
        server_per_host=2,
        moderator_per_host=1,
        rounds=3,
        model_per_host=2,
    )
    rounds = estimate_of(config)
    assert [each.requests for each in rounds] == [2 * 2 * 3, 2 * 2 * (101 + (250 - 101) // 100), 1000]
    assert rounds[0].answer_tokens == 1000 * answer_tokens("structured_outputs", Average(0, 100, 0, 0.0))
    assert rounds[2].prompt_tokens > rounds[2].requests * rounds[0].prompt_tokens / rounds[0].requests


def test_the_estimate_of_greedy_sampling_shares_no_requests(tmp_path):
    config = config_with(
        tmp_path, [ENTRY | {"generate_args": {"temperature": 0}}], participant_num=1000, agent_type="llm"
    )
    assert estimate_of(config)[0].requests == 1000


# --- The common limit ------------------------------------------------------------------------------------------------


def test_slots_are_limited_and_go_to_the_process_with_the_fewest(tmp_path):
    one, two = SharedSemaphore("a", tmp_path), SharedSemaphore("a", tmp_path)
    assert [one.acquire(3) for _ in range(4)] == [True, True, True, False]
    assert not two.acquire(3)
    one.release()
    assert not one.acquire(3)  # the other waits, and has less
    assert two.acquire(3)
    two.release()
    assert not two.acquire(3) or two.held == 1
    assert SharedSemaphore("b", tmp_path).acquire(1)


def test_among_equals_the_longest_waiting_comes_first(tmp_path):
    one, two, three = (SharedSemaphore("a", tmp_path) for _ in range(3))
    assert one.acquire(1) and not two.acquire(1) and not three.acquire(1)
    one.release()
    assert not one.acquire(1) and not three.acquire(1) and two.acquire(1)


def test_many_processes_keep_the_limit(tmp_path):
    everyone = [SharedSemaphore("a", tmp_path) for _ in range(8)]
    assert [each.acquire(7) for each in everyone] == [True] * 7 + [False]
    late = SharedSemaphore("a", tmp_path)
    assert not late.acquire(7)
    everyone[0].release()
    assert not everyone[1].acquire(7) and everyone[7].acquire(7)  # also the first ones know of the last ones
    assert [each.held for each in everyone] == [0, *[1] * 7]


def test_slots_of_an_exited_process_are_released(tmp_path, monkeypatch):
    gone, one = SharedSemaphore("a", tmp_path), SharedSemaphore("a", tmp_path)
    assert gone.acquire(1) and not one.acquire(1)
    monkeypatch.setattr(in_flight, "HOLDING_LOST_NS", 10**8)
    time.sleep(0.15)  # longer than that: a process that stays silent counts as dead
    assert one.acquire(1)
    monkeypatch.setattr(in_flight, "HOLDING_LOST_NS", 10**12)
    gone.release()  # it was only slow: its row is its own, or another one
    assert gone.held == 0 and one.held == 1


def test_no_minute_exceeds_the_limit_per_minute(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(in_flight, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for limits in ((240, 10**6), (10**6, 24_000), (7, 300.0)):
        one, two = (RateLimit(str(limits), tmp_path) for _ in range(2))  # as of two processes
        sent = []
        while clock.now < 2000:
            for each in (one, two):
                wait_s = each.take(limits, 100)
                sent += [clock.now] if wait_s == 0 else []
            clock.now += 0.1 if wait_s == 0 else wait_s + 1e-6
        clock.now = 1000.0
        counts = [sum(start <= at < start + 60 for at in sent) for start in sent]
        most = min(limits[0], limits[1] / 100)
        assert max(counts) <= most + (limits[1] < 1000)  # a request larger than a full bucket may come early
        assert len(sent) > 0.8 * most * (1000 / 60)


def test_tokens_that_were_not_used_are_given_back(tmp_path):
    limit = RateLimit("a", tmp_path)
    assert limit.take((60, 1200), 100) == 0
    assert limit.take((60, 1200), 100) > 4
    limit.give_back(95)
    assert limit.take((60, 1200), 90) == 0
    assert limit.take((60, 1200), 50_000, force=True) == 0 < limit.take((60, 1200), 1)


def test_several_processes_keep_the_limit_and_share_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    results, everyone, enough = context.Queue(), context.Barrier(4), context.Event()
    taken = context.Array("i", 4, lock=False)
    arguments = (tmp_path, 2, everyone, enough, taken)
    processes = [context.Process(target=use_places, args=(*arguments, number, results)) for number in range(4)]
    for process in processes:
        process.start()
    until(lambda: min(taken) > 100, 60, "all have had their turns")
    enough.set()
    assert max(results.get(timeout=60) for _ in processes) <= 2
    for process in processes:
        process.join()
    assert max(taken) < 3 * min(taken)
