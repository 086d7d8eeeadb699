"""LLM participants through the scripts, on real agent servers, against a model server that misbehaves on demand."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import threading
from collections import Counter

import pytest
from conftest import free_ports, one_line, until
from fake_model import ANSWER_TOKENS, PROMPT_TOKENS, FakeModel

CHARACTER = """
from participant import LLMParticipant, Participant


class Pirate(LLMParticipant):
    def system(self):
        return super().system() + " You are a pirate."


class Asker(Participant):
    async def answer(self, question):
        return 5
"""


@pytest.fixture
def play(cluster):
    """Play with LLM participants on the cluster."""

    def run(*arguments, status=0, **options):
        flags = ("--agent-type", "llm", "--seed", "7")
        return cluster.play("3", *arguments, *flags, status=status, **options)

    return run


def test_two_rounds_are_answered_and_accounted_for(cluster, fake, play):
    summary = play("600", "--rounds", "2")
    assert summary["status"] == "complete"
    assert [entry["answered"] for entry in summary["rounds"]] == [600, 600]
    assert Counter(cluster.values()) == Counter(map(float, fake.texts))
    assert summary["llm"] == {
        "requests": len(fake.bodies),
        "prompt_tokens": len(fake.bodies) * PROMPT_TOKENS,
        "completion_tokens": 1200 * ANSWER_TOKENS,
        "retries": 0,
    }
    seconds = summary["cluster"]["llm_seconds"]
    assert seconds.keys() == {"model", "client", "rpc"} and all(value >= 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(summary["seconds"]["rounds"], rel=0.2)
    first = [body for body in fake.bodies if "Round 2" not in body["messages"][1]["content"]]
    assert sum(body.get("n", 1) for body in first) == 600 and len(first) <= 12


def test_dispatch_agent_plays_the_same_game(cluster, fake, play):
    summary = play("20", "--dispatch", "agent", "--rounds", "2")
    assert [entry["answered"] for entry in summary["rounds"]] == [20, 20]
    assert len(fake.texts) == 40 and summary["llm"]["requests"] == len(fake.bodies)


def test_all_servers_of_a_host_share_the_limit_of_requests(cluster, fake, play):
    fake.delay_s = 0.02
    play("300", "--samples-per-request", "1", "--max-in-flight", "4")
    assert fake.most_at_once == 4


def test_failed_answers_are_kept_and_counted(cluster, fake, play):
    fake.for_ever("words")
    summary = play("60", "--max-attempts", "2", status=4)
    assert summary["status"] == "partial"
    assert summary["rounds"][0]["failures"] == {"no number in the answer": 60}
    assert summary["rounds"][0]["average"] is None
    lines = (cluster.path / "runs/latest/failed_answers.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert len(kept) == 20
    assert kept[0] == {"round": 1, "participant": 0, "failure": "no number in the answer", "text": "I will not say"}


def test_an_answer_that_cannot_be_encoded_does_not_end_the_game(cluster, fake, play):
    fake.for_ever("half an emoji")
    summary = play("5", "--max-attempts", "1", status=4)
    assert summary["rounds"][0]["failures"] == {"no number in the answer": 5}
    assert len((cluster.path / "runs/latest/failed_answers.jsonl").read_text().splitlines()) == 5


def test_a_budget_ends_the_game(cluster, fake, play):
    summary = play("300", "--rounds", "3", "--max-tokens", "3000", status=4)
    spent = summary["llm"]["prompt_tokens"] + summary["llm"]["completion_tokens"]
    assert spent <= 3000 and summary["status"] == "partial" and len(summary["rounds"]) < 3
    assert "out of tokens (--max-tokens)" in summary["rounds"][-1]["failures"]


def test_a_game_out_of_tokens_resumes_only_with_a_larger_budget(cluster, fake):
    flags = ("--agent-type", "llm", "--seed", "7", "--rounds", "6", "--max-tokens", "700")
    done = cluster.run("run_simulation.sh", "3", "60", *flags)
    before = cluster.summary()
    before_it = done.stderr
    assert done.returncode == 4 and 1 <= len(before["rounds"]) < 6
    resume = ("run_simulation.sh", "--resume", "runs/latest")
    done = cluster.run(*resume)
    assert done.returncode == 2 and "its budget of 700 tokens is spent; give a larger --max-tokens" in one_line(
        done.stderr
    )
    assert cluster.summary() == before and (cluster.path / "runs/latest/answers.parquet").exists()
    (hint,) = re.findall(r" of 6 rounds played; to go on with it: \./(.*)\n", before_it)
    done = cluster.run(*shlex.split(hint))
    assert "--max-tokens" in hint and done.returncode == 4, done.stderr  # as some have failed before
    after = cluster.summary()["rounds"]
    assert len(after) == 6 and after[: len(before["rounds"])] == before["rounds"]
    assert all(entry["answered"] == 60 for entry in after[len(before["rounds"]) :])


def test_a_budget_spent_by_a_round_ends_the_game_before_the_next(cluster, fake, play):
    fake.for_ever("talks")  # so that round 2 costs what round 1 did
    spent = 2 * 2 * PROMPT_TOKENS + 60 * ANSWER_TOKENS
    done = cluster.run(
        *("run_simulation.sh", "3", "60", "--agent-type", "llm", "--rounds", "9", "--max-tokens", str(6 * spent)),
    )
    assert done.returncode == 4 and "the game ends after round" in done.stderr
    assert all(entry["asked"] == entry["answered"] + entry["failed"] for entry in cluster.summary()["rounds"])


def test_no_budget_is_estimated_after_the_last_round(cluster, fake, play):
    fake.habits = itertools.cycle(["404", "well"])
    command = ("run_simulation.sh", "3", "40", "--agent-type", "llm", "--samples-per-request", "1")
    done = cluster.run(*command, "--rounds", "2")
    assert done.returncode == 4 and "the game ends" not in done.stderr
    assert [entry["ended"] for entry in cluster.summary()["rounds"]] == ["model_failed"] * 2
    assert len(fake.checks) == 2  # before the first round, and before the second one
    done = cluster.run(*command, "--max-tokens", "300")
    assert done.returncode == 4 and "the game ends" not in done.stderr
    assert cluster.summary()["rounds"][0]["ended"] == "out_of_tokens"


def test_a_round_of_refusals_alone_ends_the_game(cluster, fake):
    fake.for_ever("too long")
    done = cluster.run("run_simulation.sh", "3", "60", "--agent-type", "llm", "--rounds", "5")
    assert done.returncode == 4 and "every participant failed in round 1" in done.stderr
    (cause,) = cluster.summary()["rounds"][0]["failures"]
    assert "raise --max-model-len of the server, or play fewer rounds or use a shorter prompt" in cause


def test_a_lasting_error_of_a_model_is_one_warning_with_the_server_s_words(cluster, fake):
    fake.habits = itertools.chain(["over quota"] * 15, itertools.repeat("well"))
    flags = ("--agent-type", "llm", "--max-in-flight", "1", "--samples-per-request", "100")
    done = cluster.run("run_simulation.sh", "3", "60", *flags)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "quota" in line)
    words = f"localhost: model_1 at http://localhost:{cluster.model_port}/v1: model server: HTTP 429: You exceeded your"
    assert words in line and "WARNING" in line


def test_ignored_structured_output_is_named_with_the_alternatives(cluster, fake, play):
    fake.for_ever("cut off")
    for kind, others in (("structured_outputs", "response_format or none"), ("response_format", "none")):
        flags = ("--agent-type", "llm", "--max-attempts", "1", "--structured-output", kind)
        done = cluster.run("run_simulation.sh", "3", "30", *flags)
        line = f"the model server seems to ignore {kind}; --structured-output {others} may help"
        assert done.returncode == 4 and line in done.stderr
    done = cluster.run("run_simulation.sh", "3", "30", *flags[:-1], "none")
    assert done.returncode == 4 and "may help" not in done.stderr


def test_models_that_stay_down_end_the_game(cluster, fake, play):
    fake.habits = itertools.chain(["well"] * 20, itertools.repeat("never"))
    done = cluster.start(
        *("run_simulation.sh", "3", "300", "--agent-type", "llm", "--samples-per-request", "1", "--max-in-flight", "2"),
        *("--reply-timeout", "8", "--rounds", "5"),
    )
    until(lambda: len(fake.bodies) > 20, 30, "asked")
    fake.close()
    _, err = done.communicate(timeout=120)
    assert done.returncode == 4 and "Traceback" not in err
    summary = cluster.summary()
    entry = summary["rounds"][0]
    assert len(summary["rounds"]) == 1 and entry["answered"] == 20
    assert set(entry["failures"]) <= {"model server: connection refused", "model server: connection lost"}
    assert entry["seconds"] < 100  # one after the other they would take 20 minutes


def test_models_that_restart_during_a_round_lose_no_participant(cluster, fake, play):
    fake.delay_s = 0.05
    flags = ("--agent-type", "llm", "--samples-per-request", "1", "--max-in-flight", "4")
    done = cluster.start("run_simulation.sh", "3", "200", *flags)
    until(lambda: len(fake.bodies) > 20, 30, "asked")
    fake.close()
    again = FakeModel(port=cluster.model_port)
    try:
        done.communicate(timeout=120)
    finally:
        again.close()
    assert done.returncode == 0 and cluster.summary()["rounds"][0]["answered"] == 200


@pytest.mark.parametrize("victim", ["a participant server", pytest.param("main", marks=pytest.mark.slow)])
def test_a_recreated_participant_remembers_its_numbers(cluster, fake, tmp_path, victim):
    going_on = threading.Event()
    fake.held = lambda words: "Round 3:" in words and not going_on.is_set()
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        flags = ("--agent-type", "llm", "--rounds", "4", "--samples-per-request", "10")
        game = cluster.start("run_simulation.sh", "3", "90", *flags, stderr=stderr)
    until(lambda: "round 3: asking" in log.read_text(), 30, "round 3")
    if victim == "main":
        game.kill()
        game.communicate()
        going_on.set()
        resumed = cluster.run("run_simulation.sh", "--resume", "runs/latest")
        assert resumed.returncode == 0, resumed.stderr
    else:
        os.kill(cluster.pid(1), signal.SIGKILL)
        until(lambda: f":{cluster.base_port + 1} is lost" in log.read_text(), 30, "the loss is noted")
        going_on.set()
        game.communicate(timeout=120)
        assert game.returncode == 0 and cluster.summary()["rounds"][2]["reassigned"] == 30, log.read_text()
    summary = cluster.summary()
    assert [played["answered"] for played in summary["rounds"]] == [90] * 4
    assert summary["llm"]["requests"] <= len(fake.bodies)
    memories: Counter[str] = Counter()
    for body in fake.bodies:
        words = body["messages"][1]["content"]
        if "Round 4:" in words:
            memories[words.partition("Your numbers so far: ")[2].partition(".")[0]] += body.get("n", 1)
    numbers = [f"{value:g}" for value in cluster.values()]
    assert memories == Counter(", ".join(numbers[index : index + 270 : 90]) for index in range(90))
    until(lambda: cluster.run("start_all_server.sh", "--status").returncode == 0, 20, "all servers answer again")


def test_an_interrupted_round_waits_for_no_model(cluster, fake, play):
    fake.for_ever("never")
    run = cluster.start("run_simulation.sh", "3", "100", "--agent-type", "llm")
    until(lambda: fake.bodies, 30, "asked")
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode == 130
    assert cluster.summary()["rounds"][0]["failures"] == {"interrupted": 100}
    until(lambda: fake.now == 0, 5, "the requests are given up")


def test_a_kept_participant_answers_questions(cluster, fake, play):
    play("30", "--keep-agents")
    said = cluster.run(
        *("main.py", "--role", "ask", "--run-dir", "runs/latest", "--participant", "17", "--text", "Why that one?"),
    )
    assert said.returncode == 0 and said.stdout.strip() == fake.texts[-1]
    asked = fake.bodies[-1]
    assert asked["messages"][1]["content"].endswith("Why that one?") and "structured_outputs" not in asked
    assert "Your numbers so far" in asked["messages"][1]["content"]


def test_a_truncated_answer_to_a_question_is_marked(cluster, fake, play):
    play("30", "--keep-agents")
    fake.thoughts, fake.cut_off = ["because it is"], {"because it is"}
    ask = ("main.py", "--role", "ask", "--run-dir", "runs/latest", "--participant", "17", "--text", "Why that one?")
    said = cluster.run(*ask)
    assert said.returncode == 0 and said.stdout == "because it is [cut off after 512 tokens]\n", said.stderr
    assert fake.bodies[-1]["max_tokens"] == 512


def test_a_custom_subclass_of_llm_participants_plays(cluster, fake, play):
    (cluster.path / "mine.py").write_text(CHARACTER)
    play("30", "--agent-class", "mine.py:Pirate")
    assert all(body["messages"][0]["content"].endswith("You are a pirate.") for body in fake.bodies)
    done = cluster.run("run_simulation.sh", "3", "5", "--agent-class", "mine.py:Pirate")
    assert done.returncode == 2 and "--agent-type llm" in one_line(done.stderr)
    play("5", "--agent-class", "mine.py:Asker")
    assert cluster.values() == [5.0] * 5


# --- Before anything is created --------------------------------------------------------------------------------------


def refused(cluster, *flags, status, **env):
    """Run, and return the error; nothing was written."""
    before = cluster.runs()
    done = cluster.run("run_simulation.sh", "3", "50", "--agent-type", "llm", *flags, env=env)
    assert done.returncode == status, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr and cluster.runs() == before
    return errors[0], done


def test_a_model_that_does_not_answer_stops_the_run(cluster):
    error, _ = refused(cluster, status=3)
    assert f"localhost: model_1 at http://localhost:{cluster.model_port}/v1 does not answer" in error


def test_a_model_that_refuses_a_small_request_stops_the_run(cluster, fake):
    fake.check_habit = "no template"
    error, _ = refused(cluster, status=3)
    assert error.endswith("; start it with --chat-template, or serve a model for chats")
    system, user = fake.checks[0]["messages"]
    assert "closest" in system["content"] and user["content"].startswith("Round 1: ") and fake.bodies == []


def test_a_model_without_system_messages_plays_on_all_servers(cluster, fake, play):
    fake.without_system = "no system"
    summary = play("90", "--rounds", "2")
    assert summary["status"] == "complete" and fake.bodies[-1]["messages"][0]["role"] == "user"
    assert summary["llm"]["requests"] == len(fake.bodies)


def test_a_model_of_a_later_run_that_does_not_answer_stops_the_experiment(cluster):
    (cluster.path / "later.yaml").write_text("agent_type: [random, llm]\nparticipant_num: 10\nsleep_time: 0\n")
    before = cluster.runs()
    done = cluster.run("run_simulation.sh", "--experiment", "later.yaml", "--server-per-host", "3")
    assert done.returncode == 3 and "does not answer: connection refused; start it" in one_line(done.stderr)
    assert cluster.runs() == before


def test_a_run_that_cannot_succeed_starts_no_servers(checkout):
    entry = {"config_name": "model_1", "model_type": "openai_chat", "model_name": "m"}
    entry["client_args"] = {"base_url": f"http://127.0.0.1:{checkout.model_port + 1}/v1"}
    (checkout.path / "own.json").write_text(json.dumps([entry]))
    (checkout.path / "game.yaml").write_text("agent_type: [random, llm]\nparticipant_num: 10\n")
    plain = ("1", "10", "--agent-type", "llm")
    asked = {
        plain: (3, f"model_1 at http://localhost:{checkout.model_port}/v1 does not answer: connection refused"),
        (*plain, "--model-configs", "own.json"): (3, f"model_1 at http://127.0.0.1:{checkout.model_port + 1}/v1 does"),
        ("--experiment", "game.yaml"): (3, "model_1 at"),
        ("1", "10", "--keep-agents"): (2, "run ./start_all_server.sh first"),
    }
    for arguments, (status, words) in asked.items():
        done = checkout.run("run_simulation.sh", *arguments)
        assert done.returncode == status and words in one_line(done.stderr)
    assert checkout.runs() == set() and not list((checkout.path / "run").rglob("*.log"))


def test_a_model_unknown_to_the_servers_stops_the_run(cluster, fake):
    error, _ = refused(cluster, "--model-per-host", "3", status=3)
    assert "model_2 is not among them" in error and f"localhost:{cluster.base_port}" in error
    assert fake.bodies == []


def test_a_paid_model_is_refused_after_the_estimate(cluster, fake):
    entry = {"config_name": "model_1", "model_type": "openai_chat", "model_name": "m", "api_key": "secret"}
    entry |= {"client_args": {"base_url": "https://api.example.com/v1"}}
    (cluster.path / "paid.json").write_text(json.dumps([entry]))
    error, done = refused(cluster, "--model-configs", "paid.json", "--price-per-million-tokens", "10", status=2)
    assert "--allow-remote-model" in error and "https://api.example.com/v1" in error
    assert "at 10 per million" in done.stderr and "secret" not in done.stderr + done.stdout


def test_a_dry_run_starts_nothing(checkout):
    done = checkout.run("run_simulation.sh", "4", "1000", "--agent-type", "llm", "--rounds", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in ("participants: 1,000 llm, 250 on each server", "prompt tokens", "in all", "model_1"):
        assert words in done.stdout
    assert checkout.runs() == set() and not (checkout.path / "run/servers").exists()
    plain = checkout.run("run_simulation.sh", "4", "1001", "--dry-run")
    assert "250 to 251 on each server" in plain.stdout and "tokens" not in plain.stdout


def test_a_broken_models_file_is_one_line(checkout):
    (checkout.path / "configs/model_configs.json").write_text("[{]")
    for command in (("start_all_server.sh", "2"), ("run_simulation.sh", "2", "5", "--agent-type", "llm")):
        done = checkout.run(*command)
        assert done.returncode == 2 and "model_configs.json" in one_line(done.stderr)


def test_servers_with_other_models_are_refused(cluster):
    done = cluster.run("start_all_server.sh", "3", env={"VLLM_BASE_PORT": str(free_ports(1))})
    assert done.returncode == 3 and "know model_1 at" in one_line(done.stderr)
